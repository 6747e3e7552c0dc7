"""The flags of an agent; those of the evaluation programs: what all share, and each environment's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from itp.agent.policy import SELECTIONS
from itp.config import Topic, flag
from itp.devices import DTYPES
from itp.envs.base import TextEnv
from itp.envs.registry import EnvFlags, engine_of, games_of, scienceworld_engine
from itp.envs.scienceworld.games import ScienceworldFlags, list_games
from itp.games import Game
from itp.lm.memory_budget import EngineFlags
from itp.lm.server import PolicyServerFlags, WorldModelServerFlags
from itp.methods.registry import METHODS
from itp.methods.settings import MethodSettings
from itp.model_card import PromptFlags
from itp.text.prompt_format import STYLES


@dataclass
class AgentSettings(MethodSettings, PromptFlags, PolicyServerFlags, WorldModelServerFlags, EngineFlags):
    """An agent: its models, how they are asked, and its method.

    Programs add ``env``, ``max_k`` and ``max_k_without_head``, the K_max of an environment without a K-head's.
    """

    policy_model: str = flag(help="policy: a model folder, or a name on the Hugging Face hub (with a server: what it "
                                  "runs, read only for how to prompt it)",
                             affects_result=False)
    wm_model: str = flag("", help="world model (not needed by methods without imagination, with a server or with "
                                "--wm_backend engine)",
                         affects_result=False)
    models: ClassVar[Topic] = Topic("Precision, and lengths of answers")
    policy_dtype: str = flag("fp16", help="precision of the policy on a GPU", choices=DTYPES)
    wm_dtype: str = flag("fp16", help="precision of the world model on a GPU", choices=DTYPES)
    decision_tokens: int = flag(16, at_least=1, help="new tokens of a horizon decision at most")
    act_tokens: int = flag(256, at_least=1, help="new tokens of an action reply or reflection at most")
    wm_max_new_tokens: int = flag(256, at_least=1, help="new tokens of one imagined observation at most",
                                  aliases=("foresight_tokens",))
    action_selection: str = flag("generate", help="write the action freely, decode it under the trie of admissible "
                                                  "actions, or score each of them", choices=SELECTIONS)
    prompting: ClassVar[Topic] = Topic("How models are prompted and sampled")
    prompt_style: str = flag("auto", help="the policy's prompts; auto: tuned for models trained here, else instruct",
                             choices=("auto", *STYLES))
    wm_prompt_style: str = flag("auto", help="the same for the world model", choices=("auto", *STYLES))
    chat_template: bool = flag(True, help="instruct prompts go through the tokenizer's chat template, if it has one")
    thinking: bool = flag(False, help="let a policy that can think (Qwen3) do so before it answers")
    thinking_tokens: int = flag(1024, help="new tokens of that thinking at most")
    temperature: float = flag(0.0, at_least=0, help="sampling temperature of the policy (0: greedy)")
    top_p: float = flag(1.0, help="nucleus of the policy's sampling")
    rap_action_gen_tokens: int = flag(32, at_least=1, help="rap, mcts: new tokens of a proposed action at most")
    rap_wm_pred_tokens: int = flag(128, at_least=1, help="rap, mcts: new tokens of a predicted observation at most")
    concurrency: int = flag(16, at_least=1, help="episodes at a time", affects_result=False)
    method: str = flag("foresight", help="how to act", choices=tuple(METHODS))
    seed: int = flag(123, help="seed of everything random")
    device: str = flag("cuda", help="device of both models, where they have none of their own", affects_result=False)
    disable_wm: int = flag(0, help="1: imagine nothing", choices=(0, 1))
    use_history: int = flag(0, help="1: instruct prompts hold the steps so far (tuned ones always do)", choices=(0, 1))


@dataclass
class EvalSettings(AgentSettings):
    """What is played, and where results go."""

    out_dir: str = flag(help="result folder; the same command again plays only what is missing there",
                        affects_result=False, aliases=("output_path",))
    override: bool = flag(False, help="delete the results in out_dir and start anew", affects_result=False)
    debug: bool = flag(False, help="play the first 5 games only", affects_result=False)
    part_num: int = flag(1, at_least=1, help="share the games out over this many runs", affects_result=False)
    part_idx: int = flag(-1, help="which share this run plays, from 0 (-1: all)", affects_result=False)
    max_games: int = flag(0, at_least=0, help="play so many games only, at equal distances over the split (0: all)",
                          affects_result=False)
    trials: int = flag(1, at_least=1, help="play each game up to so many times in order, until it is solved",
                       affects_result=False)
    trials_after_success: bool = flag(False, help="go on with a game's trials after it was solved",
                                      affects_result=False)
    only_ids: str = flag("", help="play these games only: indices such as 0,5,7", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the environments", affects_result=False)


@dataclass
class AlfworldSettings(EvalSettings):
    """The games of ALFWorld, and the devices."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "wm_model", "method", "env_data_root", "split",
        "out_dir", "max_k", "fixed_k", "action_selection", "max_games")
    split: str = flag("dev", help="dev = seen = valid_seen; test = unseen = valid_unseen; train", selects_games=True)
    env_data_root: str = flag("eval_agent/data/alfworld", help="folder that holds json_2.1.1")
    max_steps: int = flag(40, at_least=1, help="steps of an episode at most", selects_games=True)
    policy_device: str = flag("", help="device of the policy", affects_result=False)
    wm_device: str = flag("", help="device of the world model", affects_result=False)
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, without one 2")
    env: ClassVar[str] = "alfworld"
    max_k_without_head: ClassVar[int] = 2

    def games(self) -> list[Game]:
        return games_of(EnvFlags(), self.split, self.env_data_root)

    def make_env(self, want_admissible: bool) -> Callable[[], TextEnv]:
        return engine_of(EnvFlags(), want_admissible=want_admissible)


@dataclass
class SciworldSettings(EvalSettings, ScienceworldFlags):
    """The games of ScienceWorld, and the devices."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "wm_model", "method", "split", "tasks",
        "variations", "out_dir", "max_k", "action_selection", "max_games")
    split: str = flag("dev", help="dev = seen, test = unseen: the simulator's development and test variations; train",
                      selects_games=True)
    policy_device: str = flag("cuda:0", help="device of the policy", affects_result=False)
    wm_device: str = flag("cuda:1", help="device of the world model", affects_result=False)
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, without one 3")
    min_k: int = flag(0, help="steps to imagine at least (not with --fixed_k)")
    concurrency: int = flag(4, help="episodes at a time; each has a JVM of some 250 MB, and two more "
                                    "load the next games; --wm_backend engine starts as many more at most",
                            affects_result=False)
    env: ClassVar[str] = "scienceworld"
    max_steps: ClassVar[int] = 0  # each game has its own
    max_k_without_head: ClassVar[int] = 3

    def games(self) -> list[Game]:
        return list_games(self.split, self)

    def make_env(self, want_admissible: bool) -> Callable[[], TextEnv]:
        return scienceworld_engine(self, want_admissible=want_admissible)
