r"""Exploration trees of the policy in the real engine, with a Q for every action in them: the data of step-level Q.

    python -m itp.training.explore --policy_model POLICY --env_data_root DATA --out_dir runs/tree

The policy plays each game, and a share of its actions (``--explore``) is another one of ``--candidates`` proposals.  Of
the ``--branch_points`` steps that are chosen by chance, the other proposals are executed too: the game is moved to the
state again, and the policy goes on greedily.  These episodes are one tree, in which

    Q(s, a) = 1 where a accomplishes the task, else γ·max_a' Q(s', a') over what was tried in s' (0 where nothing was)

as in QLASS (2502.02584), whose r is the outcome.  ``OUT/explored.jsonl`` has a line for each game: its tree as rows of
state, action and Q.  Zhai et al. (2409.09345) search with UCT; here branches are chosen by chance, so all of a game's
are played at the same time.  The same command goes on with the games that are missing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from itp.agent.policy import SELECTIONS, Policy
from itp.config import flag, parse_settings
from itp.devices import DTYPES
from itp.envs.pool import EnvPool, processes_for
from itp.envs.registry import EnvFlags, engine_of, games_of, goals_of
from itp.files import append_row, read_appended
from itp.games import Game
from itp.lm.scheduler import BatchBarrier
from itp.methods.actors import FirstThen
from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.methods.settings import MethodSettings
from itp.methods.sft import Sft
from itp.models import load_policy
from itp.pretrained import check_model_path, model_fingerprint
from itp.program import progress_bar, run_main, say_next
from itp.rollout import Episode, LeftOut, play, run_workers
from itp.run_dir import alone_in, open_run_dir, timed
from itp.seeding import derive_seed
from itp.text.state import State

log = logging.getLogger(__name__)
EXPLORED = "explored.jsonl"


@dataclass
class ExploreSettings(EnvFlags):
    """What is explored, and how."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "env_data_root", "out_dir", "env", "split",
        "max_games", "candidates", "explore", "branch_points", "action_selection")
    policy_model: str = flag(help="the policy that explores: a model folder, or a name on the Hugging Face hub",
                             affects_result=False)
    env_data_root: str = flag("", help="ALFWorld: folder that holds json_2.1.1", affects_result=False,
                              aliases=("env_data_path",))
    out_dir: str = flag(help="folder for explored.jsonl; the same command again goes on", affects_result=False)
    split: str = flag("train", help="split of the games")
    max_games: int = flag(0, at_least=0, help="a random choice of so many games (0: all)")
    max_steps: int = flag(30, at_least=1, help="steps of an episode at most, and of a branch")
    candidates: int = flag(4, at_least=2, help="proposals in a state: the likeliest one, and samples")
    temperature: float = flag(1.0, above=0, help="temperature of these samples")
    explore: float = flag(0.3, at_least=0, help="share of the steps at which another proposal is executed")
    branch_points: int = flag(3, at_least=0, help="steps of an episode at which all proposals are executed")
    gamma: float = flag(0.95, above=0, help="discount of a step")
    action_selection: str = flag("constrained", help="how actions are chosen", choices=SELECTIONS)
    dtype: str = flag("fp16", help="precision of the policy on a GPU", choices=DTYPES)
    device: str = flag("cuda", help="device of the policy", affects_result=False)
    concurrency: int = flag(32, at_least=1, help="episodes at a time", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the environments", affects_result=False)
    seed: int = flag(123, help="seed of everything random")


# ---------------------------------------------------------------- the tree


def q_values(episodes: Iterable[tuple[Sequence[tuple[State, str]], State, bool]],
             gamma: float) -> list[tuple[State, str, float]]:
    """(state, action, Q) of the tree that ``episodes`` are together.

    An episode is its steps of (state, action), its last state, and its success.
    """
    after: dict[State, dict[str, State]] = defaultdict(dict)
    solved = set()
    for steps, end, success in episodes:
        states = [*(state for state, _ in steps[1:]), end]
        for (state, action), following in zip(steps, states, strict=True):
            after[state][action] = following
        if success:
            solved.add(end)
    q: dict[tuple[State, str], float] = {}
    for state in sorted(after, key=lambda s: len(s.history), reverse=True):  # what follows is known before
        for action, following in after[state].items():
            best = max((q[following, then] for then in after.get(following, ())), default=0.0)
            q[state, action] = 1.0 if following in solved else gamma * best
    return [(state, action, q[state, action]) for state in sorted(after, key=lambda s: len(s.history))
            for action in after[state]]


# ---------------------------------------------------------------- the games


class Explorer(PolicyMethod):
    """The policy, but for a share of its steps.  A decision's ``memory`` has all proposals."""

    name = "explorer"

    def __init__(self, policy: Policy, candidates: int, share: float, temperature: float) -> None:
        warm = dataclasses.replace(policy, temperature=temperature)
        super().__init__(warm, None, MethodSettings(candidates=candidates))
        self.share = share

    async def act(self, view: View) -> Decision:
        choices = await self.policy.candidates(view.state, view.observation.admissible, self.settings.candidates,
                                               view.seed)
        draw = random.Random(derive_seed(view.seed, "explore"))
        chosen = draw.choice(choices[1:]) if choices[1:] and draw.random() < self.share else choices[0]
        return decide(chosen, memory=tuple(choice.action for choice in choices))


@dataclass
class Forest:
    """Plays trees.  ``seats``: held by every episode that is played."""

    settings: ExploreSettings
    policy: Policy
    pool: EnvPool
    barrier: BatchBarrier
    seats: asyncio.Semaphore
    left_out: LeftOut = field(default_factory=LeftOut)

    async def tree(self, game: Game) -> dict[str, Any] | None:
        """The row of a game; None where it wasn't played."""
        settings = self.settings
        first = await self._play(game, Explorer(self.policy, settings.candidates, settings.explore,
                                                 settings.temperature))
        if self.left_out.takes(first):
            return None
        draw = random.Random(derive_seed(settings.seed, "branches", game.game_id))
        chosen = draw.sample(range(len(first.steps)), min(settings.branch_points, len(first.steps)))
        others = [(i, action) for i in sorted(chosen) for action in first.steps[i].decision.memory
                  if action != first.steps[i].decision.action]
        greedy = Sft(self.policy, None, MethodSettings())
        branches = await asyncio.gather(*(
            self._play(game, FirstThen(action, i, greedy), first.steps[i].state) for i, action in others))
        episodes = [first, *(branch for branch in branches if not self.left_out.takes(branch))]
        nodes = q_values([_as_steps(episode) for episode in episodes if episode.steps], settings.gamma)
        return {"game_id": game.game_id, "success": first.success, "episodes": len(episodes),
                "solved": sum(episode.success for episode in episodes),
                "steps": sum(len(episode.steps) for episode in episodes),
                "nodes": [{"state": state.render(), "action": action, "q": round(q, 6)} for state, action, q in nodes]}

    async def _play(self, game: Game, method: Any, begin: State | None = None) -> Episode:
        async with self.seats, self.pool.session() as env:
            return await play(env, method, game, max_steps=self.settings.max_steps,
                              seed=derive_seed(self.settings.seed, "tree"), seat=self.barrier.episode, begin=begin)


def _as_steps(episode: Episode) -> tuple[list[tuple[State, str]], State, bool]:
    steps = [(step.state, step.decision.action) for step in episode.steps]
    last = episode.steps[-1]
    return steps, last.state.after(last.decision.action, last.observation), episode.success


async def _plant(forest: Forest, games: Sequence[Game], path: Path) -> None:
    """Append the tree of each of ``games``.  ``concurrency`` are open, so that a run that is killed loses no more."""
    todo = iter(games)
    with progress_bar(len(games), "game") as bar:

        async def worker() -> None:
            for game in todo:
                if row := await forest.tree(game):
                    append_row(path, row)
                bar.update()

        await run_workers(worker, forest.settings.concurrency)


async def explore(settings: ExploreSettings, games: Sequence[Game], out: Path) -> None:
    """Add the trees of ``games`` to the file."""
    barrier = BatchBarrier()
    policy = load_policy(settings.policy_model, env=settings.env, device=settings.device, dtype=settings.dtype,
                         barrier=barrier, selection=settings.action_selection)
    pool = EnvPool(engine_of(settings, want_admissible=settings.action_selection != "generate"),
                   processes_for(settings.env_processes, settings.concurrency))
    forest = Forest(settings, policy, pool, barrier, asyncio.Semaphore(settings.concurrency))
    try:
        await _plant(forest, games, out / EXPLORED)
    finally:
        await pool.close()
        await policy.close()
    forest.left_out.check_none_lost("games")
    forest.left_out.check_none_broken()


def main() -> None:
    settings = parse_settings(ExploreSettings, prog="python -m itp.training.explore", description=__doc__)
    check_model_path(settings.policy_model)
    games = games_of(settings, settings.split, settings.env_data_root)
    if settings.max_games:
        games = sorted(games, key=lambda g: derive_seed(settings.seed, "games", g.game_id))[:settings.max_games]
    games = [dataclasses.replace(goal, max_steps=0) for game in games for goal in goals_of(settings, game)]
    with alone_in(settings.out_dir):
        out = open_run_dir(settings.out_dir, settings, facts={"policy": model_fingerprint(settings.policy_model)})
        done = {row["game_id"] for row in read_appended(out / EXPLORED, {"game_id": str, "nodes": list})}
        todo = [game for game in games if game.game_id not in done]
        log.info("%d games to explore, %d are there already", len(todo), len(games) - len(todo))
        if todo:
            with timed(out):
                asyncio.run(explore(settings, todo, out))
        rows = read_appended(out / EXPLORED, {"game_id": str, "nodes": list})
    q = [node["q"] for row in rows for node in row["nodes"]]
    mean = f"{len(q)} actions, mean Q {sum(q) / len(q):.3f}" if q else "no actions"
    print(f"{len(rows)} games, {sum(row['episodes'] for row in rows)} episodes ({sum(row['solved'] for row in rows)} "
          f"solved, {sum(row['success'] for row in rows)} of the first ones), {mean}, in {out / EXPLORED}")
    say_next(f"python -m itp.training.critic --learn q --train_jsonl {out / EXPLORED} --model_path "
             f"{settings.policy_model} --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
