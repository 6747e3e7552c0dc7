"""What methods can be told, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from itp.config import Topic, flag

NEED_WORLD_MODEL = ("foresight", "rap", "mcts", "tot", "mpc", "rafa", "implement", "revise")
NEED_YES_OR_NO = ("rap", "mcts", "tot", "mpc", "rafa", "k_candidates")
"""They ask the policy whether something helps."""

DRAW_ACTIONS = (*NEED_YES_OR_NO, "multi_attempt", "no_repeat")
"""They sample several actions, from the trie of the admissible ones where the policy doesn't write freely."""

TREE_SEARCH = ("rap", "mcts")

WRITE_THOUGHTS = ("react", "cot")
"""Thought and action come in one reply, so the action is written freely."""

SCORE_ACTIONS = ("revise",)
"""They compare the log-probabilities of given actions."""

LOOK_AHEAD = ("tot", "mpc", "rafa")
"""Their depth is K_max, which therefore can't be 0."""

IMPLEMENT_CHOICES = ("policy", "gain")
IMPLEMENT_MEMORY = ("context", "recall", "none")

K_POLICIES = ("auto", "head", "prompt", "fixed", "random")


@dataclass
class MethodSettings:
    """Methods: how K is chosen.

    ``max_k`` is K_max, ``min_k`` the least K.  ``value_of_state``: V_θ(s_t) is read at every step, also where the
    K-head doesn't choose K.  ``record_sampling``: decisions say how their action was sampled, so that its probability
    can be computed again.  Stage 3 needs both.
    """

    max_k: int = 2
    min_k: int = 0
    value_of_state: bool = False
    record_sampling: bool = False
    fixed_k: int = flag(-1, help="always imagine this many steps (-1: as --k_policy says; revise: 1)")
    k_policy: str = flag("auto", help="how K is chosen; auto is fixed with --fixed_k, else head where the policy has "
                                      "a K-head, else prompt", choices=K_POLICIES)
    k_sample: bool = flag(False, help="sample K from the K-head's distribution instead of taking the most likely")
    proposals: ClassVar[Topic] = Topic("Methods that propose and compare")
    candidates: int = flag(4, at_least=1, help="actions that tot, mpc, rafa, k_candidates, multi_attempt and no_repeat "
                                                 "propose")
    beam: int = flag(2, at_least=1, help="trajectories that tot keeps at every level")
    rounds: int = flag(5, at_least=1, help="rounds of implement and self_refine at most")
    belief_samples: int = flag(10, at_least=1, help="outcomes that implement samples from the world model for an "
                                                    "action that gathers information; for others 1")
    of_implement: ClassVar[Topic] = Topic("IMPLEMENT and revise")
    implement_choice: str = flag("policy", before="policy", choices=IMPLEMENT_CHOICES,
                                 help="implement: the policy reads beliefs and chooses; or the action with the highest "
                                      "expected gain is taken, and the policy only proposes")
    implement_memory: str = flag("context", before="context", choices=IMPLEMENT_MEMORY,
                                 help="implement: what earlier trials of the game showed is read by the world model; "
                                      "recall: and where actions are chosen by gain, it is believed more than the "
                                      "world model, for one that doesn't copy what it has read; or it is forgotten")
    implement_imagination: bool = flag(True, before=True, help="implement: imagine; without, the policy acts on what "
                                                               "is remembered")
    implement_temperature: float = flag(1.0, at_least=0, before=1.0, help="implement: temperature of predictions")
    revise_margin: float = flag(2.0, at_least=0, before=2.0,
                                help="revise: nats by which the policy that has read what was imagined must prefer "
                                     "its second choice to its draft (0: the second choice is always executed)")
    tree_search: ClassVar[Topic] = Topic("Tree search: rap and mcts")
    rap_d_actions: int = flag(8, at_least=1, help="rap, mcts: actions proposed in a state at most")
    rap_depth_limit: int = flag(6, at_least=1, help="rap, mcts: steps from the root at most")
    rap_num_rollouts: int = flag(32, at_least=1, help="rap, mcts: rollouts for a decision")
    rap_uct_w: float = flag(1.4, at_least=0, help="rap, mcts: weight of exploration")
    rap_rw_action_logp: float = flag(0.2, help="rap: weight of the action's mean log-probability in the reward")
    rap_rw_self_eval: float = flag(0.6, help="rap: weight of P(yes), the policy's own verdict")
    rap_rw_goal_overlap: float = flag(0.2, help="rap: weight of the share of the task's words that the action names")
    rap_keep_tree: bool = flag(False, help="rap: go on with the subtree of what was done, where it came as imagined")

    @property
    def revise_k(self) -> int:
        """The number of steps that revise imagines."""
        return 1 if self.fixed_k < 0 else self.fixed_k

    def how_k_is_chosen(self, heads: bool) -> str:
        """``k_policy`` without auto, for a policy with or without ``heads``."""
        if self.fixed_k >= 0:
            return "fixed"
        if self.k_policy != "auto":
            return self.k_policy
        return "head" if heads else "prompt"
