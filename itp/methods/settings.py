"""What methods can be told, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from itp.config import Topic, flag

NEED_WORLD_MODEL = ("foresight", "rap", "mcts", "tot", "mpc", "rafa", "implement", "revise", "lats", "walle", "armap")
NEED_YES_OR_NO = ("rap", "mcts", "tot", "mpc", "rafa", "k_candidates", "lats")
"""They ask the policy whether something helps."""

NEED_CRITIC = ("step_q", "armap")
"""They ask a value head for the worth of actions or trajectories."""

DRAW_ACTIONS = (*NEED_YES_OR_NO, "multi_attempt", "no_repeat", "walle", "step_q", "armap")
"""They sample several actions, from the trie of the admissible ones where the policy doesn't write freely."""

TREE_SEARCH = ("rap", "mcts", "lats")

WRITE_THOUGHTS = ("react", "cot")
"""Thought and action come in one reply, so the action is written freely."""

SCORE_ACTIONS = ("revise", "wkm")
"""They compare the log-probabilities of given actions."""

LEARNED_FILES = {"walle": "walle_rules", "wkm": "wkm_base"}
"""Method -> the flag that names what its program has learned.  The file's content affects the result, not its path."""

LOOK_AHEAD = ("tot", "mpc", "rafa")
"""Their depth is K_max: see :func:`looks_ahead`."""

IMPLEMENT_CHOICES = ("policy", "gain")
IMPLEMENT_MEMORY = ("context", "recall", "none")

STATLER_WRITERS = ("lm", "belief")

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
    candidates: int = flag(4, at_least=1, help="actions that tot, mpc, rafa, k_candidates, multi_attempt, no_repeat, "
                                                 "walle and step_q propose, and wkm where they are written freely; "
                                                 "trajectories that armap imagines")
    beam: int = flag(2, at_least=1, help="trajectories that tot keeps at every level")
    rounds: int = flag(5, at_least=1, help="rounds of implement, self_refine and walle at most")
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
    learned: ClassVar[Topic] = Topic("Methods that learn from experience: walle, wkm, step_q, armap")
    walle_rules: str = flag("", help="walle: rules.json of python -m world_model.rules; empty: the world model alone "
                                     "vetoes", affects_result=False, holds="path")
    walle_critic: str = flag("proposal", before="proposal", choices=("proposal", "judge"),
                             help="walle: of the proposals that pass take the first, or the one whose imagined future "
                                  "the policy likes best")
    armap_depth: int = flag(20, at_least=1, before=20, help="armap: steps of an imagined trajectory at most")
    wkm_base: str = flag("", help="wkm: knowledge.json of python -m world_model.knowledge; empty: the policy decides "
                                  "alone", affects_result=False, holds="path")
    wkm_gamma: float = flag(0.5, at_least=0, before=0.5, help="wkm: weight γ of the policy's probabilities, at most 1; "
                                                              "that of the knowledge is 1 − γ")
    wkm_neighbors: int = flag(50, at_least=1, before=50, help="wkm: known states that are looked up")
    wkm_task_knowledge: bool = flag(False, before=False, help="wkm: the policy reads what solved and failed attempts "
                                                              "at such tasks did, for one that can read it")
    tree_search: ClassVar[Topic] = Topic("Tree search: rap, mcts and lats; statler")
    rap_d_actions: int = flag(8, at_least=1, help="rap, mcts, lats: actions proposed in a state at most")
    rap_depth_limit: int = flag(6, at_least=1, help="rap, mcts, lats: steps from the root at most")
    rap_num_rollouts: int = flag(32, at_least=1, help="rap, mcts, lats: rollouts for a decision")
    rap_uct_w: float = flag(1.4, at_least=0, help="rap, mcts, lats: weight of exploration")
    rap_rw_action_logp: float = flag(0.2, help="rap: weight of the action's mean log-probability in the reward")
    rap_rw_self_eval: float = flag(0.6, help="rap: weight of P(yes), the policy's own verdict")
    rap_rw_goal_overlap: float = flag(0.2, help="rap: weight of the share of the task's words that the action names")
    rap_keep_tree: bool = flag(False, help="rap: go on with the subtree of what was done, where it came as imagined")
    lats_lm_weight: float = flag(0.5, at_least=0, before=0.5,
                                 help="lats: weight of P(yes) in a leaf's value; the rest is self-consistency")
    statler_writer: str = flag("lm", before="lm", choices=STATLER_WRITERS,
                               help="statler: who writes the state of the world: the policy (an instruct model), or "
                                    "ALFWorld's rules from the observations")

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


def asks_yes_or_no(method: str, settings: MethodSettings) -> bool:
    """Whether ``method`` asks the policy whether something helps."""
    return method in NEED_YES_OR_NO or _judges(method, settings)


def looks_ahead(method: str, settings: MethodSettings) -> bool:
    """Whether ``method`` imagines K_max steps, which therefore can't be 0."""
    return method in LOOK_AHEAD or _judges(method, settings)


def _judges(method: str, settings: MethodSettings) -> bool:
    """Whether this is walle as a special case of mpc."""
    return method == "walle" and settings.walle_critic == "judge"
