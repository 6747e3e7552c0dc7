"""Several processes under torchrun share an evaluation: the results of one process, each game once, whoever dies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from foresight_eval import results
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.config import flag_fields
from itp.distributed import rank_devices
from tests.openai_client import free_port
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    folder = tmp_path_factory.mktemp("models")
    return AlfworldSettings(
        policy_model=str(write_tiny_model(folder / "policy", seed=0)), out_dir="", method="sft",
        env_data_root=str(games_root), split="train", max_steps=6, act_tokens=8, history_keep_steps=2,
        prompt_style="tuned", device="cpu", env_processes=1, concurrency=3, temperature=0.7)


@pytest.fixture(scope="module")
def alone(base: AlfworldSettings, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one process gives."""
    out = tmp_path_factory.mktemp("alone")
    asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(out))))
    return stories(out)


def stories(folder: Path) -> dict[int, dict[str, Any]]:
    """All that happened in each game, without seconds, cache hits and the last digits of probabilities."""
    volatile = ("seconds", "cached_tokens", "action_logprob")
    return {i: json.loads(json.dumps(record), object_hook=lambda d: {k: v for k, v in d.items() if k not in volatile})
            for i, record in results.read_episodes(folder).items()}


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2",
              "--mixed_precision", "no", "--dynamo_backend", "no")
"""Its --cpu starts one process only, and so does it where it sees no GPU, unless told that there are several."""


def launch(settings: AlfworldSettings, log: Path, *options: str,
           launcher: Sequence[str] = TORCHRUN) -> subprocess.Popen:
    flags = [part for field in flag_fields(type(settings))
             for part in (f"--{field.name}", str(getattr(settings, field.name)))]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, *options, "-m", "foresight_eval", *flags], stdout=file, stderr=file,
            env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("launcher", [TORCHRUN, (*ACCELERATE, "--main_process_port", str(free_port()))],
                         ids=["torchrun", "accelerate"])
def test_two_processes_give_what_one_gives_and_play_each_game_once(base, alone, tmp_path, launcher):
    out = tmp_path / "out"
    process = launch(dataclasses.replace(base, out_dir=str(out), override=True), tmp_path / "log",
                     launcher=launcher)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert stories(out) == alone
    log = (tmp_path / "log").read_text()
    played = [int(n) for n in re.findall(r"(\d+) steps in ", log)]
    assert len(played) == 2 and min(played) > 0 and sum(played) == sum(r["meta"]["steps"] for r in alone.values())
    assert log.count("95 %") == 1  # the first process alone sums up
    summary = json.loads((out / "summary.json").read_text())
    assert summary["overall"]["n"] == 6
    assert len((out / "log.txt").read_text().splitlines()) == 6


def test_when_one_is_killed_its_games_are_taken_over(base, alone, tmp_path):
    out = tmp_path / "out"
    settings = dataclasses.replace(base, out_dir=str(out), override=True, concurrency=1)
    process = launch(settings, tmp_path / "log", "--max-restarts", "1", "--monitor-interval", "0.1")
    deadline = time.monotonic() + 300
    while not results.read_episodes(out):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(process.pid).children() if "foresight_eval" in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob("[0-9]*.json")}
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert stories(out) == alone
    kept = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert kept == finished and len(finished) < 6  # what was finished wasn't played again, --override or not


def test_a_mistake_is_said_once_and_ends_all(base, tmp_path):
    process = launch(dataclasses.replace(base, out_dir=str(tmp_path / "out"), k_policy="head"),
                     tmp_path / "log")
    assert process.wait(300) != 0
    log = (tmp_path / "log").read_text()
    assert log.count("has no K-head") == 1 and not (tmp_path / "out").exists()


def test_devices_of_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert rank_devices("cuda:3", "cpu") == ("cuda:3", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rank_devices("cuda:0", "cuda:1") == ("cuda:2", "cuda:3")
    assert rank_devices("cuda", "cuda", pairs=False) == ("cuda:1", "cuda:1")
    assert rank_devices("cpu", "cpu") == ("cpu", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert rank_devices("cuda:0", "cuda:1") == ("cuda:1", "cuda:1")
