r"""Stage 3 of ITP-R: online A2C on the real environment, the world model frozen (eq. 7 and 8).

The current weights play a batch of whole episodes.  At each step K_t ~ P_θ(K|s_t) is sampled from the K-head, policy
and world model imagine K_t steps, and a_t ~ π_θ(·|s_t, τ̂_t(K_t)) is sampled; the traces of both are kept.  One update
on exactly these samples follows (:mod:`itp.training.itp_r.a2c_update`), then the next batch.

The step limit belongs to the task: a state holds the steps so far, so V_θ can know that time is running out, and an
episode that is cut there is worth nothing more.  ``--bootstrap_at_limit`` counts V_θ of the state it was cut in.

Departures from the paper: GAE instead of the TD target unless ``--n_steps 1``; episodes are played many at a time,
and an update takes all steps of a batch.  Some options aren't the paper's.  ``--advantage group`` and ``gigpo`` compare
the episodes of a game with each other (:mod:`itp.training.itp_r.advantages`); V_θ then is neither needed nor trained.
``--observation_loss`` teaches the policy what followed its own actions, an idea of PaW (arXiv 2606.02388).
``--credit token`` is POAD's (:mod:`itp.training.itp_r.advantages`).  ``--rescale_reward`` and ``--anneal_turns`` are
those of WMAct (Shu et al. 2025, arXiv 2511.23476): outcomes count by N_eff / N, and the step limit falls to (L̄ + L) / 2
of the last update's mean and longest episode.  Departures from WMAct: a turn is one action; the mean is taken over the
batch before the change; states are compared by what the episode has shown of them.

    OUT/last, OUT/best, OUT/metrics.jsonl, OUT/metrics.json      (:mod:`itp.training.itp_r.checkpoint`)

The same command again goes on from ``OUT/last``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itp.devices import peak_memory, resolve_device
from itp.distributed import Processes, is_first_process, rank_devices
from itp.envs.base import TextEnv
from itp.envs.pool import EnvPool, processes_for
from itp.envs.registry import engine_of, games_of, goals_of
from itp.errors import UserError
from itp.files import check_output_folder
from itp.games import Game, resolve_split
from itp.lm.local import LocalLM
from itp.lm.scheduler import BatchBarrier
from itp.model_card import prompt_settings
from itp.models import load_world_model
from itp.pretrained import model_fingerprint
from itp.rollout import LeftOut
from itp.run_dir import alone_in, open_run_dir
from itp.seeding import derive_seed
from itp.training import hub
from itp.training.itp_r.a2c_rollout import (
    Player, annealed_limit, episode_games, prepare, statistics_of, summary,
)
from itp.training.itp_r.a2c_settings import RlSettings, checked, data_root
from itp.training.itp_r.checkpoint import RunFolder

if TYPE_CHECKING:
    from itp.training.itp_r.a2c_update import Learner

log = logging.getLogger(__name__)
SAID_IF_THERE = {"groups_with_signal": "groups with a signal", "advantage_abs": "mean |advantage|",
                 "loss_observation": "observation loss", "eval_success": "held out"}
"""Metrics that the log gives behind the others, and how it calls them."""


def run(settings: RlSettings) -> None:
    """Train; what the command line calls."""
    settings = checked(settings)
    make_env, games, eval_games = environment(settings)
    check_output_folder(settings.out_dir)
    with alone_in(settings.out_dir):
        folder = open_folder(settings, games, eval_games)
        asyncio.run(A2C(settings, folder, games, eval_games).train(make_env))


# ---------------------------------------------------------------- before torch: the games, the output folder


def environment(settings: RlSettings) -> tuple[Callable[[], TextEnv], list[Game], list[Game]]:
    """What makes an environment, the games to learn on, and the held-out games of the evaluations."""
    root = data_root(settings)
    games, eval_games = games_of(settings, settings.env_split, root), []
    if settings.eval_every and settings.eval_games:
        eval_games = games_of(settings, settings.eval_split, root)
        eval_games.sort(key=lambda g: derive_seed(settings.seed, "eval", g.game_id))
        del eval_games[settings.eval_games:]
        games = [game for game in games if game not in eval_games]
        if not games:
            raise UserError(f"--eval_games {settings.eval_games}: leaves no game of {settings.env_split} to learn on")
    if resolve_split(settings.env_split) != "train":
        log.warning("!!! LEARNING ON AN EVALUATION SPLIT (%s): results on it are worthless as a test; "
                    "the model's card says so too !!!", settings.env_split)
    make_env = engine_of(settings, want_admissible=settings.action_selection == "constrained")
    return make_env, [m for game in games for m in goals_of(settings, game)], eval_games


def open_folder(settings: RlSettings, games: Sequence[Game], eval_games: Sequence[Game]) -> RunFolder:
    """The output folder, with this configuration, models and games on record."""
    folder = RunFolder(settings.out_dir, settings.report_to)
    if is_first_process():
        if settings.override:
            folder.clear()
        facts = {"policy_fingerprint": model_fingerprint(settings.policy_model),
                 "games_fingerprint": derive_seed(*(g.game_id for g in [*games, *eval_games]))}
        if settings.wm_model:
            facts["wm_fingerprint"] = model_fingerprint(settings.wm_model)
        open_run_dir(settings.out_dir, settings, facts=facts, override=settings.override, may_grow=("max_seq_len",))
    return folder


# ---------------------------------------------------------------- training


@dataclass
class Progress:
    """How far the run is; saved with every checkpoint."""

    update: int = 0
    episodes: int = 0
    seconds: float = 0.0
    env_steps: int = 0
    best: float = -1.0
    turn_limit: int = 0
    """Steps of an episode at most, where ``--anneal_turns`` has lowered it; 0: the settings' own."""


class A2C:
    """The loop: play a batch, learn from it, evaluate and save now and then."""

    def __init__(self, settings: RlSettings, folder: RunFolder, games: Sequence[Game],
                 eval_games: Sequence[Game]) -> None:
        self.settings, self.folder, self.games, self.eval_games = settings, folder, games, eval_games
        self.processes = Processes()
        self.progress, self.player, self.learner = load(settings, folder, self.processes)

    async def train(self, make_env: Callable[[], TextEnv]) -> None:
        """From the start, or from the last checkpoint, to the end."""
        pool = EnvPool(make_env, processes_for(self.settings.env_processes, self.settings.num_envs))
        async with pool as self.player.pool:
            try:
                if self.progress.update == 0 and self.eval_games:
                    self.folder.log({"update": 0, "episodes": 0} | await self.evaluate())
                while self.unfinished():
                    await self.step()
            finally:
                await self.player.close()
        if self.settings.push_to_hub and is_first_process():
            hub.push(self.folder.path / "last", self.settings.push_to_hub)
        self.folder.finish(dataclasses.asdict(self.progress) | {"peak_memory_bytes": peak_memory()})
        broken = self.processes.gather(self.player.left_out.broken)
        if is_first_process():
            done = self.progress
            print(f"{done.episodes} episodes, {done.update} updates in {done.seconds / 60:.1f} min; best held-out "
                  f"success {max(done.best, 0):.3f}; {self.folder.path}/last, {self.folder.path}/best")
            LeftOut(broken=broken).check_none_broken("the training is finished without them")

    def unfinished(self) -> bool:
        """There are episodes to play, and steps and time are left: by the first process's clock, for all alike."""
        minutes, = self.processes.gather([self.progress.seconds / 60])[:1]
        return (self.progress.episodes < self.settings.total_episodes
                and not 0 < self.settings.max_env_steps <= self.progress.env_steps
                and not 0 < self.settings.max_minutes <= minutes)

    async def step(self) -> None:
        """Play a batch of episodes and learn from them; then log, evaluate and save where it is time for it."""
        settings, progress, start = self.settings, self.progress, time.perf_counter()
        count = min(settings.batch_episodes, settings.total_episodes - progress.episodes)
        row = await self.play_and_learn(progress.episodes, count)
        progress.update += 1
        progress.episodes += count
        progress.env_steps += row["env_steps"]
        progress.seconds += time.perf_counter() - start
        last = not self.unfinished()
        if self.eval_games and (last or progress.update % settings.eval_every == 0):
            row |= await self.evaluate()
        row = {"update": progress.update, "episodes": progress.episodes} | row
        self.folder.log(row | {"seconds": progress.seconds})
        more = "".join(f", {said} {row[name]:.3f}" for name, said in SAID_IF_THERE.items() if name in row)
        log.info("update %d/%d: return %.3f, success %.2f, mean k %.2f, entropy %.2f, loss %.4f%s",
                 progress.update, settings.total_updates, row["return"], row["success"], row["mean_k"],
                 row["entropy"], row["loss"], more)
        if last or progress.update % settings.save_every == 0:
            self.save("last", row, with_state=True)

    async def play_and_learn(self, first: int, count: int) -> dict[str, Any]:
        """``count`` episodes from number ``first`` on, and one update; its figures."""
        start = time.perf_counter()
        batch = self.processes.share(episode_games(self.settings, self.games, first, count))
        episodes = await self.player.play(batch, limit=self.progress.turn_limit)
        acted = time.perf_counter()
        samples, row = prepare(episodes, await self.player.bootstraps(episodes), self.player.lm, self.settings,
                               self.processes, self.learner.token_values)
        row |= self.learner.update(samples)
        self.player.forget()
        if self.settings.anneal_turns:
            row |= self.anneal(self.processes.gather([len(episode.steps) for episode in episodes]))
        return row | {"act_seconds": acted - start, "update_seconds": time.perf_counter() - acted,
                      "steps_per_second": row["env_steps"] / (time.perf_counter() - start),
                      "tokens_per_second": (row["policy_tokens"] + row["wm_tokens"]) / (acted - start)}

    def anneal(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Lower the step limit, where it is time for it, after an update on episodes of ``lengths``."""
        played = self.progress.turn_limit or max(self.settings.max_steps, *lengths)
        if (self.progress.update + 1) % self.settings.anneal_turns == 0:
            self.progress.turn_limit = annealed_limit(lengths)
        return {"turn_limit": played}

    async def evaluate(self) -> dict[str, float]:
        """Success on the held-out games; the best weights so far become ``OUT/best``."""
        played = await self.player.play(self.processes.share(self.eval_games), greedy=True)
        found = statistics_of(self.processes.gather([summary(episode, self.settings) for episode in played]))
        scores = {f"eval_{name}": found[name] for name in ("success", "return", "mean_k", "episode_steps")}
        if scores["eval_success"] > self.progress.best:
            self.progress.best = scores["eval_success"]
            self.save("best", scores)
        return scores

    def save(self, name: str, row: Mapping[str, Any], *, with_state: bool = False) -> None:
        """Make ``OUT/name`` of the current weights.  ``with_state``: and of all that is needed to go on from there."""
        policy, split = self.learner.policy, self.settings.env_split
        policy.card = dataclasses.replace(policy.card, update=self.progress.update)
        if resolve_split(split) != "train":
            policy.card = dataclasses.replace(
                policy.card, warning=f"trained on the evaluation split {split}: don't report results on it")
        describe = functools.partial(hub.write_readme, settings=self.settings, metrics=row)
        state = None
        if with_state:
            learner = self.learner.state() if is_first_process() else {}
            state = {"progress": dataclasses.asdict(self.progress), "learner": learner}
        self.folder.save(name, self.learner.save, describe, state)


def load(settings: RlSettings, folder: RunFolder, processes: Processes) -> tuple[Progress, Player, Learner]:
    """Models, optimizer and progress, from the start or from the last checkpoint."""
    import torch

    from itp.agent.policy_with_heads import PolicyWithHeads
    from itp.training.itp_r import gpu_memory_estimate
    from itp.training.itp_r.a2c_update import Learner
    from itp.training.models import choose_dtype

    torch.manual_seed(settings.seed)
    device, wm_device = (resolve_device(d) for d in rank_devices(settings.policy_device, settings.wm_device))
    dtype = choose_dtype(settings)
    gpu_memory_estimate.report(settings, (device, wm_device), 4 if dtype == torch.float32 else 2)
    policy, tokenizer = PolicyWithHeads.from_pretrained(
        settings.policy_model, device=device, attn_implementation=settings.attn_implementation,
        dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32") if settings.lora_r else "fp32")
    policy.card = dataclasses.replace(policy.card, **prompt_settings(settings))
    learner = Learner(policy, tokenizer, settings, dtype, processes)
    progress, state = Progress(), folder.state()
    if state is not None:
        progress = Progress(**state["progress"])
        learner.load_state(state["learner"])
        log.info("going on after update %d of %s", progress.update, folder.path)
    folder.rewind(progress.update if state else -1)
    barrier = BatchBarrier()
    # No graph can repeat a policy with adapters: in every pass PEFT copies the control token's index from the CPU.
    lm = LocalLM(policy.causal_lm, tokenizer, heads=policy.heads, name="policy", barrier=barrier,
                 **settings.fixed_engine | {"cuda_graphs": settings.cuda_graphs and not settings.lora_r})
    world_model = None
    if settings.fixed_k != 0:
        world_model = load_world_model(
            settings.wm_model, env=settings.env, device=wm_device, dtype=settings.wm_dtype, barrier=barrier,
            engine=settings.fixed_engine if wm_device == device else settings.engine,
            max_new_tokens=settings.wm_max_new_tokens, recall=settings.wm_recall)
    player = Player(settings, lm, world_model, barrier)
    policy.card = policy.card.with_format(player.policy.form)  # as it acts; a release's policy has no card
    return progress, player, learner
