"""The commands of an installed package: ``itp-eval`` is ``python -m foresight_eval``, and so on.

``setup.py`` gives all of them this one function, which sees by its own name what to run.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

COMMANDS = {
    "itp-doctor": "itp.doctor",
    "itp-games": "itp.envs.alfworld_games",
    "itp-collect": "world_model.collect",
    "itp-base-policy": "itp.training.base_policy",
    "itp-world-model": "world_model.base_tuning.finetune",
    "itp-fidelity": "world_model.fidelity",
    "itp-train": "itp.training.train_adaptive_k",
    "itp-eval": "foresight_eval",
    "itp-report": "foresight_eval.report",
    "itp-serve": "itp.serve",
}


def main() -> None:
    """Run the program that the command's name stands for, with its arguments."""
    runpy.run_module(COMMANDS[Path(sys.argv[0]).stem], run_name="__main__", alter_sys=True)
