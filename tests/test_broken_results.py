"""Result files that are cut or ill-formed: one line that says which file to delete, from evaluation and report."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from foresight_eval.report import page, report
from foresight_eval.results import read_episodes, read_results
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.errors import UserError
from itp.files import read_json, write_json
from itp.run_dir import open_run_dir
from itp.training.checkpoints import whole_checkpoints
from itp.training.itp_r.label import read_finished
from tests.made_results import make_episode, make_games, write_result
from tests.tiny import write_tiny_model
from world_model.collect import _finished
from world_model.fidelity import FidelitySettings, identify, read_measured

CUT = ["", "{", '{"meta": {"success": tr', "[]", "null", "5", "{}", '{"meta": {}}', '"text"']
FIGURES = {"models": {"wm": {"one_step": {}, "by_depth": {"expert": {"1": {
    "exact_match": 0.5, "token_f1": 0.5, "fact_f1": 0.5, "fact_f1_interval": [0.4, 0.6], "n": 10}}}}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished result folder of three games."""
    games = make_games(tmp_path / "games", 3)
    write_result(tmp_path / "out", [make_episode(game, success=True, imagined=[[("look", "a")]]) for game in games])
    return tmp_path / "out"


def reported(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    report.main()


@pytest.mark.parametrize("text", CUT)
def test_a_game_that_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "1.json").write_text(text)
    with pytest.raises(UserError, match=f"^{folder}/1.json:.*; delete it, and the same command") as raised:
        reported(monkeypatch, folder)
    assert "\n" not in str(raised.value)
    (folder / "1.json").unlink()
    reported(monkeypatch, folder)


@pytest.mark.parametrize("change", [{"peak_memory_bytes": {"cuda:0": [1]}}, {"processes": 0}, {"seconds": "1"}])
def test_a_session_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    session = {"episodes": 3, "seconds": 1.0, "processes": 1, "peak_memory_bytes": {"cuda:0": 1}}
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (session, session | change)))
    with pytest.raises(UserError, match="timing.jsonl.*; mend or remove the line$"):
        reported(monkeypatch, folder)


def test_a_game_that_is_not_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "1.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="1.json.*delete it"):
        reported(monkeypatch, folder)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where the fields of a record stand."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inside for place in [(*path, key), *places(part, (*path, key))]]


def test_no_field_that_is_missing_or_of_another_kind_is_a_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    tmp_path: Path) -> None:
    """Each field of a record in turn: the report is made, or the error names the file."""
    whole, refused = read_json(folder / "1.json"), 0
    for place in places(whole):
        if place[0] != "meta" and place[1:2] not in ((), (0,)):
            continue  # the first step and the first turn stand for the others
        for change in ("remove", None, [], "text", {"a": 1}):
            record = copy.deepcopy(whole)
            at = record
            for key in place[:-1]:
                at = at[key]
            if change == "remove":
                del at[place[-1]]
            else:
                at[place[-1]] = change
            write_json(folder / "1.json", record)
            try:
                reported(monkeypatch, folder)
                page.render(read_results([folder]), [], [])
            except UserError as error:
                assert f"{folder}/1.json" in str(error) and "delete it" in str(error)
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["summary.json", "cost.json", "log.txt", "summary.csv"])
def test_what_is_made_of_the_games_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = (folder / name).read_text()
    for text in ("", "{", "[]"):
        (folder / name).write_text(text)
        reported(monkeypatch, folder)
        assert (folder / name).read_text() == whole


@pytest.mark.parametrize("text", ["{\n", "[[]]\n", "{}\n", "5\n", '{"seconds": 1}\n', '{"seconds": "x"}\n'])
def test_times_that_are_none(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "timing.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"{folder}/timing.jsonl"):
        reported(monkeypatch, folder)
    (folder / "timing.jsonl").write_text('{"seconds"')  # cut by a kill
    reported(monkeypatch, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"config": []}', '{"config": {"method": "sft"}}'])
def test_a_record_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"^{folder}.*config.json"):
        reported(monkeypatch, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"config": []}'])
def test_a_run_goes_on_with_no_broken_record(tmp_path: Path, text: str) -> None:
    settings = FidelitySettings(wm_model="a", transitions="b")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json:.*it isn't the record of a run; .* or delete it"):
        open_run_dir(tmp_path, settings)
    open_run_dir(tmp_path, settings, override=True)
    open_run_dir(tmp_path, settings)


def test_an_evaluation_that_goes_on(games_root: Path, tmp_path: Path) -> None:
    settings = AlfworldSettings(policy_model=str(write_tiny_model(tmp_path / "m")), out_dir=str(tmp_path / "out"),
                                method="sft", split="train", env_data_root=str(games_root), max_steps=2, act_tokens=8,
                                device="cpu", env_processes=1, max_games=2)
    asyncio.run(evaluate(settings))
    cut = next(file for file in (tmp_path / "out").glob("[0-9]*.json"))
    cut.write_text(cut.read_text()[:100])
    with pytest.raises(UserError, match=f"^{cut}:.*delete it, and the same command plays"):
        asyncio.run(evaluate(settings))
    cut.unlink()
    asyncio.run(evaluate(settings))
    assert len(read_episodes(tmp_path / "out")) == 2
    cut.write_text("{")
    settings.override = True  # deletes them without reading them
    asyncio.run(evaluate(settings))
    assert len(read_episodes(tmp_path / "out")) == 2


# ---------------------------------------------------------------- figures of world models


def changed(**figures: Any) -> dict[str, Any]:
    return {"models": {"wm": FIGURES["models"]["wm"] | figures}}


@pytest.mark.parametrize("content, says", [
    (None, "no such file"), ("", "not JSON"), ("{", "not JSON"), ("{}", "'models' is missing"), ("[]", "an object"),
    ("null", "an object"), ('{"models": {}}', "no figures"), ('{"models": []}', "'models' is of the wrong type"),
    ('{"models": {"wm": {}}}', "no figures"), (json.dumps(changed(by_depth=[])), "no figures"),
    (json.dumps(changed(by_depth={"expert": []})), "no figures"),
    (json.dumps(changed(by_depth={"expert": {"x": {}}})), "no figures"),
    (json.dumps(changed(by_depth={"expert": {"1": {"fact_f1": 1.0}}})), "no figures"),
    (json.dumps(changed(by_depth={"expert": {"1": {"fact_f1": 1.0, "fact_f1_interval": [None, 1]}}})), "no figures"),
])
def test_fidelity_that_holds_no_figures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        content: str | None, says: str) -> None:
    file = tmp_path / "fidelity.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"^{file}:.*{says}"):
        reported(monkeypatch, folder, "--out_dir", tmp_path / "report", "--fidelity", file)
    assert not (tmp_path / "report").exists()


def test_fidelity_is_for_a_report(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "fidelity.json", FIGURES)
    with pytest.raises(UserError, match="--fidelity .*give --out_dir"):
        reported(monkeypatch, folder, "--fidelity", tmp_path / "fidelity.json")
    reported(monkeypatch, folder, "--out_dir", tmp_path / "report", "--fidelity", tmp_path / "fidelity.json")
    assert (tmp_path / "report" / "figures" / "fact_f1_by_depth.svg").is_file()


@pytest.mark.parametrize("place", ["", "index.html", "figures", "figures/success_against_budget.pdf"])
def test_a_report_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         place: str) -> None:
    """A file in the place of a folder, or a folder in the place of a file."""
    out = tmp_path / "report"
    if "." in place:
        (out / place).mkdir(parents=True)
    else:
        (out / place).parent.mkdir(exist_ok=True)
        (out / place).write_text("")
    with pytest.raises(UserError, match=f"^{out}.* can't be written .*choose another output path"):
        reported(monkeypatch, folder, "--out_dir", out)


def test_figures_on_file_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings = FidelitySettings(wm_model=str(tmp_path / "m"), transitions=str(tmp_path / "rows.jsonl"))
    identity = identify(settings)
    for text in ("", "{", "[]", "null", "{}", '{"config": 5}', '{"config": {}, "models": []}'):
        out.write_text(text)
        with pytest.raises(UserError, match=f"^{out}:.*; delete it, or choose another --out_json"):
            read_measured(str(out), identity)
    write_json(out, identity | {"models": {"m": {"consistency": {"left_out": ["a game"]}}}})
    assert read_measured(str(out), identity) == {}  # measured again


# ---------------------------------------------------------------- what other programs go on from


@pytest.mark.parametrize("text", ["{}\n", "[[]]\n", "5\n", '{"row": 1}\n', '{"game_id": "a", "transitions": [{}]}\n'])
def test_lines_of_other_programs(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    for read in (_finished, read_finished):
        with pytest.raises(UserError, match=re.escape(str(file))):
            read(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_checkpoint_whose_mark_is_cut_is_named(tmp_path: Path, text: str) -> None:
    for step in (1, 2):
        write_json(tmp_path / f"checkpoint-{step}" / "complete.json", {"sizes": {"a": 1}})
        (tmp_path / f"checkpoint-{step}" / "a").write_text("x")
    (tmp_path / "checkpoint-2" / "complete.json").write_text(text)
    with pytest.raises(UserError, match="checkpoint-2/complete.json:.*delete this checkpoint"):
        whole_checkpoints(tmp_path)
