"""The settings of stage 3 (online A2C), and what is refused before torch is loaded."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from itp.agent.heads import has_heads, kmax_of
from itp.agent.policy import IMAGINED_ACTION_TOKENS
from itp.agent.prompt_budget import RESERVE
from itp.agent.world_model import RecallFlag
from itp.config import Topic, flag
from itp.devices import DTYPES
from itp.envs.registry import EnvFlags
from itp.errors import UserError
from itp.files import read_yaml
from itp.lm.memory_budget import EngineFlags
from itp.model_card import AS_RELEASED, PromptFlags, resolve_by_card
from itp.models import check_recall
from itp.pretrained import MASKED_ATTENTION, check_model_path
from itp.training.settings import TRACKERS, UpdateFlags, check_precision, check_tracker

log = logging.getLogger(__name__)
ADVANTAGES = ("critic", "group", "gigpo")
"""What the return of a step is compared with (:mod:`itp.training.itp_r.advantages`)."""
CREDITS = ("action", "token")
"""What has an advantage of its own."""


@dataclass
class RlSettings(PromptFlags, RecallFlag, EnvFlags, EngineFlags, UpdateFlags):
    """Models, games and folders."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "wm_model", "env_data_root", "out_dir", "epochs",
        "episodes_per_epoch", "advantage", "lr", "lora_r", "bf16")
    policy_model: str = flag(help="policy with heads, as sft leaves it", affects_result=False, holds="path",
                             aliases=("policy_model_path",))
    out_dir: str = flag(help="folder for metrics, last and best checkpoint; the same command again resumes in it",
                        affects_result=False, holds="path")
    wm_model: str = flag("", help="world model; not needed with --fixed_k 0", affects_result=False,
                         holds="path", aliases=("wm_model_path",))
    alfworld_config: str = flag("", help="alfworld's YAML file; its dataset.data_path stands in for --env_data_root",
                                affects_result=False, holds="path")
    env_data_root: str = flag("", help="ALFWorld: folder that holds json_2.1.1; empty: from --alfworld_config",
                              affects_result=False, holds="path", aliases=("env_data_path",))
    env_split: str = flag("train", help="split of the games to learn on")
    imagining: ClassVar[Topic] = Topic("How far is imagined")
    wm_max_new_tokens: int = flag(192, at_least=1, help="tokens of a predicted observation at most")
    max_k: int = flag(0, at_least=0, help="K_max; 0: the checkpoint's, any other must be the same",
                      affects_result=False, aliases=("kmax",))
    fixed_k: int = flag(-1, help="imagine so many steps always; 0: RL without imagination; -1: the K-head chooses",
                        aliases=("force_k",))
    length: ClassVar[Topic] = Topic("Length of the training, and what plays at a time")
    epochs: int = flag(1, at_least=1, help="rounds of episodes_per_epoch")
    episodes_per_epoch: int = flag(50, at_least=1, help="episodes of a round")
    episodes_per_update: int = flag(32, at_least=1, help="episodes of a batch, all played by the same weights")
    update_every: int = flag(1, at_least=1, help="update after so many batches, on all of them")
    minibatches: int = flag(1, at_least=1,
                            help="optimizer steps of an update, each on a part of its episodes; 1 is exact A2C")
    max_steps: int = flag(50, at_least=1, help="ALFWorld: steps of an episode at most")
    max_minutes: float = flag(0.0, at_least=0, help="stop after so many minutes of acting and learning (0: no limit)",
                              affects_result=False)
    max_env_steps: int = flag(0, at_least=0, help="stop after the update in which the environment has executed so many "
                                                  "steps (0: no limit)", affects_result=False)
    num_envs: int = flag(16, at_least=1, help="episodes played at a time", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the environments", affects_result=False)
    policy_device: str = flag("cuda:0", help="device of the policy", affects_result=False)
    wm_device: str = flag("cuda:1", help="device of the world model", affects_result=False)
    wm_dtype: str = flag("fp16", help="precision of the world model on a GPU", choices=DTYPES)
    advantages: ClassVar[Topic] = Topic("Returns and advantages")
    gamma: float = flag(0.99, help="discount γ")
    n_steps: int = flag(0, at_least=0,
                        help="V̂ from so many rewards and V of the state after them; 1: the paper's; 0: GAE")
    gae_lambda: float = flag(0.95, help="λ of GAE; 1: the whole return")
    bootstrap_at_limit: bool = flag(False, help="an episode cut by the step limit is worth V of its last state")
    normalize_advantages: bool = flag(False, help="mean 0 and deviation 1 over a batch")
    advantage: str = flag("critic", choices=ADVANTAGES, before="critic",
                          help="A_t of a step: against V_θ (n_steps, gae_lambda), against the other episodes of its "
                               "game (GRPO), or against those and other steps at equal states (GiGPO)")
    group_size: int = flag(1, at_least=1, before=1, help="episodes of a game, one after the other in the same update; "
                                                         "with --advantage group or gigpo at least 2")
    group_std: bool = flag(False, help="group and gigpo: differences in standard deviations of their group, as in GRPO")
    credit: str = flag("action", choices=CREDITS, before="action",
                       help="an action has one advantage, or each of its tokens its own (POAD)")
    step_weight: float = flag(1.0, at_least=0, before=1.0, help="ω of gigpo: weight of the comparison at equal states")
    learning: ClassVar[Topic] = Topic("Learning rates")
    lr: float = flag(5e-6, above=0, help="learning rate")
    value_lr: float = flag(0.0, at_least=0, help="learning rate of the value head, which starts from nothing (0: lr)")
    lr_scheduler_type: str = flag("linear", help="how the learning rate falls",
                                  choices=("linear", "constant", "cosine"))
    wd: float = flag(0.0, at_least=0, help="weight decay")
    adam_beta2: float = flag(0.95, help="AdamW's second beta; with few updates, a value near 1 keeps the gradient "
                                        "scale of the first ones, which teach values only")
    objective: ClassVar[Topic] = Topic("Rewards and losses")
    lambda_k: float = flag(0.2, at_least=0, help="λ_K: cost of an imagined step")
    step_cost: float = flag(0.01, help="λ_step: cost of a step")
    success_bonus: float = flag(0.01, help="added to the reward at success")
    invalid_action_penalty: float = flag(-0.1, help="added to the reward where the engine says that nothing happens")
    rescale_reward: bool = flag(False,
                                help="the environment's reward and the success bonus count by the share of the "
                                     "episode's actions that changed what is known of the state (WMAct)")
    anneal_turns: int = flag(0, at_least=0,
                             help="every so many updates the step limit falls to the middle between the mean and the "
                                  "longest episode of the last update (WMAct, which takes 100; 0: it stays)")
    entropy_coef: float = flag(0.01, help="β of eq. 8")
    value_coef: float = flag(1.0, help="α of eq. 8")
    observation_loss: float = flag(0.0, at_least=0, help="weight of the cross-entropy of the observations that follow "
                                                         "executed actions, a mean over their tokens (0: none)")
    value_updates: int = flag(3, at_least=0, help="first updates, of the value head alone (a quarter of all at most)")
    max_grad_norm: float = flag(1.0, at_least=0, help="gradients are clipped to this norm (0: not)")
    acting: ClassVar[Topic] = Topic("How actions are chosen, and what a prompt may hold")
    action_selection: str = flag("generate", help="actions are written freely, or drawn among the admissible ones",
                                 choices=("generate", "constrained"))
    action_max_new_tokens: int = flag(-1, at_least=1, help="tokens of an action at most (-1: 16, ScienceWorld 48)")
    action_temperature: float = flag(0.7, above=0, help="temperature of executed and imagined actions")
    action_top_p: float = flag(0.9, help="nucleus of executed and imagined actions (not of constrained ones)")
    action_do_sample: int = flag(1, help="0: actions are greedy, and only K is learned", choices=(0, 1))
    imagine_action_max_new_tokens: int = flag(-1, at_least=1,
                                              help="tokens of an imagined action at most (-1: 12, ScienceWorld 48)")
    max_seq_len: int = flag(-1, at_least=1, help="tokens of a prompt and its action; where a prompt has more, its "
                                                 "oldest steps are left out (-1: as the policy was trained, else 1536)")
    history_keep_steps: int = flag(-1, at_least=0, help="steps of history in a prompt (0: all; -1: as the policy was "
                                                        "trained, else 6)")
    padding_side: str = flag("left", choices=("left", "right"),
                             help="part of the release's command line; padded rows are computed exactly as they are "
                                  "alone, so nothing depends on it", affects_result=False)
    logprob_norm: str = flag("sum", help="an action's log-probability: sum or mean over its tokens",
                             choices=("sum", "mean"))
    compute: ClassVar[Topic] = Topic("Memory and speed")
    attn_implementation: str = flag("sdpa", choices=MASKED_ATTENTION,
                                    help="how the policy computes attention, acting and learning; changes time and "
                                         "memory only (their masks are none that flash_attention_2 knows)",
                                    affects_result=False)
    gradient_checkpointing: bool = flag(False, help="recompute activations: less memory, a third more time",
                                        affects_result=False)
    update_batch_tokens: int = flag(8192, at_least=1,
                                    help="tokens of a forward pass of the update at most, but at least a step's; "
                                         "changes memory only", affects_result=False)
    progress: ClassVar[Topic] = Topic("Evaluations, checkpoints and logs")
    eval_every: int = flag(10, at_least=0, help="updates between evaluations on held-out games (0: none, and no best)")
    eval_games: int = flag(30, at_least=0, help="games of an evaluation")
    eval_split: str = flag("valid_seen", help="their split; with env_split's own they are kept out of training")
    save_every: int = flag(10, at_least=1, help="updates between checkpoints", affects_result=False)
    report_to: str = flag("tensorboard", choices=TRACKERS, help="where metrics go besides the log and metrics.jsonl",
                          affects_result=False)
    push_to_hub: str = flag("", help="upload the last policy to this repository (user/name) of the hub, private",
                            affects_result=False)
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left in out_dir", affects_result=False)

    def __post_init__(self) -> None:
        if self.action_max_new_tokens == -1:
            self.action_max_new_tokens = RESERVE["action"][self.env]
        if self.imagine_action_max_new_tokens == -1:
            self.imagine_action_max_new_tokens = IMAGINED_ACTION_TOKENS[self.env]

    @property
    def total_episodes(self) -> int:
        return self.epochs * self.episodes_per_epoch

    @property
    def has_critic(self) -> bool:
        """Whether V_θ is needed, and trained; without a critic the value head stays as it is."""
        return self.advantage == "critic"

    @property
    def batch_episodes(self) -> int:
        return self.episodes_per_update * self.update_every

    @property
    def total_updates(self) -> int:
        return math.ceil(self.total_episodes / self.batch_episodes)


def checked(settings: RlSettings) -> RlSettings:
    """``settings`` with what they leave open filled in from the policy.

    Raises UserError for what can't work, before anything slow is started.
    """
    check(settings)
    settings = resolve_by_card(settings, settings.policy_model, AS_RELEASED | {"history_keep_steps": 6})
    _warn_of_short_budget(settings)
    return settings


def check(settings: RlSettings) -> None:
    """Raises UserError for what can't work, before anything slow is started."""
    check_model_path(settings.policy_model)
    if not has_heads(settings.policy_model):
        raise UserError(f"{settings.policy_model}: a policy without heads to choose K with; train them first: "
                        "python -m itp.training.train_adaptive_k sft")
    kmax = kmax_of(settings.policy_model)
    if settings.max_k not in (0, kmax):
        raise UserError(f"--max_k {settings.max_k}, but {settings.policy_model} was trained with kmax {kmax}; "
                        f"leave --max_k out, or train another one with sft --max_k {settings.max_k}")
    if settings.fixed_k > kmax:
        raise UserError(f"--fixed_k {settings.fixed_k}: the policy knows 0 to {kmax} imagined steps")
    if settings.fixed_k != 0 and not settings.wm_model:
        raise UserError("--wm_model is missing: the world model to imagine with (only --fixed_k 0 needs none)")
    if settings.wm_model:
        check_model_path(settings.wm_model)
        if settings.wm_recall:
            check_recall(settings.wm_model, settings.env)
    check_precision(settings)
    check_tracker(settings.report_to)
    if settings.minibatches > settings.batch_episodes:
        raise UserError(f"--minibatches {settings.minibatches}: more than the {settings.batch_episodes} episodes "
                        "of an update")
    _check_groups(settings)


def _check_groups(settings: RlSettings) -> None:
    """Raises UserError where updates don't take whole groups, and for flags of another ``--advantage``."""
    chosen, size = f"--advantage {settings.advantage}", settings.group_size
    for name, count in (("episodes_per_update", settings.episodes_per_update),
                        ("episodes_per_epoch", settings.total_episodes)):
        if count % size:
            times = f" in {settings.epochs} epochs" if name == "episodes_per_epoch" and settings.epochs > 1 else ""
            raise UserError(f"--{name}: {count} episodes{times} are no multiple of --group_size {size}; an update "
                            "takes whole groups")
    if settings.step_weight != 1 and settings.advantage != "gigpo":
        raise UserError(f"--step_weight is for --advantage gigpo; {chosen} compares no steps at equal states")
    if settings.credit == "token":
        _check_tokens(settings)
    if settings.has_critic:
        if settings.group_std:
            raise UserError("--group_std is for --advantage group and gigpo; a critic compares nothing in groups")
        return
    if size < 2:
        raise UserError(f"{chosen} compares the episodes of a game, and --group_size is 1; give 2 or more")
    for name in ("n_steps", "bootstrap_at_limit"):
        if getattr(settings, name):
            raise UserError(f"--{name} takes V_θ for what comes later, and {chosen} has no critic; leave one out")
    if settings.normalize_advantages:
        raise UserError(f"--normalize_advantages would move the advantages of groups without a signal away from 0; "
                        f"with {chosen} give --normalize_advantages false, and --group_std if they are to be scaled")


def _check_tokens(settings: RlSettings) -> None:
    """Raises UserError for flags that tokens with advantages of their own leave no meaning."""
    if not settings.has_critic:
        raise UserError(f"--credit token reads V_θ after every token, and --advantage {settings.advantage} has no "
                        "critic; give --advantage critic, or --credit action")
    if settings.n_steps > 1:
        raise UserError(f"--n_steps {settings.n_steps}: --credit token knows the TD target (--n_steps 1) and GAE "
                        "(--n_steps 0) only")
    if not settings.action_do_sample:
        raise UserError("--action_do_sample 0 draws no token, so --credit token has nothing to credit; leave one out")


def _warn_of_short_budget(settings: RlSettings) -> None:
    """Warn where the longest imagined trajectory may leave the history no room."""
    k = settings.fixed_k if settings.fixed_k >= 0 else kmax_of(settings.policy_model)
    longest = k * (settings.imagine_action_max_new_tokens + settings.wm_max_new_tokens)
    if settings.foresight_format == "last_obs":
        longest = min(k, 1) * settings.wm_max_new_tokens
    if longest + settings.action_max_new_tokens >= settings.max_seq_len:
        log.warning("%d imagined steps may take %d tokens and an action %d, which leaves no room for a state in "
                    "--max_seq_len %d: such a prompt would lose its history; raise it (then or now)", k, longest,
                    settings.action_max_new_tokens, settings.max_seq_len)


def data_root(settings: RlSettings) -> str:
    """``--env_data_root``, or the folder that alfworld's own configuration names; ScienceWorld needs none."""
    if settings.env_data_root or settings.env == "scienceworld":
        return settings.env_data_root
    if not settings.alfworld_config:
        raise UserError("--env_data_root is missing: the folder that holds json_2.1.1 (or --alfworld_config)")
    file = Path(settings.alfworld_config)
    if not file.is_file():
        raise UserError(f"--alfworld_config {file}: no such file")
    said = read_yaml(file, f"--alfworld_config {file}")
    dataset = said.get("dataset") if isinstance(said, dict) else None
    path = dataset.get("data_path") if isinstance(dataset, dict) else None
    if not isinstance(path, str):
        raise UserError(f"--alfworld_config {file}: no dataset.data_path in it; give --env_data_root")
    folder = Path(os.path.expandvars(path))
    return str(folder.parent if folder.name in ("train", "valid_seen", "valid_unseen") else folder)
