"""What methods can be told, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("foresight", "rap", "mcts", "tot", "mpc", "rafa", "implement", "sft", "react", "cot", "self_refine",
           "multi_attempt", "k_candidates")

NEED_WORLD_MODEL = ("foresight", "rap", "mcts", "tot", "mpc", "rafa", "implement")
NEED_YES_OR_NO = ("rap", "mcts", "tot", "mpc", "rafa", "k_candidates")
"""They ask the policy whether something helps."""

DRAW_ACTIONS = (*NEED_YES_OR_NO, "multi_attempt")
"""They draw several actions, from the trie of the admissible ones where the policy doesn't write freely."""

TREE_SEARCH = ("rap", "mcts")

WRITE_THOUGHTS = ("react", "cot")
"""Thought and action come in one reply, so the action is written freely."""

LOOK_AHEAD = ("tot", "mpc", "rafa")
"""Their depth is K_max, which therefore can't be 0."""


@dataclass(frozen=True)
class MethodSettings:
    """The methods' part of the command line (``k_policy``: head, prompt, fixed or random)."""

    max_k: int = 2
    min_k: int = 0
    k_policy: str = "prompt"
    k_sample: bool = False
    fixed_k: int = -1
    foresight_format: str = "full"
    reflect: bool = True
    candidates: int = 4
    beam: int = 2
    rounds: int = 5
    belief_samples: int = 10
    rap_d_actions: int = 8
    rap_depth_limit: int = 6
    rap_num_rollouts: int = 32
    rap_uct_w: float = 1.4
    rap_rw_action_logp: float = 0.2
    rap_rw_self_eval: float = 0.6
    rap_rw_goal_overlap: float = 0.2
    rap_keep_tree: bool = False
