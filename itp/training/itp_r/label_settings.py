"""The settings of stage 1, and the candidates for K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from itp.config import Topic, flag
from itp.agent.policy import SELECTIONS
from itp.agent.world_model import RecallFlag
from itp.devices import DTYPES
from itp.errors import UserError
from itp.games import ENVIRONMENTS, K_MAX
from itp.lm.memory_budget import EngineFlags
from itp.model_card import PromptFlags

LAMBDA_K = {"likelihood": 0.2, "branch": 0.01}
"""λ_K by what labels by: the paper's, and less than a saved step is worth within 30 steps at γ = 0.95."""
BY_BRANCH = ("env_data_root", "env_split", "action_selection", "branch_steps", "branches", "branch_temperature",
             "branch_gamma")
"""The flags that mean something with --label_by branch only."""


@dataclass
class LabelSettings(PromptFlags, RecallFlag, EngineFlags):
    """What is labeled, and how."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "expert_jsonl", "policy_model", "wm_model", "out_labeled_jsonl", "label_by",
        "env", "max_k", "lambda_k", "max_rows", "env_data_root")
    expert_jsonl: str = flag(help="the expert's transitions: rows of episode_id, step, state, action, next_state",
                             affects_result=False)
    policy_model: str = flag(help="the base policy π_θ0", affects_result=False, aliases=("policy_model_path",))
    wm_model: str = flag(help="the world model", affects_result=False, aliases=("wm_model_path",))
    label_by: str = flag("likelihood", choices=("likelihood", "branch"), before="likelihood",
                         help="what imagining k steps is worth: how likely it makes the expert's action (eq. 5), or "
                              "what the action that follows is worth in the game itself (needs the games)")
    out_labeled_jsonl: str = flag(help="where to write; the same command again goes on with what is missing",
                                  affects_result=False)
    env: str = flag("alfworld", help="environment of the rows", choices=ENVIRONMENTS)
    max_k: int = flag(-1, at_least=0, help="K_max, the most steps to look ahead (-1: the paper's, 5 for ALFWorld, 8 "
                                           "for ScienceWorld)", aliases=("kmax",))
    lambda_k: float = flag(-1.0, help="price λ_K of one imagined step: in nats (-1: 0.2), by branch in success (-1: "
                                      "0.01)")
    k_candidates: str = flag("", help="the k to try, such as 0,2,5 (empty: all up to kmax); 0 is always tried")
    logprob_norm: str = flag("sum", choices=("sum", "mean"), help="the action's log-probability: of all its tokens, "
                                                                  "or of one on average")
    imagination: str = flag("free", choices=("free", "teacher_forced"),
                            help="who acts in the imagined trajectory: the policy, or the expert as recorded "
                                 "(needs --foresight_format last_obs)")
    max_seq_len: int = flag(-1, at_least=1, help="tokens of a prompt and its action; where a prompt has more, its "
                                                 "oldest steps are left out (-1: as the policy was trained, else 1536)")
    wm_max_new_tokens: int = flag(192, at_least=1, help="tokens of an imagined observation at most")
    temperature: float = flag(0.0, at_least=0, help="sampling temperature of imagined actions (0: greedy)")
    top_p: float = flag(1.0, help="nucleus of imagined actions")
    wm_batch_size: int = flag(4, at_least=1, help="rows in a batch of the world model at most", affects_result=False)
    score_batch_size: int = flag(48, at_least=1, help="rows in a batch of the policy at most", affects_result=False)
    padding_side: str = flag("left", choices=("left", "right"),
                             help="part of the release's command line; padded rows are computed exactly as they are "
                                  "alone, so no label depends on it", affects_result=False)
    by_branch: ClassVar[Topic] = Topic("Labels by branches in the game")
    env_data_root: str = flag("", help="branch, ALFWorld: folder that holds json_2.1.1, with the games of the rows",
                              affects_result=False, holds="path", aliases=("env_data_path",))
    env_split: str = flag("train", before="train", help="branch: split of those games")
    action_selection: str = flag("generate", before="generate", choices=SELECTIONS,
                                 help="branch: write actions freely, decode them under the trie of admissible actions, "
                                      "or score each of those")
    branch_steps: int = flag(40, at_least=1, before=40, help="branch: steps of a branch at most")
    branches: int = flag(1, at_least=1, before=1, help="branch: branches of an action; more than one are sampled")
    branch_temperature: float = flag(0.7, above=0, before=0.7, help="branch: temperature of several branches; a single "
                                                                    "one is greedy")
    branch_gamma: float = flag(0.95, above=0, before=0.95, help="branch: a success n steps later is worth γ^n; 1: the "
                                                                "share of branches that succeed")
    env_processes: int = flag(2, at_least=1, help="branch: processes that run the games", affects_result=False)
    run: ClassVar[Topic] = Topic("Rows, devices and memory")
    max_rows: int = flag(0, at_least=0, help="label so many rows, of episodes chosen at random (0: all)")
    skip_bad_rows: bool = flag(False, help="leave out and count rows that can't be read, instead of stopping at the "
                                           "first; rows that the model's context doesn't hold are always left out",
                               affects_result=False)
    policy_device: str = flag("cuda:0", help="device of the policy", affects_result=False)
    wm_device: str = flag("cuda:1", help="device of the world model", affects_result=False)
    policy_dtype: str = flag("fp16", help="precision of the policy on a GPU", choices=DTYPES)
    wm_dtype: str = flag("fp16", help="precision of the world model on a GPU", choices=DTYPES)
    concurrency: int = flag(32, at_least=1, help="episodes at a time", affects_result=False)
    cache_gb: float = flag(0.0, at_least=0, help="GB for each model's computed prefixes; too little shows in the token "
                                                 "count (0: on a GPU a share of what is free, on a CPU 1)",
                           affects_result=False)
    fixed_cache_gb: ClassVar[float] = 1.0
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left at out_labeled_jsonl",
                          affects_result=False)

    def __post_init__(self) -> None:
        self.max_k = K_MAX[self.env] if self.max_k == -1 else self.max_k
        self.lambda_k = LAMBDA_K[self.label_by] if self.lambda_k == -1 else self.lambda_k


def parse_candidates(text: str, kmax: int) -> tuple[int, ...]:
    """The k to try, ascending.  Raises UserError."""
    if not text.strip():
        return tuple(range(kmax + 1))
    try:
        given = {int(k) for k in text.split(",")}
    except ValueError as error:
        raise UserError(f"--k_candidates {text!r}: give numbers such as 0,2,5") from error
    if wrong := [k for k in sorted(given) if not 0 <= k <= kmax]:
        raise UserError(f"--k_candidates {text!r}: {wrong[0]} isn't between 0 and --max_k {kmax}")
    return tuple(sorted(given | {0}))
