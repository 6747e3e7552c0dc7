"""Mutated files for the readers of the programs: a right result, or one line that says what is wrong.

A reader is the function that a program calls.  It gets a copy of a small valid folder in which one file was mutated, in
a worker process, which is ended where it takes longer than TIMEOUT.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chaos_mutations import mutated
from chaos_readers import READERS, Reader
from itp.errors import UserError

CONTEXT = multiprocessing.get_context("spawn")
START, TIMEOUT = 300, 60
"""Seconds that a worker may take to import what it needs, and a reader for a file."""
MEMORY = 12 * 2**30
"""Bytes that a worker may take: a number in a file must not take the machine's."""
BAD = ("traceback", "hang", "died", "several lines")
OUTCOMES = ("read", "refused", *BAD)


@dataclass(frozen=True)
class Outcome:
    """``said``: the error, or where a traceback came from."""

    reader: str
    number: int
    file: str
    mutation: str
    outcome: str
    said: str = ""


def run_inputs(root: Path, count: int, seed: int, names: Sequence[str] = ()) -> Iterator[Outcome]:
    """The outcomes of ``count`` mutated files for each of the readers ``names`` (none: all), one after another."""
    for name in names or READERS:
        with tempfile.TemporaryDirectory() as scratch:
            valid = Path(scratch) / "valid"
            READERS[name].prepare(root, valid)
            yield from _of_reader(name, valid, Path(scratch), count, seed)


def _of_reader(name: str, valid: Path, scratch: Path, count: int, seed: int) -> Iterator[Outcome]:
    """One worker reads one file after another; after a hang or a crash, another worker goes on behind it.

    Raises RuntimeError where the reader doesn't read the valid folder.
    """
    number = 0
    while number < count:
        here, there = CONTEXT.Pipe()
        worker = CONTEXT.Process(target=_work, args=(there, name, valid, scratch, range(number, count), seed))
        worker.start()
        there.close()
        if (said := _answer(here, START)) != ("read", ""):
            worker.kill()
            raise RuntimeError(f"{name}: the valid folder: {said}")
        answered = True
        while number < count and answered:
            said = _answer(here, TIMEOUT)
            answered = isinstance(said, Outcome)
            if not answered:
                path, kind, _ = mutation(valid, name, seed, number)
                said = Outcome(name, number, path.name, kind, said)
            yield said
            number += 1
        if not answered:
            worker.kill()
        worker.join()


def _answer(pipe: Connection, seconds: float) -> Any:
    """What the worker says; "hang" where it says nothing for so long, "died" where it is gone."""
    try:
        return pipe.recv() if pipe.poll(seconds) else "hang"
    except EOFError:
        return "died"


def mutation(valid: Path, name: str, seed: int, number: int) -> tuple[Path, str, bytes]:
    """(file, what is done to it, its content after that) of a reader's mutation."""
    draw = random.Random(f"{seed}/{name}/{number}")
    path = draw.choice(sorted(valid.glob(READERS[name].mutated)))
    return path, *mutated(path, draw)


def _work(pipe: Connection, name: str, valid: Path, scratch: Path, numbers: range, seed: int) -> None:
    """Send the outcome of a copy of the valid folder, then of each mutation."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout = sys.stderr = io.StringIO()
    pipe.send(read(READERS[name], shutil.copytree(valid, scratch / f"valid {numbers.start}")))
    for number in numbers:
        path, kind, content = mutation(valid, name, seed, number)
        folder = shutil.copytree(valid, scratch / str(number))  # a new one: readers remember files by their paths
        (folder / path.relative_to(valid)).write_bytes(content)
        pipe.send(Outcome(name, number, path.name, kind, *read(READERS[name], folder)))
        shutil.rmtree(folder, ignore_errors=True)


def read(reader: Reader, folder: Path) -> tuple[str, str]:
    """(outcome, what was said) of a reader on a folder."""
    try:
        reader.read(folder)
    except UserError as error:
        return ("refused" if "\n" not in str(error) else "several lines"), str(error)[:300]
    except (Exception, SystemExit):  # what is counted here: any error that isn't the user's
        trace = traceback.format_exc().splitlines()
        ours = [line.strip() for line in trace if line.strip().startswith("File") and "site-packages" not in line]
        return "traceback", f"{trace[-1][:200]} | {ours[-1] if ours else ''}"
    return "read", ""


def input_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """By reader: how many files had which outcome; and the kinds of what should not have been."""
    by_reader: dict[str, Counter[str]] = {}
    kinds: Counter[str] = Counter()
    for one in outcomes:
        by_reader.setdefault(one.reader, Counter())[one.outcome] += 1
        if one.outcome in BAD:
            kinds[f"{one.reader}: {one.outcome}: {one.said}"] += 1
    return {"by_reader": {name: {outcome: counts[outcome] for outcome in OUTCOMES} for name, counts in
                          by_reader.items()}, "kinds": dict(kinds.most_common())}


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Those that should not have been, a line each, so that they can be made again."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(one)) + "\n" for one in outcomes if one.outcome in BAD)

