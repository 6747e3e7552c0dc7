"""ITP-R, the policy that learns how far to look ahead: its three stages, one sub-command each.

    python -m itp.training.train_adaptive_k label ...    stage 1, pseudo-labels (eq. 5): itp.training.itp_r.label
    python -m itp.training.train_adaptive_k sft ...      stage 2, warm-up (eq. 6): itp.training.itp_r.warm_up
    python -m itp.training.train_adaptive_k rl_k ...     stage 3, online A2C (eq. 7 and 8): itp.training.itp_r.a2c

Each has its own --help.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from itp.config import parse_settings
from itp.program import run_main

STAGES = {"label": ("label", "LabelSettings"), "sft": ("warm_up", "SftSettings"), "rl_k": ("a2c", "RlSettings")}
"""Sub-command -> its module in :mod:`itp.training.itp_r`, and its settings."""

PROG = "python -m itp.training.train_adaptive_k"


def main() -> None:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    stage = parser.parse_args(sys.argv[1:2]).stage
    name, settings = STAGES[stage]
    module = importlib.import_module(f"itp.training.itp_r.{name}")  # only the one that is asked for
    module.run(parse_settings(vars(module)[settings], sys.argv[2:], prog=f"{PROG} {stage}",
                              description=module.__doc__))


if __name__ == "__main__":
    run_main(main)
