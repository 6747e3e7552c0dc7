"""Acting for online A2C: episodes by the current weights, and what an update needs of them.

The episodes are played by the method that evaluation plays (:mod:`itp.methods.imagine_then_plan`), which samples K_t
from the K-head and a_t from the policy, with a record of how, so that their probabilities can be computed again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from itp.agent.heads import kmax_of
from itp.agent.world_model import WorldModel
from itp.distributed import Processes
from itp.envs.pool import EnvPool
from itp.errors import PromptTooLong, UserError
from itp.games import Game
from itp.lm.local import LocalLM
from itp.lm.scheduler import BatchBarrier
from itp.methods.imagine_then_plan import ImagineThenPlan
from itp.methods.no_repeat import states
from itp.methods.settings import MethodSettings
from itp.model_card import prompt_settings
from itp.models import load_policy
from itp.rollout import Episode, LeftOut, Step, run_episodes
from itp.seeding import derive_seed
from itp.text.prompts import prompt_of_observation, world_model_target
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.advantages import Played, advantages_of, normalized, token_credit

if TYPE_CHECKING:
    from itp.training.itp_r.a2c_update import Sample


def episode_games(settings: RlSettings, games: Sequence[Game], first: int, count: int) -> list[Game]:
    """The games of the ``count`` episodes from number ``first`` of the run on.

    The games are shuffled again for each pass.  In a pass each has ``group_size`` episodes, one after the other.  The
    episode number in the id gives each episode its own seed.
    """
    chosen = []
    for number in range(first, first + count):
        turn, place = divmod(number // settings.group_size, len(games))
        order = _order(settings.seed, turn, tuple(game.game_id for game in games))
        chosen.append(dataclasses.replace(games[order[place]], game_id=f"{games[order[place]].game_id}#{number}"))
    return chosen


@functools.lru_cache(maxsize=2)
def _order(seed: int, turn: int, ids: tuple[str, ...]) -> list[int]:
    return sorted(range(len(ids)), key=lambda i: derive_seed(seed, "order", turn, ids[i]))


class Player:
    """Plays games with the current weights, ``num_envs`` at a time."""

    def __init__(self, settings: RlSettings, lm: LocalLM, world_model: WorldModel | None,
                 barrier: BatchBarrier) -> None:
        self.settings, self.lm, self.world_model, self.barrier = settings, lm, world_model, barrier
        self.policy = load_policy(
            settings.policy_model, lm=lm, env=settings.env, selection=settings.action_selection,
            action_tokens=settings.action_max_new_tokens,
            imagined_action_tokens=settings.imagine_action_max_new_tokens, **prompt_settings(settings))
        self.kmax = kmax_of(settings.policy_model)
        self.left_out = LeftOut()
        self.pool: EnvPool

    def method(self, greedy: bool) -> ImagineThenPlan:
        """ITP-R as evaluation plays it.  Not ``greedy``: K and actions are sampled, with a record of how."""
        settings, policy = self.settings, self.policy
        if not greedy and settings.action_do_sample:
            policy = dataclasses.replace(policy, temperature=settings.action_temperature, top_p=settings.action_top_p)
        return ImagineThenPlan(policy, self.world_model, MethodSettings(
            max_k=self.kmax, fixed_k=settings.fixed_k, k_policy="head", k_sample=not greedy, value_of_state=True,
            record_sampling=True))

    async def play(self, games: Sequence[Game], *, greedy: bool = False, limit: int = 0) -> list[Episode]:
        """One episode of each game, in their order; some are left out (:attr:`left_out`).

        ``limit``: its steps at most, where that is less than its own limit (0: its own).
        """
        if limit:
            most = self.settings.max_steps
            games = [dataclasses.replace(game, max_steps=min(limit, game.max_steps or most)) for game in games]
        episodes = {e.game.game_id: e async for e in run_episodes(
            self.pool, self.method(greedy), games, max_steps=self.settings.max_steps, seed=self.settings.seed,
            concurrency=self.settings.num_envs, barrier=self.barrier)} if games else {}
        return [episodes[game.game_id] for game in games if not self.left_out.takes(episodes[game.game_id])]

    async def bootstraps(self, episodes: Sequence[Episode]) -> list[float]:
        """What each episode is worth after its last step: V_θ where the limit cut it, if that is wanted, else 0."""

        async def value(episode: Episode) -> float:
            if not self.settings.bootstrap_at_limit or episode.reason != "step_limit":
                return 0.0
            step = episode.steps[-1]
            end = step.state.after(step.decision.action, step.observation)
            try:
                return (await self.policy.read_heads(end)).value
            except PromptTooLong:
                return 0.0  # the policy can't go on from there

        return list(await asyncio.gather(*(value(episode) for episode in episodes)))

    def forget(self) -> None:
        """Clear the prefix cache after a weight update."""
        self.lm.engine.reset()

    async def close(self) -> None:
        await self.lm.close()
        if self.world_model is not None:
            await self.world_model.close()


def rewards_of(episode: Episode, settings: RlSettings) -> list[float]:
    """r_1 ... r_T of eq. 7."""
    from itp.training.itp_r.losses import reward

    scale = efficacy(episode) if settings.rescale_reward else 1.0
    return [reward(step.reward, step.decision.k, success=episode.success and step is episode.steps[-1],
                   invalid=step.invalid, lambda_k=settings.lambda_k, step_cost=settings.step_cost,
                   success_bonus=settings.success_bonus, invalid_action_penalty=settings.invalid_action_penalty,
                   efficacy=scale)
            for step in episode.steps]


def efficacy(episode: Episode) -> float:
    """The share of an episode's actions that changed what is known of its state; 1 where it has none.

    What is known: see :func:`itp.methods.no_repeat.states`.  So an action that shows something new counts, and one that
    the engine doesn't take, or that shows only what was known, doesn't.
    """
    if not episode.steps:
        return 1.0
    last = episode.steps[-1]
    known = states(last.state.after(last.decision.action, last.observation), episode.game.env)
    changed = [before != after for before, after in itertools.pairwise(known)]
    return sum(changed) / len(changed)


def annealed_limit(lengths: Sequence[int]) -> int:
    """The step limit after episodes of ``lengths``: the middle between their mean and the longest one, rounded up."""
    return math.ceil((statistics.fmean(lengths) + max(lengths)) / 2)


def played(episode: Episode, bootstrap: float, settings: RlSettings) -> Played:
    """What the advantages of an episode are made of.  Its group are the episodes of its game in the batch."""
    game_id = episode.game.game_id.rsplit("#", 1)[0]  # without the number from episode_games
    return Played(game_id, rewards_of(episode, settings), [step.decision.value for step in episode.steps],
                  [step.state.observation for step in episode.steps], bootstrap)


TokenValues = Callable[[list[list["Sample"]]], list[list[list[float]]]]
"""V_θ within the actions of samples (:meth:`itp.training.itp_r.a2c_update.Learner.token_values`)."""


def prepare(episodes: Sequence[Episode], bootstraps: Sequence[float], lm: LocalLM, settings: RlSettings,
            processes: Processes, token_values: TokenValues) -> tuple[list[list[Sample]], dict[str, Any]]:
    """The samples of this process's episodes, and what is to be said about those of all processes.

    ``token_values`` is asked with ``--credit token`` only.
    """
    row = statistics_of(processes.gather([summary(e, settings) for e in episodes]))
    outcomes = [played(e, b, settings) for e, b in zip(episodes, bootstraps, strict=True)]
    found = advantages_of(outcomes, settings, processes)
    samples = [[sample_of(step, advantage, target, lm, settings)
                for step, advantage, target in zip(episode.steps, advantages, targets, strict=True)]
               for episode, advantages, targets in zip(episodes, found.steps, found.targets, strict=True)]
    if settings.credit == "token":
        samples, figures = with_token_credit(samples, outcomes, token_values(samples), settings, processes)
        row |= figures
    return [steps for steps in samples if steps], row | found.figures


def with_token_credit(samples: Sequence[Sequence[Sample]], outcomes: Sequence[Played],
                      within: Sequence[Sequence[Sequence[float]]], settings: RlSettings,
                      processes: Processes) -> tuple[list[list[Sample]], dict[str, float]]:
    """``samples`` with advantages of their tokens, and figures of those of all processes.  ``within``: V_θ."""
    lam = 0.0 if settings.n_steps else settings.gae_lambda
    found = [token_credit(o.rewards, o.values, inner, settings.gamma, lam, o.bootstrap)
             for o, inner in zip(outcomes, within, strict=True)]
    own = [[credits[:len(sample.drawn)] for sample, credits in zip(steps, advantages, strict=True)]
           for steps, (advantages, _) in zip(samples, found, strict=True)]
    everyone = processes.gather([a for advantages in own for credits in advantages for a in credits])
    if settings.normalize_advantages and everyone:
        own = [[normalized(credits, everyone) for credits in advantages] for advantages in own]
    credited = [[dataclasses.replace(sample, token_advantages=credits, token_targets=values)
                 for sample, credits, values in zip(steps, advantages, targets, strict=True)]
                for steps, advantages, (_, targets) in zip(samples, own, found, strict=True)]
    return credited, {"token_advantage_abs": statistics.fmean(map(abs, everyone)) if everyone else 0.0}


def sample_of(step: Step, advantage: float, target: float, lm: LocalLM, settings: RlSettings) -> Sample:
    """A step as the update needs it."""
    from itp.training.itp_r.a2c_update import Sample

    def ids_of(text: str) -> list[int]:
        return [*lm.encode.start, *lm.encode(text)]

    decision, before, observation = step.decision, [], []
    if settings.observation_loss and step.observation:
        before = ids_of(prompt_of_observation(decision.heads_prompt, decision.action))
        observation = lm.encode.continuation(world_model_target(step.observation))
        if lm.context_length:  # what is beyond, the policy can't read
            observation = observation[:max(0, lm.context_length + 1 - len(before))]
    return Sample(ids_of(decision.prompt), ids_of(decision.heads_prompt), decision.trace,
                  -1 if settings.fixed_k >= 0 else decision.k, advantage, target, before, observation)


def summary(episode: Episode, settings: RlSettings) -> dict[str, Any]:
    """One episode in numbers."""
    steps, usage = episode.steps, episode.usage
    return {"return": sum(rewards_of(episode, settings)), "success": float(episode.success), "steps": len(steps),
            "k": [step.decision.k for step in steps],
            "kmax": len(steps[0].decision.k_logprobs) - 1 if steps else 0,
            "invalid": sum(step.invalid for step in steps),
            "efficacy": efficacy(episode) if settings.rescale_reward else None,
            "shortened": sum(spent.shortened for spent in usage.values()),
            "policy_tokens": usage["policy"].tokens if "policy" in usage else 0,
            "wm_tokens": usage["world_model"].tokens if "world_model" in usage else 0}


def statistics_of(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Many episodes in numbers: means over episodes, ``mean_k``, ``k_histogram`` and ``invalid`` over steps.

    Raises UserError where no episode has a step.
    """
    drawn = [k for row in summaries for k in row["k"]]
    if not drawn:
        raise UserError("no episode has a step: each ended at once, because the policy's context doesn't hold its "
                        "first prompt, its environment died or its game is broken (see the warnings above)")
    shares = [row["efficacy"] for row in summaries if row["efficacy"] is not None]
    return {
        "return": statistics.fmean(row["return"] for row in summaries),
        "success": statistics.fmean(row["success"] for row in summaries),
        "episode_steps": statistics.fmean(row["steps"] for row in summaries),
        "mean_k": statistics.fmean(drawn),
        "k_histogram": [drawn.count(k) for k in range(max(row["kmax"] for row in summaries) + 1)],
        "invalid": sum(row["invalid"] for row in summaries) / len(drawn), "env_steps": len(drawn),
        "shortened_prompts": sum(row["shortened"] for row in summaries),
        "policy_tokens": sum(row["policy_tokens"] for row in summaries),
        "wm_tokens": sum(row["wm_tokens"] for row in summaries),
    } | ({"efficacy": statistics.fmean(shares)} if shares else {})
