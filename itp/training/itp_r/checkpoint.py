"""What an RL run leaves on disk.  No formula of the paper is here.

``OUT/metrics.jsonl``   a line an update (line 0: the start), cut back to the checkpoint when a run goes on
``OUT/last``            the policy, a model folder with heads, and ``trainer_state.pt`` to go on from; with LoRA
                        also ``adapter``, which is merged there
``OUT/best``            the policy with the highest success on the held-out games so far
``OUT/metrics.json``    written last: the run is finished

Folders appear whole: written beside, then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from itp.distributed import is_first_process
from itp.files import append_row, read_appended, write_atomic, write_json, writing

STATE = "trainer_state.pt"


class RunFolder:
    """``OUT``: metrics and checkpoints.  Only the first process writes."""

    def __init__(self, path: str | Path, report_to: str = "none") -> None:
        self.path, self.report_to = Path(path), report_to
        self._tracker: Any = None
        for name in ("last", "best"):  # killed between two renames: the old folder is still the one
            old = self.path / f".{name}.old"
            if is_first_process() and old.is_dir() and not (self.path / name).exists():
                os.replace(old, self.path / name)

    def clear(self) -> None:
        """Remove what another configuration left."""
        for name in ("last", "best", ".last.old", ".best.old", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("metrics.jsonl", "metrics.json"):
            (self.path / name).unlink(missing_ok=True)

    def state(self) -> dict[str, Any] | None:
        """What ``trainer_state.pt`` of the last checkpoint holds; None where there is none."""
        if not (self.path / "last" / STATE).is_file():
            return None
        import torch

        return torch.load(self.path / "last" / STATE, map_location="cpu", weights_only=True)

    def rewind(self, update: int) -> None:
        """Forget the metrics of updates that came after the checkpoint; they are made again."""
        file = self.path / "metrics.jsonl"
        if is_first_process() and file.exists():
            rows = [row for row in read_appended(file, {"update": int}) if row["update"] <= update]
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, row: Mapping[str, Any]) -> None:
        if not is_first_process():
            return
        append_row(self.path / "metrics.jsonl", row)
        if self.report_to == "none":
            return
        if self._tracker is None:
            from accelerate import Accelerator

            self._tracker = Accelerator(log_with=self.report_to, project_dir=self.path)
            name = "tensorboard" if self.report_to == "tensorboard" else self.path.name  # a folder; a project
            self._tracker.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": row["episodes"]}})
        self._tracker.log({name: value for name, value in row.items() if isinstance(value, (int, float))},
                          step=row["episodes"])

    def save(self, name: str, write: Callable[[Path], None], describe: Callable[[Path], None],
             state: Mapping[str, Any] | None = None) -> None:
        """Make ``OUT/name`` of what ``write`` writes into a folder, and ``describe``, which writes its README."""
        if not is_first_process():
            return
        import torch

        beside, old, place = (self.path / f".{name}.tmp", self.path / f".{name}.old", self.path / name)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        with writing(place, unfinished=beside):
            write(beside)
            describe(beside)
            if state is not None:
                torch.save(dict(state), beside / STATE)
            for file in filter(Path.is_file, beside.rglob("*")):  # on disk before it takes the old one's place
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            if place.exists():
                os.replace(place, old)
            os.replace(beside, place)
        shutil.rmtree(old, ignore_errors=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            for tracker in self._tracker.trackers:
                tracker.finish()
        if is_first_process():
            write_json(self.path / "metrics.json", dict(summary))
