"""How much does batching buy?  Same models, same games, same decoding, one run, on the machine at hand.

    python scripts/bench.py --policy_model P --wm_model W --heads_model ITP_R --env_data_root data \\
        --expert_jsonl transitions.jsonl

The yardstick is a plain loop of Transformers' ``model.generate`` at batch 1 (``scripts/sequential.py``), asked by the
same planners.  It plays --sequential_games of the games (labels about --sequential_rows of the rows, whole episodes),
spread evenly, since rates are compared.  Parts:

foresight     evaluation: game steps/s, once for every number in --concurrency
rap           the same with tree search, over the first --rap_steps steps of each game
label         pseudo-labels (stage 1): rows/s
rl_k          rollouts of online A2C (stage 3): game steps/s
wm_training   world-model training, transitions/s: rows padded to --cutoff, rows as they are, packed episodes; losses

Each part reports generated tokens/s, rows per model batch, the share of time that each model and the environments'
processes were busy and that no model was ("waiting"), peak memory, and the bytes that generation read per second.  Peak
memory: on a GPU what torch allocated there during the part, else what the process had so far.  Bytes read: the weights
once a forward pass, and the keys and values of its rows; as a share of --peak_bandwidth_gbs, if given.
Before the clock starts, environments have loaded every game once and every model has run.  In foresight the actions
of all concurrencies must be equal; exit status 1 where they aren't (in half precision they may differ).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field

from bench_training import world_model_training
from foresight_eval.settings import AlfworldSettings
from itp.agent.heads import has_heads
from itp.agent.policy import SELECTIONS
from itp.config import flag, parse_settings
from itp.devices import DTYPES, peak_memory
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.pool import EnvPool, processes_for
from itp.errors import UserError
from itp.files import check_output_file, write_json
from itp.games import Game, spread
from itp.lm.base import LM, GenParams, metered
from itp.lm.local import LocalLM
from itp.lm.memory_budget import EngineFlags, kv_bytes
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import PolicyMethod
from itp.models import load_policy, load_world_model
from itp.plan import make_plan
from itp.pretrained import check_model_path
from itp.program import run_main
from itp.rollout import Episode, run_episodes
from itp.run_dir import versions

PARTS = ("foresight", "rap", "label", "rl_k", "wm_training")
SEQUENTIAL = "one by one"


@dataclass
class BenchSettings(EngineFlags):
    policy_model: str = flag(help="policy: a model folder, or a name on the Hugging Face hub")
    env_data_root: str = flag(help="folder that holds json_2.1.1")
    wm_model: str = flag(help="world model")
    heads_model: str = flag("", help="policy with heads, for the part rl_k")
    expert_jsonl: str = flag("", help="the expert's transitions, for the parts label and wm_training")
    parts: str = flag(",".join(PARTS), help="what to measure")
    split: str = flag("unseen", help="dev = seen = valid_seen; test = unseen = valid_unseen; train")
    games: int = flag(32, at_least=1, help="games to play, spread evenly over the split")
    sequential_games: int = flag(2, help="how many of them the yardstick plays (0: leave it out)")
    rows: int = flag(1200, help="rows to label, of whole episodes")
    sequential_rows: int = flag(100, help="how many of them the yardstick labels (0: leave it out)")
    concurrency: str = flag("16", help="episodes at a time; several, as 1,4,16,64, give a curve in foresight")
    fixed_k: int = flag(2, help="steps that foresight and label imagine")
    action_selection: str = flag("constrained", help="as in foresight_eval", choices=SELECTIONS)
    max_steps: int = flag(40, help="steps of an episode at most")
    wm_max_new_tokens: int = flag(192, at_least=1, help="tokens of a predicted observation at most; a model with "
                                                        "random weights always writes so many")
    rap_steps: int = flag(3, at_least=1, help="steps of an episode at most in the part rap")
    rap_num_rollouts: int = flag(4, at_least=1, help="rollouts of a decision in the part rap")
    train_rows: int = flag(128, help="transitions of the training part")
    batch_size: int = flag(16, help="transitions of a training step")
    cutoff: int = flag(1024, help="tokens that the yardstick of training pads to")
    seed: int = flag(123, help="seed of everything random")
    env_processes: int = flag(2, help="processes that run the environments")
    device: str = flag("cpu", help="device of the models")
    dtype: str = flag("fp32", help="precision of the models", choices=DTYPES)
    peak_bandwidth_gbs: float = flag(0.0, at_least=0, help="GB/s that the device's memory can be read at")
    out_json: str = flag("", help="also write the figures to this file")


@dataclass
class Pass:
    """One way to do one part.  ``busy``, ``waiting``, ``environment``: shares of its seconds."""

    part: str
    how: str
    unit: str
    amount: int
    seconds: float
    generated_tokens: int
    rows_per_batch: dict[str, float]
    busy: dict[str, float]
    cached_prompt_share: dict[str, float]
    waiting: float
    environment: float
    peak_memory_gb: float
    gb_read: float
    """That decoding had to read: weights once a pass, keys and values of its rows."""
    actions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


def main() -> None:
    settings = parse_settings(BenchSettings, prog="python scripts/bench.py", description=__doc__)
    parts, numbers = check(settings)
    if settings.out_json:
        check_output_file(settings.out_json)
    games = spread(list_games(settings.split, settings.env_data_root), settings.games)

    import torch

    print(f"{len(games)} games of {settings.split}, {settings.env_processes} environment processes, "
          f"{torch.get_num_threads()} threads, {settings.device}, {settings.dtype}")
    passes: list[Pass] = []
    for part in parts:
        if part == "wm_training":
            continue
        for how in ([SEQUENTIAL] if sequential_share(settings, part) else []) + (
                [str(n) for n in numbers] if part == "foresight" else [str(max(numbers))]):
            passes.append(asyncio.run(run_part(settings, part, how, games)))
            first = next(p for p in passes if p.part == part)
            print(describe(passes[-1], first, settings.peak_bandwidth_gbs), flush=True)
    training = world_model_training(settings) if "wm_training" in parts else []
    for one in training:
        print(one.describe(training[0]), flush=True)
    same = compare([p for p in passes if p.part == "foresight"])
    if settings.out_json:
        write_json(settings.out_json, {"settings": asdict(settings), "versions": versions(), "passes": [
            {name: value for name, value in asdict(p).items() if name != "actions"} | {"rate": p.rate}
            for p in passes], "training": [asdict(one) for one in training]})
    if not same:
        sys.exit(1)


def check(settings: BenchSettings) -> tuple[list[str], list[int]]:
    """The parts and the concurrencies."""
    parts = settings.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts: {', '.join(sorted(unknown))} isn't one of {', '.join(PARTS)}")
    if "rl_k" in parts and not settings.heads_model:
        raise UserError("--parts rl_k needs --heads_model, a policy with heads; give one, or leave it out of --parts")
    if {"label", "wm_training"} & set(parts) and not settings.expert_jsonl:
        raise UserError("--parts label,wm_training need --expert_jsonl; give it, or leave them out of --parts")
    try:
        numbers = [int(n) for n in settings.concurrency.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--concurrency {settings.concurrency!r}: give numbers from 1 on, such as 1,4,16")
    for model in filter(None, (settings.policy_model, settings.wm_model, settings.heads_model)):
        check_model_path(model)
    return parts, numbers


def sequential_share(settings: BenchSettings, part: str) -> int:
    return settings.sequential_rows if part == "label" else settings.sequential_games


# ---------------------------------------------------------------- the parts


async def run_part(settings: BenchSettings, part: str, how: str, games: Sequence[Game]) -> Pass:
    """One part, ``how`` many at a time."""
    barrier, alone = BatchBarrier(), how == SEQUENTIAL
    concurrency = 1 if alone else int(how)
    policy_path = settings.heads_model if part == "rl_k" else settings.policy_model
    lms = {"policy": load(settings, policy_path, "policy", alone, barrier),
           "world_model": load(settings, settings.wm_model, "world_model", alone, barrier)}
    try:
        if part == "label":
            return await label(settings, lms, how, concurrency, barrier)
        method = rl_actor(settings, lms) if part == "rl_k" else planner(settings, lms, part)
        chosen = spread(games, settings.sequential_games) if alone else games
        make_env = functools.partial(AlfworldEnv, want_admissible=method.want_admissible)
        processes = processes_for(settings.env_processes, concurrency)
        async with EnvPool(make_env, processes) as pool:
            await warm_up(pool, chosen, processes, concurrency)
            episodes: list[Episode] = []

            async def play() -> int:
                max_steps = settings.rap_steps if part == "rap" else settings.max_steps
                async for episode in run_episodes(pool, method, chosen, max_steps=max_steps, seed=settings.seed,
                                                  concurrency=concurrency, barrier=barrier):
                    episodes.append(episode)
                return sum(len(e.steps) for e in episodes)

            found = await measured(part, how, "steps", lms, play, pool)
            if pool.deaths:
                raise UserError(f"{pool.deaths} environment processes died, which takes time; start again")
            found.actions = {e.game.game_id: [step.decision.action for step in e.steps] for e in episodes}
            return found
    finally:
        for lm in lms.values():
            await lm.close()


def load(settings: BenchSettings, path: str, role: str, alone: bool, barrier: BatchBarrier) -> LM:
    """The model in this project's engine, or ``alone`` as the yardstick asks it."""
    if not alone:
        loader = load_policy if role == "policy" else load_world_model
        return loader(path, device=settings.device, dtype=settings.dtype, barrier=barrier, engine=settings.engine).lm
    from itp.agent.policy_with_heads import PolicyWithHeads
    from sequential import SequentialLM

    heads = PolicyWithHeads.from_pretrained(path, device=settings.device)[0].heads if has_heads(path) else None
    return SequentialLM(path, heads=heads, device=settings.device, dtype=settings.dtype, role=role)


def planner(settings: BenchSettings, lms: dict[str, LM], name: str) -> PolicyMethod:
    """``foresight`` with K fixed, or ``rap``, as the evaluation's own command line would say it."""
    fixed_k = settings.fixed_k if name == "foresight" else -1
    plan = make_plan(AlfworldSettings(
        policy_model=settings.policy_model, wm_model=settings.wm_model, out_dir="", method=name, fixed_k=fixed_k,
        action_selection=settings.action_selection, wm_max_new_tokens=settings.wm_max_new_tokens,
        rap_wm_pred_tokens=settings.wm_max_new_tokens,
        rap_num_rollouts=settings.rap_num_rollouts))
    barrier = BatchBarrier()
    return plan.build_method(plan.load_policy(barrier, lm=lms["policy"]),
                             plan.load_world_model(barrier, lm=lms["world_model"]))


def rl_actor(settings: BenchSettings, lms: dict[str, LM]) -> PolicyMethod:
    """What acts in stage 3: K and actions are sampled."""
    from itp.training.itp_r.a2c_rollout import Player
    from itp.training.itp_r.a2c_settings import RlSettings, checked

    rl = checked(RlSettings(policy_model=settings.heads_model, wm_model=settings.wm_model, out_dir="",
                            fixed_k=settings.fixed_k, action_selection=settings.action_selection,
                            action_temperature=1.0, action_top_p=1.0, wm_max_new_tokens=settings.wm_max_new_tokens,
                            report_to="none"))
    world_model = load_world_model(settings.wm_model, lm=lms["world_model"], max_new_tokens=rl.wm_max_new_tokens)
    return Player(rl, lms["policy"], world_model, BatchBarrier()).method(greedy=False)


async def label(settings: BenchSettings, lms: dict[str, LM], how: str, concurrency: int, barrier: BatchBarrier) -> Pass:
    from itp.training.itp_r.expert_steps import choose_rows, read_expert
    from itp.training.itp_r.label_settings import LabelSettings
    from itp.training.itp_r.pseudo_labels import Labeler

    own = LabelSettings(
        expert_jsonl=settings.expert_jsonl, policy_model=settings.policy_model, wm_model=settings.wm_model,
        out_labeled_jsonl="", max_k=settings.fixed_k, max_rows=settings.rows, seed=settings.seed,
        wm_max_new_tokens=settings.wm_max_new_tokens)
    rows = choose_rows(read_expert(settings.expert_jsonl, None), own.max_rows, own.seed)
    episodes = [list(group) for _, group in itertools.groupby(rows, key=lambda r: r.transition.episode_id)]
    if how == SEQUENTIAL:
        episodes = spread(episodes, max(1, len(episodes) * settings.sequential_rows // len(rows)))
    labeler = Labeler(load_policy(settings.policy_model, lm=lms["policy"]),
                      load_world_model(settings.wm_model, lm=lms["world_model"], max_new_tokens=own.wm_max_new_tokens),
                      tuple(range(own.max_k + 1)), own)
    todo = iter(episodes)

    async def worker() -> None:
        barrier.add(live=1)
        for row in itertools.chain.from_iterable(todo):  # an episode's rows follow each other, as in the program
            await labeler.label(row)
        barrier.add(live=-1)

    async def work() -> int:
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return sum(map(len, episodes))

    return await measured("label", how, "rows", lms, work)


async def warm_up(pool: EnvPool, games: Sequence[Game], processes: int, concurrency: int) -> None:
    """Every process loads every game, every environment starts its engine."""
    async with contextlib.AsyncExitStack() as stack:
        # A session goes to the process with the fewest: the first ones are one in each process.
        envs = [await stack.enter_async_context(pool.session()) for _ in range(max(processes, concurrency))]

        async def load(env, chosen: Sequence[Game]) -> None:
            for game in chosen:
                await env.reset(game)

        await asyncio.gather(*(load(env, games) for env in envs[:processes]))
        await asyncio.gather(*(load(env, games[:1]) for env in envs[processes:]))


async def measured(part: str, how: str, unit: str, lms: dict[str, LM], work: Callable[[], Awaitable[int]],
                   pool: EnvPool | None = None) -> Pass:
    """``work`` under the clock.  It returns how much it has done."""
    for lm in lms.values():
        await lm.generate(["Task:"], GenParams(max_new_tokens=4))  # too short for the prefix cache
        lm.batches.clear()
        lm.busy_s = 0.0
    device, before = reset_peak_memory(lms["policy"]), {role: read_bytes(lm) for role, lm in lms.items()}
    environment, start = pool.busy_s if pool else 0.0, time.monotonic()
    with metered() as usage:
        amount = await work()
    seconds = time.monotonic() - start
    busy = {role: lm.busy_s / seconds for role, lm in lms.items()}
    processes = len(pool.pids()) if pool else 1
    return Pass(
        part, how, unit, amount, seconds, sum(u.completion_tokens for u in usage.values()),
        {role: statistics.fmean(lm.batches or [0]) for role, lm in lms.items()}, busy,
        {role: u.cached_tokens / max(1, u.prompt_tokens) for role, u in usage.items()},
        max(0.0, 1 - sum(busy.values())), ((pool.busy_s - environment) / processes / seconds) if pool else 0.0,
        peak_memory()[device] / 2**30, sum(read_bytes(lm) - before[role] for role, lm in lms.items()) / 1e9)


def reset_peak_memory(lm: LM) -> str:
    """The device of a model, with its peak set back; that of a CPU's process can't be."""
    if lm.model.device.type != "cuda":
        return "cpu"
    import torch

    torch.cuda.reset_peak_memory_stats(lm.model.device)
    return str(lm.model.device)


def read_bytes(lm: LM) -> int:
    """What the forward passes of generation so far had to read: all weights, and the keys and values of their rows."""
    counted = lm.engine.memory if isinstance(lm, LocalLM) else lm
    weights = sum(p.nbytes for p in lm.model.parameters())
    if not lm.model.config.tie_word_embeddings:  # of input embeddings a pass reads some rows only
        weights -= lm.model.get_input_embeddings().weight.nbytes
    kept = kv_bytes(lm.model.config.get_text_config(), lm.model.dtype.itemsize)
    return counted.passes * weights + counted.tokens_read * kept


# ---------------------------------------------------------------- what is printed


def describe(one: Pass, first: Pass, peak_bandwidth_gbs: float) -> str:
    written, first_written = (p.generated_tokens / p.seconds for p in (one, first))
    read = one.gb_read / one.seconds
    bound = f" ({read / peak_bandwidth_gbs:.1%} of {peak_bandwidth_gbs:g})" if peak_bandwidth_gbs else ""
    models = ", ".join(f"{role} {one.busy[role]:.0%} in batches of {one.rows_per_batch[role]:.1f} "
                       f"({one.cached_prompt_share.get(role, 0):.0%} of prompts cached)" for role in one.busy)
    return (f"{one.part:10} {one.how:>10}: {one.rate:8.2f} {one.unit}/s ({one.rate / first.rate:.1f} x), "
            f"{written:8.1f} tokens/s ({written / max(1e-9, first_written):.1f} x), "
            f"{one.amount} {one.unit} in {one.seconds:.1f} s\n"
            f"{'':23} {models}, waiting {one.waiting:.0%}, environment {one.environment:.0%}, "
            f"{one.peak_memory_gb:.2f} GB, {read:.2f} GB/s read{bound}")


def compare(passes: Sequence[Pass]) -> bool:
    """Say where executed actions differ.  The yardstick may: its last digits and its ties are its own."""
    batched = [p for p in passes if p.how != SEQUENTIAL]
    for p in passes:
        if p is batched[0] if batched else True:
            continue
        shared = [game for game in p.actions if game in batched[0].actions]
        equal = sum(p.actions[game] == batched[0].actions[game] for game in shared)
        print(f"actions {p.how} and {batched[0].how} at a time: {equal} of {len(shared)} games equal")
    return all(p.actions == batched[0].actions for p in batched)


if __name__ == "__main__":
    run_main(main)
