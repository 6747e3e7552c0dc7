r"""Prompts as turns of a chat: how a model is asked, found out from its tokenizer's own chat template.

A template is rendered once with a placeholder for what the user says, and cut there into what stands before
and behind it (:class:`itp.text.prompts.Turns`).  So a state still grows at its end, what was computed for its
beginning still serves, and training and inference join the very same strings.

A model trained here carries its turns in ``itp_model.json``.  A chat model from elsewhere gets the
environment's instruction as system turn, or at the head of the user's where its template knows no system.
"""

from __future__ import annotations

from typing import Any

from itp.runtime import UserError, bos_ids, model_card, prompt_style
from itp.text.actions import THINK, THOUGHT
from itp.text.prompts import INSTRUCTION, PLAIN, WORLD_INSTRUCTION, Turns

_PLACE = "@@PLACE@@"
_DATE = "26 Jul 2024"
"""Llama's templates write a date; with today's the same prompt would differ from day to day."""


def turns_of(tokenizer: Any, system: str = "", thinking: bool = False) -> Turns:
    """The tokenizer's chat template as :class:`Turns`.  Raises UserError where it has none.

    ``thinking``: whether a model that can think before it answers does (Qwen3).  Off, its block is closed for
    it, where the template doesn't do so itself.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use plain prompts")
    user = {"role": "user", "content": _PLACE}
    text = _render(tokenizer, [{"role": "system", "content": system}, user] if system else [user], thinking)
    if text is None or system and system not in text:  # some refuse a system turn, some drop it
        text = _render(tokenizer, [user | {"content": f"{system}\n\n{_PLACE}"}], thinking)
    if text is None or text.count(_PLACE) != 1:
        raise UserError(f"{tokenizer.name_or_path}: its chat template can't be used for a single question")
    head, tail = text.split(_PLACE)
    if bos_ids(tokenizer):  # then every sequence here starts with it anyway
        head = head.removeprefix(tokenizer.bos_token)
    if not thinking and tail.rstrip().endswith(THINK):
        tail = f"{tail.rstrip()}\n\n{THOUGHT}\n\n"
    return Turns(head, tail, thinking)


def end_of_turn(tokenizer: Any) -> set[int]:
    """The token that ends an assistant's turn, which isn't always the tokenizer's end-of-sequence token."""
    if not tokenizer.chat_template:
        return set()
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PLACE}]
    text = _render(tokenizer, said, thinking=False, ask=False)
    behind = text.rsplit(_PLACE, 1)[-1] if text else ""
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    return set(ids) & set(tokenizer.get_added_vocab().values())


def asked_as(path: str, tokenizer: Any = None, *, role: str = "policy", env: str = "alfworld", style: str = "auto",
             chat: bool = True, thinking: bool = False) -> tuple[str, Turns]:
    """(prompt style, turns) for the model at ``path``: as its training left them, else as a chat model's in ``env``.

    ``tokenizer``: None for a server that puts its own template around.  ``chat`` False: plain text for models
    from elsewhere too.
    """
    if (trained := as_trained(path, style)) is not None:
        return trained
    style = prompt_style(path) if style == "auto" else style
    if not chat or tokenizer is None or not tokenizer.chat_template:
        if thinking:
            raise UserError(f"--thinking: {path} isn't asked by a chat template, so it can't think before it answers; "
                            "leave the flag out")
        return style, PLAIN
    instruction = INSTRUCTION if role == "policy" else WORLD_INSTRUCTION
    return style, turns_of(tokenizer, instruction[env], thinking)


def as_trained(path: str, style: str) -> tuple[str, Turns] | None:
    """(prompt style, turns) that training left beside the model at ``path``; None for one to be asked otherwise."""
    card = model_card(path)
    if style == "auto":
        style = prompt_style(path)
    return (style, trained_turns(card)) if style == "tuned" or style == card.get("prompt_style") else None


def trained_turns(card: dict[str, Any]) -> Turns:
    """The turns that a model card records; plain text where it records none."""
    return Turns(**card["turns"]) if "turns" in card else PLAIN


def card_of(turns: Turns, style: str = "tuned") -> dict[str, Any]:
    """What training writes beside a model, so that whoever asks it asks as it was trained."""
    card: dict[str, Any] = {"prompt_style": style}
    return card if turns == PLAIN else card | {"turns": {"head": turns.head, "tail": turns.tail}}


def _render(tokenizer: Any, messages: list[dict[str, str]], thinking: bool, ask: bool = True) -> str | None:
    """The template's text; None where it refuses these messages."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask,
                                             enable_thinking=thinking, date_string=_DATE)
    except TemplateError:
        return None
