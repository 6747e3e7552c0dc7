"""What a recorded turn holds besides the environment's own words, and how it is cut off.

Published dialogues add guidelines, instructions, lists of actions and summaries to what the environment said, and some
say the task again in every turn.  None of that is in the states of evaluation.  Neither ALFWorld nor ScienceWorld says
a label or a heading of those here; a test compares with the real engines.
"""

from __future__ import annotations

import re

_WORDS = ("Guidelines?", "Hints?", "Tips?", "Notes?", "Instructions?", "Reminder", "Remember", "Summary",
          "Summari[sz]ation", "Thoughts?", "Think", "Thinking", "Actions?", "Reflections?", "Feedback", "Reward",
          "Score", "Plan", "History", "Important", "Warning", "Rules?", "Experiences?", "Insights?", "Inventory",
          "System", "Human", "User", "Assistant")
"""Labels of one word; the environment may use the word itself, but not with a capital before a colon."""
_PHRASES = (r"(?:available|admissible|valid|possible|allowed|previous|past|recent|next) "
            r"(?:actions?|commands?|objects?)",
            r"(?:action|command) (?:history|format|list)", r"(?:task|state|world|action) knowledge",
            r"(?:output|response|answer) format", r"current (?:progress|status)",
            r"(?:current|total|final) (?:score|reward)", r"(?:current|remaining) steps?", r"steps? (?:left|remaining)")
"""Labels of several words, in capitals or not; some files write them as a heading without a colon."""
_COUNTS = r"(?i:steps? \d+ ?(?:/|of) ?\d+|you have \d+ (?:more )?(?:steps?|actions?|turns?)\b)"
"""How far the episode is, as a sentence or a line."""
_LEADS = ("please", "now", "your", "the", "my", "here are", "here is", "respond", "reply", "answer", "output", "choose",
          "give", "with", "in", "as", "a", "an", "some", "useful", "new", "general", "recent", "following", "current")
"""Words before a label that go with it: `Please respond with Action: <command>`."""
_HELP = r"Available commands:\n  look: "
"""The beginning of ALFWorld's answer to `help`, which is the environment's."""
_SEVERAL = rf"(?i:{'|'.join(_PHRASES).replace(' ', '[ _]')})"
_ONE = rf"(?:{'|'.join(_WORDS)})"
_MARKED = "|".join((_ONE, _SEVERAL, r"(?=[A-Z _-]{4})[A-Z]{1,30}(?:[ _-][A-Z]{1,30}){0,5}"))
_CLOSED = r"[*_>\])=`\"]{0,4}"
_FOREIGN = "|".join((
    r"#+ |={2,} ?(?=\w)",                              # a heading
    r"</?[A-Za-z][\w -]{0,40}>",                            # a tag
    rf"\[(?:{_ONE}|{_SEVERAL})\]", _COUNTS,
    rf"(?:{_MARKED}){_CLOSED}[ \t]{{0,4}}[:：]",              # a label
    rf"{_SEVERAL}(?:[ \t](?:are|is))?{_CLOSED}[ \t]{{0,4}}(?:[:=：]|\n|\Z)",
))
_BEGIN = r"(?:(?m:^)[ \t]{0,8}(?:\d{1,2}[.)][ \t])?|(?<=\s)(?![ \t]))"
_DECORATION = r"(?:[^\w\s]|_|[ \t]){0,12}?"
"""Bullets, quotes, emoji: they go with the label behind them, and so does the number of an item of a list."""
_LEAD = rf"(?:(?i:{'|'.join(_LEADS)})[ \t]{{1,4}}){{0,6}}"
_NOT_ENVIRONMENT = re.compile(rf"{_BEGIN}(?!{_HELP}){_DECORATION}{_LEAD}(?:{_FOREIGN})")
"""The beginning of text that isn't the environment's, with the decoration and the words that lead to it."""
_SAYING_AGAIN = (r"(?:\b(?:Remember|Reminder|Recall|Note)\b[,:]?\s*(?:that\s+)?)?"
                 r"(?:\b(?:(?:The|Your|Current)\s+)*(?:Task Description|Task|Goal|Objective)\s*:\s*)?")
"""The words with which a turn begins to say the task again."""
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
        self._task = re.compile(rf"{_SAYING_AGAIN}[\"'“”]?{words}\.?[\"'“”]?", re.IGNORECASE)
        self._first = first

    def removed(self, text: str) -> tuple[str, bool]:
        """(``text`` without the task, whether it held it).  A first observation said with the task goes too."""
        left, count = self._task.subn("", text)
        left = left.strip()
        if count and self._first and left != self._first:
            left = left.removeprefix(self._first).strip()
        return left, bool(count)
