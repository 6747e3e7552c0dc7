"""The format of a model's prompts: the parts around the text of a prompt.

A :class:`PromptTemplate` holds the parts that a chat template puts before and behind the text.  In plain text there is
nothing before it and a line break behind it.  A :class:`PromptFormat` is all that :mod:`itp.text.prompts` must know
about a model: its style, its environment, its template, and whether it has heads.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("tuned", "instruct")
"""``tuned``: a model that this project trained; its prompt is the bare state.  ``instruct``: any other model; its
prompt has an instruction before the state."""


@dataclass(frozen=True)
class PromptTemplate:
    """The parts around a prompt's text: ``head`` before it, and ``tail`` between it and the label.

    ``thinks``: the model thinks before it answers, so its turn doesn't begin with a label.
    """

    head: str = ""
    tail: str = "\n"
    thinks: bool = False

    def before_reply(self, label: str) -> str:
        """The part between the prompt's text and the model's reply."""
        return self.tail if self.thinks else f"{self.tail}{label}:"


PLAIN = PromptTemplate()
"""Plain text: the label on the next line."""


@dataclass(frozen=True)
class PromptFormat:
    """The format of a model's prompts.  ``style`` is one of STYLES.

    ``control_token``: the policy has heads, which give K_t and V(s_t) at a control token behind the state.
    """

    style: str = "tuned"
    env: str = "alfworld"
    template: PromptTemplate = PLAIN
    control_token: bool = False


TUNED = PromptFormat()
"""The format of a model that this project trained on plain text of ALFWorld."""
