"""The flags of the evaluation programs: those that all share, and each environment's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from foresight_eval.methods.settings import METHODS
from itp.config import flag
from itp.envs.base import TextEnv
from itp.envs.scienceworld_games import ScienceworldFlags, list_games
from itp.envs.which import EnvFlags, engine_of, games_of, scienceworld_engine
from itp.games import Game
from itp.lm.room import EngineFlags
from itp.lm.server import PolicyServerFlags, WorldModelServerFlags
from itp.policy.agent import SELECTIONS
from itp.policy.shown import FORMAT_CHOICES
from itp.runtime import DTYPES

STYLES = ("auto", "tuned", "instruct")
K_POLICIES = ("auto", "head", "prompt", "fixed", "random")


@dataclass
class EvalSettings(PolicyServerFlags, WorldModelServerFlags, EngineFlags):
    policy_model: str = flag(help="policy: a model folder, or a name on the Hugging Face hub (with a server: what it "
                                  "runs, read only for how to ask it)")
    output_path: str = flag(help="result folder; the same command again plays only what is missing there")
    wm_model: str = flag("", help="world model (not needed by methods without imagination or with a server)")
    override: bool = flag(False, help="delete the results in output_path and start anew")
    debug: bool = flag(False, help="play the first 5 games only")
    part_num: int = flag(1, at_least=1, help="share the games out over this many runs")
    part_idx: int = flag(-1, help="which share this run plays, from 0 (-1: all)")
    max_games: int = flag(0, at_least=0, help="play so many games only, at equal distances over the split (0: all)")
    only_ids: str = flag("", help="play these games only: indices such as 0,5,7")
    policy_dtype: str = flag("fp16", help="precision of the policy on a GPU", choices=DTYPES)
    wm_dtype: str = flag("fp16", help="precision of the world model on a GPU", choices=DTYPES)
    decision_tokens: int = flag(16, at_least=1, help="new tokens of a horizon decision at most")
    act_tokens: int = flag(256, at_least=1, help="new tokens of an action reply or reflection at most")
    foresight_tokens: int = flag(256, at_least=1, help="new tokens of one imagined observation at most")
    fixed_k: int = flag(-1, help="always imagine this many steps (-1: as --k_policy says)")
    k_policy: str = flag("auto", help="how K is chosen; auto is fixed with --fixed_k, else head where the policy has "
                                      "a K-head, else prompt", choices=K_POLICIES)
    k_sample: bool = flag(False, help="draw K from the K-head's distribution instead of taking the most likely")
    action_selection: str = flag("generate", help="write the action freely, decode it under the trie of admissible "
                                                  "actions, or score each of them", choices=SELECTIONS)
    prompt_style: str = flag("auto", help="the policy's prompts; auto: tuned for models trained here, else instruct",
                             choices=STYLES)
    wm_prompt_style: str = flag("auto", help="the same for the world model", choices=STYLES)
    chat_template: bool = flag(True, help="instruct prompts go through the tokenizer's chat template, if it has one")
    thinking: bool = flag(False, help="let a policy that can think (Qwen3) do so before it answers")
    thinking_tokens: int = flag(1024, help="new tokens of that thinking at most")
    foresight_format: str = flag("auto", help="what of the imagined trajectory the policy reads (auto: as it was "
                                              "trained, else full)", choices=FORMAT_CHOICES)
    history_keep_steps: int = flag(-1, at_least=0, help="steps of history in a prompt (0: all; -1: as the policy was "
                                                        "trained, else all)")
    temperature: float = flag(0.0, at_least=0, help="sampling temperature of the policy (0: greedy)")
    top_p: float = flag(1.0, help="nucleus of the policy's sampling")
    candidates: int = flag(4, at_least=1, help="actions that tot, mpc, rafa, k_candidates and multi_attempt propose")
    beam: int = flag(2, at_least=1, help="trajectories that tot keeps at every level")
    rounds: int = flag(5, at_least=1, help="rounds of implement and self_refine at most")
    belief_samples: int = flag(10, at_least=1, help="outcomes that implement draws from the world model for an action")
    rap_d_actions: int = flag(8, at_least=1, help="rap, mcts: actions proposed in a state at most")
    rap_depth_limit: int = flag(6, at_least=1, help="rap, mcts: steps from the root at most")
    rap_num_rollouts: int = flag(32, at_least=1, help="rap, mcts: rollouts for a decision")
    rap_uct_w: float = flag(1.4, at_least=0, help="rap, mcts: weight of exploration")
    rap_rw_action_logp: float = flag(0.2, help="rap: weight of the action's mean log-probability in the reward")
    rap_rw_self_eval: float = flag(0.6, help="rap: weight of P(yes), the policy's own verdict")
    rap_rw_goal_overlap: float = flag(0.2, help="rap: weight of the share of the task's words that the action names")
    rap_action_gen_tokens: int = flag(32, at_least=1, help="rap, mcts: new tokens of a proposed action at most")
    rap_wm_pred_tokens: int = flag(128, at_least=1, help="rap, mcts: new tokens of a predicted observation at most")
    rap_keep_tree: bool = flag(False, help="rap: go on with the subtree of what was done, where it came as imagined")
    concurrency: int = flag(16, at_least=1, help="episodes at a time")
    env_processes: int = flag(2, at_least=1, help="processes that run the environments")
    method: str = flag("foresight", help="how to act", choices=METHODS)
    seed: int = flag(123, help="seed of everything random")
    device: str = flag("cuda", help="device of both models, where they have none of their own")
    disable_wm: int = flag(0, help="1: imagine nothing", choices=(0, 1))
    use_history: int = flag(0, help="1: instruct prompts hold the steps so far (tuned ones always do)", choices=(0, 1))


@dataclass
class AlfworldSettings(EvalSettings):
    split: str = flag("dev", help="dev = seen = valid_seen; test = unseen = valid_unseen; train")
    env_data_root: str = flag("eval_agent/data/alfworld", help="folder that holds json_2.1.1")
    max_steps: int = flag(40, at_least=1, help="steps of an episode at most")
    policy_device: str = flag("", help="device of the policy")
    wm_device: str = flag("", help="device of the world model")
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, without one 2")
    env: ClassVar[str] = "alfworld"
    min_k: ClassVar[int] = 0
    max_k_without_head: ClassVar[int] = 2

    def games(self) -> list[Game]:
        return games_of(EnvFlags(), self.split, self.env_data_root)

    def make_env(self, want_admissible: bool) -> Callable[[], TextEnv]:
        return engine_of(EnvFlags(), want_admissible=want_admissible)


@dataclass
class SciworldSettings(EvalSettings, ScienceworldFlags):
    split: str = flag("dev", help="dev = seen, test = unseen: the simulator's development and test variations; train")
    policy_device: str = flag("cuda:0", help="device of the policy")
    wm_device: str = flag("cuda:1", help="device of the world model")
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, without one 3")
    min_k: int = flag(0, help="steps to imagine at least (not with --fixed_k)")
    concurrency: int = flag(4, help="episodes at a time; each has a JVM of some 250 MB, and two more "
                                          "load the next games")
    env: ClassVar[str] = "scienceworld"
    max_steps: ClassVar[int] = 0  # each game has its own
    max_k_without_head: ClassVar[int] = 3

    def games(self) -> list[Game]:
        return list_games(self.split, self)

    def make_env(self, want_admissible: bool) -> Callable[[], TextEnv]:
        return scienceworld_engine(self, want_admissible=want_admissible)
