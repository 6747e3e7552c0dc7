r"""A tokenizer's own chat template as a :class:`~itp.text.prompt_format.PromptTemplate`.

The chat template is rendered once with a placeholder for the user's text, and cut there into what stands before the
text and behind it.  So a state still grows at its end, what was computed for its beginning still serves, and training
and inference join exactly the same strings.
"""

from __future__ import annotations

from typing import Any

from itp.errors import UserError
from itp.pretrained import bos_ids
from itp.text.parsing import THINK, THOUGHT
from itp.text.prompt_format import PromptTemplate

_PLACE = "@@PLACE@@"
_DATE = "26 Jul 2024"
"""Llama's templates write a date; with today's the same prompt would differ from day to day."""


def template_of(tokenizer: Any, system: str = "", thinking: bool = False) -> PromptTemplate:
    """The template around one user's turn, with ``system`` as system turn.  Raises UserError where there is none.

    Where a template knows no system turn, ``system`` stands at the head of the user's.

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
    return PromptTemplate(head, tail, thinking)


def end_of_turn(tokenizer: Any) -> set[int]:
    """The token that ends an assistant's turn, which isn't always the tokenizer's end-of-sequence token."""
    if not tokenizer.chat_template:
        return set()
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PLACE}]
    text = _render(tokenizer, said, thinking=False, ask=False)
    behind = text.rsplit(_PLACE, 1)[-1] if text else ""
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    return set(ids) & set(tokenizer.get_added_vocab().values())


def _render(tokenizer: Any, messages: list[dict[str, str]], thinking: bool, ask: bool = True) -> str | None:
    """The template's text; None where it refuses these messages."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask,
                                             enable_thinking=thinking, date_string=_DATE)
    except TemplateError:
        return None
