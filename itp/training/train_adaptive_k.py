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
from pathlib import Path
from types import ModuleType
from typing import Any

from itp.config import add_flags, asked_to_complete, complete, parse_settings
from itp.distributed import is_first_process
from itp.program import run_main, say_next

STAGES = {"label": ("label", "LabelSettings"), "sft": ("warm_up", "SftSettings"), "rl_k": ("a2c", "RlSettings")}
"""Sub-command -> its module in :mod:`itp.training.itp_r`, and its settings."""

PROG = "python -m itp.training.train_adaptive_k"


def main() -> None:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if asked_to_complete():
        stages = parser.add_subparsers()
        for stage in STAGES:
            add_flags(stages.add_parser(stage), stage_of(stage)[1])
        complete(parser)
    parser.add_argument("stage", choices=STAGES)
    stage = parser.parse_args(sys.argv[1:2]).stage
    module, settings = stage_of(stage)  # only the one that is asked for
    settings = parse_settings(settings, sys.argv[2:], prog=f"{PROG} {stage}", description=module.__doc__)
    module.run(settings)
    if is_first_process():
        say_next(next_of(stage, settings))


def stage_of(stage: str) -> tuple[ModuleType, type]:
    """The module of a stage, and its settings class."""
    name, settings = STAGES[stage]
    module = importlib.import_module(f"itp.training.itp_r.{name}")
    return module, vars(module)[settings]


def next_of(stage: str, settings: Any) -> str:
    """The command that takes what this stage has written."""
    if stage == "label":
        return (f"{PROG} sft --train_jsonl {settings.out_labeled_jsonl} --policy_model {settings.policy_model} "
                f"--max_k {settings.max_k} --out_dir DIR")
    if stage == "sft":
        return f"{PROG} rl_k --policy_model {settings.merged_path} --wm_model WM --env_data_root DATA --out_dir DIR"
    best = Path(settings.out_dir) / "best"
    policy = best if best.is_dir() else Path(settings.out_dir) / "last"
    return (f"python -m foresight_eval --policy_model {policy} --wm_model {settings.wm_model or 'WM'} "
            f"--env_data_root {settings.env_data_root or 'DATA'} --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
