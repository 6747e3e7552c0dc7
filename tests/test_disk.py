"""What the operating system refuses is one line: full disks, files in the place of folders, caches, wrong models."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from foresight_eval.results import read_episodes
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp import doctor, files
from itp.envs.alfworld import fast_translation
from itp.envs.scienceworld import env as scienceworld, games as scienceworld_games
from itp.errors import UserError
from itp.files import (
    append_row, cache_folder, check_output_file, check_output_folder, keep, read_appended, read_cached, refusal,
    why_unwritable, write_atomic, write_json,
)
from itp.pretrained import check_model_path
from itp.program import run_main
from itp.run_dir import open_run_dir
from itp.training.models import save_whole
from itp.training.itp_r.checkpoint import RunFolder
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]


def program(*command: str, limit: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a program here.  ``limit``: bytes of a file at most, which is what a full disk looks like to it."""
    def prepare() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run([sys.executable, *command], capture_output=True, text=True, preexec_fn=prepare, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})


def says(ran: subprocess.CompletedProcess, *words: str) -> None:
    """It ended in one line that holds ``words``."""
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stderr
    assert last.startswith("error: ") and all(word in last for word in words), last


# ---------------------------------------------------------------- files


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=f"^{path}: can't be written \\(No space left on device\\); free some space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"n": 1})
    path.write_bytes(path.read_bytes() + b'{"n": 2')  # cut by a kill
    append_row(path, {"n": 3})
    assert read_appended(path) == [{"n": 1}, {"n": 3}]
    code = f"from itp.files import append_row; append_row({str(path)!r}, {{'long': 'x' * 9000}})"
    assert "UserError" in program("-c", code, limit=4096).stderr
    assert read_appended(path) == [{"n": 1}, {"n": 3}] and path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("error, why", [
    (OSError(errno.ENOSPC, "x"), "No space left on device"), (OSError(errno.EROFS, "x"), "Read-only file system"),
    (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"), (FileNotFoundError(errno.ENOENT, "x"), ""),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "the disk took no more"),
    (RuntimeError("basic_ios::clear: iostream error"), "the disk took no more"),
    (Exception("No space left on device (os error 28)"), "No space left on device"),
    (RuntimeError("CUDA out of memory"), ""), (UserError("No space left on device"), ""), (KeyError("a"), ""),
])
def test_what_libraries_say_of_a_full_disk(error: Exception, why: str) -> None:
    assert refusal(error) == why


@pytest.mark.parametrize("what", ["torch.save(big, place)", "save_file(big, place)", "model.save_pretrained(place)",
                                  "open(place, 'wb').write(bytes(1 << 20))"])
def test_libraries_really_say_so(tmp_path: Path, what: str) -> None:
    code = ("import torch; from safetensors.torch import save_file; from itp.files import writing\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "big = {'a': torch.zeros(1 << 20)}; place = 'out'\n"
            "model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, hidden_size=64, intermediate_size=64, "
            "num_hidden_layers=1, num_attention_heads=2))\n"
            f"with writing('PLACE'):\n    {what}\n")
    ran = program("-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}", limit=100_000)
    assert "itp.errors.UserError: PLACE: can't be written (" in ran.stderr.strip().splitlines()[-1], ran.stderr


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    for place in (file, file / "below", file / "far/below"):
        with pytest.raises(UserError, match=f"{place}: can't be written .*choose another output path"):
            check_output_folder(place)
        with pytest.raises(UserError, match="choose another output path"):
            open_run_dir(place, AlfworldSettings())
        with pytest.raises(UserError, match="choose another output path"):
            write_json(place / "x.json", {})
    for place in (folder, file / "below"):
        with pytest.raises(UserError, match="choose another output path"):
            check_output_file(place)
        with pytest.raises(UserError, match="choose another output path"):
            write_json(place, {})
    check_output_folder(folder / "new" / "one")
    check_output_file(folder / "new" / "one")
    assert file.read_text() == "" and os.listdir(folder) == []
    if Path("/proc").is_dir():
        assert why_unwritable("/proc/itp")


OUTPUTS = [
    "-m foresight_eval --policy_model {model} --method sft --env_data_root {games} --out_dir {out}",
    "-m foresight_eval --policy_model {model} --method sft --env_data_root {games} --out_dir {out} --override",
    "-m world_model.collect --env_data_root {games} --out_dir {out}",
    "-m world_model.collect --env_data_root {games} --out_dir {out} --override",
    "-m world_model.early_experience --expert_jsonl {rows} --env_data_root {games} --policy_model {model} "
    "--out_dir {out}",
    "-m world_model.data_processing.convert --input {rows} --out_dir {out}",
    "-m world_model.data_processing.fetch --out_dir {out}",
    "-m world_model.fidelity --wm_model {model} --transitions {rows} --out_json {out}",
    "-m itp.training.train_adaptive_k label --expert_jsonl {rows} --policy_model {model} --wm_model {model} "
    "--out_labeled_jsonl {out}",
    "-m itp.training.base_policy --train_json {talks} --model_path {model} --out_dir {out}",
    "-m itp.training.base_policy --train_json {talks} --model_path {model} --out_dir {free} --merged_dir {out}",
    "-m itp.training.base_lm --transitions {rows} --out_dir {out}",
    "-m world_model.base_tuning.finetune --data_path {rows} --model_path {model} --out_dir {out}",
    "-m itp.envs.alfworld_games --out {out}",
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> dict[str, str]:
    """A model, games, data, and a place below a file."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "file").write_text("")
    row = {"episode_id": "e", "step": 0, "state": "Task: a task\nObservation: You are in a room.", "action": "look",
           "next_state": "x"}
    (desk / "rows.jsonl").write_text(json.dumps(row) + "\n")
    turns = [{"from": "human", "value": row["state"]}, {"from": "gpt", "value": "Action: look"}]
    write_json(desk / "talks.json", [{"id": "e", "conversations": turns}] * 4)
    return {"model": str(write_tiny_model(desk / "model")), "games": str(games_root), "rows": str(desk / "rows.jsonl"),
            "talks": str(desk / "talks.json"), "out": str(desk / "file" / "out"), "free": str(desk / "free")}


@pytest.mark.parametrize("command", OUTPUTS)
def test_every_program_refuses_an_output_below_a_file(desk: dict[str, str], command: str) -> None:
    says(program(*command.format(**desk).split()), "can't be written", "choose another output path")
    assert not Path(desk["free"]).exists()


# ---------------------------------------------------------------- weights on a full disk


def test_a_model_folder_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from itp.model_card import ModelCard

    place = write_tiny_model(tmp_path / "m")
    before = {file.name: file.read_bytes() for file in place.iterdir()}

    class Model:
        def save_pretrained(self, folder: Path, **options) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_text("half")
            raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="m: can't be written"):
        save_whole(Model(), Model(), place, ModelCard())
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before and os.listdir(tmp_path) == ["m"]


def test_stage_3_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)

    def write(place: Path) -> None:
        place.mkdir()

    folder.save("last", write, lambda place: None, {"update": 1})

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="last: can't be written .*free some space"):
        folder.save("last", write, lambda place: None, {"update": 2})
    monkeypatch.undo()
    assert folder.state() == {"update": 1} and not (tmp_path / ".last.tmp").exists()


def test_training_on_a_full_disk_ends_in_one_line_and_goes_on(desk: dict[str, str], tmp_path: Path) -> None:
    command = ("-m", "itp.training.base_policy", "--train_json", desk["talks"], "--model_path", desk["model"],
               "--out_dir", str(tmp_path / "out"), "--lora_r", "2", "--eval_share", "0", "--save_every_steps", "1",
               "--batch_size", "1", "--grad_accum", "1", "--epochs", "1", "--report_to", "none")
    says(program(*command, limit=30_000), f"{tmp_path}/out/checkpoint-1", "can't be written", "free some space")
    ran = program(*command)
    assert ran.returncode == 0 and (tmp_path / "out" / "metrics.json").exists(), ran.stderr


def test_an_evaluation_on_a_full_disk_keeps_what_is_finished(desk: dict[str, str], tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AlfworldSettings(policy_model=desk["model"], method="sft", env_data_root=desk["games"], split="train",
                                max_steps=2, act_tokens=8, device="cpu", out_dir=str(tmp_path), env_processes=1)
    written = iter(range(3))  # the record and two games

    def full(_: int) -> None:
        if next(written, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=f"^{tmp_path}/\\d.json: can't be written .No space .*free some space"):
        asyncio.run(evaluate(settings))
    monkeypatch.undo()
    assert len(read_episodes(tmp_path)) == 2 and not list(tmp_path.glob(".*.tmp"))
    asyncio.run(evaluate(settings))
    assert len(read_episodes(tmp_path)) == 6


def test_a_full_temporary_folder_is_no_fault_of_a_game(desk: dict[str, str], tmp_path: Path) -> None:
    """The engine copies its library there."""
    says(program("-m", "world_model.collect", "--env_data_root", desk["games"], "--out_dir", str(tmp_path / "out"),
                 limit=8_000), tempfile.gettempdir(), "can't be written", "free some space")


def test_a_program_says_in_one_line_what_nobody_thought_of(capsys: pytest.CaptureFixture) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "x")

    def missing() -> None:
        raise FileNotFoundError(errno.ENOENT, "x")

    with pytest.raises(SystemExit) as ended:
        run_main(full)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: output: No space left on device\n"
    with pytest.raises(FileNotFoundError):  # not a matter of the disk: a fault of the program
        run_main(missing)


# ---------------------------------------------------------------- caches


@pytest.fixture
def bad_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ITP_CACHE", str(tmp_path / "file" / "cache"))
    files._warn_of_cache.cache_clear()
    fast_translation.world.cache_clear()
    return tmp_path / "file" / "cache"


def test_a_cache_that_cannot_be_written_is_one_warning(bad_cache: Path, caplog: pytest.LogCaptureFixture,
                                                       games_root: Path) -> None:
    from itp.envs.alfworld.env import AlfworldEnv
    from itp.envs.alfworld.games import list_games

    env = AlfworldEnv()
    for game in list_games("train", games_root)[:2]:
        assert env.reset(game).text.startswith("You are in")
    env.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{bad_cache} can't be written (Not a directory)" in caplog.text and "set ITP_CACHE" in caplog.text
    found = doctor.cache()
    assert found.state == "note" and "can't be written" in found.said and "set ITP_CACHE" in found.remedy


def test_a_read_only_cache_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITP_CACHE", str(tmp_path))
    keep(tmp_path / "a", "kept")

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: read_only())
    monkeypatch.setattr(files.os, "replace", read_only)
    keep(tmp_path / "a", "new")
    assert read_cached(tmp_path / "a") == "kept" and doctor.cache().state == "note"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ITP_CACHE")

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_folder("alfworld") is None and "no home" in doctor.cache().said
    keep(None, "text")
    assert read_cached(None) is None


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\xfe", b"c-muNWdLG"])
def test_what_is_not_what_was_kept_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, games_root: Path,
                                                 content: bytes) -> None:
    from itp.envs.alfworld.env import AlfworldEnv
    from itp.envs.alfworld.games import list_games

    monkeypatch.setenv("ITP_CACHE", str(tmp_path))
    game, texts = list_games("train", games_root)[0], []
    for _ in range(2):
        fast_translation.world.cache_clear()
        env = AlfworldEnv()
        env._loaded = None
        texts.append(env.reset(game).text)
        env.close()
        kept = next(tmp_path.rglob("*.world"))
        assert kept.read_bytes() != content
        kept.write_bytes(content)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kept", ["", "{", "[]", "{}", '{"boil": []}', '{"boil": {"train": [1]}}'])
def test_kept_lists_of_scienceworld_that_are_none(kept: str) -> None:
    assert scienceworld_games._kept_splits(kept) is None


def test_the_doctor_says_that_nothing_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert [found.state for found in doctor.hub_cache()] == ["note"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert list(doctor.hub_cache()) == []
    found = doctor.disk(str(tmp_path / "file" / "out"), 1.0)
    assert found.state == "note" and "can't be written" in found.said


# ---------------------------------------------------------------- models


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """The folder of a LoRA training, one of its checkpoints, stage 3's adapter, and one from elsewhere."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out, out / "checkpoint-5", elsewhere / "adapter", out / "last" / "adapter"):
        write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
        (folder / "adapter_model.safetensors").write_text("")
    write_json(out / "config.json", {"config": {}, "versions": {}})
    write_json(out / "merged_full" / "config.json", {"model_type": "llama"})
    write_json(out / "last" / "config.json", {"model_type": "llama"})
    for folder, instead in ((out, out / "merged_full"), (out / "checkpoint-5", out / "merged_full"),
                            (out / "last" / "adapter", out / "last")):
        with pytest.raises(UserError, match=f"^{folder}: holds a LoRA adapter.*; give {instead}$"):
            check_model_path(str(folder))
    with pytest.raises(UserError, match="holds a LoRA adapter.*; merge it"):
        check_model_path(str(elsewhere / "adapter"))
    check_model_path(str(out / "merged_full"))
    (elsewhere / "adapter" / "model.safetensors").write_text("")  # whole weights beside it
    write_json(elsewhere / "adapter" / "config.json", {"model_type": "llama"})
    check_model_path(str(elsewhere / "adapter"))


def test_the_folder_of_a_full_training_is_no_model(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"config": {}, "versions": {}})
    with pytest.raises(UserError, match="the folder of a run, and not of its model; give a Hugging Face model folder"):
        check_model_path(str(tmp_path))
    write_json(tmp_path / "merged_full" / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match=f"give {tmp_path}/merged_full"):
        check_model_path(str(tmp_path))


@pytest.mark.parametrize("flag", ["policy_model", "wm_model"])
def test_no_output_folder_is_claimed_for_an_adapter(tmp_path: Path, games_root: Path, desk: dict[str, str],
                                                    flag: str) -> None:
    write_json(tmp_path / "a" / "adapter_config.json", {})
    models = {"policy_model": desk["model"], "wm_model": desk["model"], flag: str(tmp_path / "a")}
    with pytest.raises(UserError, match="holds a LoRA adapter"):
        asyncio.run(evaluate(AlfworldSettings(out_dir=str(tmp_path / "out"), env_data_root=str(games_root), **models)))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- Java


def fake_java(folder: Path, script: str) -> Path:
    java = folder / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    return java


@pytest.mark.parametrize("version, number", [("1.7.0_80", 7), ("1.6.0", 6), ("1.8.0_292", 8), ("9", 9), ("11.0.2", 11),
                                             ("17-ea", 17), ("21.0.2", 21)])
def test_versions_of_java(version: str, number: int) -> None:
    assert scienceworld.java_version(f'openjdk version "{version}" 2024'.encode()) == (version, number)
    assert scienceworld.java_version(b"bash: java: not found") == ("", 0)


def test_an_old_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = fake_java(tmp_path, """[ "$1" = -version ] || exit 1\necho 'java version "1.7.0_80"' >&2""")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = doctor.java()
    assert found.state == "note" and "1.7.0_80" in found.said and "too old" in found.said and "8 or newer" in found.said
    with pytest.raises(UserError, match=f"{java} doesn't run .it is Java 1.7.0_80, and ScienceWorld needs 8 or newer"):
        scienceworld.JvmEngine()


def test_a_java_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, "sleep 30")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("JAVA_TIMEOUT", "START_TIMEOUT"):
        monkeypatch.setattr(scienceworld, name, 0.5)
    found = doctor.java()
    assert found.state == "note" and "doesn't answer" in found.said
    with pytest.raises(UserError, match="no answer within 0.5 s"):
        scienceworld.JvmEngine()
