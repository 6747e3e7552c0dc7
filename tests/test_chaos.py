"""scripts/chaos.py stays alive: a few mutations of every reader, a worker that hangs, and one kill."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from itp.files import write_json
from itp.model_card import ModelCard
from itp.text.dialogues import episode_dialogue
from itp.text.state import State
from itp.transitions import Transition, write_transitions
from tests.made_results import PLAYED, ROOM, make_episode, make_games, write_result
from tests.tiny import write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import chaos_inputs  # noqa: E402
import chaos_kills  # noqa: E402
import chaos_runs  # noqa: E402
from chaos_readers import READERS, Reader  # noqa: E402

DEPTH = {"fact_f1": 0.5, "fact_f1_interval": [0.4, 0.6], "exact_match": 0.5, "token_f1": 0.5, "n": 2}


def played() -> list[Transition]:
    rows, state = [], State("put a mug in fridge", ROOM)
    for t, (action, seen) in enumerate(PLAYED):
        rows.append(Transition("e", t, state.render(), action, seen, action))
        state = state.after(action, seen)
    return rows


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> Path:
    """The files that undisturbed runs leave, made by hand."""
    from itp.agent.policy_with_heads import PolicyWithHeads
    from itp.pretrained import load_causal_lm

    root = tmp_path_factory.mktemp("chaos") / "runs"
    rows = played()
    (root / "collect").mkdir(parents=True)
    write_transitions(root / "collect" / "transitions.jsonl", rows)
    write_json(root / "collect" / "dialogues.json", [episode_dialogue(rows)])
    write_lines(root / "collect" / "episodes.jsonl", [{"game_id": "e", "transitions": [asdict(t) for t in rows]}])
    write_lines(root / "label" / "labeled.jsonl", [{**asdict(t), "k_label": 1, "imagined": [[t.action, t.next_state]],
                                                    "shown": {"foresight_format": "full"}} for t in rows])
    write_lines(root / "label" / "labeled.jsonl.run" / "rows.jsonl", [{"row": 0, "added": {"k_label": 1}}])
    write_json(root / "fidelity" / "fidelity.json", {"config": {}, "models": {"m": {
        "one_step": {"expert": {"all": DEPTH}}, "by_depth": {"expert": {"1": DEPTH}}}}})
    game, = make_games(root / "made", 1)
    write_result(root / "evaluate", [make_episode(game, success=True, imagined=[PLAYED[:1]])])
    write_lines(root / "evaluate" / "timing.jsonl", [
        {"episodes": 1, "steps": 3, "seconds": 1.0, "processes": 1, "peak_memory_bytes": {}}])
    model, tokenizer = load_causal_lm(str(write_tiny_model(root / "plain")))
    PolicyWithHeads.create(model, tokenizer, 2, ModelCard(max_seq_len=99)).save_pretrained(
        root / "sft" / "merged_full", tokenizer)
    (root / "games").symlink_to(games_root)
    return root


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_what_is_valid_and_refuses_the_rest_in_a_line(name: str, runs: Path, tmp_path: Path) -> None:
    valid = tmp_path / "valid"
    READERS[name].prepare(runs, valid)
    assert chaos_inputs.read(READERS[name], shutil.copytree(valid, tmp_path / "copy")) == ("read", "")
    for number in range(5):
        path, kind, content = chaos_inputs.mutation(valid, name, 0, number)
        assert (path, kind, content) == chaos_inputs.mutation(valid, name, 0, number)  # it can be made again
        folder = shutil.copytree(valid, tmp_path / str(number))
        (folder / path.relative_to(valid)).write_bytes(content)
        outcome, said = chaos_inputs.read(READERS[name], folder)
        assert outcome in ("read", "refused"), f"{kind} of {path.name}: {said}"


def test_tracebacks_are_counted() -> None:
    def broken(folder: Path) -> None:
        raise KeyError("a key")

    outcome, said = chaos_inputs.read(Reader(lambda runs, folder: None, "*", broken), Path())
    assert outcome == "traceback" and said.startswith("KeyError: 'a key'") and "test_chaos.py" in said
    one = chaos_inputs.Outcome("r", 0, "f", "cut", outcome, said)
    assert chaos_inputs.input_figures([one])["by_reader"]["r"]["traceback"] == 1


def test_a_worker_that_says_nothing_hangs_and_one_that_is_gone_died() -> None:
    here, there = chaos_inputs.CONTEXT.Pipe()
    start = time.monotonic()
    assert chaos_inputs._answer(here, 0.1) == "hang" and time.monotonic() - start < 5
    there.send(("read", ""))
    assert chaos_inputs._answer(here, 0.1) == ("read", "")
    there.close()
    assert chaos_inputs._answer(here, 0.1) == "died"


def test_figures_without_the_clock_are_compared() -> None:
    timed = {"n": 1, "usage": [{"seconds": 2, "calls": 3}]}
    assert chaos_runs.without_clock(timed) == {"n": 1, "usage": [{"calls": 3}]}
    assert chaos_runs.differences({"a": [1.0, "x"]}, {"a": [1.00001, "x"]}) == []
    assert chaos_runs.differences({"a": [1.1, "x"]}, {"a": [1.0, "y"], "b": 0}) == [
        "/b: only in one", "/a/0: 1.1, not 1.0", "/a/1: 'x', not 'y'"]


def test_the_plan_of_the_kills() -> None:
    plan = chaos_kills.planned(100, 1)
    assert len(plan) == sum(chaos_kills.KILLS.values()) == 100 and {*plan} == chaos_kills.KILLS.keys()
    assert plan == chaos_kills.planned(100, 1) != chaos_kills.planned(100, 2)


def test_one_kill(tmp_path: Path, games_root: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "games").symlink_to(games_root)
    write_json(runs / "seconds.json", {"games": 1.0})
    seconds = chaos_runs.prepare(runs, ["collect"])["collect"]
    outcome = chaos_kills.Trial(tmp_path, chaos_runs.BY_NAME["collect"], "program", 0, 1, seconds).run()
    assert outcome["faults"] == [] and 0 < outcome["moment"] < seconds
