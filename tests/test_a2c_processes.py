"""Stage 3 in real processes: one that is killed goes on by its own command, and two learn what one learns."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from itp.training.itp_r import a2c as rl_k
from itp.training.itp_r.a2c_settings import RlSettings
from tests.rl_runs import approx, metrics, settings, write_models

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"), games_root)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are compared with this one: another number of threads gives other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launch(chosen: RlSettings, log: Path, *launcher: str) -> subprocess.Popen:
    flags = [part for field in dataclasses.fields(chosen)
             for part in (f"--{field.name}", str(getattr(chosen, field.name)))]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, *launcher, "-m", "itp.training.train_adaptive_k", "rl_k", *flags],
                                stdout=file, stderr=file, env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "policy_heads.safetensors")


@pytest.mark.parametrize("changes", [{}, {"advantage": "gigpo", "group_size": 2, "observation_loss": 0.1}],
                         ids=["critic", "gigpo"])
def test_a_killed_process_goes_on_by_its_own_command(models, games_root: Path, tmp_path: Path, changes: dict) -> None:
    """One episode at a time.  Of several, batches form as their requests come, and a last bit may turn a sample."""
    whole, killed = (settings(models, games_root, tmp_path / name, max_steps=2, episodes_per_epoch=24, eval_every=0,
                              num_envs=1, lora_r=4, lora_dropout=0.2, lr=1e-2, **changes)
                     for name in ("whole", "killed"))
    out, log = tmp_path / "killed", tmp_path / "log"
    process = launch(killed, log)
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole_lines = (out / "metrics.jsonl").read_text().count("\n")  # the kill may have cut the one after them
    assert not (out / "metrics.json").exists() and whole_lines < whole.total_updates
    process = launch(killed, log)
    rl_k.run(whole)
    assert process.wait(300) == 0, log.read_text()
    assert int(re.search(r"going on after update (\d+)", log.read_text())[1]) in range(4, 12, 2)
    rows = metrics(tmp_path / "whole")
    assert len(rows) == whole.total_updates == 12 and metrics(out) == approx(rows)
    for name, weight in weights(tmp_path / "whole" / "last").items():
        assert_close(weights(out / "last")[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"episodes_per_epoch": 7, "episodes_per_update": 3, "normalize_advantages": True},
    {"episodes_per_epoch": 15, "episodes_per_update": 6, "advantage": "gigpo", "group_size": 3, "group_std": True,
     "observation_loss": 0.1}], ids=["critic", "gigpo"])
def test_two_processes_learn_what_one_learns(models, games_root: Path, tmp_path: Path, changes: dict) -> None:
    """Three episodes an update, so that their shares differ, and one in the last, where a process has none.  Or two
    groups of three, and one in the last, each of which is shared among the processes.

    One episode at a time, and a nucleus of hardly more than one token, so that a last bit turns no sample.  Sums in
    another order differ in their last bits, of which Adam makes whole steps where a gradient is next to nothing: hence
    a small learning rate, and weights compared as a whole.
    """
    one, two = (settings(models, games_root, tmp_path / name, max_steps=2, lr=1e-4, num_envs=1, action_top_p=0.01,
                         **changes) for name in ("one", "two"))
    log = tmp_path / "log"
    process = launch(two, log, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    rl_k.run(one)
    assert process.wait(300) == 0, log.read_text()
    rows = metrics(tmp_path / "one")
    assert [row["update"] for row in rows] == [0, 1, 2, 3] and metrics(tmp_path / "two") == approx(rows, rel=1e-3)
    assert all(row["advantage_abs"] > 0.01 for row in rows[1:])
    start, alone, together = (torch.cat([w.flatten() for _, w in sorted(weights(folder).items())])
                              for folder in (models[0], tmp_path / "one" / "last", tmp_path / "two" / "last"))
    assert (together - alone).norm() < 0.02 * (alone - start).norm()
