"""Stage 3: what is learned from is what was drawn, runs go on after a kill, and K falls where looking ahead is dear."""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itp.agent.world_model import WorldModel
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.base import Observation, StepResult
from itp.envs.pool import EnvPool
from itp.errors import UserError
from itp.files import read_json
from itp.games import Game
from itp.lm.base import Trace
from itp.methods.base import Decision
from itp.model_card import ModelCard
from itp.rollout import Episode, Step
from itp.seeding import derive_seed
from itp.text.prompts import CTRL
from itp.text.state import State
from itp.training.itp_r import a2c
from itp.training.itp_r.a2c_rollout import annealed_limit, efficacy, rewards_of
from itp.training.itp_r.a2c_settings import RlSettings, checked, data_root
from itp.training.itp_r.checkpoint import RunFolder
from tests.rl_runs import KMAX, approx, metrics, settings, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"), games_root)


class Corridor:
    """Any action leads on; the third step wins.  Looking ahead can't help here."""

    want_admissible = True

    def reset(self, game: Game) -> Observation:
        self.steps = 0
        return Observation("You are in a room.", "look", admissible=("look", "inventory"))

    def step(self, action: str) -> StepResult:
        self.steps += 1
        won = self.steps == 3
        obs = Observation("You see a desk 2.", "look", admissible=("look", "inventory"))
        return StepResult(obs, float(won), won, False, 100.0 * won, won, False)

    def close(self) -> None:
        pass


@pytest.fixture
def corridor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs play in a corridor, which starts in no time."""
    games = [Game("alfworld", "train", f"corridor {i}", "", "") for i in range(4)]
    held_out = games[3:]
    monkeypatch.setattr(a2c, "environment",
                        lambda chosen: (Corridor, games[:3], held_out if chosen.eval_every else []))


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("changes", [
    {"action_selection": "constrained", "observation_loss": 0.1},
    {"action_selection": "generate", "action_temperature": 0.7, "action_top_p": 0.9, "history_keep_steps": 2,
     "foresight_format": "last_obs"},
    {"action_selection": "constrained", "lora_r": 4, "lora_dropout": 0.0, "bootstrap_at_limit": True},
    {"action_selection": "constrained", "attn_implementation": "eager"},
], ids=["constrained", "nucleus", "lora", "eager"])
def test_the_update_reads_what_was_drawn(models, games_root: Path, tmp_path: Path, changes: dict) -> None:
    """With unchanged weights log π_θ(a|·), log P_θ(K|s) and V_θ(s) of the packed episodes are those of acting."""
    from itp.training.itp_r.a2c_rollout import prepare
    from itp.distributed import Processes
    from itp.training.itp_r.a2c_update import make_rows

    chosen = settings(models, games_root, tmp_path, **changes)
    make_env, games, _ = a2c.environment(chosen)

    async def play():
        _, player, learner = a2c.load(chosen, RunFolder(tmp_path), Processes())
        async with EnvPool(make_env, 1) as player.pool:
            episodes = await player.play(games[:3])
            bootstraps = await player.bootstraps(episodes)
        await player.close()
        return episodes, bootstraps, player, learner

    episodes, bootstraps, player, learner = asyncio.run(play())
    samples, _ = prepare(episodes, bootstraps, player.lm, chosen, Processes(), learner.token_values)
    rows = [row for episode in samples for row in make_rows(episode, 10 ** 6)]
    assert len(rows) == len(samples)
    read = learner.read(rows)
    assert learner.policy.causal_lm.config._attn_implementation == chosen.attn_implementation
    decisions = [step.decision for episode in episodes for step in episode.steps]
    assert read.action_logprobs.tolist() == pytest.approx([d.trace.logprob for d in decisions], abs=1e-4)
    assert read.k_logprobs.tolist() == pytest.approx([d.k_logprobs[d.k] for d in decisions], abs=1e-4)
    assert read.values.tolist() == pytest.approx([d.value for d in decisions], abs=1e-4)
    assert len({d.k for d in decisions}) > 1 and min(d.trace.logprob for d in decisions) < -0.1
    assert sum(len(row.tree.ids) for row in rows) < sum(len(s.ids) for e in samples for s in e)
    if chosen.observation_loss:  # what followed is the text that the next prompt goes on with
        for before, after in ((a, b) for episode in samples for a, b in itertools.pairwise(episode)):
            assert [*before.before_observation, *before.observation] == after.heads_ids[:len(before.observed_ids) + 1]
        assert sum(len(row.observed) for row in rows) == sum(len(s.observation) for e in samples for s in e) > 100
    else:
        assert not any(row.observed for row in rows)
    if chosen.bootstrap_at_limit:  # no game is won in so few steps
        assert all(b != 0 for b in bootstraps)
    else:
        assert bootstraps == [0.0] * 3


def test_no_observation_is_learned_beyond_the_models_context() -> None:
    from itp.training.itp_r.a2c_rollout import sample_of

    class Words:
        """A tokenizer whose tokens are words."""

        start = [1]

        def __call__(self, text: str) -> list[int]:
            return [2] * len(text.split())

        continuation = __call__

    decision = Decision("look", prompt="a b", heads_prompt=f"Task: x\n{CTRL}", trace=Trace((3,), (None,), 1.0, 0.0))
    step = Step(State("x", "y"), decision, "one two three four", 0.0, 0.0, False, False)
    chosen = RlSettings(policy_model="", out_dir="", observation_loss=1.0)
    for context, left in ((None, 4), (100, 4), (9, 4), (8, 3), (6, 1), (5, 0), (2, 0)):  # 6 tokens come before
        lm = SimpleNamespace(encode=Words(), context_length=context)
        sample = sample_of(step, 0.0, 0.0, lm, chosen)
        assert (len(sample.before_observation), len(sample.observation)) == (6, left)
        assert len(sample.observed_ids) <= (context or 100) or not left
    assert not sample_of(step, 0.0, 0.0, lm, dataclasses.replace(chosen, observation_loss=0.0)).before_observation


def test_without_the_k_head_k_leaves_the_loss(models, corridor, games_root: Path, tmp_path: Path) -> None:
    chosen = settings(models, games_root, tmp_path, fixed_k=0, wm_model="", episodes_per_epoch=4, eval_every=0)
    a2c.run(chosen)
    rows = metrics(tmp_path)
    assert [row["k_histogram"][1:] for row in rows] == [[0] * KMAX] * 2
    assert [row["entropy"] for row in rows] == [0.0, 0.0] and all(row["wm_tokens"] == 0 for row in rows)
    assert not (tmp_path / "best").exists() and (tmp_path / "last" / "trainer_state.pt").exists()


@pytest.mark.parametrize("normalized", [False, True])
def test_tokens_are_credited_by_what_the_acting_weights_say(models, games_root: Path, tmp_path: Path,
                                                            normalized: bool) -> None:
    """On real games: of each action's drawn tokens the TD advantages add up to the action's own."""
    from itp.distributed import Processes
    from itp.training.itp_r.a2c_rollout import prepare

    chosen = settings(models, games_root, tmp_path, credit="token", n_steps=1, normalize_advantages=normalized)
    make_env, games, _ = a2c.environment(chosen)

    async def play():
        _, player, learner = a2c.load(chosen, RunFolder(tmp_path), Processes())
        async with EnvPool(make_env, 1) as player.pool:
            episodes = await player.play(games[:2])
        await player.close()
        return prepare(episodes, [0.0] * 2, player.lm, chosen, Processes(), learner.token_values), learner

    (episodes, row), learner = asyncio.run(play())
    samples = [sample for episode in episodes for sample in episode]
    assert [len(s.token_advantages) for s in samples] == [len(s.drawn) for s in samples]
    assert [len(s.token_targets) for s in samples] == [max(len(s.drawn) - 1, 0) for s in samples]
    assert max(len(s.drawn) for s in samples) > 1
    everyone = [a for s in samples for a in s.token_advantages]
    if normalized:
        assert sum(everyone) == pytest.approx(0, abs=1e-6) and math.fsum(a * a for a in everyone) == pytest.approx(
            len(everyone), rel=1e-4)
    else:
        assert [sum(s.token_advantages) for s in samples if s.drawn] == pytest.approx(
            [s.advantage for s in samples if s.drawn], abs=1e-6)
        assert row["token_advantage_abs"] == pytest.approx(sum(map(abs, everyone)) / len(everyone))
    found = learner.update(episodes)
    assert all(math.isfinite(value) for value in found.values())


def test_an_action_has_one_advantage_unless_tokens_are_asked_for(models, games_root: Path, tmp_path: Path) -> None:
    """No position more is read, and the loss is the old formula bit by bit."""
    import torch

    from itp.distributed import Processes
    from itp.training.itp_r.a2c_rollout import prepare

    chosen = settings(models, games_root, tmp_path)
    make_env, games, _ = a2c.environment(chosen)

    async def play():
        _, player, learner = a2c.load(chosen, RunFolder(tmp_path), Processes())
        async with EnvPool(make_env, 1) as player.pool:
            episodes = await player.play(games[:2])
        await player.close()
        return prepare(episodes, [0.0] * 2, player.lm, chosen, Processes(), pytest.fail)[0], learner

    episodes, learner = asyncio.run(play())
    rows = [row for episode in episodes for row in learner._rows(episode)]
    samples, places = [sample for row in rows for sample in row.samples], []
    learner.policy.heads.register_forward_hook(lambda module, args, out: places.append(len(args[0])))
    total, _ = learner._loss(rows, len(samples), 0, value_only=False)
    assert places == [len(samples)] and not any(s.token_advantages or s.token_targets for s in samples)
    read = learner.read(rows)
    advantages, targets = (torch.tensor([getattr(s, name) for s in samples]) for name in ("advantage", "target"))
    act = -(advantages * (read.k_logprobs + read.action_logprobs)).sum() / len(samples)
    value = (read.values - targets).square().sum() / len(samples)
    entropy = -read.entropies.sum() / len(samples)
    assert torch.equal(total, act + chosen.value_coef * value + chosen.entropy_coef * entropy)


def test_without_a_critic_the_value_head_stays_as_it_is(models, corridor, games_root: Path, tmp_path: Path) -> None:
    """Episodes of a group differ in what they imagined: λ_K is in their returns."""
    from itp.agent.policy_with_heads import read_heads

    chosen = settings(models, games_root, tmp_path, advantage="group", group_size=4, episodes_per_update=8,
                      episodes_per_epoch=16, num_envs=8, eval_every=0, wd=0.1, value_updates=3)
    a2c.run(chosen)
    rows = metrics(tmp_path)
    assert all(0 < row["groups_with_signal"] <= 1 and row["advantage_abs"] > 0.01 for row in rows)
    assert not {"loss_value", "value_mean", "explained_variance", "loss_observation"} & rows[0].keys()
    before, after = read_heads(chosen.policy_model), read_heads(tmp_path / "last")
    assert {name.split(".")[0] for name in before if not before[name].equal(after[name])} == {"k_head"}


def wandering(game: Game) -> Episode:
    """Two visits, an action that isn't one, a look, a first look into a drawer, and its second opening: 4 of 7 count.

    The engine answers; the first visit goes back where it comes from at last.
    """
    env = AlfworldEnv()
    first = env.reset(game)
    places = re.findall(r"(?:cabinet|drawer) \d+", first.text)
    state, steps = State(first.task, first.text), []
    for action in (f"go to {places[0]}", f"go to {places[1]}", f"go to {places[1]}", "look", f"open {places[1]}",
                   f"open {places[1]}", f"go to {places[0]}"):
        result = env.step(action)
        steps.append(Step(state, Decision(action, k=1), result.obs.text, 0.25, 0.0, False, result.invalid))
        state = state.after(action, result.obs.text)
    return Episode(game, steps, success=True)


def test_outcomes_count_by_the_share_of_actions_that_changed_something(games_root: Path) -> None:
    game = next(g for g in list_games("train", games_root)
                if len(re.findall(r"(?:cabinet|drawer) \d+", AlfworldEnv().reset(g).text)) > 1)
    episode = wandering(game)
    assert efficacy(episode) == 4 / 7
    plain = RlSettings(policy_model="", out_dir="", lambda_k=0.2, step_cost=0.01, success_bonus=0.5,
                       invalid_action_penalty=-0.1)
    costs = [-0.21 - 0.1 * step.invalid for step in episode.steps]
    assert sum(step.invalid for step in episode.steps) >= 1
    assert rewards_of(episode, plain) == pytest.approx([c + 0.25 + 0.5 * (i == 6) for i, c in enumerate(costs)])
    scaled = rewards_of(episode, dataclasses.replace(plain, rescale_reward=True))
    assert scaled == pytest.approx([c + 4 / 7 * (0.25 + 0.5 * (i == 6)) for i, c in enumerate(costs)])
    assert efficacy(Episode(game)) == 1.0
    elsewhere = [Step(State("x", "a", history), Decision("do"), seen, 0.0, 0.0, False, False)
                 for history, seen in (((), "a"), ((("do", "a"),), "b"))]
    assert efficacy(Episode(Game("scienceworld", "train", "g", "", ""), elsewhere)) == 0.5


def test_the_step_limit_falls_by_hand(models, corridor, games_root: Path, tmp_path: Path) -> None:
    assert annealed_limit([10, 20, 30]) == 25 and annealed_limit([30, 30]) == 30 and annealed_limit([3, 3, 4]) == 4
    assert annealed_limit([1]) == 1 and annealed_limit([2, 5]) == 5  # 4.25
    chosen = settings(models, games_root, tmp_path, fixed_k=0, wm_model="", max_steps=9, anneal_turns=2,
                      rescale_reward=True, eval_every=2)
    a2c.run(chosen)  # every episode of the corridor is won by the third step
    rows = [row for row in metrics(tmp_path) if row["update"]]
    assert [row["turn_limit"] for row in rows] == [9, 9, 3, 3] and {row["episode_steps"] for row in rows} == {3.0}
    assert {row["efficacy"] for row in rows} == {0.0}  # its answers say nothing of the room
    import torch

    assert torch.load(tmp_path / "last" / "trainer_state.pt", weights_only=False)["progress"]["turn_limit"] == 3


def test_a_budget_of_environment_steps_ends_the_run_and_a_larger_one_goes_on(models, corridor, games_root: Path,
                                                                             tmp_path: Path) -> None:
    """Two episodes of an update take 6 steps."""
    chosen = settings(models, games_root, tmp_path, fixed_k=0, wm_model="", eval_every=0, max_env_steps=7)
    a2c.run(chosen)
    assert [row["update"] for row in metrics(tmp_path)] == [1, 2]
    a2c.run(dataclasses.replace(chosen, max_env_steps=18))
    assert [row["update"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert read_json(tmp_path / "metrics.json")["env_steps"] == 18


def test_a_lower_limit_is_that_of_training_only(models, corridor, games_root: Path, tmp_path: Path) -> None:
    chosen = settings(models, games_root, tmp_path, fixed_k=0, wm_model="", max_steps=9)
    games = [Game("alfworld", "train", "corridor", "", "", max_steps=most) for most in (0, 1, 5)]

    async def steps(limit: int) -> list[int]:
        from itp.distributed import Processes

        _, player, _ = a2c.load(chosen, RunFolder(tmp_path), Processes())
        async with EnvPool(Corridor, 1) as player.pool:
            found = [(await player.play([game], limit=limit))[0] for game in games]
        await player.close()
        return [len(episode.steps) for episode in found]

    assert asyncio.run(steps(0)) == [3, 1, 3] and asyncio.run(steps(2)) == [2, 1, 2]


# ---------------------------------------------------------------- stopping and going on


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it is executed."""


@pytest.mark.parametrize("where, changes", [
    ("alfworld", {"fixed_k": 1, "max_steps": 2, "episodes_per_epoch": 4, "episodes_per_update": 1}),
    ("corridor", {"lora_r": 4, "minibatches": 2}),
    ("corridor", {"advantage": "gigpo", "group_size": 2, "group_std": True, "observation_loss": 0.1})])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(models, games_root: Path, tmp_path: Path, where: str,
                                                         changes: dict, request: pytest.FixtureRequest) -> None:
    if where == "corridor":
        request.getfixturevalue("corridor")
    whole, cut = (settings(models, games_root, tmp_path / name, num_envs=1, **changes)
                  for name in ("whole", "cut"))
    a2c.run(whole)
    rows = metrics(tmp_path / "whole")
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4] and rows[-1]["episodes"] == whole.total_episodes
    assert ["eval_success" in row for row in rows] == [True, False, True, False, True]

    def log_and_die(self: RunFolder, row: dict) -> None:
        log(self, row)
        if row["update"] == 3:  # the checkpoint is that of update 2
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write('{"update": 4, "epis')
            raise Killed

    log = RunFolder.log
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "log", log_and_die)
        a2c.run(cut)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    a2c.run(cut)
    assert metrics(tmp_path / "cut") == approx(rows)

    import torch
    from safetensors.torch import load_file

    weights = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "cut")]
    start = load_file(Path(whole.policy_model) / "model.safetensors")
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    assert read_json(tmp_path / "cut" / "metrics.json")["episodes"] == whole.total_episodes

    a2c.run(cut)  # finished: nothing is done again
    assert metrics(tmp_path / "cut") == approx(rows)
    with pytest.raises(UserError, match="gamma: 0.99 there, 0.5 now"):
        a2c.run(dataclasses.replace(cut, gamma=0.5))


def test_a_loss_that_is_not_finite_ends_the_run(models, corridor, games_root: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from itp.training.itp_r.a2c_update import Learner

    chosen = settings(models, games_root, tmp_path, fixed_k=0, wm_model="", eval_every=0, save_every=1)
    read = Learner.read

    def diverging(self: Learner, rows):
        found = read(self, rows)
        return dataclasses.replace(found, values=found.values * (math.nan if self.updates == 2 else 1.0))

    monkeypatch.setattr(Learner, "read", diverging)
    with pytest.raises(UserError, match="the loss is nan in update 3.*the last checkpoint is kept"):
        a2c.run(chosen)
    assert RunFolder(tmp_path).state()["progress"]["update"] == 2
    assert [row["update"] for row in metrics(tmp_path)] == [1, 2]


def test_the_folder_before_survives_a_kill_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.old" / "config.json").write_text("{}")
    RunFolder(tmp_path)
    assert (tmp_path / "last" / "config.json").exists()


# ---------------------------------------------------------------- refusals, games, cards


def test_refusals_name_what_is_wrong(models, games_root: Path, tmp_path: Path) -> None:
    chosen = settings(models, games_root, tmp_path / "out")
    groups = {"advantage": "group", "group_size": 2}
    for changes, said in [
        ({"max_k": 5}, "--max_k 5, but .* was trained with kmax 2"),
        ({"policy_model": str(models[1])}, "without heads.*sft"),
        ({"fixed_k": 3}, "--fixed_k 3: the policy knows 0 to 2"),
        ({"wm_model": ""}, "--wm_model is missing"),
        ({"env_data_root": ""}, "--env_data_root is missing"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        ({"minibatches": 4}, "more than the 2 episodes"),
        ({"advantage": "group"}, "--advantage group compares the episodes of a game, and --group_size is 1"),
        ({"group_size": 4}, "--episodes_per_update: 2 episodes are no multiple of --group_size 4"),
        ({"group_size": 2, "episodes_per_epoch": 3, "epochs": 3}, "--episodes_per_epoch: 9 episodes in 3 epochs"),
        ({"group_std": True}, "--group_std is for --advantage group and gigpo"),
        ({"step_weight": 0.5}, "--step_weight is for --advantage gigpo"),
        (groups | {"step_weight": 0.5}, "--step_weight is for --advantage gigpo; --advantage group compares no steps"),
        (groups | {"n_steps": 1}, "--n_steps takes V_θ for what comes later, and --advantage group has no critic"),
        (groups | {"bootstrap_at_limit": True, "advantage": "gigpo"}, "--bootstrap_at_limit takes V_θ"),
        (groups | {"normalize_advantages": True}, "give --normalize_advantages false"),
        ({"eval_split": "train", "eval_games": 6}, "leaves no game of train"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            a2c.run(dataclasses.replace(chosen, **changes))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    checked(dataclasses.replace(chosen, max_k=KMAX))  # the checkpoint's own is no conflict


def test_more_room_is_no_other_run(models, corridor, games_root: Path, tmp_path: Path, caplog) -> None:
    """Prompts beyond the budget lose history and are counted; the same folder goes on with more --max_seq_len."""
    chosen = settings(models, games_root, tmp_path, fixed_k=0, wm_model="", eval_every=0, episodes_per_epoch=2,
                      max_steps=3, save_every=1)
    small = dataclasses.replace(chosen, max_seq_len=12)
    a2c.run(small)
    assert "0 imagined steps may take 0 tokens and an action 16, which leaves no room" in caplog.text
    (row,) = metrics(tmp_path)
    assert row["shortened_prompts"] == 2 * 2  # of each episode's third step: to read the heads, and to act
    (tmp_path / "metrics.json").unlink()
    a2c.run(chosen)
    assert read_json(tmp_path / "config.json")["config"]["max_seq_len"] == 480
    with pytest.raises(UserError, match="max_seq_len: 480 there, 12 now"):
        a2c.run(small)


@pytest.mark.parametrize("changes, warned", [
    ({"max_seq_len": 46}, "2 imagined steps may take 30 tokens and an action 16"), ({"max_seq_len": 47}, ""),
    ({"max_seq_len": 31, "fixed_k": 1}, "1 imagined steps may take 15 tokens"), ({"max_seq_len": 32, "fixed_k": 1}, ""),
    ({"max_seq_len": 19, "foresight_format": "last_obs"}, "2 imagined steps may take 3 tokens"),
    ({"max_seq_len": 20, "foresight_format": "last_obs"}, ""),
])
def test_too_little_room_is_said_at_the_start(models, games_root, tmp_path, caplog, changes, warned) -> None:
    checked(settings(models, games_root, tmp_path, **changes))
    assert (warned in caplog.text) if warned else not caplog.text


def test_the_games_folder_of_alfworlds_own_configuration(models, games_root: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(games_root))
    config = tmp_path / "base_config.yaml"
    config.write_text("dataset:\n  data_path: '$ALFWORLD_DATA/json_2.1.1/train'\n")
    chosen = settings(models, games_root, tmp_path, env_data_root="", alfworld_config=str(config))
    assert data_root(chosen) == str(games_root / "json_2.1.1")
    assert len(a2c.environment(chosen)[1]) == 6
    config.write_text("dataset: 3\n")
    with pytest.raises(UserError, match="no dataset.data_path"):
        data_root(chosen)


def test_games_come_in_turns_and_held_out_ones_never(models, games_root: Path, tmp_path: Path) -> None:
    from itp.training.itp_r.a2c_rollout import episode_games

    chosen = settings(models, games_root, tmp_path, eval_split="train", eval_games=2, missions=2)
    _, games, held_out = a2c.environment(chosen)
    assert len(held_out) == 2 and not {g.path for g in games} & {g.path for g in held_out}
    assert any(game.goal for game in games)
    played = episode_games(chosen, games, 0, 2 * len(games))
    assert len({game.game_id for game in played}) == len(played)
    for turn in (played[:len(games)], played[len(games):]):
        assert {(g.path, g.goal) for g in turn} == {(g.path, g.goal) for g in games}
    assert [g.path for g in played[:len(games)]] != [g.path for g in played[len(games):]]
    assert episode_games(chosen, games, 3, 4) == played[3:7]
    grouped = episode_games(dataclasses.replace(chosen, group_size=3), games, 0, 3 * len(games))
    assert len({game.game_id for game in grouped}) == len(grouped)  # hence different seeds
    assert [(g.path, g.goal) for g in grouped] == [(g.path, g.goal) for g in played[:len(games)] for _ in range(3)]


def test_learning_on_a_test_split_is_written_on_the_card(models, games_root: Path, tmp_path: Path, caplog) -> None:
    chosen = settings(models, games_root, tmp_path, env_split="valid_seen", eval_split="valid_unseen", eval_games=1,
                      episodes_per_epoch=1, fixed_k=0, wm_model="")
    a2c.run(chosen)
    assert "LEARNING ON AN EVALUATION SPLIT" in caplog.text
    for name in ("last", "best"):
        card = ModelCard.read(tmp_path / name)
        assert card.warning.startswith("trained on the evaluation split valid_seen") and card.control_token
        assert f"**{card.warning}**" in (tmp_path / name / "README.md").read_text()


def test_readme_adapter_tracker_and_upload(models, corridor, games_root: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def upload(folder_path: Path, ignore_patterns: list[str], repo_id: str) -> None:
        there = {str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()}
        sent.append({name for name in there if not any(fnmatch.fnmatch(name, p) for p in ignore_patterns)})
        assert repo_id == "me/policy"
        if len(sent) == 1:
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    chosen = settings(models, games_root, tmp_path / "out", fixed_k=0, wm_model="", episodes_per_epoch=2, lora_r=4,
                      report_to="tensorboard", push_to_hub="me/policy")
    with pytest.raises(UserError, match="--push_to_hub me/policy: OSError"):
        a2c.run(chosen)
    assert not (tmp_path / "out" / "metrics.json").exists()
    a2c.run(chosen)  # the same command tries again
    assert len(metrics(tmp_path / "out")) == 2 and (tmp_path / "out" / "metrics.json").exists()
    assert {"README.md", "itp_model.json", "model.safetensors", "policy_heads.safetensors",
            "adapter/adapter_model.safetensors", "adapter/policy_heads.safetensors"} <= sent[1]
    assert "trainer_state.pt" not in sent[1] and (tmp_path / "out" / "last" / "trainer_state.pt").exists()
    for name, metric in (("last", "return"), ("best", "eval_success")):
        text = (tmp_path / "out" / name / "README.md").read_text()
        assert re.search(r"from `policy` \(weights \w{16}\) on games of alfworld \(split train\)\.", text)
        assert f"- {metric}: " in text
        assert str(tmp_path) not in text and str(games_root) not in text and '"lora_r": 4' in text
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("return")] == [
        (2, pytest.approx(metrics(tmp_path / "out")[1]["return"]))]


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize("changes", [
    {"normalize_advantages": True}, {"advantage": "group", "group_size": 8, "group_std": True},
    {"advantage": "gigpo", "group_size": 8, "group_std": True}], ids=["critic", "group", "gigpo"])
def test_where_looking_ahead_is_dear_and_useless_k_falls_to_0(models, corridor, games_root: Path, tmp_path: Path,
                                                              changes: dict) -> None:
    chosen = settings(models, games_root, tmp_path, lambda_k=0.5, episodes_per_epoch=320, episodes_per_update=16,
                      num_envs=16, lr=1e-2, value_updates=2, entropy_coef=0.0, wm_max_new_tokens=1,
                      imagine_action_max_new_tokens=1, eval_every=0, save_every=100, **changes)
    a2c.run(chosen)
    rows = metrics(tmp_path)
    assert rows[0]["mean_k"] > 0.7 and rows[-1]["mean_k"] < 0.1
    assert rows[-1]["return"] > rows[0]["return"] + 0.8  # about 3 steps, K 1 each, at .5


def test_an_observation_loss_teaches_what_the_actions_led_to(models, corridor, games_root: Path,
                                                             tmp_path: Path) -> None:
    """In the corridor one observation follows every action.  Without weight on it, its cross-entropy doesn't fall."""
    first, last = {}, {}
    for weight in (1.0, 1e-9):
        chosen = settings(models, games_root, tmp_path / str(weight), fixed_k=0, wm_model="", eval_every=0,
                          observation_loss=weight, lr=3e-3, episodes_per_epoch=32, episodes_per_update=4, num_envs=4)
        a2c.run(chosen)
        losses = [row["loss_observation"] for row in metrics(tmp_path / str(weight))]
        first[weight], last[weight] = losses[0], losses[-1]
    assert first[1.0] == pytest.approx(first[1e-9], rel=0.3)  # the same weights, other last bits may turn an action
    assert last[1.0] < 0.5 * first[1.0] and last[1e-9] > 0.8 * first[1e-9]


class Rooms:
    """One step: in each room one of two actions wins, and nothing in the text says which."""

    want_admissible = True

    def reset(self, game: Game) -> Observation:
        self.right = right_action(game.path)
        return Observation(f"You see a desk {game.path}.", "look", admissible=("look", "inventory"))

    def step(self, action: str) -> StepResult:
        won = action == self.right
        return StepResult(Observation("You see.", "look", admissible=()), float(won), True, False, 100.0 * won, won,
                          False)

    def close(self) -> None:
        pass


def right_action(room: str) -> str:
    return ("look", "inventory")[derive_seed("room", room) % 2]


def test_where_looking_ahead_helps_and_costs_nothing_k_stays(models, games_root: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    games = [Game("alfworld", "train", f"room {i}", f"{i % 31} {i % 37} {i % 41}", "") for i in range(5000)]
    monkeypatch.setattr(a2c, "environment", lambda chosen: (Rooms, games, []))

    async def knows(self: WorldModel, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """A world model that has learned what holds in each room, and says so whatever is done."""
        rooms = [re.search(r"desk (.*)\.", state.first)[1] for state in states]
        return [{"look": "heat", "inventory": "cool"}[right_action(room)] for room in rooms]

    monkeypatch.setattr(WorldModel, "step", knows)
    chosen = settings(models, games_root, tmp_path, lambda_k=0.0, episodes_per_epoch=6400, episodes_per_update=64,
                      num_envs=64, lr=3e-3, value_updates=2, entropy_coef=0.0, normalize_advantages=True, max_steps=1,
                      imagine_action_max_new_tokens=1, eval_every=0, save_every=1000)
    a2c.run(chosen)
    rows = metrics(tmp_path)
    assert rows[0]["success"] < 0.7 and rows[-1]["success"] > 0.9  # what the model says is read
    assert rows[-1]["mean_k"] > 0.9
