"""Evaluate a method on ALFWorld: plays every game of a split and writes tables.

    python -m foresight_eval --method foresight --policy_model P --wm_model W \\
        --env_data_root DATA --split unseen --out_dir runs/eval

Output: {idx}.json a game, summary.json, summary.csv, log.txt and config.json in --out_dir.
"""

from __future__ import annotations

import asyncio

from foresight_eval.settings import AlfworldSettings
from itp.config import parse_settings
from itp.program import run_main


def main() -> None:
    settings = parse_settings(AlfworldSettings, prog="python -m foresight_eval", description=__doc__)
    from foresight_eval.runner import evaluate

    asyncio.run(evaluate(settings))


if __name__ == "__main__":
    run_main(main)
