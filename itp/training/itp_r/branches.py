r"""Pseudo-labels by branching (``--label_by branch``): did what was imagined change the action, and did that pay?

    a_k = the action that the policy takes in s_t with τ̂_t(k) in its prompt;  a_0 is its draft
    K̃_t = argmax_{0 <= k <= K_max} [ value(a_k) − λ_K·k ], ties to the smaller k

Eq. 5 asks how likely imagination makes the expert's action.  Here the environment answers, and no expert is needed: the
game is moved to s_t by the episode's own actions, executes each different a_k, and the same policy plays on without
imagination.  The value of an action is γ^n where the task is accomplished n steps after s_t (that action is the first),
and 0 where it isn't within ``branch_steps`` steps; with several branches their mean.  So a faster success is worth
more, and where no action leads to success all values are 0 and K̃_t is 0.  Where all a_k are the same nothing is
executed: K̃_t is 0.

After CoMAP (arXiv 2606.02372), which labels "revise" where the alternative's branch wins against the draft's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from itp.agent.policy import Choice
from itp.envs.alfworld.games import with_alternative_goals
from itp.envs.base import EnvDied, TextEnv
from itp.envs.pool import EnvPool
from itp.envs.registry import EnvFlags, engine_of, games_of
from itp.envs.replay import reach
from itp.errors import UnplayableGame, UserError
from itp.games import Game
from itp.lm.base import metered
from itp.lm.scheduler import BatchBarrier
from itp.methods.actors import FirstThen
from itp.methods.settings import MethodSettings
from itp.methods.sft import Sft
from itp.rollout import MAX_RESTARTS, Episode, play
from itp.seeding import derive_seed
from itp.text.prompts import foresight_text
from itp.training.itp_r.expert_steps import ExpertStep
from itp.training.itp_r.pseudo_labels import Labeler, best_k, computed, penalized

log = logging.getLogger(__name__)
LOST = "the environment's process was lost again and again; start the same command again"
OUTCOMES = ("same", "wins", "ties", "loses")
"""What became of a_k beside the draft: the same action, or another one whose value is more, equal or less."""


def value_of(branches: Sequence[tuple[bool, int]], gamma: float) -> float:
    """The mean of γ^n of ``branches``, (success, steps n) each; 0 for one without success."""
    return sum(gamma ** steps for success, steps in branches if success) / len(branches)


def outcome(gain: float, same: bool) -> str:
    """One of OUTCOMES.  ``gain``: value(a_k) − value(a_0)."""
    return "same" if same else "wins" if gain > 0 else "loses" if gain < 0 else "ties"


@dataclass(frozen=True)
class BranchLabeler(Labeler):
    """The label of one row from the game itself.  ``games``: those of the rows, by episode id."""

    games: Mapping[str, Game]
    pool: EnvPool
    barrier: BatchBarrier
    seats: asyncio.Semaphore = field(repr=False)
    """Held by every game that is open, so that no more are than rows at a time."""

    async def label(self, row: ExpertStep) -> dict[str, Any]:
        """What is added to the row.  Raises PromptTooLong, UnplayableGame, and UserError where the game isn't the
        episode's."""
        settings, steps = self.settings, {"replayed": 0, "played": 0}
        with metered() as imagining:
            trajectory = await self._imagine(row)
        with metered() as choosing:
            choices = await self._choose(row, trajectory.steps, steps)
        actions = {k: choice.action for k, choice in choices.items()}
        with metered() as branching:
            branches = await self._branch(row, list(dict.fromkeys(actions.values())), steps)
        with metered() as weighing:
            margins = {k: await self.policy.log_odds(choice.prompt, choice.action, actions[0])
                       for k, choice in choices.items() if choice.action != actions[0]}
        worth = {action: value_of(ends, settings.branch_gamma) for action, ends in branches.items()}
        gains = {k: worth[action] - worth[actions[0]] if worth else 0.0 for k, action in actions.items()}
        scores = penalized(gains, settings.lambda_k)
        phases = {"imagine": imagining, "choose": choosing, "branch": branching, "weigh": weighing}
        return {
            "k_label": best_k(scores),
            **self._imagined(row, trajectory),
            "scores": scores,
            "actions": actions,
            "values": {k: worth[action] for k, action in actions.items()} if worth else {},
            "branches": branches,
            "revise": {k: gains[k] > 0 for k in actions if k},
            "margins": margins,
            "winner": max(worth, key=worth.__getitem__) if any(worth.values()) else "",
            "engine_steps": steps,
            "tokens": {name: computed(spent.get("policy")) for name, spent in phases.items()}
            | {"world_model": computed(imagining.get("world_model"))},
            "shortened": sum(usage.shortened for spent in phases.values() for usage in spent.values()),
        }

    async def _choose(self, row: ExpertStep, imagined: Sequence[tuple[str, str]],
                      steps: dict[str, int]) -> dict[int, Choice]:
        """k -> what the policy does after k imagined steps, as in an evaluation with K fixed at k."""
        policy, admissible = self.policy, None
        if policy.selection != "generate":
            admissible = await self._admissible(row)
            steps["replayed"] += len(row.state.history)
        seed = derive_seed(self._seed(row), "act")
        choices = await asyncio.gather(*(policy.act(row.state, admissible, seed, foresight=foresight_text(
            imagined[:k], policy.foresight_format)) for k in self.candidates))
        return dict(zip(self.candidates, choices, strict=True))

    async def _admissible(self, row: ExpertStep) -> tuple[str, ...] | None:
        """The admissible actions of the row's state."""
        async with self.barrier.away(), self.seats, self.pool.session() as env:
            for _ in range(MAX_RESTARTS + 1):
                try:
                    return (await reach(env, self.games[row.transition.episode_id], row.state)).admissible
                except EnvDied as died:
                    log.warning("%s: %s; moving to its state again", row.where, died)
        raise UserError(LOST)

    async def _branch(self, row: ExpertStep, actions: Sequence[str],
                      steps: dict[str, int]) -> dict[str, list[tuple[bool, int]]]:
        """Action -> (success, steps) of its branches; nothing where there is only one action."""
        if len(actions) < 2:
            return {}
        n = self.settings.branches
        async with self.barrier.away():
            episodes = await asyncio.gather(*(self._play(row, action, i) for action in actions for i in range(n)))
        steps["replayed"] += len(row.state.history) * len(episodes)
        steps["played"] += sum(len(episode.steps) for episode in episodes)
        ends = [(episode.success, len(episode.steps)) for episode in episodes]
        return {action: ends[i * n:(i + 1) * n] for i, action in enumerate(actions)}

    async def _play(self, row: ExpertStep, action: str, i: int) -> Episode:
        """Branch ``i`` of ``action``: the i-th of each action has the same seed."""
        settings, temperature = self.settings, self.settings.branch_temperature if self.settings.branches > 1 else 0.0
        policy = dataclasses.replace(self.policy, temperature=temperature)
        method = FirstThen(action, len(row.state.history), Sft(policy, None, MethodSettings()))
        async with self.seats, self.pool.session() as env:
            episode = await play(env, method, self.games[row.transition.episode_id], max_steps=settings.branch_steps,
                                 seed=derive_seed(self._seed(row), "branch", i), seat=self.barrier.episode,
                                 begin=row.state)
        if episode.reason == "unplayable":
            raise UnplayableGame(episode.fault)
        if episode.reason == "env_died":
            raise UserError(LOST)
        return episode

    async def close(self) -> None:
        await super().close()
        await self.pool.close()


class GameFlags(Protocol):
    """The flags that say where the games of an expert's steps are."""

    env: str
    env_split: str
    env_data_root: str


def engine(env: str, *, want_admissible: bool) -> Callable[[], TextEnv]:
    """A picklable callable that makes an engine, which can pose alternative goals."""
    return engine_of(EnvFlags(env=env, missions=2), want_admissible=want_admissible)


def find_games(settings: GameFlags, rows: Sequence[ExpertStep]) -> dict[str, Game]:
    """Episode id -> its game.  Raises UserError that names a row whose game isn't there, or whose state isn't whole.

    The id is the game's with ``@`` and the number of an alternative goal, and ``#`` and the number of the episode, as
    world_model.collect writes it.
    """
    listed = {game.game_id: game for game in games_of(
        EnvFlags(env=settings.env, tasks="all"), settings.env_split, settings.env_data_root)}
    found: dict[str, Game] = {}
    for row in rows:
        episode = row.transition.episode_id
        if row.state.omitted:
            raise UserError(f"{row.where}: the state lacks its first {row.state.omitted} steps, which are to be "
                            "repeated in the game; give transitions with whole states")
        if episode not in found:
            name, _, goal = episode.partition("#")[0].partition("@")
            game = listed.get(name)
            if goal and game:
                game = next((other for other in with_alternative_goals(game, int(goal) + 1)
                             if other.game_id == f"{name}@{goal}"), None) if goal.isdecimal() else None
            if game is None:
                raise UserError(f"{row.where}: episode {episode!r} names no game of split {settings.env_split}"
                                f"{f' in {settings.env_data_root}' * bool(settings.env_data_root)}; give the games "
                                "that the transitions were collected in")
            found[episode] = dataclasses.replace(game, max_steps=0)
    return found


def summarize(added: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What became of the second choices, with their mean margins (nats), and what all of it cost."""
    outcomes: dict[int, Counter[str]] = {}
    margins: dict[str, list[float]] = {}
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for row in added:
        tokens.update(row["tokens"])
        steps.update(row["engine_steps"])
        for k, action in row["actions"].items():
            if int(k):
                gain = row["values"][k] - row["values"]["0"] if row["values"] else 0.0
                what = outcome(gain, action == row["actions"]["0"])
                outcomes.setdefault(int(k), Counter())[what] += 1
                if what != "same":
                    margins.setdefault(what, []).append(row["margins"][k])
    return {
        "branched_rows": sum(bool(row["branches"]) for row in added),
        "outcomes": {str(k): {name: counts[name] for name in OUTCOMES} for k, counts in sorted(outcomes.items())},
        "mean_margin": {name: sum(margins[name]) / len(margins[name]) for name in OUTCOMES if name in margins},
        "tokens": {name: tokens[name] for name in ("imagine", "choose", "branch", "weigh", "world_model")},
        "engine_steps": {name: steps[name] for name in ("replayed", "played")},
    }


def report(summary: dict[str, Any]) -> list[str]:
    """The lines of :func:`summarize`'s figures."""
    lines = [f"{summary['branched_rows']} rows were branched"]
    for k, counts in summary["outcomes"].items():
        lines.append(f"action after {k} imagined steps beside the draft: "
                     + ", ".join(f"{name} {n}" for name, n in counts.items()))
    if summary["mean_margin"]:
        lines.append("mean margin over the draft, nats: "
                     + ", ".join(f"where it {name} {margin:.2f}" for name, margin in summary["mean_margin"].items()))
    tokens, steps = summary["tokens"], summary["engine_steps"]
    lines.append("tokens computed: " + ", ".join(f"{name} {n}" for name, n in tokens.items()))
    lines.append(f"engine steps: {steps['played']} of branches, {steps['replayed']} repeated to reach their states")
    return lines
