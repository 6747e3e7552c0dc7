"""The wheel: what it holds, and its commands where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from foresight_eval.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, with the setuptools that is here, so that nothing is fetched or left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "itp", "world_model", "foresight_eval", "setup.py", "pyproject.toml",
                            "LICENSE", "README.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("no git checkout to build from")
    for name in files.stdout.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    builder = folder / "builder"
    venv.create(builder, with_pip=True)
    run = subprocess.run([builder / "bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder,
                          folder / "source"], capture_output=True, text=True, check=False)
    if run.returncode and "setuptools" in run.stderr and "No matching distribution" in run.stderr:
        pytest.skip("the package index, which has setuptools, can't be reached")
    assert run.returncode == 0, run.stderr[-2000:]
    built, = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with the dependencies of the environment that runs the tests."""
    env = tmp_path_factory.mktemp("env")
    venv.create(env, with_pip=True)
    site, = (env / "lib").glob("python*/site-packages")
    run = subprocess.run([env / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", wheel],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    there = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in there))
    return env


def call(env: Path, cwd: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([env / "bin" / command, *arguments], cwd=cwd, env=without, capture_output=True, text=True,
                          check=False)


def test_it_holds_what_programs_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "itp", "world_model", "foresight_eval"], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout.splitlines()
    assert {name for name in tracked if not name.startswith("itp/tests")} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "scripts", "models", "docs", "configs")]
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 3e6


def test_its_commands_work_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    where = call(installed, tmp_path, "python", "-c", "import itp; print(itp.__file__)").stdout
    assert where.startswith(str(installed))
    doctor = call(installed, tmp_path, "itp-doctor")
    assert "note    repository" in doctor.stdout and doctor.stdout.splitlines()[-1].startswith("next: itp-games")
    said = call(installed, tmp_path, "itp-eval", "--help")
    assert said.returncode == 0 and "more flags: --help-all" in said.stdout, said.stderr
    assert {path.name for path in (installed / "bin").iterdir()} >= set(COMMANDS)


def test_games_are_made_played_and_reported_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    made = call(installed, tmp_path, "itp-games", "--out_dir", "games", "--train", "0", "--seen", "0", "--unseen", "1")
    assert made.returncode == 0, made.stderr
    absent = call(installed, tmp_path, "itp-eval", "--policy_model", "models/alfworld/policy", "--env_data_root",
                  "games", "--split", "unseen", "--method", "sft", "--out_dir", "absent")
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1
    assert "models/alfworld/policy" in absent.stderr and "clone" in absent.stderr
    played = call(installed, tmp_path, "itp-eval", "--policy_model", str(ROOT / "models/alfworld/policy"), "--method",
                  "sft", "--env_data_root", "games", "--split", "unseen", "--out_dir", "out", "--max_steps", "3",
                  "--action_selection", "constrained")
    assert played.returncode == 0, played.stderr
    report = call(installed, tmp_path, "itp-report", "out", "--out_dir", "report")
    assert report.returncode == 0, report.stderr
    assert "<script" in (tmp_path / "report/index.html").read_text()
