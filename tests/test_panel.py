"""Panels: the same games in the same order, wherever they lie and whoever made them; and what reports compare."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from foresight_eval import results
from foresight_eval.report.report import overview
from foresight_eval.runner import evaluate
from foresight_eval.same_games import check_same_games
from foresight_eval.settings import AlfworldSettings, SciworldSettings
from itp.envs.alfworld.games import list_games
from itp.envs.alfworld.generate import GenerateSettings, generate_panels
from itp.envs.panel import (
    Panel, PanelSettings, alfworld_games, game_hash, read_panel, read_panel_of, scienceworld_games, write_panel,
)
from itp.envs.scienceworld.games import STEP_LIMITS, splits
from itp.errors import UserError
from tests.made_results import CONFIG, make_episode, make_games, write_result
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def panel_file(games_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A panel of the six train games."""
    file = tmp_path_factory.mktemp("panels") / "six.json"
    write_panel(PanelSettings(out_json=str(file), split="train", env_data_root=str(games_root)))
    return file


@pytest.fixture(scope="module")
def shuffled(games_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same games elsewhere: other names of their trials, another order, other times, written as other JSON."""
    root = tmp_path_factory.mktemp("elsewhere")
    games = list_games("train", games_root)
    for i, game in enumerate(random.Random(1).sample(games, len(games))):
        source = Path(game.path).parent
        folder = root / "json_2.1.1" / "train" / source.parent.name / f"trial_z{i}"
        shutil.copytree(source, folder)
        file = folder / "game.tw-pddl"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(dict(reversed(content.items())), indent=3))
        os.utime(file, (1e9, 1e9))
    return root


def test_the_shipped_panels_are_what_results_say_they_are() -> None:
    """Another hash is another panel: then results of before aren't comparable any more."""
    for name, split, shown in (("seen", "valid_seen", "7dd675862135fead"), ("unseen", "valid_unseen",
                                                                           "6815b124096aab4d")):
        panel = read_panel(f"alfworld_made_{name}")
        assert (panel.hash, panel.split, len(panel.entries)) == (shown, split, 204)
        assert set(Counter(entry.task_type for entry in panel.entries).values()) == {34}
    assert read_panel("scienceworld_test").hash == "bebd21a6972bc2da"


def test_games_made_anew_are_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six games of the shipped panel, made on this machine by the command that makes all of them."""
    shipped = read_panel("alfworld_made_unseen")
    some = [entry for entry in shipped.entries if int(entry.id[-6:]) < 6]  # the first the generator makes
    small = dataclasses.replace(shipped, entries=tuple(some))
    monkeypatch.setattr("itp.envs.alfworld.generate.read_panel_of", lambda *_: small)
    settings = GenerateSettings(out_dir=str(tmp_path), panel="alfworld_made_unseen")
    assert generate_panels(settings)["made"] == 6
    assert [game.game_id for game in alfworld_games(small, tmp_path)] == [entry.id for entry in some]
    assert generate_panels(settings)["made"] == 0

    broken = Path(list_games("valid_unseen", tmp_path)[2].path)
    broken.write_text(broken.read_text().replace("(:init", "(:init (never)", 1))
    with pytest.raises(UserError, match=f"1 of its 6 games .*{some[2].id} has other content"):
        generate_panels(settings)


def test_a_hash_is_of_what_the_engine_reads(games_root: Path, panel_file: Path, shuffled: Path) -> None:
    panel = read_panel(str(panel_file))
    assert [(g.game_id, g.task_type) for g in alfworld_games(panel, shuffled)] == [
        (g.game_id, g.task_type) for g in list_games("train", games_root)]
    assert alfworld_games(panel, shuffled / "json_2.1.1") == alfworld_games(panel, shuffled)
    game = alfworld_games(panel, shuffled)[0]
    content = json.loads(Path(game.path).read_text())
    seen = {game_hash(game)}
    for changed in ("walkthrough", "pddl_domain", "grammar", "pddl_problem"):
        other = Path(game.path).with_name(f"{changed}.json")
        other.write_text(json.dumps(content | {changed: content[changed] and content[changed][:-1]}))
        seen.add(game_hash(dataclasses.replace(game, path=str(other))))
    assert len(seen) == 4  # the expert's solution doesn't count


def test_what_is_missing_is_named(panel_file: Path, tmp_path: Path) -> None:
    panel = read_panel(str(panel_file))
    with pytest.raises(UserError, match=f"6 of its 6 games .*{panel.entries[0].id} is missing; make them"):
        alfworld_games(panel, tmp_path)
    with pytest.raises(UserError, match="--split seen: --panel .* is of train"):
        read_panel_of(str(panel_file), "alfworld", "seen", "dev")
    with pytest.raises(UserError, match="its games are alfworld's"):
        read_panel_of(str(panel_file), "scienceworld", "dev", "dev")
    with pytest.raises(UserError, match=r"no such file, nor a panel of this repository \(alfworld_made_seen, "):
        read_panel("nothing")
    twice = json.loads(panel_file.read_text())
    twice["games"] += twice["games"][:1]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    with pytest.raises(UserError, match="two games have the same id"):
        read_panel(str(tmp_path / "twice.json"))


def test_results_are_the_same_wherever_the_games_lie(games_root: Path, panel_file: Path, shuffled: Path,
                                                     tmp_path: Path) -> None:
    base = AlfworldSettings(
        policy_model=str(write_tiny_model(tmp_path / "policy")), method="sft", out_dir="", panel=str(panel_file),
        max_steps=3, act_tokens=8, prompt_style="tuned", device="cpu", temperature=0.7)
    played = []
    for root, concurrency, processes in ((games_root, 1, 1), (shuffled, 6, 2)):
        out = tmp_path / f"out{concurrency}"
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(out), env_data_root=str(root),
                                                 concurrency=concurrency, env_processes=processes)))
        played.append(results.read_results([out])[0])
    panel = read_panel(str(panel_file))
    for made in played:
        assert [meta["game_id"] for meta in made.metas] == [entry.id for entry in panel.entries]
        assert [meta["game_hash"] for meta in made.metas] == [entry.hash for entry in panel.entries]
        assert made.summary["panel"] == {"name": "six", "hash": panel.hash}
        assert made.config["split"] == "train"
        assert f"panel six {panel.hash}" in overview([made])
    one, other = ([[(step["action"], step["obs_next"]) for step in record["foresight_steps"]]
                   for record in made.records.values()] for made in played)
    assert one == other and len(one) == 6
    check_same_games(played, allow_mixed=False)

    reordered = json.loads(panel_file.read_text())
    reordered["games"].reverse()
    (tmp_path / "six.json").write_text(json.dumps(reordered))
    changed = dataclasses.replace(base, out_dir=str(tmp_path / "out1"), env_data_root=str(games_root),
                                  panel=str(tmp_path / "six.json"))
    for settings in (changed, dataclasses.replace(changed, panel="", split="train")):
        with pytest.raises(UserError, match="panel_hash"):
            asyncio.run(evaluate(settings))


def test_a_report_refuses_results_of_other_games(tmp_path: Path) -> None:
    episodes = [make_episode(game, success=True, imagined=[]) for game in make_games(tmp_path / "games", 3)]
    all_three = write_result(tmp_path / "all", episodes)
    two = write_result(tmp_path / "two", episodes[:2])
    of_panel = write_result(tmp_path / "panel", episodes, panel="panels/p.json", panel_hash="1")
    of_other = write_result(tmp_path / "other", episodes, panel="p", panel_hash="2")
    check_same_games([all_three, write_result(tmp_path / "same", episodes), write_result(tmp_path / "none", [])],
                     allow_mixed=False)
    for pair, said in (([all_three, two], "3 and 2, of which 2 are the same"),
                       ([all_three, of_panel], r"different panels \(none; p 1\)"),
                       ([of_panel, of_other], r"different panels \(p 1; p 2\)")):
        with pytest.raises(UserError, match=f"{said}; .*--allow_mixed"):
            check_same_games(pair, allow_mixed=False)
        check_same_games(pair, allow_mixed=True)

    for i, record in two.records.items():
        record["meta"]["game_hash"] = "else" * i or record["meta"]["game_hash"]
    with pytest.raises(UserError, match="different games that are both called game_1"):
        check_same_games([all_three, two], allow_mixed=True)
    assert "panel" not in CONFIG  # results of before there were panels


def test_a_scienceworld_panel() -> None:
    """Task and variation of each are the simulator's own; no file of games is needed."""
    panel = read_panel("scienceworld_test")
    games = scienceworld_games(panel, SciworldSettings(policy_model="", out_dir=""))
    assert [game.game_id for game in games] == [entry.id for entry in panel.entries]
    known = splits()
    assert {game.task_type for game in games} == set(STEP_LIMITS)
    assert all(int(g.game_id.split("/")[1]) in known[g.task_type]["valid_unseen"] for g in games)
    assert games[0].max_steps == STEP_LIMITS["boil"]
    with pytest.raises(UserError, match="another game with --simplification 'openDoors'"):
        scienceworld_games(panel, SciworldSettings(policy_model="", out_dir="", simplification="openDoors"))
    with pytest.raises(UserError, match="leave --tasks out"):
        scienceworld_games(panel, SciworldSettings(policy_model="", out_dir="", tasks="boil"))


def test_the_order_and_the_names_are_part_of_a_panel(panel_file: Path) -> None:
    panel = read_panel(str(panel_file))
    renamed = dataclasses.replace(panel.entries[0], id="another name")
    others = [Panel(panel.name, panel.env, panel.split, panel.made, entries) for entries in (
        panel.entries[::-1], panel.entries[:-1], (renamed, *panel.entries[1:]))]
    assert len({panel.hash, *(other.hash for other in others)}) == 4
