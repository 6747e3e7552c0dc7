"""How much faster is an evaluation that plays several games at a time?  Same models, same games, one run.

    python scripts/bench_eval.py --policy_model P --wm_model W --env_data_root data --method foresight

plays --games games of a split once for every number in --concurrency, and prints for each: game steps a
second, that as a multiple of the first, rows per model batch, the share of the time in which each model was at
work, and the share of prompt tokens that came from its prefix cache.  Then it compares the executed actions
game by game: how many episodes run at once must not change what happens in them.  Exit status 1 where it did
(in half precision it may: equally likely actions round differently in a larger batch).

Every number starts alike: models freshly loaded (empty prefix caches), new environment processes.  Before the
clock starts each of these has loaded every game once, so that no pass pays for the translation of a game.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from foresight_eval.methods import build
from foresight_eval.runner import make_policy, make_world_model, method_settings, needs_world_model
from foresight_eval.settings import AlfworldSettings
from itp.config import flag, parse_settings
from itp.envs.alfworld import AlfworldEnv
from itp.envs.pool import EnvPool
from itp.games import Game, list_games
from itp.lm.base import GenParams
from itp.lm.local import LocalLM, Quorum
from itp.policy.agent import SELECTIONS
from itp.rollout import Episode, run_episodes
from itp.runtime import DTYPES, UserError, run_main, versions, write_json


@dataclass
class BenchSettings:
    policy_model: str = flag(help="policy: a model folder, or a name on the Hugging Face hub")
    env_data_root: str = flag(help="folder that holds json_2.1.1")
    wm_model: str = flag("", help="world model (needed by --method foresight)")
    split: str = flag("unseen", help="dev = seen = valid_seen; test = unseen = valid_unseen; train")
    games: int = flag(32, help="games to play, spread evenly over the split")
    method: str = flag("sft", help="how to act", choices=("sft", "foresight"))
    fixed_k: int = flag(2, help="steps that foresight imagines")
    action_selection: str = flag("constrained", help="as in foresight_eval", choices=SELECTIONS)
    concurrency: str = flag("1,16", help="episodes at a time, one pass for each number; the first is the yardstick")
    max_steps: int = flag(40, help="steps of an episode at most")
    foresight_tokens: int = flag(256, help="new tokens of one imagined observation at most")
    seed: int = flag(123, help="seed of everything random")
    temperature: float = flag(0.0, help="sampling temperature of the policy (0: greedy)")
    env_processes: int = flag(2, help="processes that run the environments")
    device: str = flag("cpu", help="device of both models")
    dtype: str = flag("fp32", help="precision of both models on a GPU", choices=DTYPES)
    out_json: str = flag("", help="also write the figures to this file")


@dataclass
class ModelWork:
    """What one model did in a pass.  ``busy``: share of the pass in which it was computing."""

    batches: int
    rows_per_batch: float
    busy: float
    cached_prompt_share: float


@dataclass
class Pass:
    """All games once, ``concurrency`` at a time."""

    concurrency: int
    seconds: float
    warm_up_seconds: float
    steps: int
    successes: int
    models: dict[str, ModelWork] = field(default_factory=dict)
    actions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds


def main() -> None:
    settings = parse_settings(BenchSettings, prog="python scripts/bench_eval.py", description=__doc__)
    numbers = concurrencies(settings.concurrency)
    games = spread(list_games("alfworld", settings.split, settings.env_data_root), settings.games)
    evaluation = evaluation_settings(settings)
    if needs_world_model(evaluation) and not settings.wm_model:
        raise UserError(f"--method {settings.method} needs --wm_model, the world model's folder")

    import torch

    print(f"{settings.method}, {settings.action_selection}, {len(games)} games of {settings.split}, "
          f"{settings.env_processes} environment processes, {torch.get_num_threads()} threads, {settings.device}")
    passes = []
    for number in numbers:
        passes.append(asyncio.run(play_all(settings, evaluation, games, number)))
        print(describe(passes[-1], passes[0]), flush=True)
    differing = {p.concurrency: differences(passes[0].actions, p.actions) for p in passes[1:]}
    for number, found in differing.items():
        print(f"actions at {number} and at {passes[0].concurrency} at a time: "
              f"{len(games) - len(found)} of {len(games)} games equal")
        for line in found:
            print(f"  {line}")
    if settings.out_json:
        rows = [{**asdict(p), "steps_per_second": p.steps_per_second} for p in passes]
        for row in rows:
            del row["actions"]
        write_json(settings.out_json, {"settings": asdict(settings), "versions": versions(), "passes": rows,
                                       "games_that_differ": {str(n): len(f) for n, f in differing.items()}})
    if any(differing.values()):
        sys.exit(1)


def concurrencies(text: str) -> list[int]:
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--concurrency {text!r}: give numbers from 1 on, such as 1,16")
    return numbers


def spread(games: Sequence[Game], wanted: int) -> list[Game]:
    """``wanted`` games at even distances, since lists of games are sorted by task type."""
    if not 1 <= wanted <= len(games):
        raise UserError(f"--games {wanted}: the split has {len(games)} games; choose from 1 to that many")
    return [games[i * len(games) // wanted] for i in range(wanted)]


def evaluation_settings(settings: BenchSettings) -> AlfworldSettings:
    """The evaluation that is measured, as its own command line would say it."""
    return AlfworldSettings(
        policy_model=settings.policy_model, wm_model=settings.wm_model, output_path="", method=settings.method,
        split=settings.split, env_data_root=settings.env_data_root, fixed_k=settings.fixed_k,
        action_selection=settings.action_selection, max_steps=settings.max_steps, seed=settings.seed,
        temperature=settings.temperature, foresight_tokens=settings.foresight_tokens)


async def play_all(settings: BenchSettings, evaluation: AlfworldSettings, games: Sequence[Game],
                   concurrency: int) -> Pass:
    quorum = Quorum()
    paths = {"policy": settings.policy_model}
    if needs_world_model(evaluation):
        paths["world_model"] = settings.wm_model
    lms = {role: LocalLM.load(path, device=settings.device, dtype=settings.dtype, quorum=quorum, role=role)
           for role, path in paths.items()}
    world_model = make_world_model(evaluation, lms["world_model"]) if "world_model" in lms else None
    method = build(settings.method, make_policy(evaluation, lms["policy"]), world_model, method_settings(evaluation))
    make_env = functools.partial(AlfworldEnv, want_admissible=method.want_admissible)
    episodes: list[Episode] = []
    try:
        async with EnvPool(make_env, settings.env_processes) as pool:
            start = time.monotonic()
            await warm_up(pool, games, settings.env_processes, concurrency, list(lms.values()))
            warm, start = time.monotonic() - start, time.monotonic()
            async for episode in run_episodes(pool, method, games, max_steps=settings.max_steps, seed=settings.seed,
                                              concurrency=concurrency, quorum=quorum):
                episodes.append(episode)
            seconds = time.monotonic() - start
            if pool.deaths:
                raise UserError(f"{pool.deaths} environment processes died, which takes time; start again")
    finally:
        for lm in lms.values():
            await lm.close()
    return Pass(concurrency, seconds, warm, sum(len(e.steps) for e in episodes), sum(e.success for e in episodes),
                {role: work(lm, episodes, seconds) for role, lm in lms.items()},
                {e.game.game_id: [step.decision.action for step in e.steps] for e in episodes})


async def warm_up(pool: EnvPool, games: Sequence[Game], processes: int, concurrency: int,
                  lms: Sequence[LocalLM]) -> None:
    """Every process loads every game, every environment starts its engine, every model runs once."""
    async with contextlib.AsyncExitStack() as stack:
        # A session goes to the process with the fewest: the first ones are one in each process.
        envs = [await stack.enter_async_context(pool.session()) for _ in range(max(processes, concurrency))]

        async def load(env, chosen: Sequence[Game]) -> None:
            for game in chosen:
                await env.reset(game)

        await asyncio.gather(*(load(env, games) for env in envs[:processes]))
        await asyncio.gather(*(load(env, games[:1]) for env in envs[processes:]))
    for lm in lms:
        # Shorter than a block of the prefix cache, so nothing of it is found again.
        await lm.generate(["Task:"], GenParams(max_new_tokens=4))
        lm.batches.clear()
        lm.busy_s = 0.0


def work(lm: LocalLM, episodes: Sequence[Episode], seconds: float) -> ModelWork:
    usages = [e.usage[lm.role] for e in episodes if lm.role in e.usage]
    return ModelWork(len(lm.batches), statistics.fmean(lm.batches or [0]), lm.busy_s / seconds,
                     sum(u.cached_tokens for u in usages) / max(1, sum(u.prompt_tokens for u in usages)))


def describe(one: Pass, first: Pass) -> str:
    lines = [f"{one.concurrency:4} at a time: {one.steps_per_second:7.2f} steps/s "
             f"({one.steps_per_second / first.steps_per_second:.2f} x), {one.steps} steps in {one.seconds:.1f} s, "
             f"{one.successes} won; warm-up {one.warm_up_seconds:.1f} s"]
    lines += [f"     {role:12} {w.batches} batches of {w.rows_per_batch:.2f} rows, busy {w.busy:.0%} of the time, "
              f"{w.cached_prompt_share:.0%} of prompt tokens cached" for role, w in one.models.items()]
    return "\n".join(lines)


def differences(first: dict[str, list[str]], other: dict[str, list[str]]) -> list[str]:
    """One line for every game whose executed actions differ: where they part."""
    lines = []
    for game_id, actions in first.items():
        if actions != other[game_id]:
            pairs = zip([*actions, None], [*other[game_id], None], strict=False)
            step, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            lines.append(f"{game_id}: step {step}: {here!r} and {there!r}")
    return lines


if __name__ == "__main__":
    run_main(main)
