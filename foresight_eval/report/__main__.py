"""The command ``python -m foresight_eval.report``; the program is :mod:`foresight_eval.report.report`."""

from foresight_eval.report.report import main
from itp.program import run_main

if __name__ == "__main__":
    run_main(main)
