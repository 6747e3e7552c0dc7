"""Early experience on real games: rows are what the engine answers, and nothing else of them is learned."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from itp.agent.policy import Policy
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.errors import UserError
from itp.files import read_json
from itp.games import Game
from itp.lm.base import GenParams, Generation
from itp.pretrained import load_tokenizer
from itp.text.prompt_format import TUNED
from itp.text.prompts import prompt_of_observation, world_model_prompt
from itp.text.state import State, parse
from itp.training.base_policy import read_dialogues
from itp.training.examples import IGNORED, encode
from itp.transitions import Transition, read_transitions, write_transitions
from tests.tiny import write_tiny_model
from tests.toy import ToyLM
from world_model import early_experience
from world_model.early_experience import EarlySettings, choose, compared, most_steps


@pytest.fixture(scope="module")
def game(games_root: Path) -> Game:
    return list_games("train", str(games_root))[0]


def solution_of(game: Game) -> list[str]:
    return json.loads(Path(game.path).read_text())["walkthrough"]


@pytest.fixture(scope="module")
def expert(game: Game, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An episode of the solution, with one step at which something else was executed."""
    env, rows = AlfworldEnv(), []
    first = env.reset(game)
    state = State(first.task, first.text)
    for step, action in enumerate([solution_of(game)[0], "look", *solution_of(game)[1:]]):
        seen = env.step(action).obs.text
        imitated = solution_of(game)[1] if step == 1 else action
        rows.append(Transition(f"{game.game_id}#0", step, state.render(), action, seen, imitated))
        state = state.after(action, seen)
    path = tmp_path_factory.mktemp("expert") / "transitions.jsonl"
    write_transitions(path, rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> Path:
    things = {name.lower() for game in list_games("train", games_root)
              for name in re.findall(r"([A-Za-z]+)_bar_", Path(game.path).read_text())}
    words = [*sorted(things), "leads to changes nothing. is better, it leads to: Thought:"]
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model", words=words)


class Proposing(ToyLM):
    """Its samples are ``look``, ``inventory`` and the expert's action, again and again; it explains with a line."""

    def __init__(self, expert: dict[str, str]) -> None:
        super().__init__("policy")
        self.expert = expert

    async def generate(self, prompts: list[str], params: GenParams) -> list[Generation]:
        self.asked += [(prompt, params.seed) for prompt in prompts]
        return [Generation(self.reply(prompt, i), 9, 4, 0, "stop", -1.0) for i, prompt in enumerate(prompts)]

    def reply(self, prompt: str, i: int) -> str:
        if prompt.endswith("Comparison:"):
            return " It shows more.\n"
        own = self.expert[prompt.removesuffix("\nAction:").rpartition("\n\n")[2]]
        return f" {['look', own, 'inventory'][i % 3]}\n"


@pytest.fixture
def run(game: Game, expert: Path, games_root: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the program with a policy that proposes the same always; its output folder."""
    lm = Proposing({t.state: t.expert_action for t in read_transitions(expert)})

    def started(*flags: str, style: str = "tuned") -> Path:
        monkeypatch.setattr(early_experience, "load_policy", lambda *_, **options: Policy(
            lm, dataclasses.replace(TUNED, style=style), selection=options["selection"]))
        monkeypatch.setattr(sys, "argv", [
            "early_experience", "--expert_jsonl", str(expert), "--env_data_root", str(games_root), "--policy_model",
            str(folder), "--out_dir", str(tmp_path / "out"), "--env_processes", "1", "--concurrency", "3", *flags])
        early_experience.main()
        return tmp_path / "out"

    return started


def answer(game: Game, state: State, action: str) -> str:
    """What a fresh engine says to ``action`` after the state's own actions."""
    env = AlfworldEnv()
    env.reset(game)
    for before, seen in state.history:
        assert env.step(before).obs.text == seen
    return env.step(action).obs.text


def test_rows_are_what_the_engine_answers(run: Any, game: Game, expert: Path) -> None:
    out, steps = run("--alternatives", "4"), read_transitions(expert)
    tried = read_transitions(out / "transitions.jsonl")
    wanted = [(t.step, action) for t in steps for action in ("look", "inventory") if action != t.expert_action]
    assert [(t.step, t.action) for t in tried] == wanted  # each once, and not the expert's own
    for t in tried:
        assert t.next_state == answer(game, parse(t.state), t.action)
        assert t.state == steps[t.step].state and t.source == "policy" and not t.expert_action
    summary = read_json(out / "summary.json")
    # 2 alternatives a state, and the expert's action where another one was executed
    assert summary["env_steps"] == {"tried": len(tried) + 1, "replayed": sum(t.step for t in tried) + 1}
    assert summary["outcomes"] == len(tried) and summary["states"] == len(steps)


def test_only_observations_and_the_experts_replies_are_learned(run: Any, expert: Path, folder: Path) -> None:
    out, tokenizer = run("--alternatives", "3"), load_tokenizer(str(folder))
    rows, tried = read_dialogues(str(out / "outcomes.json")), read_transitions(out / "transitions.jsonl")
    assert len(rows) == len(tried)
    for example, row, t in zip(rows, encode(rows, tokenizer, 4000).rows, tried, strict=True):
        assert [text for text, learned in example.segments if learned] == [f" {t.next_state}\n"]
        labels = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(labels) == tokenizer.decode(tokenizer(f" {t.next_state}\n")["input_ids"]) + "[EOS]"
        given = "".join(text for text, learned in example.segments if not learned)
        assert given == world_model_prompt(t.state, t.action) == prompt_of_observation(f"{t.state}\n<CTRL>", t.action)
        assert example.group == f"{t.episode_id}"
    first, *others = read_dialogues(str(out / "reflections.json"))
    assert len(others) == len(read_transitions(expert)) - 1
    learned, = [text for text, learned in first.segments if learned]
    assert learned.endswith(f"\nAction: {read_transitions(expert)[0].expert_action}\n")


def test_thoughts_say_what_happened(run: Any, game: Game, expert: Path) -> None:
    steps, (first, *_) = read_transitions(expert), read_json(run("--alternatives", "3") / "reflections.json")
    state, action = parse(steps[0].state), steps[0].expert_action
    seen = " ".join(answer(game, state, action).split())
    assert first["conversations"][-1] == {"from": "gpt", "value": (
        f"Thought: look changes nothing. inventory changes nothing. {action} is better, it leads to: {seen}\n"
        f"Action: {action}")}
    assert compared(state, "look", "You see.", [(action, answer(game, state, action))], "alfworld") == (
        f"{action} leads to: {seen} look is better, it leads to: You see.")


def test_a_chat_model_writes_the_thoughts_itself(run: Any) -> None:
    out = run("--alternatives", "3", "--reflections", "policy", style="instruct")
    said = [talk["conversations"][-1]["value"].split("\n")[0] for talk in read_json(out / "reflections.json")]
    assert said and set(said) == {"Thought: It shows more."}


def test_a_model_that_explains_nothing_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match="--reflections policy: .*explains nothing"):
        run("--reflections", "policy")


def test_the_same_command_goes_on(run: Any, tmp_path: Path) -> None:
    out = run("--alternatives", "3")
    files = {name: (out / name).read_text() for name in ("transitions.jsonl", "outcomes.json", "reflections.json")}
    lines = (out / "tried.jsonl").read_text().splitlines(keepends=True)
    (out / "tried.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    run("--alternatives", "3")
    assert {name: (out / name).read_text() for name in files} == files
    with pytest.raises(UserError, match="alternatives"):
        run("--alternatives", "2")


def test_random_alternatives_are_admissible(run: Any, game: Game) -> None:
    rows = read_transitions(run("--alternatives", "0", "--random_alternatives", "2") / "transitions.jsonl")
    assert {t.source for t in rows} == {"random"}
    for t in rows:
        env = AlfworldEnv(want_admissible=True)
        now = env.reset(game).admissible
        for action, _ in parse(t.state).history:
            now = env.step(action).obs.admissible
        assert t.action in now


def test_a_budget_of_engine_steps_is_kept(run: Any, expert: Path) -> None:
    spent = read_json(run("--alternatives", "3", "--max_env_steps", "90") / "summary.json")["env_steps"]
    assert 0 < sum(spent.values()) <= 90
    settings = EarlySettings(expert_jsonl=str(expert), out_dir="", alternatives=3, max_env_steps=90)
    rows = early_experience.read_expert(str(expert), None)
    chosen = choose(settings, rows)
    assert sum(most_steps(settings, row) for row in chosen) <= 90 and [row.index for row in chosen] == sorted(
        row.index for row in chosen)
    with pytest.raises(UserError, match="not enough for one state"):
        choose(dataclasses.replace(settings, max_env_steps=1), rows)


@pytest.mark.parametrize("flags, says", [
    (["--alternatives", "0"], "nothing is tried"),
    (["--env_split", "valid_seen"], "names no game of split valid_seen"),
])
def test_what_cannot_work_is_refused(run: Any, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(*flags)
