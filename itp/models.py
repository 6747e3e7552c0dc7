"""Policies and world models from their folders.  Nothing else constructs a ``Policy`` or a ``WorldModel``.

What a model's card records (:mod:`itp.model_card`) decides how it is prompted: its format, the history and the budget
of its prompts, and for a policy what it reads of an imagined trajectory.  Each model follows its own card.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from itp.agent.heads import has_heads
from itp.agent.policy import IMAGINED_ACTION_TOKENS, Policy
from itp.agent.prompt_budget import RESERVE, PromptBudget, prompt_tokens
from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.errors import UserError
from itp.lm.base import LM
from itp.lm.local import LocalLM
from itp.lm.openai import OpenAILM
from itp.lm.scheduler import BatchBarrier
from itp.lm.server import Server
from itp.lm.tokenize import Encoder
from itp.lm.vision import VisionLM, sees
from itp.model_card import AS_TRAINED, ModelCard, fill_in, format_for, predicts_states, recorded_settings
from itp.pretrained import load_tokenizer
from itp.text.prompt_format import PromptFormat

log = logging.getLogger(__name__)


def load_policy(path: str, *, env: str = "alfworld", lm: LM | None = None, server: Server | None = None,
                device: str = "cpu", dtype: str = "fp32", barrier: BatchBarrier | None = None,
                engine: Mapping[str, Any] | None = None, concurrency: int = 16, style: str = "auto", chat: bool = True,
                thinking: bool = False, foresight_format: str = "auto", history_keep_steps: int = -1,
                max_seq_len: int = -1, role: str = "policy", **behavior: Any) -> Policy:
    """The policy in the model folder (or of the hub name) ``path``, with its heads where it has some.

    ``lm``: the model, where it is loaded already.  ``server``: where it runs, if not in this process; ``path`` may
    then be empty, and says only how it is prompted.  ``engine``: options of :class:`itp.lm.local.LocalLM`.
    ``concurrency``: requests to a server at a time.  ``style``, ``chat``, ``thinking``: see
    :func:`itp.model_card.format_for`.  ``foresight_format``, ``history_keep_steps``, ``max_seq_len``: by default as
    the policy was trained.  ``role``: under which its calls are counted, ``critic`` for a critic.  ``behavior``: other
    fields of :class:`itp.agent.policy.Policy`.  Raises UserError.
    """
    if lm is None:
        lm = (server.connect("policy", concurrency) if server else
              _load_policy_lm(path, device=device, dtype=dtype, barrier=barrier, role=role, **engine or {}))
    tokenizer = _tokenizer_for_template(lm, server, path, style, chat)
    form = format_for(path, tokenizer, env=env, style=style, chat=chat, thinking=thinking)
    form = replace(form, control_token=has_heads(path))
    prompt = fill_in({"foresight_format": foresight_format, "history_keep_steps": history_keep_steps,
                      "max_seq_len": max_seq_len}, recorded_settings(path), path)
    behavior = {"action_tokens": RESERVE["action"][env], "imagined_action_tokens": IMAGINED_ACTION_TOKENS[env],
                "score_answers": isinstance(lm, OpenAILM), **behavior}
    return Policy(lm, form, _budget(lm, path, form, prompt["max_seq_len"], "action"),
                  foresight_format=prompt["foresight_format"], history_keep_steps=prompt["history_keep_steps"],
                  **behavior)


def load_world_model(path: str, *, env: str = "alfworld", lm: LM | None = None, server: Server | None = None,
                     device: str = "cpu", dtype: str = "fp32", barrier: BatchBarrier | None = None,
                     engine: Mapping[str, Any] | None = None, concurrency: int = 16, style: str = "auto",
                     chat: bool = True, max_new_tokens: int = 192, recall: bool = False,
                     limit_flag: str = "--wm_max_new_tokens", states: bool = False) -> WorldModel:
    """The world model in the model folder (or of the hub name) ``path``.

    ``max_new_tokens``: of a predicted observation at most, which the flag ``limit_flag`` sets.  ``recall``: see
    :class:`itp.agent.world_model.WorldModel`.  The other arguments are those of :func:`load_policy`.  Its history and
    its budget are those of its own card.  Raises UserError, also for a model of symbolic states, which only those who
    want one (``states``) can ask: see :func:`load_state_model`.
    """
    if recall:
        check_recall(path, env, states)
    if not states and predicts_states(path):
        raise UserError(f"{path} predicts symbolic states, which only --method implement reads; give a world model "
                        "that predicts observations")
    if lm is None and server is None and ModelCard.read(path) is not None and sees(path):
        lm = VisionLM.load(path, device=device, dtype=dtype)
    if lm is None:
        lm = (server.connect("world_model", concurrency) if server else
              LocalLM.load(path, device=device, dtype=dtype, role="world_model", barrier=barrier, **engine or {}))
    tokenizer = _tokenizer_for_template(lm, server, path, style, chat)
    form = format_for(path, tokenizer, role="world_model", env=env, style=style, chat=chat)
    prompt = fill_in(AS_TRAINED, recorded_settings(path), path)
    return WorldModel(lm, form, _budget(lm, path, form, prompt["max_seq_len"], "observation"),
                      history_keep_steps=prompt["history_keep_steps"], max_new_tokens=max_new_tokens,
                      recall=recall, limit_flag=limit_flag)


def check_recall(path: str, env: str, states: bool = False) -> None:
    """Refuse ``--wm_recall`` where it can't help the world model in ``path``, which predicts symbolic ``states``."""
    if env != "alfworld":
        raise UserError(f"--wm_recall knows the rules of ALFWorld's rooms only; leave it out for {env}")
    if states:
        raise UserError(f"{path} predicts symbolic states, which --wm_recall doesn't; leave it out")


def load_state_model(path: str, *, state_tokens: int = 2048, **options: Any) -> StateModel:
    """The world model on symbolic states in ``path``, whose card says that it is one.

    ``state_tokens``: of a predicted state at most.  ``options``: those of :func:`load_world_model`.
    """
    return StateModel(load_world_model(path, states=True, **options), state_tokens)


def _load_policy_lm(path: str, *, device: str, dtype: str, **options: Any) -> LocalLM:
    """The LM of a policy, with its heads where the folder has them.  ``options`` are LocalLM's."""
    if not has_heads(path):
        return LocalLM.load(path, device=device, dtype=dtype, **options)
    from itp.agent.policy_with_heads import PolicyWithHeads

    policy, tokenizer = PolicyWithHeads.from_pretrained(path, device=device, dtype=dtype)
    return LocalLM(policy.causal_lm, tokenizer, heads=policy.heads, name=Path(path).name, **options)


def _tokenizer_for_template(lm: LM, server: Server | None, path: str, style: str, chat: bool) -> Any:
    """The tokenizer whose chat template is applied here; None where a server applies its own, or none is wanted."""
    if server is not None:
        return server.tokenizer(path, style) if chat else None
    return lm.tokenizer


def _budget(lm: LM, path: str, form: PromptFormat, max_seq_len: int, answer: str) -> PromptBudget:
    """The budget of a model's prompts.  Those to a server are counted by the tokenizer in ``path``, if it has one."""
    tokens = prompt_tokens(max_seq_len, answer, form.env) if max_seq_len else 0
    tokenizer, context = lm.tokenizer, lm.context_length or 0
    if tokenizer is None and tokens:
        try:
            tokenizer = load_tokenizer(path)
        except UserError:
            log.warning("%s has no tokenizer to count with: prompts to its server aren't cut to %d tokens", path,
                        tokens)
    if tokenizer is None:
        return PromptBudget(role=lm.role)
    encoder = lm.encode if isinstance(lm, LocalLM) else Encoder(tokenizer)  # its texts are tokenized once
    return PromptBudget(tokens, context, encoder.count, lm.role)
