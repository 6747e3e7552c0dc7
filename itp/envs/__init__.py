"""Text environments: the real engines behind one small contract (see :mod:`itp.envs.base`)."""
