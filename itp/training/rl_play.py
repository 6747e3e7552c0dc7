"""Acting for online A2C: episodes by the current weights, and what an update needs of them.

At each step the K-head draws K_t ~ P_θ(K|s_t), policy and world model imagine K_t steps (eq. 2), and the policy draws
a_t ~ π_θ(·|s_t, τ̂_t(K_t)) (eq. 3) with a record of how, so that its probability can be computed again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itp.envs.pool import EnvPool
from itp.games import Game
from itp.imagination import imagine
from itp.lm.base import Trace
from itp.lm.chat import asked_as
from itp.lm.local import LocalLM, Quorum
from itp.policy.agent import Policy
from itp.policy.method import Decision, View
from itp.rollout import Episode, run_episodes
from itp.runtime import derive_seed
from itp.training.fitting import Fitting
from itp.world_model import WorldModel

if TYPE_CHECKING:
    from itp.training.rl_k import RlSettings
    from itp.training.rl_run import Processes
    from itp.training.rl_update import Sample


@dataclass
class Drawn(Decision):
    """A decision with what its update needs."""

    prompt: str = ""
    trace: Trace | None = None


class Actor:
    """ITP-R (eq. 3): the K-head draws K, policy and world model imagine, the policy acts.

    ``greedy`` takes the most likely K, as evaluation does.
    """

    name = "itp_r"

    def __init__(self, policy: Policy, world_model: WorldModel | None, settings: RlSettings, greedy: bool) -> None:
        self.policy, self.world_model, self.settings, self.greedy = policy, world_model, settings, greedy
        self.want_admissible = policy.selection == "constrained"

    async def act(self, view: View) -> Drawn:
        fitting = Fitting(self.policy, self.world_model, self.settings.max_seq_len)
        state = fitting.for_acting(view.state)
        control = await self.policy.read_control(state)
        k = self.settings.force_k
        if k < 0:
            k = control.choose_k(len(control.k_logprobs) - 1, None if self.greedy else derive_seed(view.seed, "k"))
        imagined = await imagine(fitting, fitting, state, k, view.seed)
        foresight = imagined.text(self.settings.foresight_format)
        state = fitting.for_acting(state, foresight)
        choice = await self.policy.act(state, view.observation.admissible, derive_seed(view.seed, "act"),
                                       foresight=foresight, trace=True)
        return Drawn(choice.action, k, imagined, k_logprobs=control.k_logprobs, value=control.value, raw=choice.raw,
                     parsed=choice.parsed, logprob=choice.logprob, trace=choice.trace,
                     prompt=self.policy.prompt(state, "Action", foresight=foresight))


def episode_games(settings: RlSettings, games: Sequence[Game], first: int, count: int) -> list[Game]:
    """The games of episodes ``first`` ... of the run: all games in an order drawn anew, again and again.

    The number of the episode in the id makes its randomness its own.
    """
    chosen = []
    for number in range(first, first + count):
        turn, place = divmod(number, len(games))
        order = _order(settings.seed, turn, tuple(game.game_id for game in games))
        chosen.append(dataclasses.replace(games[order[place]], game_id=f"{games[order[place]].game_id}#{number}"))
    return chosen


@functools.lru_cache(maxsize=2)
def _order(seed: int, turn: int, ids: tuple[str, ...]) -> list[int]:
    return sorted(range(len(ids)), key=lambda i: derive_seed(seed, "order", turn, ids[i]))


class Player:
    """Plays games with the current weights, ``num_envs`` at a time."""

    def __init__(self, settings: RlSettings, lm: LocalLM, world_model: WorldModel | None, quorum: Quorum) -> None:
        self.settings, self.lm, self.world_model, self.quorum = settings, lm, world_model, quorum
        style, turns = asked_as(settings.policy_model_path, lm.tokenizer, env=settings.env)
        self.greedy = Policy(lm, env=settings.env, style=style, turns=turns, selection=settings.action_selection,
                             keep_steps=settings.history_keep_steps, control=True,
                             action_tokens=settings.action_max_new_tokens,
                             imagined_action_tokens=settings.imagine_action_max_new_tokens)
        self.sampling = self.greedy
        if settings.action_do_sample:
            self.sampling = dataclasses.replace(self.greedy, temperature=settings.action_temperature,
                                                top_p=settings.action_top_p)
        self.pool: EnvPool

    async def play(self, games: Sequence[Game], *, greedy: bool = False) -> list[Episode]:
        """One episode of each game, in their order; those lost with their environment's process are left out."""
        actor = Actor(self.greedy if greedy else self.sampling, self.world_model, self.settings, greedy)
        episodes = {e.game.game_id: e async for e in run_episodes(
            self.pool, actor, games, max_steps=self.settings.max_steps, seed=self.settings.seed,
            concurrency=self.settings.num_envs, quorum=self.quorum)} if games else {}
        return [episodes[game.game_id] for game in games if episodes[game.game_id].steps]

    async def bootstraps(self, episodes: Sequence[Episode]) -> list[float]:
        """What each episode is worth after its last step: V_θ where the limit cut it, if that is wanted, else 0."""
        async def value(episode: Episode) -> float:
            if not self.settings.bootstrap_at_limit or episode.reason != "step_limit":
                return 0.0
            step = episode.steps[-1]
            fitting = Fitting(self.sampling, None, self.settings.max_seq_len)
            end = fitting.for_acting(step.state.after(step.decision.action, step.observation))
            return (await self.sampling.read_control(end)).value

        return list(await asyncio.gather(*(value(episode) for episode in episodes)))

    def forget(self) -> None:
        """The weights have changed: what was computed with the old ones is void."""
        self.lm.engine.reset()

    async def close(self) -> None:
        await self.lm.close()
        if self.world_model is not None:
            await self.world_model.lm.close()


def rewards_of(episode: Episode, settings: RlSettings) -> list[float]:
    """r_1 ... r_T of eq. 7."""
    from itp.training.losses import reward

    return [reward(step.reward, step.decision.k, success=episode.success and step is episode.steps[-1],
                   invalid=step.invalid, lambda_k=settings.lambda_k, step_cost=settings.step_cost,
                   success_bonus=settings.success_bonus, invalid_action_penalty=settings.invalid_action_penalty)
            for step in episode.steps]


def advantages_of(episode: Episode, bootstrap: float, settings: RlSettings) -> tuple[list[float], list[float]]:
    """(A_t, V̂_t) of every step, by the values that the acting weights gave."""
    from itp.training.losses import gae, n_step_returns

    rewards, values = rewards_of(episode, settings), [step.decision.value for step in episode.steps]
    if settings.n_steps:
        targets = n_step_returns(rewards, values, settings.gamma, settings.n_steps, bootstrap)
        return [target - value for target, value in zip(targets, values, strict=True)], targets
    advantages = gae(rewards, values, settings.gamma, settings.gae_lambda, bootstrap)
    return advantages, [a + value for a, value in zip(advantages, values, strict=True)]


def prepare(episodes: Sequence[Episode], bootstraps: Sequence[float], lm: LocalLM, settings: RlSettings,
            processes: Processes) -> tuple[list[list[Sample]], dict[str, Any]]:
    """The samples of this process's episodes, and what is to be said about those of all processes."""
    from itp.text.prompts import CTRL
    from itp.training.losses import normalised
    from itp.training.rl_update import Sample

    found = [advantages_of(e, b, settings) for e, b in zip(episodes, bootstraps, strict=True)]
    everyone = processes.gather([a for advantages, _ in found for a in advantages])
    control, start = lm.tokenizer.convert_tokens_to_ids(CTRL), lm.encode.start
    samples: list[list[Sample]] = []
    for episode, (advantages, targets) in zip(episodes, found, strict=True):
        if settings.normalize_advantages:
            advantages = normalised(advantages, everyone)
        prompts = [lm.encode(step.decision.prompt) for step in episode.steps]
        samples.append([
            Sample([*start, *ids], len(start) + ids.index(control), step.decision.trace,
                   -1 if settings.force_k >= 0 else step.decision.k, advantage, target)
            for step, ids, advantage, target in zip(episode.steps, prompts, advantages, targets, strict=True)])
    own = [value for _, targets in found for value in targets]
    predicted = [step.decision.value for episode in episodes for step in episode.steps]
    targets, values = processes.gather(own), processes.gather(predicted)
    row = statistics_of(processes.gather([summary(e, settings) for e in episodes]))
    return samples, row | {
        "advantage_mean": statistics.fmean(everyone), "advantage_std": statistics.pstdev(everyone),
        "value_mean": statistics.fmean(values), "target_mean": statistics.fmean(targets),
        "explained_variance": 1 - statistics.pvariance([t - v for t, v in zip(targets, values, strict=True)])
        / (statistics.pvariance(targets) + 1e-8)}


def summary(episode: Episode, settings: RlSettings) -> dict[str, Any]:
    """One episode in numbers."""
    steps, usage = episode.steps, episode.usage
    return {"return": sum(rewards_of(episode, settings)), "success": float(episode.success), "steps": len(steps),
            "k": [step.decision.k for step in steps], "kmax": len(steps[0].decision.k_logprobs) - 1,
            "invalid": sum(step.invalid for step in steps),
            "policy_tokens": usage["policy"].tokens,
            "wm_tokens": usage["world_model"].tokens if "world_model" in usage else 0}


def statistics_of(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Many episodes in numbers: means over episodes, ``mean_k``, ``k_histogram`` and ``invalid`` over steps."""
    drawn = [k for row in summaries for k in row["k"]]
    return {
        "return": statistics.fmean(row["return"] for row in summaries),
        "success": statistics.fmean(row["success"] for row in summaries),
        "episode_steps": statistics.fmean(row["steps"] for row in summaries),
        "mean_k": statistics.fmean(drawn),
        "k_histogram": [drawn.count(k) for k in range(summaries[0]["kmax"] + 1)],
        "invalid": sum(row["invalid"] for row in summaries) / len(drawn), "env_steps": len(drawn),
        "policy_tokens": sum(row["policy_tokens"] for row in summaries),
        "wm_tokens": sum(row["wm_tokens"] for row in summaries),
    }
