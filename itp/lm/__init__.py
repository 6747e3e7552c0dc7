"""Language models behind one contract (:mod:`itp.lm.base`): in this process, or on a server."""
