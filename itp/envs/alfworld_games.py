"""The command ``python -m itp.envs.alfworld_games``; the program is :mod:`itp.envs.alfworld.generate`."""

from itp.envs.alfworld.generate import main
from itp.program import run_main

if __name__ == "__main__":
    run_main(main)
