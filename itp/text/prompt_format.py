"""The form in which a model is prompted: what stands around the text of a prompt.

A :class:`PromptTemplate` is what a chat template puts before and behind the text; plain text is the template with
nothing before and a line break behind.  A :class:`PromptFormat` is all that :mod:`itp.text.prompts` needs to know of a
model: its style, its environment, its template, and whether its prompts hold the control token.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("tuned", "instruct")
"""``tuned``: trained by this project, prompted with the bare state.  ``instruct``: from elsewhere, prompted with an
instruction before the state."""


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around a prompt's text: ``head`` before it, ``tail`` between it and the label.

    ``thinks``: the model thinks before it answers, so its own turn doesn't begin with a label.
    """

    head: str = ""
    tail: str = "\n"
    thinks: bool = False

    def before_reply(self, label: str) -> str:
        """What stands between the prompt's text and the model's reply."""
        return self.tail if self.thinks else f"{self.tail}{label}:"


PLAIN = PromptTemplate()
"""Plain text: the label on the next line."""


@dataclass(frozen=True)
class PromptFormat:
    """How a model is prompted.  ``style`` is one of STYLES.

    ``control_token``: the policy has heads, which read K_t and V(s_t) at the control token of its prompts.
    """

    style: str = "tuned"
    env: str = "alfworld"
    template: PromptTemplate = PLAIN
    control_token: bool = False


TUNED = PromptFormat()
"""The format of a model that this project trained on plain text of ALFWorld."""
