"""Atomic facts of an observation, and Fact-F1: the agreement between a predicted observation and the true one.

An ALFWorld observation is a list of facts in prose: the places of things, and things that are open, closed, held, on,
hot, cool or clean.  :func:`facts` extracts them, so that two texts are compared by their facts rather than by their
words: "a mug 1, and a pen 2" and "a pen 2, and a mug 1" state the same facts.  A sentence of no known form (of another
environment, or a world model's nonsense) is one fact, and only an equal sentence matches it.
"""

from __future__ import annotations

import re

from itp.text import alfworld_phrases as phrases

Fact = tuple[str, ...]
"""A predicate and its arguments: ("in", "mug 1", "desk 2"), ("closed", "drawer 3"), ("hot", "egg 1")."""

_SENTENCE_END = re.compile(r"(?<=\.)\s+|\n+")

_FORMS: tuple[tuple[Fact, re.Pattern[str]], ...] = (
    (("at",), phrases.ARRIVED),
    (("closed",), phrases.IS_CLOSED),
    (("open",), phrases.IS_OPEN),
    (("held",), phrases.PICKED_UP),
    (("in",), phrases.MOVED),
    (("hot",), phrases.HEATED),
    (("cool",), phrases.COOLED),
    (("clean",), phrases.CLEANED),
    (("lit",), phrases.TURNED_ON),
    (("held", "nothing"), phrases.HOLDS_NOTHING),
)
"""Sentences that state one fact: the beginning of the fact, and the sentence whose names complete it."""


def facts(observation: str) -> frozenset[Fact]:
    """The facts that ``observation`` states."""
    found: set[Fact] = set()
    place = ""
    for sentence in filter(None, map(str.strip, _SENTENCE_END.split(observation))):
        if match := phrases.ABOUT_PLACE.fullmatch(sentence):
            place = match[1] or match[2]
        found |= _of_sentence(sentence, place)
    return frozenset(found)


def _of_sentence(sentence: str, place: str) -> set[Fact]:
    """The facts of one sentence, in which "it" stands for ``place``."""
    for fact, form in _FORMS:
        if match := form.fullmatch(sentence):
            return {(*fact, *filter(None, match.groups()))}
    if match := phrases.CONDITION.fullmatch(sentence):
        return {("cool" if word == "cold" else word, match[2]) for word in match[1].split() if word != "and"}
    head, sees, listing = sentence.partition(phrases.SEES)
    if sees:
        here = place if head in ("In it", f"On the {place}", f"In the {place}") else head
        return {("in", name, here) for name in phrases.LISTED.findall(listing)} or {("empty", here)}
    head, carries, listing = sentence.partition(phrases.CARRIES)
    if carries:
        return {("held", name) for name in phrases.LISTED.findall(listing)}
    return {("says", " ".join(sentence.split()))}


def fact_f1(predicted: str, true: str) -> float:
    """F1 between the facts that two observations state, in [0, 1]."""
    a, b = facts(predicted), facts(true)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
