"""How reliable are the programs?  Killed at random moments, given broken files, and refused by the disk.

    python scripts/chaos.py --out_dir runs/chaos --kills 100 --inputs 1000 --seed 1

kills     `kill -9` of a program, of one of its processes or of a server; the same command again must give the same
          (chaos_kills.py)
inputs    so many mutated files for each reader: a right result or one line, no traceback, no hang (chaos_inputs.py)
disk      a full disk, a folder that can't be written, two programs in one folder (chaos_disk.py)

The programs run with models of the demo's kind that are trained within a minute first (chaos_runs.py).
OUT/chaos.json gets the figures as they come.  The same command again goes on with the kills that are missing.  Exit
status 1 where something went wrong that should not have.  docs/reliability.md has the figures of this project.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import read_appended, read_object, write_json
from itp.program import run_main
from itp.run_dir import versions

PARTS = ("kills", "inputs", "disk")


@dataclass
class ChaosSettings:
    out_dir: str = flag(help="folder of the figures, the runs and what failed")
    parts: str = flag(",".join(PARTS), help="what to do")
    kills: int = flag(100, at_least=1, help="how many kills")
    inputs: int = flag(1000, at_least=1, help="mutated files for each reader")
    readers: str = flag("", help="only these readers, separated by commas")
    seed: int = flag(1, help="seed of the moments and mutations")
    jobs: int = flag(1, at_least=1, help="kills at a time")


def main() -> None:
    settings = parse_settings(ChaosSettings, prog="python scripts/chaos.py", description=__doc__)
    if unknown := set(settings.parts.split(",")) - set(PARTS):
        raise UserError(f"--parts: {', '.join(sorted(unknown))} isn't one of {', '.join(PARTS)}")
    sys.exit(0 if Chaos(settings).run() else 1)


class Chaos:
    """The parts that were asked for, and their figures."""

    def __init__(self, settings: ChaosSettings) -> None:
        self.settings, self.out = settings, Path(settings.out_dir).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "chaos.json"
        self.figures: dict[str, Any] = read_object(self.file) if self.file.exists() else {}

    def run(self) -> bool:
        """Whether all that was tried went as it should."""
        self.note("settings", asdict(self.settings) | {"versions": versions()})
        parts = self.settings.parts.split(",")
        return all([getattr(self, part)() for part in PARTS if part in parts])

    def note(self, name: str, figures: Any) -> None:
        self.figures[name] = figures
        write_json(self.file, self.figures)

    def kills(self) -> bool:
        from chaos_kills import kill_figures, run_kills

        for outcome in run_kills(self.out, self.settings.kills, self.settings.seed, self.settings.jobs):
            print(f"kill {outcome}", flush=True)
            self.note("kills", kill_figures(read_appended(self.out / "kills.jsonl")))
        return not self.figures.get("kills", {}).get("with_faults")

    def inputs(self) -> bool:
        from chaos_inputs import BAD, input_figures, run_inputs, write_outcomes
        from chaos_readers import READERS
        from chaos_runs import prepare

        names = _chosen(self.settings.readers, READERS)
        prepare(self.out / "runs", ("collect", "label", "sft", "evaluate", "fidelity"))
        outcomes = []
        for outcome in run_inputs(self.out / "runs", self.settings.inputs, self.settings.seed, names):
            outcomes.append(outcome)
            if len(outcomes) % 100 == 0 or outcome.outcome in BAD:
                self.note("inputs", input_figures(outcomes))
            if outcome.outcome in BAD:
                print(f"input {outcome}", flush=True)
        self.note("inputs", input_figures(outcomes))
        write_outcomes(self.out / "inputs.jsonl", outcomes)
        return not any(outcome.outcome in BAD for outcome in outcomes)

    def disk(self) -> bool:
        from chaos_disk import run_disk

        rows = []
        for row in run_disk(self.out):
            rows.append(row)
            print(f"disk {row}", flush=True)
            self.note("disk", rows)
        return not any(row["faults"] for row in rows)


def _chosen(given: str, known: Iterable[str]) -> list[str]:
    names = [name for name in given.split(",") if name]
    if unknown := set(names) - set(known):
        raise UserError(f"--readers: {', '.join(sorted(unknown))} isn't one of {', '.join(known)}")
    return names or list(known)


if __name__ == "__main__":
    run_main(main)
