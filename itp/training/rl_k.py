r"""Stage 3 of ITP-R: online A2C on the real environment, the world model frozen (eq. 7 and 8).

A batch is whole episodes played by the current weights: at each step the K-head draws K_t ~ P_θ(K|s_t), policy and
world model imagine K_t steps, and a_t ~ π_θ(·|s_t, τ̂_t(K_t)) is drawn with a record of how.  One update follows
(:mod:`itp.training.rl_update`), on the log-probabilities of exactly what was drawn; then the next batch.

The step limit belongs to the task: a state holds the steps so far, so V_θ can know that time is running out, and an
episode that is cut there is worth nothing more.  ``--bootstrap_at_limit`` counts V_θ of the state it was cut in.

Departures from the paper: GAE instead of the TD target unless ``--n_steps 1``; episodes are played many at a time,
and an update takes all steps of a batch.

    OUT/last, OUT/best, OUT/metrics.jsonl, OUT/metrics.json      (:mod:`itp.training.rl_run`)

The same command again goes on from ``OUT/last``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itp.config import flag
from itp.envs.base import TextEnv
from itp.envs.pool import EnvPool, processes_for
from itp.envs.which import EnvFlags, engine_of, games_of, missions_of
from itp.games import Game, resolve_split
from itp.lm.chat import asked_as
from itp.lm.local import LocalLM, Quorum
from itp.lm.room import EngineFlags
from itp.policy.agent import IMAGINED_ACTION_TOKENS
from itp.policy.heads import has_heads, kmax_of
from itp.policy.shown import EVERYTHING, FORMAT_CHOICES, show_as_trained, shown
from itp.runtime import (
    DTYPES,
    MASKED_ATTENTION,
    UserError,
    check_model_path,
    claim_output,
    derive_seed,
    model_fingerprint,
    rank_devices,
    resolve_device,
)
from itp.training import hub
from itp.training.finetune import TRACKERS, check_tracker, is_first_process
from itp.training.rl_play import Player, episode_games, prepare, statistics_of, summary
from itp.training.rl_run import Processes, RunFolder
from itp.world_model import WorldModel

if TYPE_CHECKING:
    from itp.training.rl_update import Learner

log = logging.getLogger("itp.rl_k")


@dataclass
class RlSettings(EnvFlags, EngineFlags):
    policy_model_path: str = flag(help="policy with heads, as sft leaves it")
    out_dir: str = flag(help="folder for metrics, last and best checkpoint; the same command again resumes in it")
    wm_model_path: str = flag("", help="world model; not needed with --force_k 0")
    alfworld_config: str = flag("", help="alfworld's YAML file; its dataset.data_path stands in for --env_data_path")
    env_data_path: str = flag("", help="ALFWorld: folder that holds json_2.1.1; empty: from --alfworld_config")
    env_split: str = flag("train", help="split of the games to learn on")
    wm_max_new_tokens: int = flag(192, at_least=1, help="tokens of a predicted observation at most")
    kmax: int = flag(0, at_least=0, help="K_max; 0: the checkpoint's, any other must be the same")
    force_k: int = flag(-1, help="imagine so many steps always; 0: RL without imagination; -1: the K-head chooses")
    foresight_format: str = flag("auto", help="what of the imagined trajectory the policy reads (auto: as it was "
                                              "trained, else full)", choices=FORMAT_CHOICES)
    epochs: int = flag(1, at_least=1, help="rounds of episodes_per_epoch")
    episodes_per_epoch: int = flag(50, at_least=1, help="episodes of a round")
    episodes_per_update: int = flag(32, at_least=1, help="episodes of a batch, all played by the same weights")
    update_every: int = flag(1, at_least=1, help="update after so many batches, on all of them")
    minibatches: int = flag(1, at_least=1,
                            help="optimizer steps of an update, each on a part of its episodes; 1 is exact A2C")
    max_steps: int = flag(50, at_least=1, help="ALFWorld: steps of an episode at most")
    max_minutes: float = flag(0.0, at_least=0, help="stop after so many minutes of acting and learning (0: no limit)")
    num_envs: int = flag(16, at_least=1, help="episodes played at a time")
    env_processes: int = flag(2, at_least=1, help="processes that run the environments")
    policy_device: str = flag("cuda:0", help="device of the policy")
    wm_device: str = flag("cuda:1", help="device of the world model")
    wm_dtype: str = flag("fp16", help="precision of the world model on a GPU", choices=DTYPES)
    gamma: float = flag(0.99, help="discount γ")
    n_steps: int = flag(0, at_least=0,
                        help="V̂ from so many rewards and V of the state after them; 1: the paper's; 0: GAE")
    gae_lambda: float = flag(0.95, help="λ of GAE; 1: the whole return")
    bootstrap_at_limit: bool = flag(False, help="an episode cut by the step limit is worth V of its last state")
    normalize_advantages: bool = flag(False, help="mean 0 and deviation 1 over a batch")
    lr: float = flag(5e-6, above=0, help="learning rate")
    value_lr: float = flag(0.0, at_least=0, help="learning rate of the value head, which starts from nothing (0: lr)")
    lr_scheduler_type: str = flag("linear", help="how the learning rate falls",
                                  choices=("linear", "constant", "cosine"))
    wd: float = flag(0.0, at_least=0, help="weight decay")
    adam_beta2: float = flag(0.95, help="AdamW's second beta; with few updates a long memory keeps the scale of the "
                                        "first ones, which teach values only")
    lambda_k: float = flag(0.2, at_least=0, help="λ_K: cost of an imagined step")
    step_cost: float = flag(0.01, help="λ_step: cost of a step")
    success_bonus: float = flag(0.01, help="added to the reward at success")
    invalid_action_penalty: float = flag(-0.1, help="added to the reward where the engine says that nothing happens")
    entropy_coef: float = flag(0.01, help="β of eq. 8")
    value_coef: float = flag(1.0, help="α of eq. 8")
    value_updates: int = flag(3, at_least=0, help="first updates, of the value head alone (a quarter of all at most)")
    max_grad_norm: float = flag(1.0, at_least=0, help="gradients are clipped to this norm (0: not)")
    action_selection: str = flag("generate", help="actions are written freely, or drawn among the admissible ones",
                                 choices=("generate", "constrained"))
    action_max_new_tokens: int = flag(-1, at_least=1, help="tokens of an action at most (-1: 16, ScienceWorld 48)")
    action_temperature: float = flag(0.7, above=0, help="temperature of executed and imagined actions")
    action_top_p: float = flag(0.9, help="nucleus of executed and imagined actions (not of constrained ones)")
    action_do_sample: int = flag(1, help="0: actions are greedy, and only K is learned", choices=(0, 1))
    imagine_action_max_new_tokens: int = flag(-1, at_least=1,
                                              help="tokens of an imagined action at most (-1: 12, ScienceWorld 48)")
    max_seq_len: int = flag(1536, at_least=1,
                            help="tokens of a prompt and its action at most; the oldest history goes first")
    history_keep_steps: int = flag(-1, at_least=0, help="steps of history in a prompt (0: all; -1: as the policy was "
                                                        "trained, else 6)")
    padding_side: str = flag("left", choices=("left", "right"),
                             help="part of the release's command line; padded rows are computed exactly as they are "
                                  "alone, so nothing depends on it")
    logprob_norm: str = flag("sum", help="an action's log-probability: sum or mean over its tokens",
                             choices=("sum", "mean"))
    lora_r: int = flag(8, at_least=0, help="rank of LoRA; 0 trains every weight")
    lora_alpha: int = flag(16, help="LoRA's scale is lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, at_least=0, below=1, help="dropout in front of LoRA, in updates only")
    fp16: bool = flag(False, help="update in float16 with loss scaling (needs a GPU, else float32)")
    bf16: bool = flag(False, help="update in bfloat16 (needs a GPU, else float32)")
    attn_implementation: str = flag("sdpa", choices=MASKED_ATTENTION,
                                    help="how the policy computes attention, acting and learning; changes time and "
                                         "memory only (their masks are none that flash_attention_2 knows)")
    gradient_checkpointing: bool = flag(False, help="recompute activations: less memory, a third more time")
    update_batch_tokens: int = flag(8192, at_least=1,
                                    help="tokens of a forward pass of the update at most, but at least a step's; "
                                         "changes memory only")
    eval_every: int = flag(10, at_least=0, help="updates between evaluations on held-out games (0: none, and no best)")
    eval_games: int = flag(30, at_least=0, help="games of an evaluation")
    eval_split: str = flag("valid_seen", help="their split; with env_split's own they are kept out of training")
    save_every: int = flag(10, at_least=1, help="updates between checkpoints")
    report_to: str = flag("tensorboard", choices=TRACKERS, help="where metrics go besides the log and metrics.jsonl")
    push_to_hub: str = flag("", help="upload the last policy to this repository (user/name) of the hub, private")
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left in out_dir")

    def __post_init__(self) -> None:
        if self.action_max_new_tokens == -1:
            self.action_max_new_tokens = {"alfworld": 16, "scienceworld": 48}[self.env]
        if self.imagine_action_max_new_tokens == -1:
            self.imagine_action_max_new_tokens = IMAGINED_ACTION_TOKENS[self.env]

    @property
    def total_episodes(self) -> int:
        return self.epochs * self.episodes_per_epoch

    @property
    def batch_episodes(self) -> int:
        return self.episodes_per_update * self.update_every

    @property
    def total_updates(self) -> int:
        return math.ceil(self.total_episodes / self.batch_episodes)


NO_INFLUENCE = ("out_dir", "override", "policy_device", "wm_device", "policy_model_path", "wm_model_path", "num_envs",
                "env_processes", "max_minutes", "save_every", "update_batch_tokens", "env_data_path",
                "alfworld_config", "padding_side", "kmax", "attn_implementation", "gradient_checkpointing", "cache_gb",
                "max_batch_tokens", "report_to", "push_to_hub")
"""Settings that don't change what is learned, or count by what they lead to."""
MAY_GROW = ("max_seq_len",)
"""A run that meets a prompt that doesn't fit goes on with more."""


def run(settings: RlSettings) -> None:
    """Train; what the command line calls."""
    check(settings)
    settings = show_as_trained(settings, settings.policy_model_path, unknown=EVERYTHING | {"history_keep_steps": 6})
    make_env, games, held_out = environment(settings)
    folder = claim(settings, games, held_out)
    asyncio.run(train(settings, folder, make_env, games, held_out))


# ---------------------------------------------------------------- before torch: checks, games, claim


def check(settings: RlSettings) -> None:
    """Raises UserError for what can't work, before anything slow is started."""
    check_model_path(settings.policy_model_path)
    if not has_heads(settings.policy_model_path):
        raise UserError(f"{settings.policy_model_path}: a policy without heads to choose K with; train them first: "
                        "python -m itp.training.train_adaptive_k sft")
    kmax = kmax_of(settings.policy_model_path)
    if settings.kmax not in (0, kmax):
        raise UserError(f"--kmax {settings.kmax}, but {settings.policy_model_path} was trained with kmax {kmax}; "
                        f"leave --kmax out, or train another one with sft --kmax {settings.kmax}")
    if settings.force_k > kmax:
        raise UserError(f"--force_k {settings.force_k}: the policy knows 0 to {kmax} imagined steps")
    if settings.force_k != 0 and not settings.wm_model_path:
        raise UserError("--wm_model_path is missing: the world model to imagine with (only --force_k 0 needs none)")
    if settings.wm_model_path:
        check_model_path(settings.wm_model_path)
    if settings.fp16 and settings.bf16:
        raise UserError("--fp16 and --bf16 exclude each other; give one")
    check_tracker(settings.report_to)
    if settings.minibatches > settings.batch_episodes:
        raise UserError(f"--minibatches {settings.minibatches}: more than the {settings.batch_episodes} episodes "
                        "of an update")
    _check_room(settings, kmax)


def _check_room(settings: RlSettings, kmax: int) -> None:
    """Warn where the longest imagined trajectory may leave a prompt no room."""
    k = settings.force_k if settings.force_k >= 0 else kmax
    longest = k * (settings.imagine_action_max_new_tokens + settings.wm_max_new_tokens)
    if settings.foresight_format == "last_obs":
        longest = min(k, 1) * settings.wm_max_new_tokens
    if longest + settings.action_max_new_tokens >= settings.max_seq_len:
        log.warning("%d imagined steps may take %d tokens and an action %d, which leaves no room for a state in "
                    "--max_seq_len %d: the run would stop at the first such prompt; raise it (then or now)", k, longest,
                    settings.action_max_new_tokens, settings.max_seq_len)


def data_root(settings: RlSettings) -> str:
    """``--env_data_path``, or the folder that alfworld's own configuration names; ScienceWorld needs none."""
    if settings.env_data_path or settings.env == "scienceworld":
        return settings.env_data_path
    if not settings.alfworld_config:
        raise UserError("--env_data_path is missing: the folder that holds json_2.1.1 (or --alfworld_config)")
    import yaml

    file = Path(settings.alfworld_config)
    if not file.is_file():
        raise UserError(f"--alfworld_config {file}: no such file")
    try:
        path = yaml.safe_load(file.read_text(encoding="utf-8"))["dataset"]["data_path"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"--alfworld_config {file}: no dataset.data_path in it; give --env_data_path") from error
    folder = Path(os.path.expandvars(path))
    return str(folder.parent if folder.name in ("train", "valid_seen", "valid_unseen") else folder)


def environment(settings: RlSettings) -> tuple[Callable[[], TextEnv], list[Game], list[Game]]:
    """What makes an environment, the games to learn on, and those held out."""
    root = data_root(settings)
    games, held_out = games_of(settings, settings.env_split, root), []
    if settings.eval_every and settings.eval_games:
        held_out = games_of(settings, settings.eval_split, root)
        held_out = sorted(held_out, key=lambda g: derive_seed(settings.seed, "eval", g.game_id))[:settings.eval_games]
        games = [game for game in games if game not in held_out]
        if not games:
            raise UserError(f"--eval_games {settings.eval_games}: leaves no game of {settings.env_split} to learn on")
    if resolve_split(settings.env_split) != "train":
        log.warning("!!! LEARNING ON AN EVALUATION SPLIT (%s): results on it are worthless as a test; "
                    "the model's card says so too !!!", settings.env_split)
    make_env = engine_of(settings, want_admissible=settings.action_selection == "constrained")
    return make_env, [m for game in games for m in missions_of(settings, game)], held_out


def claim(settings: RlSettings, games: Sequence[Game], held_out: Sequence[Game]) -> RunFolder:
    """The output folder, with this configuration, models and games on record."""
    folder = RunFolder(settings.out_dir, settings.report_to)
    if is_first_process():
        if settings.override:
            folder.clear()
        config = dataclasses.asdict(settings) | {
            "policy_fingerprint": model_fingerprint(settings.policy_model_path),
            "games_fingerprint": derive_seed(*(g.game_id for g in [*games, *held_out]))}
        if settings.wm_model_path:
            config["wm_fingerprint"] = model_fingerprint(settings.wm_model_path)
        claim_output(settings.out_dir, config, override=settings.override, ignore=NO_INFLUENCE,
                     may_grow=MAY_GROW)
    return folder


# ---------------------------------------------------------------- training


@dataclass
class Progress:
    """How far the run is; saved with every checkpoint."""

    update: int = 0
    episodes: int = 0
    seconds: float = 0.0
    best: float = -1.0


async def train(settings: RlSettings, folder: RunFolder, make_env: Callable[[], TextEnv], games: Sequence[Game],
                held_out: Sequence[Game]) -> None:
    processes = Processes()
    progress, player, learner = load(settings, folder, processes)
    card = {}
    if resolve_split(settings.env_split) != "train":
        card["warning"] = f"trained on the evaluation split {settings.env_split}: don't report results on it"

    def readme(row: Mapping[str, Any]) -> Callable[[Path], None]:
        return functools.partial(hub.write_readme, settings=settings, metrics=row)

    def unfinished() -> bool:
        minutes, = processes.gather([progress.seconds / 60])[:1]
        return (progress.episodes < settings.total_episodes
                and not 0 < settings.max_minutes <= minutes)

    async def evaluate() -> dict[str, float]:
        """Success on the held-out games; the best weights so far become ``OUT/best``."""
        played = await player.play(processes.share(held_out), greedy=True)
        found = statistics_of(processes.gather([summary(episode, settings) for episode in played]))
        scores = {f"eval_{name}": found[name] for name in ("success", "return", "mean_k", "episode_steps")}
        if scores["eval_success"] > progress.best:
            progress.best = scores["eval_success"]
            folder.save("best", learner.save, card | {"update": progress.update}, readme(scores))
        return scores

    def save(row: Mapping[str, Any]) -> None:
        state = learner.state() if is_first_process() else {}
        folder.save("last", learner.save, card | {"update": progress.update}, readme(row),
                    {"progress": dataclasses.asdict(progress), "learner": state})

    async with EnvPool(make_env, processes_for(settings.env_processes, settings.num_envs)) as player.pool:
        try:
            if progress.update == 0 and held_out:
                folder.log({"update": 0, "episodes": 0} | await evaluate())
            while unfinished():
                start = time.perf_counter()
                count = min(settings.batch_episodes, settings.total_episodes - progress.episodes)
                batch = processes.share(episode_games(settings, games, progress.episodes, count))
                episodes = await player.play(batch)
                acted = time.perf_counter()
                samples, row = prepare(episodes, await player.bootstraps(episodes), player.lm, settings,
                                       processes)
                row |= learner.update(samples)
                player.forget()
                progress.update += 1
                progress.episodes += count
                row |= {"act_seconds": acted - start, "update_seconds": time.perf_counter() - acted,
                        "steps_per_second": row["env_steps"] / (time.perf_counter() - start),
                        "tokens_per_second": (row["policy_tokens"] + row["wm_tokens"]) / (acted - start)}
                progress.seconds += time.perf_counter() - start
                last = not unfinished()
                if held_out and (last or progress.update % settings.eval_every == 0):
                    row |= await evaluate()
                row = {"update": progress.update, "episodes": progress.episodes} | row
                folder.log(row | {"seconds": progress.seconds})
                log.info("update %d/%d: return %.3f, success %.2f, mean k %.2f, entropy %.2f, loss %.4f%s",
                         progress.update, settings.total_updates, row["return"], row["success"], row["mean_k"],
                         row["entropy"], row["loss"],
                         f", held out {row['eval_success']:.3f}" if "eval_success" in row else "")
                if last or progress.update % settings.save_every == 0:
                    save(row)
        finally:
            await player.close()
    if settings.push_to_hub and is_first_process():
        hub.push(folder.path / "last", settings.push_to_hub)
    folder.finish(dataclasses.asdict(progress))
    if is_first_process():
        print(f"{progress.episodes} episodes, {progress.update} updates in {progress.seconds / 60:.1f} min; "
              f"best held-out success {max(progress.best, 0):.3f}; {folder.path}/last, {folder.path}/best")


def load(settings: RlSettings, folder: RunFolder, processes: Processes) -> tuple[Progress, Player, Learner]:
    """Models, optimizer and progress, from the start or from the last checkpoint."""
    import torch

    from itp.policy.heads import PolicyWithHeads
    from itp.training import memory
    from itp.training.hf_trainer import choose_dtype
    from itp.training.rl_update import Learner

    torch.manual_seed(settings.seed)
    device, wm_device = (resolve_device(d) for d in rank_devices(settings.policy_device, settings.wm_device))
    dtype = choose_dtype(settings)
    memory.report(settings, (device, wm_device), 4 if dtype == torch.float32 else 2)
    policy, tokenizer = PolicyWithHeads.from_pretrained(
        settings.policy_model_path, device=device, attn_implementation=settings.attn_implementation,
        dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32") if settings.lora_r else "fp32")
    policy.shown = shown(settings)
    learner = Learner(policy, tokenizer, settings, dtype, processes)
    progress, state = Progress(), folder.state()
    if state is not None:
        progress = Progress(**state["progress"])
        learner.load_state(state["learner"])
        log.info("going on after update %d of %s", progress.update, folder.path)
    folder.rewind(progress.update if state else -1)
    quorum = Quorum()
    lm = LocalLM(policy.causal_lm, tokenizer, heads=policy.heads, name="policy", quorum=quorum,
                 **settings.fixed_engine)
    world_model = None
    if settings.force_k != 0:
        wm = LocalLM.load(settings.wm_model_path, device=wm_device, dtype=settings.wm_dtype, role="world_model",
                          quorum=quorum, **(settings.fixed_engine if wm_device == device else settings.engine))
        style, turns = asked_as(settings.wm_model_path, wm.tokenizer, role="world_model", env=settings.env)
        world_model = WorldModel(wm, env=settings.env, style=style, turns=turns,
                                 max_new_tokens=settings.wm_max_new_tokens, keep_steps=settings.history_keep_steps)
    return progress, Player(settings, lm, world_model, quorum), learner


