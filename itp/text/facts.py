"""Atomic facts of an observation, and Fact-F1: how much of what is true a predicted observation says.

An ALFWorld observation is a list of facts in prose: what is where, what is open or closed, held, on, hot,
cool or clean.  :func:`facts` reads them out, so that two texts are compared by what they say rather than by
their words: "a mug 1, and a pen 2" and "a pen 2, and a mug 1" say the same.  A sentence of no known form
(other environments, a world model's nonsense) is one fact, to be met to the letter.
"""

from __future__ import annotations

import re

Fact = tuple[str, ...]
"""A predicate and its arguments: ("in", "mug 1", "desk 2"), ("closed", "drawer 3"), ("hot", "egg 1")."""

_NAME = r"[a-z]+ \d+"
_LISTED = re.compile(rf"\ba ({_NAME})")
_SENTENCE_END = re.compile(r"(?<=\.)\s+|\n+")
_PLACE = re.compile(rf"(?:On|In) the ({_NAME}), you see .*|(?:The )?({_NAME}) is open\.")

_FORMS: tuple[tuple[Fact, re.Pattern[str]], ...] = tuple(
    (fact, re.compile(form.replace("NAME", f"({_NAME})"))) for fact, form in (
        (("at",), r"You (?:arrive at|are facing) (?:the )?NAME\."),
        (("closed",), r"The NAME is closed\.|You close the NAME\."),
        (("open",), r"The NAME is open\.|You open the NAME\."),
        (("held",), r"You pick up the NAME from the .*\."),
        (("in",), r"You (?:move|put) the NAME (?:to|in/on|in|on) the NAME\."),
        (("hot",), r"You heat the NAME using the .*\."),
        (("cool",), r"You cool the NAME using the .*\."),
        (("clean",), r"You clean the NAME using the .*\."),
        (("lit",), r"You turn on the NAME\."),
        (("held", "nothing"), r"You are not carrying anything\."),
    ))
"""Sentences that state one fact: what it begins with, and the form whose names are the rest of it."""


_CONDITION = re.compile(rf"This is a ([a-z ]+) ({_NAME})\.")
"""The answer to examining an object: ``This is a cool and clean mug 1.``"""


def facts(observation: str) -> frozenset[Fact]:
    """What ``observation`` says."""
    found: set[Fact] = set()
    place = ""
    for sentence in filter(None, map(str.strip, _SENTENCE_END.split(observation))):
        if match := _PLACE.fullmatch(sentence):
            place = match[1] or match[2]
        found |= _of_sentence(sentence, place)
    return frozenset(found)


def _of_sentence(sentence: str, place: str) -> set[Fact]:
    """The facts of one sentence; ``place`` is what "it" is."""
    for fact, form in _FORMS:
        if match := form.fullmatch(sentence):
            return {(*fact, *filter(None, match.groups()))}
    if match := _CONDITION.fullmatch(sentence):
        return {("cool" if word == "cold" else word, match[2]) for word in match[1].split() if word != "and"}
    head, sees, listing = sentence.partition(", you see ")
    if sees:
        here = place if head in ("In it", f"On the {place}", f"In the {place}") else head
        return {("in", name, here) for name in _LISTED.findall(listing)} or {("empty", here)}
    head, carries, listing = sentence.partition("You are carrying:")
    if carries:
        return {("held", name) for name in _LISTED.findall(listing)}
    return {("says", " ".join(sentence.split()))}


def fact_f1(predicted: str, true: str) -> float:
    """F1 between the facts that two observations state, in [0, 1]."""
    a, b = facts(predicted), facts(true)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
