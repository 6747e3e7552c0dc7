"""Settings, trajectory files, lists of games and result folders: what users get wrong is said in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from itp.config import flag, parse_settings
from itp.devices import resolve_device
from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES, list_games, task_params
from itp.errors import UserError
from itp.files import read_appended, read_json, read_rows, write_atomic, write_json
from itp.games import resolve_split
from itp.model_card import ModelCard, style_of
from itp.pretrained import model_fingerprint
from itp.program import run_main
from itp.run_dir import alone_in, open_run_dir
from itp.seeding import derive_seed
from itp.transitions import REQUIRED, Transition, read_transitions, write_transitions


@dataclass
class Settings:
    out: str = flag(help="where to write")
    games: int = flag(5, at_least=1, help="how many")
    lr: float = flag(1e-3, above=0, below=10, help="100 % of the rate")
    kind: str = flag("a", help="which", choices=("a", "b"))
    override: bool = flag(False, help="start anew")
    internal: int = 7


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return str(path)


# --- settings


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, "out: from_yaml\ngames: 3\nlr: 2\noverride: true\n")
    assert parse_settings(Settings, ["--config", config, "--games", "9"]) == Settings(
        out="from_yaml", games=9, lr=2.0, kind="a", override=True, internal=7)
    assert parse_settings(Settings, ["--out", "x"]) == Settings("x", 5, 1e-3, "a", False)


@pytest.mark.parametrize("given, value", [([], True), (["false"], False), (["1"], True), (["No"], False)])
def test_a_switch_also_takes_a_value(given: list[str], value: bool) -> None:
    assert parse_settings(Settings, ["--out", "x", "--override", *given]).override is value


@pytest.mark.parametrize("text, says", [
    ("gamse: 3\nout: x", "unknown setting 'gamse', did you mean 'games'?"),
    ("internal: 3\nout: x", "unknown setting 'internal'"),
    ("games: three\nout: x", "games must be int, not 'three'"),
    ("games: true\nout: x", "games must be int, not True"),
    ("games: 2.5\nout: x", "games must be int, not 2.5"),
    ("lr: 1e-3x\nout: x", "lr must be float"),
    ("out: 5", "out must be str, not 5"),
    ("override: 'yes'\nout: x", "override must be bool"),
    ("kind: c\nout: x", "kind must be one of ['a', 'b'], not 'c'"),
    ("- a\n- b", "must hold `name: value` lines"),
    ("out: [", "not YAML"),
    ("games: 3", "missing required --out"),
])
def test_yaml_errors(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        parse_settings(Settings, ["--config", yaml_file(tmp_path, text)])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, good, wrong, says", [
    ("games", ["1", "2"], ["0", "-1"], "at least 1"),
    ("lr", ["0.001", "9.9"], ["0", "-1", "10", "nan"], "above 0 and below 10"),
])
def test_values_out_of_bounds_are_refused(tmp_path: Path, name: str, good: list[str], wrong: list[str],
                                          says: str) -> None:
    for value in good:
        parse_settings(Settings, ["--out", "x", f"--{name}", value])
    for value in wrong:
        with pytest.raises(UserError, match=rf"--{name} \S+: must be {says}$"):
            parse_settings(Settings, ["--out", "x", f"--{name}", value])
    with pytest.raises(UserError, match=says):
        parse_settings(Settings, ["--config", yaml_file(tmp_path, f"out: x\n{name}: -1")])


def test_a_default_out_of_bounds_may_be_given_too() -> None:
    @dataclass
    class Steps:
        keep: int = flag(-1, at_least=0, help="-1: as trained")

    assert parse_settings(Steps, ["--keep", "-1"]).keep == -1
    with pytest.raises(UserError, match="--keep -2: must be at least 0"):
        parse_settings(Steps, ["--keep", "-2"])


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        parse_settings(Settings, ["--config", str(tmp_path / "nowhere.yaml"), "--out", "x"])


@pytest.mark.parametrize("argv", [["--games", "three"], ["--kind", "c"], ["--game", "3"], ["--internal", "3"],
                                  ["--override", "maybe"]])
def test_flag_errors(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as status:
        parse_settings(Settings, ["--out", "x", *argv])
    assert status.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_a_flag_has_one_of_its_names(capsys: pytest.CaptureFixture) -> None:
    @dataclass
    class Horizon:
        max_k: int = flag(5, help="steps", aliases=("kmax",))

    assert parse_settings(Horizon, ["--kmax", "2"]).max_k == 2 == parse_settings(Horizon, ["--max_k", "2"]).max_k
    with pytest.raises(SystemExit):
        parse_settings(Horizon, ["--kmax", "2", "--max_k", "3"])
    assert "--max_k is another name of --kmax; give one of them" in capsys.readouterr().err


def test_help_shows_defaults_and_what_is_required(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_settings(Settings, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "where to write (required)" in said and "how many (default: 5)" in said and "100 % of the rate" in said
    assert "--internal" not in said


# --- trajectory files


ROW = {"episode_id": "e", "step": 1, "state": "Task: t\nObservation: o", "action": "look", "next_state": "x\u2028é\ny"}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_transitions_come_back_as_they_were(tmp_path: Path) -> None:
    written = [Transition(**ROW, expert_action="go", reward=1.5, done=True, success=True, task_type="t", source="s"),
               Transition(**{**ROW, "step": 2})]
    assert write_transitions(tmp_path / "t.jsonl", written) == 2
    assert read_transitions(tmp_path / "t.jsonl") == written
    (tmp_path / "t.json").write_text(json.dumps([dataclasses.asdict(t) for t in written], indent=1))
    assert read_transitions(tmp_path / "t.json") == written


def test_foreign_rows_need_three_fields_only(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines({name: name for name in REQUIRED} | {"their_own": [1]}) + "\n\n")
    assert read_transitions(path) == [Transition("", 0, "state", "action", "next_state", "action")]
    path.write_text(lines({**ROW, "episode_id": 12}))
    assert read_transitions(path)[0].episode_id == "12"
    path.write_text(lines({**ROW, "episode_id": None}))  # not one episode of all such rows
    assert read_transitions(path)[0].episode_id == ""
    with pytest.raises(UserError, match=":1: field 'episode_id' is missing"):
        read_transitions(path, required=("episode_id", *REQUIRED))


@pytest.mark.parametrize("text, says", [
    (lines(ROW, {"state": "s", "action": "a"}), ":2: field 'next_state' is missing"),
    (lines(ROW) + "\n" + lines({**ROW, "action": None}), ":3: field 'action' is None"),
    (lines(ROW, ROW, {**ROW, "step": "2"}), ":3: field 'step' is '2'"),
    (lines({**ROW, "step": True}), ":1: field 'step' is True"),
    (lines({**ROW, "reward": "much"}), ":1: field 'reward' is 'much'"),
    (lines({**ROW, "success": 1}), ":1: field 'success' is 1"),
    (lines(ROW) + '{"state": "cut o', ":2: not JSON"),
    (lines("just text"), ":1: not a row"),
    (json.dumps([ROW, {"action": "a"}]), ": row 1: field 'state' is missing"),
    ("[\n" + json.dumps(ROW) + "\n" + json.dumps(ROW) + "]", ":3: not JSON"),
    ("", "holds no transitions"),
    ("[]", "holds no transitions"),
])
def test_errors_name_file_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_transitions(path)
    assert str(error.value).startswith(f"{path}") and says in str(error.value) and "\n" not in str(error.value)


def test_only_whole_lines_of_a_growing_file_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_appended(path) == [] and not path.exists()
    whole, torn = '{"a": "é"}\n{"a": 2}\n', '{"a": "é"}'.encode()
    for cut in range(len(torn) + 1):  # also inside a character
        path.write_bytes(whole.encode() + torn[:cut])
        assert read_appended(path) == [{"a": "é"}, {"a": 2}]
        assert path.read_text() == whole
    path.write_bytes(torn[:5])
    assert read_appended(path) == [] and path.read_text() == ""


def test_an_expert_file_needs_more_fields(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines({name: name for name in REQUIRED}))
    with pytest.raises(UserError, match=":1: field 'episode_id' is missing"):
        read_transitions(path, required=("episode_id", "step", *REQUIRED))
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl"))


# --- games


def test_real_games_are_listed(games_root: Path) -> None:
    train = list_games("train", games_root)
    assert {game.task_type for game in train} == set(ALFWORLD_TASK_TYPES) and len(train) == 6
    assert [g.path for g in train] == sorted(g.path for g in train)
    assert all(Path(g.path) == games_root / "json_2.1.1/train" / g.game_id / "game.tw-pddl" for g in train)
    assert list_games("train", games_root / "json_2.1.1") == train
    assert list_games("train", games_root, only_ids=[4, 1]) == [train[4], train[1]]
    pick = next(g for g in train if g.task_type == "pick_two_obj_and_place")
    assert task_params(pick)["object_target"] == pick.game_id.split("-")[1]


@pytest.mark.parametrize("alias, split", [("dev", "valid_seen"), ("seen", "valid_seen"), ("valid_seen", "valid_seen"),
                                          ("test", "valid_unseen"), ("unseen", "valid_unseen"),
                                          ("valid_unseen", "valid_unseen"), ("train", "train")])
def test_split_aliases(alias: str, split: str, games_root: Path) -> None:
    assert resolve_split(alias) == split
    assert {g.split for g in list_games(alias, games_root)} == {split}


def make_file(root: Path, trial: str, text: str = '{"solvable": true}') -> Path:
    path = root / "json_2.1.1/train" / trial / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_only_playable_games_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "removable_drive"  # the filter looks at the game's folder, not at where the data lie
    good = [make_file(root, "look_at_obj_in_light-Mug-None-DeskLamp-301/trial_2"),
            make_file(root, "pick_and_place_simple-Mug-None-Shelf-1/trial_1")]
    make_file(root, "pick_and_place_simple-Mug-None-Shelf-1/trial_0", '{"solvable": false}')
    make_file(root, "pick_and_place_simple-AppleSliced-None-Shelf-1/trial_0")
    make_file(root, "pick_and_place_with_movable_recep-Mug-Bowl-Shelf-1/trial_0")
    make_file(root, "pick_flowers-Mug-None-Shelf-1/trial_0")
    (root / "json_2.1.1/train/pick_and_place_simple-Mug-None-Shelf-2/trial_0").mkdir(parents=True)
    assert [Path(g.path) for g in list_games("train", root)] == good


@pytest.mark.parametrize("split, only, says", [
    ("validation", (), "unknown split 'validation': choose one of train"),
    ("dev", (), "no such folder"),
    ("train", (0, 5), "[5]"),
])
def test_errors_of_lists(tmp_path: Path, split: str, only: tuple[int, ...], says: str) -> None:
    make_file(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/trial_1")
    with pytest.raises(UserError) as error:
        list_games(split, tmp_path, only)
    assert says in str(error.value)


def test_a_broken_or_missing_game_file(tmp_path: Path) -> None:
    (tmp_path / "json_2.1.1/train").mkdir(parents=True)
    with pytest.raises(UserError, match="no playable game .* itp.envs.alfworld_games"):
        list_games("train", tmp_path)
    path = make_file(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/trial_1", '{"solvable": tr')
    with pytest.raises(UserError, match=f"{path}: not a readable game file"):
        list_games("train", tmp_path)


# --- result folders, files, seeds, models


def test_a_result_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    @dataclass
    class Run:
        split: str = flag("dev", help="which games")
        max_steps: int = flag(40, help="steps at most", aliases=("steps",))
        device: str = flag("cpu", help="where", affects_result=False)
        budget: int = flag(100, help="tokens (0: without limit)")
        internal: int = 7

    out, facts = tmp_path / "run", {"weights": "abc", "path": Path("a")}
    record = out / "config.json"
    assert open_run_dir(out, Run(), facts=facts) == out
    before = record.read_text()
    assert read_json(record)["config"] == {"split": "dev", "max_steps": 40, "device": "cpu", "budget": 100,
                                           "weights": "abc", "path": "a"}
    assert read_json(record)["versions"]["python"].startswith("3.")
    open_run_dir(out, Run(device="cuda", internal=8), facts=facts)
    assert record.read_text() == before
    for other, known, says in ((Run(max_steps=50, device="cuda"), facts, "max_steps: 40 there, 50 now"),
                               (Run(), facts | {"new": 1}, "new: None there, 1 now"),
                               (Run(), facts | {"weights": "abd"}, "weights: 'abc' there, 'abd' now"),
                               (Run(budget=101), facts, "budget: 100 there, 101 now")):
        with pytest.raises(UserError) as error:
            open_run_dir(out, other, facts=known)
        assert says in str(error.value) and str(out) in str(error.value) and "device" not in str(error.value)
        assert record.read_text() == before
    # A record of older code: a flag by another name, and none of what has come since, which was off then.
    old = json.loads(before)
    old["config"]["steps"] = old["config"].pop("max_steps")
    write_json(record, old)
    open_run_dir(out, Run(), facts=facts | {"new": 0})
    with pytest.raises(UserError, match="max_steps: 40 there, 50 now"):
        open_run_dir(out, Run(max_steps=50), facts=facts)
    open_run_dir(out, Run(max_steps=50), facts=facts, override=True)
    assert read_json(record)["config"]["max_steps"] == 50


def test_a_flag_may_say_which_value_runs_had_before_it_was_there(tmp_path: Path) -> None:
    """Packing is new and on by default: a run of earlier code had a row for each step."""
    @dataclass
    class Run:
        steps: int = flag(0, help="", before=1)
        packed: int = flag(0, help="")

    write_json(tmp_path / "config.json", {"config": {}, "versions": {}})
    open_run_dir(tmp_path, Run(steps=1))
    with pytest.raises(UserError, match="steps: 1 there, 0 now"):
        open_run_dir(tmp_path, Run())


def test_some_numbers_of_a_run_may_grow(tmp_path: Path) -> None:
    @dataclass
    class Run:
        budget: int = flag(100, help="tokens (0: without limit)")

    def recorded(budget: int) -> int:
        open_run_dir(tmp_path, Run(budget), may_grow=("budget",), redo=redo)
        return read_json(tmp_path / "config.json")["config"]["budget"]

    def redo() -> None:
        before.append(read_json(tmp_path / "config.json")["config"]["budget"])

    before: list[int] = []
    assert [recorded(100), recorded(150), recorded(150), recorded(0)] == [100, 150, 150, 0]
    assert before == [100, 150]  # with the old record: a kill in redo() leaves it to the next start
    for less in (100, 150):  # 0 is without limit
        with pytest.raises(UserError, match=f"budget: 0 there, {less} now"):
            recorded(less)


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "f.txt"
    write_atomic(path, "first\né")
    assert path.read_text(encoding="utf-8") == "first\né"
    assert os.listdir(path.parent) == ["f.txt"]

    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "second")
    assert path.read_text(encoding="utf-8") == "first\né"


def test_read_json_names_the_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None]} and "ü" in (tmp_path / "a.json").read_text("utf-8")
    (tmp_path / "b.json").write_text('{"a": 1,\n"b"}')
    with pytest.raises(UserError, match=r"b\.json:2: not JSON"):
        read_json(tmp_path / "b.json")


def test_seeds_depend_on_every_part_and_its_border() -> None:
    seeds = [derive_seed(*parts) for parts in ((1, "ab", 0), (1, "a", "b0"), (1, "ab", 1), (2, "ab", 0), (1, "ab"),
                                               (1, "ab0"), (11, "b", 0))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    # SHA-256 of "1", unit separator, "a"; computed apart: the same on every machine and in every process.
    assert derive_seed(1, "a") == int.from_bytes(bytes.fromhex(SHA256_1_A)[:8], "little") // 2


SHA256_1_A = "aaa8be88bd4afa32f5b8af336bd2218492836d5edac8fca0e6c3ebc99614678e"


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    weights = {"w": torch.arange(1000.0)}
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "llama"})
    (folder / "notes.txt").write_text("not a weight")
    first = model_fingerprint(str(folder))
    (folder / "notes.txt").write_text("still not")
    os.utime(folder / "model.safetensors", (1, 1))
    assert model_fingerprint(str(folder)) == first
    weights["w"][500] += 1
    save_file(weights, folder / "model.safetensors")
    second = model_fingerprint(str(folder))
    write_json(folder / "config.json", {"model_type": "qwen2"})
    third = model_fingerprint(str(folder))
    (folder / "adaptive_heads.pt").write_bytes(b"heads")
    fourth = model_fingerprint(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"weights of older models")
    assert len({first, second, third, fourth, model_fingerprint(str(folder))}) == 5
    assert model_fingerprint("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_model_card(tmp_path: Path) -> None:
    assert ModelCard.read("") is None and ModelCard.read(tmp_path) is None
    assert style_of("") == style_of(tmp_path) == "instruct"
    write_json(tmp_path / "itp_model.json", {"prompt_style": "tuned"})
    assert ModelCard.read(str(tmp_path)) == ModelCard("tuned")
    assert style_of(str(tmp_path)) == "tuned"


def test_a_device_that_is_not_there_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    there = resolve_device("cuda:99")
    assert there == "cpu" or int(there.removeprefix("cuda:")) < 99
    assert "cuda:99" in caplog.text and len(caplog.records) == 1
    assert resolve_device("cpu") == "cpu"


def test_users_errors_are_one_line_and_status_two(capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise UserError("x.json:3: not JSON")

    def interrupted() -> None:
        raise KeyboardInterrupt

    for main, status, says in ((fails, 2, "error: x.json:3: not JSON\n"), (interrupted, 130, "interrupted; ")):
        with pytest.raises(SystemExit) as end:
            run_main(main)
        assert end.value.code == status
        assert capsys.readouterr().err.startswith(says)


def test_a_folder_in_which_another_program_works_is_refused(tmp_path: Path) -> None:
    """Until that program ends, also by a kill; the same process may come back to its folder."""
    with alone_in(tmp_path):
        pass
    hold = (f"import itp.run_dir, time\nwith itp.run_dir.alone_in({str(tmp_path)!r}):\n"
            "    print('in', flush=True)\n    time.sleep(99)")
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another program works there"), alone_in(tmp_path):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with alone_in(tmp_path), pytest.raises(UserError, match="another program"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path / "new"):
        assert (tmp_path / "new").is_dir() and not any((tmp_path / "new").iterdir())
