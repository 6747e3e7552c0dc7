"""The flags of an agent: its models, how they are asked, and its method.  Evaluation and the server add their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from itp.agent.policy import SELECTIONS
from itp.agent.world_model import RecallFlag
from itp.config import Topic, flag
from itp.devices import DTYPES
from itp.lm.memory_budget import EngineFlags
from itp.lm.server import PolicyServerFlags, WorldModelServerFlags
from itp.methods.registry import METHODS
from itp.methods.settings import MethodSettings
from itp.model_card import PromptFlags
from itp.text.prompt_format import STYLES

K_WITHOUT_HEAD = {"alfworld": 2, "scienceworld": 3}


@dataclass
class AgentSettings(MethodSettings, PromptFlags, PolicyServerFlags, WorldModelServerFlags, RecallFlag, EngineFlags):
    """An agent: its models, how they are asked, and its method.

    Programs add ``env`` and ``max_k``.
    """

    policy_model: str = flag(help="policy: a model folder, or a name on the Hugging Face hub (with a server: what it "
                                  "runs, read only for how to prompt it)",
                             affects_result=False)
    wm_model: str = flag("", help="world model (not needed by methods without imagination, with a server or with "
                                "--wm_backend engine)",
                         affects_result=False)
    critic_model: str = flag("", help="model whose value head step_q and armap ask (empty: the policy's own head)",
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
    rap_action_gen_tokens: int = flag(32, at_least=1, help="rap, mcts, lats: new tokens of a proposed action at most")
    rap_wm_pred_tokens: int = flag(128, at_least=1,
                                   help="rap, mcts, lats: new tokens of a predicted observation at most")
    concurrency: int = flag(16, at_least=1, help="episodes at a time", affects_result=False)
    method: str = flag("foresight", help="how to act", choices=tuple(METHODS))
    seed: int = flag(123, help="seed of everything random")
    device: str = flag("cuda", help="device of both models, where they have none of their own", affects_result=False)
    disable_wm: int = flag(0, help="1: imagine nothing", choices=(0, 1))
    use_history: int = flag(0, help="1: instruct prompts hold the steps so far (tuned ones always do)", choices=(0, 1))

    @property
    def max_k_without_head(self) -> int:
        """K_max in this environment for a policy without a K-head."""
        return K_WITHOUT_HEAD[self.env]
