"""What a recorded turn holds besides the environment's own words, and how it is cut off.

Published dialogues add guidelines, instructions, lists of actions and summaries to what the environment said, and some
say the task again in every turn.  None of that is in the states of evaluation.  Neither ALFWorld nor ScienceWorld says
a label or a heading of those here; a test compares with the real engines.
"""

from __future__ import annotations

import re

_WORDS = ("Guidelines?", "Hints?", "Tips?", "Notes?", "Instructions?", "Reminder", "Remember", "Summary",
          "Summari[sz]ation", "Thoughts?", "Actions?", "Reflections?", "Feedback", "Reward", "Score", "Plan", "History")
"""Labels of one word; the environment may use the word itself, but not with a capital before a colon."""
_PHRASES = (r"(?:available|admissible|valid|possible|allowed|previous|past|next) (?:actions?|commands?)",
            r"(?:action|command) (?:history|format|list)", r"(?:task|state|world|action) knowledge",
            r"(?:output|response|answer) format", r"current (?:progress|status)")
_HELP = r"Available commands:\n  look: "
"""The beginning of ALFWorld's answer to `help`, which is the environment's."""
_MARKED = "|".join(("|".join(_WORDS), rf"(?i:{'|'.join(_PHRASES).replace(' ', '[ _]')})",
                    r"(?=[A-Z _-]{4,}\W)[A-Z]+(?:[ _-][A-Z]+)*"))
_NOT_ENVIRONMENT = re.compile(rf"(?:^|(?<=\s))(?!{_HELP})[*_<\[(]*(?:#+ |(?:{_MARKED})[*_>\])]*:)")
"""The beginning of text that isn't the environment's: a heading, a label from the lists, or any label in capitals."""
_OBSERVATION_LINE = re.compile(r"^[ \t]*Observation:", re.MULTILINE)
_OBSERVATION = re.compile(r"(?:^|(?<=\s))Observation:")


def without_tail(text: str) -> str:
    """``text`` up to the first label or heading that isn't the environment's."""
    found = _NOT_ENVIRONMENT.search(text)
    return (text[:found.start()] if found else text).strip()


def without_label(text: str) -> str:
    return text.strip().removeprefix("Observation:").strip()


def observation_in(text: str) -> tuple[str, bool]:
    """(what the environment said in a turn, whether the turn held more).  It is behind the last ``Observation:``."""
    text = text.strip()
    labels = list(_OBSERVATION_LINE.finditer(text)) or list(_OBSERVATION.finditer(text))
    said = text[labels[-1].end():].strip() if labels else text
    seen = without_tail(said)
    return seen, seen != without_label(text)


class RepeatedTask:
    """Removes the task from turns that say it again."""

    def __init__(self, task: str, first: str) -> None:
        words = r"\s+".join(map(re.escape, task.split()))
        self._task = re.compile(rf"(?:(?:Task|Goal|Task Description)\s*:\s*)?{words}\.?")
        self._first = first

    def removed(self, text: str) -> tuple[str, bool]:
        """(``text`` without the task, whether it held it).  A first observation said with the task goes too."""
        left, count = self._task.subn("", text, count=1)
        left = left.strip()
        if count and self._first and left != self._first:
            left = left.removeprefix(self._first).strip()
        return left, bool(count)
