"""Labels by branching in the real game: by hand where imagination wins, ties and loses; restarts, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itp import rollout
from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games, with_alternative_goals
from itp.envs.base import EnvDied, Observation
from itp.envs.pool import EnvPool
from itp.envs.replay import reach
from itp.envs.scienceworld.env import ScienceworldEnv
from itp.errors import UnplayableGame, UserError
from itp.games import Game
from itp.lm.base import GenParams, Generation
from itp.methods.base import Decision, View
from itp.methods.registry import build
from itp.methods.settings import MethodSettings
from itp.rollout import play
from itp.seeding import derive_seed
from itp.text.state import State, parse
from itp.training.itp_r import branches, label
from itp.training.itp_r.branches import find_games, value_of
from itp.training.itp_r.expert_steps import read_expert
from itp.training.itp_r.label_settings import LabelSettings
from itp.training.itp_r.warm_up_data import SftSettings, as_labeled, read_labeled
from itp.transitions import Transition, write_transitions
from tests.tiny import write_tiny_model
from tests.toy import ToyLM, unit

AT = 2
"""The step at which the toy policy wavers; at all others it knows what to do."""
GIVE_UP, LOITER, GAMBLE = "help", "look", "inventory"
"""After the first it never succeeds; the second costs a step; the third costs one, and sampled branches may give up."""


class Wavering(ToyLM):
    """Follows the solution of its game, but at step AT it takes ``table[k]`` after k imagined steps.

    "solve" stands for the solution's action.
    """

    def __init__(self, role: str, solutions: dict[str, list[str]], table: dict[int, str]) -> None:
        super().__init__(role)
        self.solutions, self.table = solutions, table

    def answer(self, prompt: str, seed: int, params: GenParams) -> Generation:
        if self.role == "world_model":
            return Generation(" A dream.", 9, 4, 0, "stop", -1.0)
        action = self.act(prompt.removesuffix("\nAction:"), seed)
        return Generation(f" {action}" + "\n" * bool(params.choices), 9, 4, 0, "stop", -1.0)

    def act(self, text: str, seed: int) -> str:
        k = text.count("\nThen: ")
        state = parse(text.partition("\nIf: ")[0])
        done, solution = [action for action, _ in state.history], self.solutions[state.task]
        if GIVE_UP in done or done[-1:] == [GAMBLE] and unit("coin", seed) < 0.4:
            return GIVE_UP
        step = sum(action not in (LOITER, GAMBLE) for action in done)
        if done == solution[:AT] and self.table.get(k, "solve") != "solve":
            return self.table[k]
        return solution[step] if step < len(solution) else LOITER


@pytest.fixture(scope="module")
def game(games_root: Path) -> Game:
    return max(list_games("train", str(games_root)), key=lambda game: len(solution_of(game)))


def solution_of(game: Game) -> list[str]:
    return json.loads(Path(game.path).read_text())["walkthrough"]


@pytest.fixture(scope="module")
def expert(game: Game, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of the solution of ``game``."""
    env, rows = AlfworldEnv(), []
    for n in range(2):
        first = env.reset(game)
        state = State(first.task, first.text)
        for step, action in enumerate(solution_of(game)):
            seen = env.step(action).obs.text
            rows.append(Transition(f"{game.game_id}#{n}", step, state.render(), action, seen, action))
            state = state.after(action, seen)
    path = tmp_path_factory.mktemp("expert") / "transitions.jsonl"
    write_transitions(path, rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder, which is named and not loaded."""
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "model"))


Label = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def labeled(game: Game, expert: Path, games_root: Path, folder: str, tmp_path: Path,
            monkeypatch: pytest.MonkeyPatch) -> Label:
    """Labels the episodes with a toy policy of ``table``; the rows by episode and step."""
    solutions = {AlfworldEnv().reset(game).task: solution_of(game)}

    def run(table: dict[int, str], out: str = "labeled.jsonl", **changes: Any) -> list[dict[str, Any]]:
        def load_policy(*_: Any, selection: str, temperature: float, **__: Any) -> Policy:
            return Policy(Wavering("policy", solutions, table), selection=selection, temperature=temperature)

        monkeypatch.setattr(label, "load_policy", load_policy)
        monkeypatch.setattr(label, "load_world_model",
                            lambda *_, **__: WorldModel(Wavering("world_model", solutions, table)))
        settings = settings_of(expert, folder, games_root, tmp_path / out, **changes)
        label.run(settings)
        return [json.loads(line) for line in Path(settings.out_labeled_jsonl).read_text().splitlines()]

    return run


def settings_of(expert: Path, folder: str, root: Path, out: Path, **changes: Any) -> LabelSettings:
    return LabelSettings(**{
        "label_by": "branch", "expert_jsonl": str(expert), "policy_model": folder, "wm_model": folder,
        "out_labeled_jsonl": str(out), "env_data_root": str(root), "max_k": 2, "branch_gamma": 0.9,
        "policy_device": "cpu", "wm_device": "cpu", "env_processes": 1} | changes)


def test_the_value_of_branches_is_their_mean_discounted_success() -> None:
    assert value_of([(True, 3)], 0.5) == 0.125 and value_of([(False, 3)], 0.5) == 0.0
    assert value_of([(True, 1), (False, 9), (True, 2), (False, 9)], 0.5) == (0.5 + 0.25) / 4
    assert value_of([(True, 1), (False, 9)], 1.0) == 0.5


@pytest.mark.parametrize("table, extra, lambda_k, k_label, revise", [
    ({0: GIVE_UP, 1: "solve", 2: "solve"}, 0, 0.01, 1, [True, True]),
    ({0: GIVE_UP, 1: GIVE_UP, 2: "solve"}, 0, 0.01, 2, [False, True]),
    ({0: LOITER, 1: "solve", 2: LOITER}, 1, 0.01, 1, [True, False]),  # a step is saved
    ({0: LOITER, 1: "solve", 2: LOITER}, 1, 0.1, 0, [True, False]),  # which is worth less than imagining one
    ({0: "solve", 1: GIVE_UP, 2: LOITER}, 1, 0.01, 0, [False, False]),
    ({0: LOITER, 1: GAMBLE, 2: LOITER}, 1, 0.0, 0, [False, False]),  # a tie
    ({0: GIVE_UP, 1: LOITER, 2: GIVE_UP}, 0, 0.0, 0, [False, False]),  # a step more than there is: no success
])
def test_the_label_is_the_k_whose_action_wins(labeled: Label, game: Game, table: dict[int, str], extra: int,
                                              lambda_k: float, k_label: int, revise: list[bool]) -> None:
    """``extra``: how many steps more than the solution has left a branch may take."""
    solution, selection = solution_of(game), "constrained" if lambda_k == 0.01 else "generate"
    left = len(solution) - AT
    expected = {"solve": 0.9 ** left, GIVE_UP: 0.0} | dict.fromkeys((LOITER, GAMBLE), extra * 0.9 ** (left + 1))
    rows = labeled(table, lambda_k=lambda_k, action_selection=selection, branch_steps=left + extra)
    assert len(rows) == 2 * len(solution)
    for row in rows:
        if row["step"] != AT:
            assert row["actions"] == dict.fromkeys("012", solution[row["step"]]) and row["branches"] == {}
            assert (row["k_label"], row["values"], row["winner"], row["margins"]) == (0, {}, "", {})
            assert row["revise"] == {"1": False, "2": False} and row["engine_steps"]["played"] == 0
            continue
        worth = {k: expected[table[k]] for k in table}
        assert row["actions"] == {str(k): solution[AT] if a == "solve" else a for k, a in table.items()}
        assert row["values"] == pytest.approx({str(k): v for k, v in worth.items()})
        assert row["scores"] == pytest.approx({str(k): v - worth[0] - lambda_k * k for k, v in worth.items()})
        assert row["k_label"] == k_label and list(row["revise"].values()) == revise
        assert row["winner"] == (row["actions"][str(max(worth, key=worth.get))] if max(worth.values()) else "")
        assert set(row["margins"]) == {str(k) for k in table if table[k] != table[0]}
        tries = len(set(table.values())) + (selection == "constrained")  # what is admissible is read there, too
        assert row["engine_steps"] == {"replayed": AT * tries,
                                       "played": sum(steps for ((_, steps),) in row["branches"].values())}
        assert row["label_by"] == "branch" and [seen for _, seen in row["imagined"]] == ["A dream."] * 2


def test_a_k_is_what_the_method_does_with_k_fixed(labeled: Label, game: Game, expert: Path) -> None:
    table = {0: "solve", 1: LOITER, 2: GAMBLE}
    rows = labeled(table)
    first = AlfworldEnv().reset(game)
    policy, world_model = (Wavering(role, {first.task: solution_of(game)}, table) for role in ("policy", "world_model"))
    for row in rows[:4]:
        for k in range(3):
            method = build("foresight", Policy(policy), WorldModel(world_model), MethodSettings(fixed_k=k))
            view = View(game, row["step"], parse(row["state"]), first, derive_seed(123, row["episode_id"], row["step"]))
            decision = asyncio.run(method.act(view))
            assert row["actions"][str(k)] == decision.action
            assert [list(step) for step in decision.imagined.steps] == row["imagined"][:k]


def test_several_branches_are_sampled_and_averaged(labeled: Label, game: Game, tmp_path: Path) -> None:
    table = {0: "solve", 1: GAMBLE, 2: GAMBLE}
    row = labeled(table, branches=8, max_rows=len(solution_of(game)))[AT]
    left = len(solution_of(game)) - AT
    assert row["branches"][solution_of(game)[AT]] == [[True, left]] * 8
    gambles = row["branches"][GAMBLE]
    successes = sum(success for success, _ in gambles)
    assert 0 < successes < 8 and all(steps == (left + 1 if success else 40) for success, steps in gambles)
    assert row["values"]["1"] == pytest.approx(0.9 ** (left + 1) * successes / 8)
    alone = labeled(table, out="alone.jsonl")[AT]  # a single branch is greedy: the gamble is won
    assert alone["branches"][GAMBLE] == [[True, left + 1]]


def test_neither_concurrency_nor_a_restart_changes_a_label(labeled: Label, tmp_path: Path) -> None:
    table = {0: GAMBLE, 1: "solve", 2: GIVE_UP}
    together = labeled(table, branches=3, concurrency=5)
    assert together == labeled(table, "alone.jsonl", branches=3, concurrency=1)
    progress = tmp_path / "labeled.jsonl.run" / "rows.jsonl"
    content = progress.read_bytes()
    before = content[:len(content) // 2]
    progress.write_bytes(before)  # in the middle of a line
    (tmp_path / "labeled.jsonl").unlink()
    assert labeled(table, branches=3, concurrency=5) == together
    assert progress.read_bytes().startswith(before[:before.rfind(b"\n") + 1])
    assert len(progress.read_text().splitlines()) == len(together)
    with pytest.raises(UserError, match="branches: 3 there, 4 now"):
        labeled(table, branches=4)
    with pytest.raises(UserError, match="label_by: 'branch' there, 'likelihood' now"):
        labeled(table, label_by="likelihood", env_data_root="", branch_gamma=0.95)


def test_the_summary_counts_outcomes_and_costs(labeled: Label, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = labeled({0: LOITER, 1: "solve", 2: GIVE_UP})
    summary = json.loads((tmp_path / "labeled.jsonl.run" / "summary.json").read_text())
    same = len(rows) - 2
    assert summary["outcomes"] == {"1": {"same": same, "wins": 2, "ties": 0, "loses": 0},
                                   "2": {"same": same, "wins": 0, "ties": 0, "loses": 2}}
    assert summary["branched_rows"] == 2 and summary["labels"] == {"0": same, "1": 2, "2": 0}
    assert summary["engine_steps"]["played"] == sum(row["engine_steps"]["played"] for row in rows) > 0
    margins = [row["margins"]["1"] for row in rows if row["margins"]]
    assert summary["mean_margin"]["wins"] == pytest.approx(sum(margins) / 2)
    assert f"same {same}, wins 2, ties 0, loses 0" in capsys.readouterr().out


def test_stage_2_takes_the_rows_and_learns_the_winner(labeled: Label, game: Game, tmp_path: Path) -> None:
    rows = labeled({0: GIVE_UP, 1: LOITER, 2: GIVE_UP})
    path = str(tmp_path / "labeled.jsonl")

    def read(**changes: Any) -> list[tuple[str, int | None]]:
        settings = SftSettings(train_jsonl=path, policy_model="", out_dir="", max_k=2, **changes)
        return [(step.action, step.k) for step in read_labeled(as_labeled(settings))][:len(solution_of(game)) * 3]

    expert = [(action, 1 if t == AT else 0) for t, action in enumerate(solution_of(game))]
    winners = [(LOITER if t == AT else action, k) for t, (action, k) in enumerate(expert)]
    assert rows[AT]["winner"] == LOITER and read()[:len(expert)] == expert
    assert read(act_as="winner")[:len(winners)] == winners
    assert read(act_as="winner", act_on="all")[3 * AT:3 * AT + 3] == [(LOITER, 1), (LOITER, None), (LOITER, None)]
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({name: value for name, value in rows[0].items() if name != "winner"}) + "\n")
    settings = SftSettings(train_jsonl=path, policy_model="", out_dir="", max_k=2, act_as="winner")
    with pytest.raises(UserError, match="bare.jsonl:1: no field 'winner'.*--label_by branch"):
        read_labeled(as_labeled(dataclasses.replace(settings, train_jsonl=str(bare))))


def test_an_episode_may_begin_in_a_state(game: Game, expert: Path) -> None:
    """It is played on from there, with as many steps as it is given, and only if the game repeats itself."""
    solution = solution_of(game)
    row = read_expert(str(expert), None)[AT]
    task = row.state.task
    method = build("sft", Policy(Wavering("policy", {task: solution}, {})), None, MethodSettings())
    views: list[View] = []
    act = method.act

    async def noting(view: View) -> Decision:
        views.append(view)
        return await act(view)

    method.act = noting

    async def main() -> None:
        async with EnvPool(AlfworldEnv, 1) as pool, pool.session() as env:
            async def played(max_steps: int, begin: State):
                return await play(env, method, game, max_steps=max_steps, seed=1, begin=begin,
                                  seat=lambda: asyncio.Semaphore(1))

            whole = await played(len(solution) - AT, row.state)
            assert whole.success and [step.decision.action for step in whole.steps] == solution[AT:]
            assert whole.steps[0].state == row.state and views[0].observation.text == row.state.observation
            assert [(view.step, view.seed) for view in views] == [
                (t, derive_seed(1, game.game_id, t)) for t in range(AT, len(solution))]
            assert not (await played(len(solution) - AT - 1, row.state)).success
            other = dataclasses.replace(row.state, history=(*row.state.history[:-1], (solution[AT - 1], "A moon.")))
            with pytest.raises(UserError, match="after step 2.*and the episode saw 'A moon.'"):
                await played(1, other)

    asyncio.run(main())


def test_the_game_of_an_episode_is_found_with_its_goal(game: Game, games_root: Path, expert: Path, folder: str,
                                                       tmp_path: Path) -> None:
    settings = settings_of(expert, folder, games_root, tmp_path / "out")
    row = read_expert(str(expert), None)[0]
    other = with_alternative_goals(game, 2)[1]

    def find(episode: str, state: State = row.state) -> dict[str, Game]:
        renamed = dataclasses.replace(row.transition, episode_id=episode)
        return find_games(settings, [dataclasses.replace(row, transition=renamed, state=state)])

    assert find(game.game_id) == {game.game_id: game} and other.goal == 1
    assert find(f"{game.game_id}@1#7") == {f"{game.game_id}@1#7": other}
    for wrong in ("nowhere", f"{game.game_id}@99", f"{game.game_id}@x#1"):
        with pytest.raises(UserError, match=f"transitions.jsonl:1: episode '{wrong}' names no game of split train"):
            find(wrong)
    cut = State("t", "o").after("a", "b").after("c", "d").last(1)
    with pytest.raises(UserError, match="transitions.jsonl:1: the state lacks its first 1 steps"):
        find(game.game_id, cut)


def test_another_game_than_the_episodes_is_named_with_its_row(labeled: Label, expert: Path, tmp_path: Path) -> None:
    lines = expert.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    first = parse(json.loads(lines[AT])["state"]).first
    other.write_text("\n".join(line.replace(json.dumps(first)[1:-1], "A moon.") for line in lines[:AT + 1]) + "\n")
    with pytest.raises(UserError, match=r"other.jsonl:3: .* at its start its copy here says") as error:
        labeled({0: GIVE_UP, 1: LOITER}, expert_jsonl=str(other))
    assert "\n" not in str(error.value)


def test_a_process_that_died_costs_another_try_and_a_broken_game_its_rows(
        labeled: Label, game: Game, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, errors = {0: GIVE_UP, 1: "solve"}, []

    async def failing(*how: Any) -> Observation:
        if errors:
            raise errors.pop()
        return await reach(*how)

    for module in (branches, rollout):
        monkeypatch.setattr(module, "reach", failing)
    how = {"max_rows": len(solution_of(game)), "concurrency": 1, "action_selection": "constrained"}
    undisturbed = labeled(table, "a.jsonl", **how)
    errors += [EnvDied("it died")] * 3
    assert labeled(table, "b.jsonl", **how) == undisturbed
    errors += [EnvDied("it died")] * 4
    with pytest.raises(UserError, match="start the same command again"):
        labeled(table, "c.jsonl", **how)
    errors.append(UnplayableGame("broken"))
    assert labeled(table, "d.jsonl", **how) == undisturbed[1:]
    assert json.loads((tmp_path / "d.jsonl.run" / "summary.json").read_text())["skipped"] == 1


@pytest.mark.parametrize("changes, says", [
    ({"env_data_root": ""}, "give --env_data_root"),
    ({"imagination": "teacher_forced", "foresight_format": "last_obs"}, "teacher_forced shows the expert's"),
    ({"logprob_norm": "mean"}, "--logprob_norm is of --label_by likelihood"),
    ({"max_k": 0}, "give --max_k 1 or more"),
    ({"branch_gamma": 1.1}, "--branch_gamma 1.1: more than 1"),
    ({"env_split": "seen"}, "names no game of split seen"),
    ({"label_by": "likelihood"}, "--env_data_root is for --label_by branch"),
    ({"label_by": "likelihood", "env_data_root": "", "branch_gamma": 0.95, "branches": 2}, "--branches is for"),
])
def test_what_cannot_be_compared_is_refused(labeled: Label, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        labeled({}, **changes)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_price_of_a_step_is_the_papers_or_that_of_branches() -> None:
    given = {"expert_jsonl": "", "policy_model": "", "wm_model": "", "out_labeled_jsonl": ""}
    assert LabelSettings(**given).lambda_k == 0.2 and LabelSettings(**given, label_by="branch").lambda_k == 0.01
    assert LabelSettings(**given, label_by="branch", lambda_k=0.3).lambda_k == 0.3


def test_scienceworld(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A focus on the wrong thing ends an episode at once; another action goes on to the last step."""
    class Focus(ToyLM):
        def answer(self, prompt: str, seed: int, params: GenParams) -> Generation:
            there = "Observation:" if self.role == "world_model" else "If: "
            text = "A dream." if self.role == "world_model" else "focus on agent" if there in prompt else "look around"
            return Generation(f" {text}", 9, 4, 0, "stop", -1.0)

    env = ScienceworldEnv()
    try:
        game = Game("scienceworld", "train", "find-plant/0", "find-plant/0/easy", "find-plant")
        first = env.reset(game)
        state = State(first.task, first.text)
        seen = env.step("inventory").obs.text
        after = state.after("inventory", seen)
        write_transitions(tmp_path / "t.jsonl", [
            Transition(f"{game.game_id}#0", t, s.render(), "inventory", seen, "inventory")
            for t, s in enumerate((state, after))])
        monkeypatch.setattr(label, "load_policy", lambda *_, **__: Policy(Focus("policy")))
        monkeypatch.setattr(label, "load_world_model", lambda *_, **__: WorldModel(Focus("world_model")))
        settings = settings_of(tmp_path / "t.jsonl", folder, Path(""), tmp_path / "out.jsonl", env="scienceworld",
                               env_data_root="", max_k=1, branch_steps=3, concurrency=1)
        label.run(settings)
    finally:
        env.close()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for t, row in enumerate(rows):
        assert row["branches"] == {"look around": [[False, 3]], "focus on agent": [[False, 1]]}
        assert row["engine_steps"] == {"replayed": 2 * t, "played": 4} and row["k_label"] == 0
    assert len(rows) == 2
