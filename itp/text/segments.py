"""A dialogue as the segments of a training sequence, which are given or learned."""

from __future__ import annotations

import re
from collections.abc import Sequence

from itp.text.prompt_format import PLAIN, PromptTemplate
from itp.text.prompts import END
from itp.text.turns import has_loss, is_learned

_LABEL = re.compile(r"(Action|Thought|Reflection|Horizon|Helps|Observation):")
Segment = tuple[str, bool | str]
"""A text of a training sequence, and whether it is learned; a string is learned in place of the text."""


def dialogue_segments(conversations: Sequence[dict]) -> list[Segment]:
    """The segments of a dialogue of human and gpt turns, one after the other.

    A gpt turn starts with a label (``Action: ...``), which is given and not learned, because
    :func:`itp.text.prompts.policy_prompt` ends with exactly this label.  A turn that isn't to be learned
    (:mod:`itp.text.turns`) is context only; its ``correction`` is learned in its place.  The joined segments are the
    text of a growing state, so one sequence teaches all prompts of an episode.
    """
    segments: list[Segment] = []
    for turn in conversations:
        if turn["from"] == "gpt":
            label, text = _split_label(turn["value"])
            correction = turn.get("correction")
            learned: bool | str = is_learned(turn)
            if correction is not None and has_loss(turn):
                learned = _split_label(correction)[1]
            segments += [(label, False)] * bool(label) + [(text, learned)]
        else:
            segments.append((turn["value"] + END, False))
    return segments


def _split_label(value: str) -> tuple[str, str]:
    """A gpt turn as its label, which may be empty, and the text behind it."""
    label = _LABEL.match(value)
    cut = label.end() if label else 0
    return value[:cut], value[cut:] + END


def dialogue_examples(conversations: Sequence[dict], template: PromptTemplate = PLAIN) -> list[list[Segment]]:
    """Training sequences of a dialogue, each a list of segments.

    In plain text, one sequence holds the whole dialogue.  In turns of a chat, the label comes behind the user's turn,
    so every learned gpt turn has a sequence of its own.  Its user's turn is the text so far, as in the prompts of
    inference.
    """
    segments = dialogue_segments(conversations)
    if template == PLAIN:
        return [segments]
    examples: list[list[Segment]] = []
    before = ""
    for i, (text, learned) in enumerate(segments):
        if learned:
            label = segments[i - 1][0] if i and _LABEL.fullmatch(segments[i - 1][0]) else ""
            state = before.removesuffix(label).removesuffix(END)
            target = learned if isinstance(learned, str) else text
            examples.append([(f"{template.head}{state}{template.tail}{label}", False), (target, True)])
        before += text
    return examples
