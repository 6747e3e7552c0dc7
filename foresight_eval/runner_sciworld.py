"""Evaluate a method on ScienceWorld: plays the games of a split and writes tables.

    python -m foresight_eval.runner_sciworld --method foresight --policy_model P --wm_model W \\
        --split test --out_dir runs/eval

Success is a score of 100; the mean score, 0 where an episode ended below, stands beside it.  Output: {idx}.json a
game, summary.json, summary.csv, log.txt and config.json in --out_dir.
"""

from __future__ import annotations

import asyncio

from foresight_eval.settings import SciworldSettings
from itp.config import parse_settings
from itp.program import run_main


def main() -> None:
    settings = parse_settings(SciworldSettings, prog="python -m foresight_eval.runner_sciworld", description=__doc__)
    from foresight_eval.runner import evaluate

    asyncio.run(evaluate(settings))


if __name__ == "__main__":
    run_main(main)
