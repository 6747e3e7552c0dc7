"""Files that programs read: with a byte order mark, or cut short or ill-formed, which is one line with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foresight_eval.results import read_episodes
from itp.agent.heads import HEADS_CONFIG, kmax_of
from itp.config import flag, parse_settings
from itp.envs.alfworld.games import golden_steps, task_params
from itp.errors import UserError
from itp.files import read_appended, read_json, read_object, read_rows, read_text, read_yaml, write_json
from itp.games import Game
from itp.model_card import MODEL_CARD, ModelCard
from itp.run_dir import open_run_dir
from itp.training.checkpoints import whole_checkpoints
from itp.transitions import read_transitions

ROW = {"state": "s", "action": "a", "next_state": "o", "step": 0}


@dataclass
class Settings:
    out: str = flag(help="where to write")
    games: int = flag(5, help="how many")


@dataclass
class Empty:
    pass


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Editors on Windows write it, and joined files have it in the middle."""
    path = tmp_path / "x.jsonl"
    one, two = json.dumps(ROW).encode(), json.dumps(ROW | {"step": 1}).encode()
    for content in (BOM + b"[" + one + b",\n" + two + b"]", BOM + one + b"\n" + BOM + two + b"\n"):
        path.write_bytes(content)
        assert [t.step for t in read_transitions(path)] == [ROW["step"], 1]
    path.write_bytes(BOM + one + b"\n" + b'{"cut')
    assert read_appended(path) == [ROW]
    path.write_bytes(BOM + one)
    assert read_json(path) == read_object(path) == ROW and read_text(path) == one.decode()
    path.write_bytes(BOM + b"out: x\ngames: 3")
    assert parse_settings(Settings, ["--config", str(path)]).games == 3
    assert read_yaml(path) == {"out": "x", "games": 3}


@pytest.mark.parametrize("content, says", [
    (b'{"a": 1,\n"b"', ":2: not JSON"),
    (b"", ":1: not JSON"),
    (b"[1]", ": a JSON list where an object is needed"),
    (b"null", ": a JSON null where"),
    (b"{}", ": field 'a' is missing"),
    (b'{"a": "1"}', ": field 'a' is of the wrong type ('1')"),
    (b'{"a": true}', ": field 'a' is of the wrong type (True)"),
    (b'{"a": "\xff"}', ": not UTF-8 text (byte 7)"),
    (b'{"a": ' + b"1" * 5000 + b"}", ": not usable JSON"),
    (b"[" * 100000, ": not usable JSON"),
    (None, ": no such file"),
])
def test_an_object_that_is_none_is_one_line_with_the_remedy(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_object(path, {"a": int}, "make it again")
    assert str(error.value).startswith(f"{path}{says}") and "\n" not in str(error.value)
    assert content is None or str(error.value).endswith("; make it again")


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    """Python reads it and can't write it again; a whole pair is a character."""
    (tmp_path / "pair.json").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_json(tmp_path / "pair.json") == {"a": "\U0001f600"}
    (tmp_path / "half.json").write_text('{"a": "\\ud83d"}\n')
    for read in (read_json, lambda path: list(read_rows(path))):
        with pytest.raises(UserError, match="half.json.*surrogates not allowed"):
            read(tmp_path / "half.json")


def test_files_that_only_look_like_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": [ROW]}, indent=2))
    with pytest.raises(UserError, match="x.json: one JSON object over several lines; give a list of rows, or JSONL"):
        read_transitions(path)
    with pytest.raises(UserError, match="can't be read .Is a directory"):
        read_text(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="must hold `name: value` lines"):
        parse_settings(Settings, ["--config", str(path)])


GAME = {"conversations": [], "foresight_steps": [], "meta": {
    "game_id": "g", "split": "train", "task_type": "look", "success": True, "score": 100.0, "reward": 1.0, "steps": 0,
    "terminate_reason": "success", "unparsed_actions": 0, "restarts": 0, "usage": {}}}
CARD = {"prompt_style": "tuned", "turns": {"head": "<user>", "tail": "<model>"}}


@pytest.mark.parametrize("name, good, bad", [
    (MODEL_CARD, CARD, [[], CARD | {"turns": {"head": "x"}}, CARD | {"turns": "x"}, CARD | {"control": 1},
                        CARD | {"control": True},
                        CARD | {"prompt_style": "x"}, CARD | {"foresight_format": "x"}, CARD | {"max_seq_len": -1}]),
    (HEADS_CONFIG, {"kmax": 5}, [[], {}, {"kmax": None}, {"kmax": "5"}, {"kmax": 0}]),
    ("config.json", {"config": {}}, [[], {}, {"config": []}]),
    ("7.json", GAME, [[], {}, {"meta": {}}, GAME | {"meta": {}}, GAME | {"foresight_steps": [{}]}]),
    ("checkpoint-5/complete.json", {"sizes": {}}, [[], {}, {"sizes": 3}]),
])
def test_records_that_are_none_are_one_line(tmp_path: Path, name: str, good: Any, bad: list[Any]) -> None:
    """Every record that a program reads back: cut short, a list, without a field, with a field of another type."""
    read: dict[str, Callable[[Path], Any]] = {
        MODEL_CARD: ModelCard.read, HEADS_CONFIG: kmax_of, "7.json": read_episodes, "config.json":
        lambda folder: open_run_dir(folder, Empty()), "checkpoint-5/complete.json": whole_checkpoints}
    write_json(tmp_path / name, good)
    read[name](tmp_path)
    for content in [json.dumps(good)[:-1], *map(json.dumps, bad)]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name) as error:
            read[name](tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"pddl_params": []}'])
def test_traj_data_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "traj_data.json").write_text(content)
    with pytest.raises(UserError, match="traj_data.json.*; download or make the game again"):
        task_params(Game("alfworld", "train", "x", str(tmp_path / "game.tw-pddl"), "x"))
    (tmp_path / "game.tw-pddl").write_text("[]")
    with pytest.raises(UserError, match="game.tw-pddl: a JSON list"):
        golden_steps(Game("alfworld", "train", "x", str(tmp_path / "game.tw-pddl"), "x"))
