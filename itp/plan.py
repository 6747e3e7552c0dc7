"""An agent's settings, resolved once: what is to be loaded, who chooses K, which models run where.

:func:`make_plan` reads the models' cards and refuses what can't work before anything is loaded; after that nobody asks
the settings again what they mean.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from itp.agent import engine_world_model
from itp.agent.engine_world_model import EngineWorldModel
from itp.agent.heads import has_heads, kmax_of
from itp.agent.policy import Policy
from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.agent_settings import AgentSettings
from itp.envs.pool import processes_for
from itp.errors import UserError
from itp.files import content_digest
from itp.lm.base import LM
from itp.lm.scheduler import BatchBarrier
from itp.lm.server import ENGINE, Server, server_of
from itp.lm.tokenize import Encoder
from itp.methods.base import Method
from itp.methods.knowledge import read_knowledge
from itp.methods.registry import build
from itp.methods.settings import (
    DRAW_ACTIONS, LEARNED_FILES, NEED_CRITIC, NEED_WORLD_MODEL, SCORE_ACTIONS, TREE_SEARCH, WRITE_THOUGHTS,
    MethodSettings, asks_yes_or_no, looks_ahead,
)
from itp.model_card import card_digest, predicts_states, prompt_settings, resolve_by_card
from itp.models import check_recall, load_policy, load_state_model, load_world_model
from itp.pretrained import check_model_path, load_tokenizer, model_fingerprint
from itp.text.prompts import NO, YES
from itp.text.rules import read_rules

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalPlan:
    """``settings``: with what they left open filled in from the policy's card.  ``method_settings``: what the method
    is told.  ``policy_server``, ``wm_server``: where the models run, if not in this process.  ``how_k``: who chooses K
    (head, prompt, fixed or random).
    """

    settings: AgentSettings
    method_settings: MethodSettings
    policy_server: Server | None
    wm_server: Server | None
    heads: bool
    how_k: str

    @property
    def uses_world_model(self) -> bool:
        return _uses_world_model(self.settings)

    @property
    def imagines_in_engine(self) -> bool:
        """Whether the game itself is in the place of the world model."""
        return self.uses_world_model and self.settings.wm_backend == ENGINE

    @property
    def predicts_states(self) -> bool:
        """Whether the world model is one on symbolic states."""
        return self.uses_world_model and not self.imagines_in_engine and predicts_states(self.settings.wm_model)

    @property
    def facts(self) -> dict[str, Any]:
        """What the results depend on besides the settings: models count by their weights, not by their paths."""
        settings = self.settings
        facts = {"max_k": self.method_settings.max_k}  # not -1: what a report measures budgets by
        critic = settings.critic_model if settings.method in NEED_CRITIC else ""
        facts["critic_fingerprint"] = model_fingerprint(critic) if critic else ""  # "": to resume without is refused
        for method, name in LEARNED_FILES.items():
            path = getattr(settings, name) if settings.method == method else ""
            facts[f"{name}_sha256"] = content_digest(path) if path else ""
        if self.policy_server is None:
            facts["policy_fingerprint"] = model_fingerprint(settings.policy_model)
        else:  # a server's weights can't be seen; its folder, where one is given, says how it is prompted
            facts |= {"policy_fingerprint": self.policy_server.identity,
                      "policy_card": card_digest(settings.policy_model)}
        if self.imagines_in_engine:
            facts["world_model"] = engine_world_model.NAME  # marks the results: see Result.title
        elif self.uses_world_model and self.wm_server is None:
            facts["wm_fingerprint"] = model_fingerprint(settings.wm_model)
        elif self.uses_world_model:
            facts["wm_card"] = card_digest(settings.wm_model)
        return facts

    def load_policy(self, barrier: BatchBarrier, device: str = "cpu", lm: LM | None = None,
                    critic: Policy | None = None) -> Policy:
        """The policy on ``device``, or on ``lm`` and with ``critic`` where these are loaded already."""
        s = self.settings
        tokens = {"action_tokens": s.act_tokens}
        if s.method in TREE_SEARCH:
            tokens = dict.fromkeys(("action_tokens", "imagined_action_tokens"), s.rap_action_gen_tokens)
        if critic is None and s.critic_model and s.method in NEED_CRITIC:
            critic = load_policy(s.critic_model, env=s.env, device=device, dtype=s.policy_dtype, barrier=barrier,
                                 engine=s.engine, role="critic")
        return load_policy(
            s.policy_model, env=s.env, lm=lm, server=self.policy_server, device=device, dtype=s.policy_dtype,
            barrier=barrier, engine=s.engine, concurrency=s.concurrency, style=s.prompt_style, chat=s.chat_template,
            thinking=s.thinking, selection=s.action_selection, history=bool(s.use_history), temperature=s.temperature,
            top_p=s.top_p, text_tokens=s.act_tokens, decision_tokens=s.decision_tokens, critic=critic,
            thinking_tokens=s.thinking_tokens, **tokens, **prompt_settings(s))

    def load_world_model(self, barrier: BatchBarrier, device: str = "cpu",
                         lm: LM | None = None) -> WorldModel | StateModel | EngineWorldModel:
        """The world model on ``device``, or on ``lm`` where that is loaded already; or the engine in its place."""
        s = self.settings
        if self.imagines_in_engine:  # with the text alone: what is admissible takes long to list
            return EngineWorldModel(s.make_env(want_admissible=False), processes_for(s.env_processes, s.concurrency),
                                    simulators=s.concurrency)
        limit = "rap_wm_pred_tokens" if s.method in TREE_SEARCH else "wm_max_new_tokens"
        load = load_state_model if self.predicts_states else load_world_model
        return load(
            s.wm_model, env=s.env, lm=lm, server=self.wm_server, device=device, dtype=s.wm_dtype, barrier=barrier,
            engine=s.engine, concurrency=s.concurrency, style=s.wm_prompt_style, chat=s.chat_template,
            max_new_tokens=getattr(s, limit), recall=s.wm_recall, limit_flag=f"--{limit}")

    def build_method(self, policy: Policy, world_model: WorldModel | StateModel | EngineWorldModel | None) -> Method:
        """What acts."""
        return build(self.settings.method, policy, world_model, self.method_settings)


def make_plan(settings: AgentSettings) -> EvalPlan:
    """Resolve ``settings``.  Raises UserError for what can't work, before any model is loaded."""
    servers = {prefix: server_of(settings, prefix) for prefix in ("policy", "wm")}
    if _uses_world_model(settings):
        _check_one_world_model(settings, servers["wm"])
    _check_method(settings)
    _check_model(settings, servers["policy"], settings.policy_model, settings.prompt_style)
    if _uses_world_model(settings) and settings.wm_backend != ENGINE:
        _check_model(settings, servers["wm"], settings.wm_model, settings.wm_prompt_style)
    heads = has_heads(settings.policy_model)
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(MethodSettings)}
    fixed_k = settings.revise_k if settings.method == "revise" else settings.fixed_k
    method_settings = MethodSettings(**given | {
        "max_k": _max_k(settings, heads), "fixed_k": 0 if settings.disable_wm else fixed_k})
    if servers["policy"] is not None and settings.max_seq_len > 0:
        _check_countable(settings)
    plan = EvalPlan(resolve_by_card(settings, settings.policy_model), method_settings, servers["policy"],
                    servers["wm"], heads, method_settings.how_k_is_chosen(heads))
    _check_states(plan)
    _check_server_policy(plan)
    _check_horizon(plan)
    return plan


def _uses_world_model(settings: AgentSettings) -> bool:
    remembers_only = settings.method == "implement" and not settings.implement_imagination
    return (settings.method in NEED_WORLD_MODEL and not remembers_only and not settings.disable_wm
            and settings.fixed_k != 0)


def _max_k(settings: AgentSettings, heads: bool) -> int:
    """K_max: the flag's, else the K-head's, else the environment's."""
    if settings.max_k >= 0:
        return settings.max_k
    return kmax_of(settings.policy_model) if heads else settings.max_k_without_head


# ---------------------------------------------------------------- what is refused


def _check_model(settings: AgentSettings, server: Server | None, path: str, style: str) -> None:
    """Refuse a model that isn't there, where it, or the tokenizer of what a server runs, is to be loaded."""
    if server is None or settings.chat_template and server.needs_template(path, style):
        check_model_path(path)


def _check_one_world_model(settings: AgentSettings, server: Server | None) -> None:
    """Refuse a missing world model, and one beside the engine, which nobody would ask."""
    if settings.wm_backend == ENGINE:
        if settings.wm_recall:
            raise UserError("--wm_recall: with --wm_backend engine the game itself answers; leave one of them out")
        if settings.wm_model:
            raise UserError("--wm_backend engine imagines in the game itself and asks no world model: leave --wm_model "
                            "out, or --wm_backend")
    elif server is None and not settings.wm_model:
        raise UserError(f"--method {settings.method} needs --wm_model (or --wm_backend openai, or --disable_wm 1)")


def _check_countable(settings: AgentSettings) -> None:
    """Refuse a budget for the prompts of a server, where no tokenizer here can count them."""
    try:
        load_tokenizer(settings.policy_model)
    except UserError as error:
        raise UserError(f"--max_seq_len {settings.max_seq_len}: --policy_model must name a folder with the tokenizer "
                        "that counts the prompts of a policy behind a server") from error


def _check_method(settings: AgentSettings) -> None:
    """Refuse flags that contradict each other or the method."""
    method = settings.method
    if settings.k_policy == "fixed" and settings.fixed_k < 0:
        raise UserError("--k_policy fixed needs --fixed_k, the number of steps to imagine")
    if settings.fixed_k >= 0 and settings.k_policy not in ("auto", "fixed"):
        raise UserError(f"--fixed_k {settings.fixed_k} contradicts --k_policy {settings.k_policy}; give one of them")
    if method in WRITE_THOUGHTS and settings.action_selection != "generate":
        raise UserError(f"--method {method} writes thought and action in one reply: use --action_selection generate")
    if settings.thinking and settings.action_selection != "generate":
        raise UserError("--thinking: a model that thinks writes its action freely; use --action_selection generate")
    if settings.thinking and asks_yes_or_no(method, settings):
        raise UserError(f"--thinking: --method {method} reads how sure the policy is of yes where its answer begins, "
                        "so it can't think first; leave the flag out")
    if settings.thinking and method in SCORE_ACTIONS:
        raise UserError(f"--thinking: --method {method} compares the log-probabilities of actions right after the "
                        "prompt, so the policy can't think first; leave the flag out")
    if method == "statler" and settings.statler_writer == "belief" and settings.env != "alfworld":
        raise UserError("--statler_writer belief knows ALFWorld's rules only; give --statler_writer lm")
    if method in LEARNED_FILES and settings.env != "alfworld":
        raise UserError(f"--method {method} reads the symbolic state of ALFWorld's rooms only; choose another method "
                        f"for {settings.env}")
    _read_learned(settings)
    if method == "implement":
        _check_implement(settings)
    if method in NEED_CRITIC and not has_heads(settings.critic_model or settings.policy_model):
        raise UserError(f"--method {method} needs --critic_model, a model with a value head that python -m "
                        "itp.training.critic trains")
    if settings.wkm_gamma > 1:
        raise UserError(f"--wkm_gamma {settings.wkm_gamma}: a share, from 0 to 1")
    if method == "revise":
        _check_revise(settings)
    elif method in NEED_WORLD_MODEL and method != "foresight" and (settings.disable_wm or settings.fixed_k >= 0):
        raise UserError(f"--method {method} is nothing without its world model: --disable_wm and --fixed_k are for "
                        "--method foresight")


def _read_learned(settings: AgentSettings) -> None:
    """Refuse a file of rules or of knowledge that isn't there, or isn't one."""
    read = {"walle_rules": read_rules, "wkm_base": read_knowledge}
    name = LEARNED_FILES.get(settings.method)
    if name and (path := getattr(settings, name)):
        read[name](path)


def _check_implement(settings: AgentSettings) -> None:
    """Refuse memory that there is none of: what ScienceWorld's earlier trials showed isn't remembered."""
    if settings.env != "scienceworld":
        return
    if settings.implement_memory == "recall":
        raise UserError("--implement_memory recall: nothing is remembered of ScienceWorld's earlier trials; leave it "
                        "out, or use --method reflexion, which writes notes on them")
    if not settings.implement_imagination:
        raise UserError("--implement_imagination false: the policy acts on what is remembered, and nothing is "
                        "remembered of ScienceWorld's earlier trials; use --method sft")


def _check_revise(settings: AgentSettings) -> None:
    """Refuse what leaves gated revision without an imagined step, or its number of steps to somebody else."""
    if settings.disable_wm or settings.fixed_k == 0:
        raise UserError("--method revise imagines what its draft leads to: give --fixed_k 1 or more, no --disable_wm, "
                        "or take --method sft")
    if settings.k_policy not in ("auto", "fixed"):
        raise UserError(f"--method revise imagines --fixed_k steps: leave --k_policy {settings.k_policy} out, or take "
                        "--method foresight, whose K-head decides where to imagine")


def _check_states(plan: EvalPlan) -> None:
    """Refuse a world model on symbolic states where nobody can ask it, and recall that no world model here can use."""
    settings = plan.settings
    if plan.predicts_states and (settings.method != "implement" or settings.env != "alfworld"):
        raise UserError(f"--wm_model {settings.wm_model} predicts symbolic states, which --method implement asks for "
                        "on ALFWorld; give a world model that predicts observations")
    if settings.wm_recall and plan.uses_world_model and not plan.imagines_in_engine:
        check_recall(settings.wm_model, settings.env, plan.predicts_states)


def _check_server_policy(plan: EvalPlan) -> None:
    """Refuse what a policy behind a server can't do; :func:`check_server` sees to what depends on the server."""
    settings, method = plan.settings, plan.settings.method
    if plan.policy_server is None:
        return
    plan.policy_server.check_selection(settings.action_selection)
    draws = method in DRAW_ACTIONS or method == "implement" and settings.implement_choice == "gain"
    if settings.action_selection == "score" and draws:
        raise UserError(f"--method {method} draws several actions: with --policy_backend {settings.policy_backend} it "
                        "needs --action_selection generate")
    if method in NEED_CRITIC and not settings.critic_model:
        raise UserError(f"--method {method} asks a value head, and a policy behind a server has none: give "
                        "--critic_model, which python -m itp.training.critic trains")
    if method == "rap":
        raise UserError("--method rap weighs an action by the log-probability of what the policy wrote, which a server "
                        "doesn't say: use --method mcts, or a local policy")
    if method == "foresight" and plan.how_k == "head":
        raise UserError(f"--policy_backend {settings.policy_backend}: a server has no K-head; choose --k_policy prompt "
                        "or random, --fixed_k, or a local policy")


def _check_horizon(plan: EvalPlan) -> None:
    """Refuse a K that can't be chosen; warn of one that the policy has never been trained to read."""
    settings, method, path = plan.settings, plan.method_settings, plan.settings.policy_model
    if method.min_k > method.max_k:
        raise UserError(f"--min_k {method.min_k}: more than K_max, which is {method.max_k}; give less")
    if looks_ahead(settings.method, settings) and method.max_k < 1:
        raise UserError(f"--method {settings.method} looks --max_k steps ahead: give at least 1")
    if settings.k_policy == "head" and not plan.heads:
        raise UserError(f"--k_policy head: {path} has no K-head; train one with "
                        "`python -m itp.training.train_adaptive_k sft`, or choose another --k_policy")
    if not plan.heads or settings.method not in ("foresight", "revise"):
        return
    name, k = ("fixed_k", method.fixed_k) if plan.how_k == "fixed" else ("max_k", method.max_k)
    if k <= (trained := kmax_of(path)):
        return
    if plan.how_k == "head":
        raise UserError(f"--{name} {k}: the K-head of {path} was trained with K_max {trained}; give at most that")
    log.warning("--%s %d: %s was trained with K_max %d, and longer imagined trajectories are new to it", name, k,
                path, trained)


def check_answers(plan: EvalPlan) -> None:
    """Refuse a policy whose tokenizer can't write the answers that the method prompts for."""
    settings = plan.settings
    if not asks_yes_or_no(settings.method, settings) or plan.policy_server:
        return
    encode = Encoder(load_tokenizer(settings.policy_model))
    if encode.continuation(YES) == encode.continuation(NO):
        raise UserError(f"--method {settings.method} asks the policy for yes or no, and the tokenizer of "
                        f"{settings.policy_model} knows neither word; train it on dialogues that have them "
                        "(world_model.collect --reasoning_share)")


async def check_server(plan: EvalPlan) -> None:
    """Ask a policy's server whether it can do what the run needs, before anything is written."""
    if plan.policy_server is None:
        return
    policy_lm = plan.policy_server.connect("policy", concurrency=1)
    try:
        await check_scores(plan.settings, policy_lm)
    finally:
        await policy_lm.close()


async def check_scores(settings: AgentSettings, policy_lm: LM) -> None:
    """Refuse a server that can't score a given text, where that is wanted of the policy."""
    judges, scores = asks_yes_or_no(settings.method, settings), settings.action_selection == "score"
    scores = scores or settings.method in SCORE_ACTIONS
    if not judges and not scores:
        return
    try:
        yes, no = await policy_lm.loglikelihood([("Helps:", YES), ("Helps:", NO)])
    except UserError as error:
        by_method = judges or settings.method in SCORE_ACTIONS
        what = f"--method {settings.method}" if by_method else "--action_selection score"
        raise UserError(f"{what} needs the log-probabilities of given text: {error}") from error
    if judges and yes.logprobs == no.logprobs:
        raise UserError(f"--method {settings.method} asks the policy for yes or no, and to {settings.policy_api_model} "
                        "both are the same; train it on dialogues that have them (world_model.collect "
                        "--reasoning_share)")
