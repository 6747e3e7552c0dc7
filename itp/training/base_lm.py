"""The command ``python -m itp.training.base_lm``; the program is :mod:`itp.training.from_scratch.base_lm`."""

from itp.program import run_main
from itp.training.from_scratch.base_lm import main

if __name__ == "__main__":
    run_main(main)
