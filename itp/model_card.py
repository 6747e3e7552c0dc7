"""How a model is prompted, on record beside its weights: read and written here, and nowhere else.

A model that was trained here has ``itp_model.json`` in its folder: a :class:`ModelCard`.  A model from elsewhere has
none; it is prompted by its tokenizer's chat template (:func:`format_for`).  Programs that prompt a policy have
:class:`PromptFlags`, which by default say "as the policy was trained"; :func:`resolve` fills them in from the card.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from itp.chat_template import template_of
from itp.config import flag
from itp.errors import UserError
from itp.files import Fields, checked_object, read_object, write_json
from itp.pretrained import model_folder
from itp.text.prompt_format import PLAIN, STYLES, PromptFormat, PromptTemplate
from itp.text.prompts import FORESIGHT_FORMATS, INSTRUCTION, WORLD_INSTRUCTION

MODEL_CARD = "itp_model.json"
"""The card's name in a model folder, beside ``config.json``."""

OWN_PROMPT = "own"
"""``control_prompt``: the control token stands in a prompt of its own.  A card without it is of an older policy, whose
actions were prompted behind the token."""

COPY_AGAIN = "copy the whole model folder again"
_NUMBER = (int, type(None))
CARD_FIELDS: Fields = {"prompt_style": str, "turns": dict, "control": bool, "control_prompt": str,
                       "foresight_format": (str, type(None)), "history_keep_steps": _NUMBER,
                       "max_seq_len": _NUMBER, "warning": str, "update": _NUMBER, "predicts": str}
PREDICTS = ("observation", "state")

S = TypeVar("S")


@dataclass(frozen=True)
class ModelCard:
    """What training records of a model's prompts.  None: not on record.

    ``style``, ``template``, ``control_token``: see :class:`itp.text.prompt_format.PromptFormat`.
    ``foresight_format``: what of an imagined trajectory the policy reads (FORESIGHT_FORMATS).
    ``history_keep_steps``: how many of the last steps its prompts hold (0: all).
    ``max_seq_len``: the token budget that its prompts were cut to (:mod:`itp.agent.prompt_budget`).
    ``warning``: a caveat for users of the model.  ``update``: the stage-3 update that produced the model.
    ``predicts``: what a world model answers with, of PREDICTS: the next observation, or the next symbolic state
    (:mod:`itp.agent.state_model`).
    """

    style: str = "tuned"
    template: PromptTemplate = PLAIN
    control_token: bool = False
    foresight_format: str | None = None
    history_keep_steps: int | None = None
    max_seq_len: int | None = None
    warning: str = ""
    update: int | None = None
    predicts: str = PREDICTS[0]

    @classmethod
    def read(cls, path: str | Path) -> ModelCard | None:
        """The card of the model at ``path`` (a folder or hub name); None where training here left none."""
        file = model_folder(path) / MODEL_CARD if path else None
        if file is None or not file.is_file():
            return None
        values = read_object(file, advice=COPY_AGAIN)
        checked_object(values, str(file), {name: CARD_FIELDS[name] for name in values if name in CARD_FIELDS},
                       COPY_AGAIN)
        _check_values(values, file)
        template = PLAIN
        if "turns" in values:
            turns = checked_object(values["turns"], f"{file}: turns", {"head": str, "tail": str}, COPY_AGAIN)
            template = PromptTemplate(turns["head"], turns["tail"])
        return cls(values.get("prompt_style", "instruct"), template, values.get("control", False),
                   values.get("foresight_format"), values.get("history_keep_steps"), values.get("max_seq_len"),
                   values.get("warning", ""), values.get("update"), values.get("predicts", PREDICTS[0]))

    def write(self, folder: str | Path) -> None:
        """Write the card into a model folder.  What isn't on record has no key."""
        values: dict[str, Any] = {"prompt_style": self.style}
        if self.template != PLAIN:
            values["turns"] = {"head": self.template.head, "tail": self.template.tail}
        if self.control_token:
            values |= {"control": True, "control_prompt": OWN_PROMPT}
        for name in ("foresight_format", "history_keep_steps", "max_seq_len", "update"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        if self.warning:
            values["warning"] = self.warning
        if self.predicts != PREDICTS[0]:
            values["predicts"] = self.predicts
        write_json(Path(folder) / MODEL_CARD, values)

    def with_format(self, form: PromptFormat) -> ModelCard:
        """The same card for prompts in ``form``."""
        return dataclasses.replace(self, style=form.style, template=form.template, control_token=form.control_token)


def _check_values(values: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a value that means nothing: a model would silently be prompted in another way."""
    for name, known in (("prompt_style", STYLES), ("foresight_format", FORESIGHT_FORMATS), ("predicts", PREDICTS)):
        if values.get(name) is not None and values[name] not in known:
            raise UserError(f"{file}: field {name!r} is {values[name][:40]!r}, not {' or '.join(known)}; {COPY_AGAIN}")
    if values.get("control") and values.get("control_prompt") != OWN_PROMPT:
        raise UserError(f"{file}: this policy learned to act with <CTRL> in its prompt, where it no longer stands; run "
                        "stage 2 again on its base policy (train_adaptive_k sft)")
    for name, kind in CARD_FIELDS.items():
        if kind is _NUMBER and (values.get(name) or 0) < 0:
            raise UserError(f"{file}: field {name!r} is {values[name]}; {COPY_AGAIN}")


def predicts_states(path: str | Path) -> bool:
    """Whether the model at ``path`` is a world model on symbolic states."""
    card = ModelCard.read(path)
    return card is not None and card.predicts == "state"


def card_digest(path: str | Path) -> str:
    """Tells cards apart, whatever their folders are called; empty where there is none."""
    card = ModelCard.read(path)
    return "" if card is None else hashlib.sha256(repr(card).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- the format of a model's prompts


def style_of(path: str | Path) -> str:
    """How a model is prompted: ``tuned`` if it was trained here, ``instruct`` if it comes from elsewhere."""
    card = ModelCard.read(path)
    return "instruct" if card is None else card.style


def trained_format(path: str | Path, style: str = "auto", env: str = "alfworld") -> PromptFormat | None:
    """The format that training recorded of the model at ``path``; None for one that is to be prompted otherwise.

    ``style``: the style to prompt it in, whatever its card says (auto: the card's).
    """
    card = ModelCard.read(path)
    style = style_of(path) if style == "auto" else style
    if style != "tuned" and (card is None or style != card.style):
        return None
    return PromptFormat(style, env, PLAIN if card is None else card.template)


def format_for(path: str | Path, tokenizer: Any = None, *, role: str = "policy", env: str = "alfworld",
               style: str = "auto", chat: bool = True, thinking: bool = False) -> PromptFormat:
    """The format for the model at ``path``: as training recorded it, else that of a chat model in ``env``.

    ``tokenizer``: None for a server that applies its own chat template.  ``chat`` False: plain text for models from
    elsewhere too.  Raises UserError where a model is to think that isn't prompted by a chat template.
    """
    if (trained := trained_format(path, style, env)) is not None:
        return trained
    style = style_of(path) if style == "auto" else style
    if not chat or tokenizer is None or not tokenizer.chat_template:
        if thinking:
            raise UserError(f"--thinking: {path} isn't prompted by a chat template, so it can't think before it "
                            "answers; leave the flag out")
        return PromptFormat(style, env)
    instruction = INSTRUCTION if role == "policy" else WORLD_INSTRUCTION
    return PromptFormat(style, env, template_of(tokenizer, instruction[env], thinking))


# ---------------------------------------------------------------- flags that default to the card


AS_TRAINED = {"foresight_format": "auto", "history_keep_steps": -1, "max_seq_len": -1}
"""The defaults of the PromptFlags: as the policy was trained."""

NOTHING_ON_RECORD = {"foresight_format": "full", "history_keep_steps": 0, "max_seq_len": 0}
"""What holds for a policy of which nothing is on record: all of the history, in as many tokens as its context holds."""

AS_RELEASED = NOTHING_ON_RECORD | {"max_seq_len": 1536}
"""The same in the three stages, which have the token budget of the authors' release."""


@dataclass
class PromptFlags:
    """What a policy's prompt holds of the past and of the imagined future, and how many tokens it may have."""

    foresight_format: str = flag("auto", choices=("auto", *FORESIGHT_FORMATS),
                                 help="what of the imagined trajectory the policy reads: every step (full), or the "
                                      "last observation (auto: as it was trained, else full)")
    history_keep_steps: int = flag(-1, at_least=0, help="steps of history in a prompt (0: all; -1: as the policy was "
                                                        "trained, else all)")
    max_seq_len: int = flag(-1, at_least=0, help="tokens of a prompt and its answer; where a prompt has more, its "
                                                 "oldest steps are left out (-1: as the policy was trained; 0, and "
                                                 "where that isn't on record: as many as the model's context holds)")


def prompt_settings(settings: PromptFlags) -> dict[str, Any]:
    """The three settings by name, as they go on record."""
    return {name: getattr(settings, name) for name in AS_TRAINED}


def recorded_settings(path: str | Path) -> dict[str, Any]:
    """Those of the PromptFlags that the card of the model at ``path`` records."""
    card = ModelCard.read(path)
    return {} if card is None else {name: value for name in AS_TRAINED if (value := getattr(card, name)) is not None}


def fill_in(given: Mapping[str, Any], recorded: Mapping[str, Any], whose: str,
            unknown: Mapping[str, Any] = NOTHING_ON_RECORD) -> dict[str, Any]:
    """The PromptFlags ``given``, the unset ones from ``recorded``, or from ``unknown`` where the record has no value.

    Raises UserError if a flag contradicts the record.  A different ``max_seq_len`` is allowed.  ``whose`` names the
    record in the error.
    """
    for name in ("foresight_format", "history_keep_steps"):
        if given[name] != AS_TRAINED[name] and recorded.get(name, given[name]) != given[name]:
            raise UserError(f"--{name} {given[name]}, but {whose} was made with {recorded[name]}; leave the flag out")
    return {name: recorded.get(name, unknown[name]) if value == AS_TRAINED[name] else value
            for name, value in given.items()}


def resolve(settings: S, recorded: Mapping[str, Any], whose: str, unknown: Mapping[str, Any] = NOTHING_ON_RECORD) -> S:
    """``settings`` with their PromptFlags filled in (:func:`fill_in`)."""
    return dataclasses.replace(settings, **fill_in(prompt_settings(settings), recorded, whose, unknown))


def resolve_by_card(settings: S, path: str, unknown: Mapping[str, Any] = NOTHING_ON_RECORD) -> S:
    """:func:`resolve` by the card of the policy at ``path``."""
    return resolve(settings, recorded_settings(path), path, unknown)
