"""Score result folders again, without playing: what their summaries say, and every metric of their episodes.

    python -m foresight_eval.score DIR [DIR ...]                      # all metrics, a column a folder
    python -m foresight_eval.score DIR --metrics revisit_rate,tokens_per_decision --out_csv scores.csv

``summary.json``, ``cost.json`` and ``summary.csv`` of each folder are written anew from its episodes.  So figures that
were added since, and mended ones, come to results of any age.  :mod:`foresight_eval.metrics` says how to add a metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foresight_eval.metrics import METRICS
from foresight_eval.report import tables
from foresight_eval.results import read_config, read_results
from foresight_eval.summary import write_summary
from itp.config import complete, did_you_mean, flag, from_args, make_parser
from itp.errors import UserError
from itp.files import check_output_file, write_atomic
from itp.program import run_main


@dataclass
class ScoreSettings:
    """What is shown."""

    metrics: str = flag("", help="metrics to show, comma-separated (empty: all)")
    out_csv: str = flag("", help="file for the table")


def main() -> None:
    parser = make_parser(ScoreSettings, prog="python -m foresight_eval.score", description=__doc__,
                         positional="DIR [DIR ...] ")
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="result folders")
    complete(parser)
    args = parser.parse_args()
    settings = from_args(ScoreSettings, args)
    wanted = [name for name in settings.metrics.split(",") if name]
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"--metrics {name}: no such metric"
                            + (did_you_mean(name, METRICS) or f"; choose among {', '.join(METRICS)}"))
    if settings.out_csv:
        check_output_file(settings.out_csv)
    for folder in args.folders:  # before anything is written
        read_config(folder)
    for folder in args.folders:
        write_summary(folder)
    table = tables.metrics(read_results(args.folders), wanted)
    print(tables.terminal(table))
    if settings.out_csv:
        write_atomic(settings.out_csv, tables.to_csv(table))


if __name__ == "__main__":
    run_main(main)
