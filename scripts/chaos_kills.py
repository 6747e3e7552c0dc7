"""`kill -9` at random moments: the same command again must give what an undisturbed run gives.

A trial starts a program of chaos_runs.py in a folder of its own, kills something of it, runs the same command again
to its end, and compares the folder with the undisturbed run's.  The moment of the kill is drawn uniformly over the
processor time that the undisturbed run took, so that it doesn't depend on what else the machine does.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from chaos_runs import BY_NAME, LONGEST, Program, Server, differences, prepare
from itp.files import read_appended

KILLS = {
    ("collect", "program"): 12, ("collect", "environment"): 5, ("policy", "program"): 12, ("world_model", "all"): 7,
    ("world_model", "rank"): 3, ("label", "program"): 12, ("sft", "program"): 8, ("rl_k", "program"): 6,
    ("rl_k", "environment"): 3, ("evaluate", "program"): 13, ("evaluate", "environment"): 5, ("two_ranks", "rank"): 5,
    ("two_ranks", "all"): 4, ("scienceworld", "java"): 3, ("served", "server"): 2,
}
"""(program, victim) -> how many of 100 kills.

The victim: the program's process; its environment process or JVM; one of several processes that learn or play together;
all processes at once, as where a machine fails; the server that it asks.
"""
IS_VICTIM: dict[str, Callable[[psutil.Process], bool]] = {
    "environment": lambda process: "itp.envs.pool" in process.cmdline(),
    "java": lambda process: "java" in process.name(),
    "rank": lambda process: "RANK" in process.environ() and "itp.envs.pool" not in process.cmdline()
    and any(module in process.cmdline() for module in ("foresight_eval", "world_model.base_tuning.finetune")),
}
"""Which of the processes that a program started are its victims of a kind."""
GRACE = 30
"""Seconds in which what a killed program started must have ended."""
AWAY = 2
"""Seconds that a killed server is away; a program that asks it goes on by itself."""
TRIES = 20
"""How often a moment is drawn until it lies within the run."""


def run_kills(out: Path, kills: int, seed: int, jobs: int) -> Iterator[dict[str, Any]]:
    """The outcome of each of ``kills`` trials that ``out/kills.jsonl`` doesn't have, which goes in there."""
    plan = planned(kills, seed)
    seconds = prepare(out / "runs", list(dict.fromkeys(name for name, _ in plan)))
    done = {row["trial"] for row in read_appended(out / "kills.jsonl")}
    lock = threading.Lock()

    def one(number: int) -> dict[str, Any]:
        name, victim = plan[number]
        trial = Trial(out, BY_NAME[name], victim, number, seed, seconds[name])
        outcome = {"trial": number, "program": name, "victim": victim, **trial.run()}
        with lock, open(out / "kills.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, [number for number in range(kills) if number not in done])


def planned(kills: int, seed: int) -> list[tuple[str, str]]:
    """(program, victim) of each trial, mixed, so that the first few are a fair sample."""
    cases = [case for case, count in KILLS.items() for _ in range(count)]
    mixed = random.Random(seed).sample(cases, len(cases))
    return [mixed[number % len(mixed)] for number in range(kills)]


class Trial:
    """One kill and what came of it."""

    def __init__(self, out: Path, program: Program, victim: str, number: int, seed: int, seconds: float) -> None:
        self.root, self.program, self.victim, self.seconds = out / "runs", program, victim, seconds
        self.random = random.Random(f"{seed}/{number}")
        self.out, self.log = out / "kills" / str(number), out / "kills" / f"{number}.log"
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """What happened, and ``faults``: all that shouldn't have."""
        start = time.monotonic()
        with Server(self.root, self.program.needs_server) as server:
            outcome, faults = self._disturb(server)
            if "moment" in outcome:
                before = len(self.log.read_text(errors="replace"))
                status = self.program.finish(self.root, self.out, self.log, server.url)
                faults += self._faults_of_the_end(status, self.log.read_text(errors="replace")[before:])
        outcome |= {"faults": faults, "seconds": round(time.monotonic() - start, 1)}
        if not faults:
            shutil.rmtree(self.out, ignore_errors=True)
            self.log.unlink()
        return outcome

    def _disturb(self, server: Server) -> tuple[dict[str, Any], list[str]]:
        """Start the program until a kill hits it; (moment and status, faults)."""
        for _ in range(TRIES):
            shutil.rmtree(self.out, ignore_errors=True)
            self.log.write_text("")
            moment = self.random.uniform(0, self.seconds)  # in the processor's time
            process = self.program.start(self.root, self.out, self.log, server.url)
            if self._killed(process, moment, server):
                outcome = {"moment": round(moment, 2), "of": self.seconds}
                if self.victim == "server":
                    time.sleep(AWAY)
                    server.start()
                if self.victim not in ("program", "all"):
                    outcome["status"] = self._wait(process)
                return outcome, self._faults_of_the_kill(process)
            if process.returncode != 0:
                return {}, [f"ended with status {process.returncode} before the kill"]
        return {}, [f"no kill hit it in {TRIES} tries"]

    def _killed(self, process: subprocess.Popen, moment: float, server: Server) -> bool:
        """Kill the victim at ``moment``, or as soon after it as there is one; False where the run ended before."""
        while process.poll() is None:
            if _spent(process.pid) >= moment and (found := self._victims(process, server)):
                self.started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                for victim in found:
                    victim.kill()
                if self.victim in ("program", "all"):
                    process.wait()
                return True
            time.sleep(0.02)
        return False

    def _victims(self, process: subprocess.Popen, server: Server) -> list[psutil.Process]:
        """The processes to kill; none where there is none of that kind yet."""
        if self.victim == "server":
            return [psutil.Process(server.process.pid)]
        try:
            program = psutil.Process(process.pid)
            if self.victim == "program":
                return [program]
            below = program.children(recursive=True)
            if self.victim == "all":
                return [program, *below]
            found = [one for one in below if IS_VICTIM[self.victim](one)]
        except psutil.Error:  # one ended while it was looked at
            return []
        return [self.random.choice(found)] if found else []

    def _wait(self, process: subprocess.Popen) -> int | None:
        """The status that the program ends with by itself; None where it hangs and is ended."""
        try:
            return process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None

    def _faults_of_the_kill(self, process: subprocess.Popen) -> list[str]:
        said = self.log.read_text(errors="replace")
        faults = ["hung after the kill"] if process.returncode == -signal.SIGKILL and self.victim not in (
            "program", "all") else []
        # A launcher reports a process that it lost with a traceback of its own.
        if self.victim in ("environment", "java", "server") and "Traceback (most" in said:
            faults.append("a traceback after the kill")
        if self.victim in ("environment", "java", "server") and process.returncode != 0:
            faults.append(f"status {process.returncode} after its {self.victim} was killed")
        _, alive = psutil.wait_procs(self.started, GRACE)
        for orphan in alive:
            faults.append(f"still running {GRACE} s later: {' '.join(orphan.cmdline())[:100]}")
            orphan.kill()
        return faults

    def _faults_of_the_end(self, status: int, said: str) -> list[str]:
        faults = [f"status {status} of the same command again"] if status != 0 else []
        if "Traceback (most" in said:
            faults.append("a traceback of the same command again")
        if status == 0:
            odd = differences(self.program.content(self.out), self.program.content(self.root / self.program.name))
            faults += odd[:5]
        return faults


def _spent(pid: int) -> float:
    """Processor time of a process and of all that it started, in seconds."""
    total = 0.0
    with contextlib.suppress(psutil.Error):  # one ended meanwhile
        program = psutil.Process(pid)
        for process in (program, *program.children(recursive=True)):
            total += sum(process.cpu_times()[:4])  # its own, and of children that have ended
    return total


def kill_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By program and victim: kills, and trials with faults."""
    kills, faulty = Counter(), Counter()
    for row in rows:
        name = f"{row['program']}: {row['victim']}"
        kills[name] += "moment" in row
        faulty[name] += bool(row["faults"])
    return {"kills": sum(kills.values()), "with_faults": sum(faulty.values()),
            "by_case": {name: {"kills": kills[name], "with_faults": faulty[name]} for name in sorted(kills)}}
