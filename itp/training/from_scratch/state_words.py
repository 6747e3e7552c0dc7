"""Symbolic states as few tokens: what ``word_tokenizer`` adds for a world model with the modes [PER] and [PRE].

A state is JSON, most of which says the same in every state.  A receptacle with all that stands before its contents
(``"cabinet 1": {"visited": true, "open": "N/A", "objects": [``) is one token, and so is the head of an object list
(``"cabinet 1": [``).  The signs between objects, and between receptacles, are dropped on the way in and put back on
the way out.  So a small model finds the receptacle again in what earlier trials showed, and what it copies stands
directly behind it.  A state survives the round trip; observations don't, which such a model reads and never writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from itp.text.prompts import PERCEIVE, PREDICT

MARKS = (PERCEIVE, PREDICT)
OPEN = ("true", "false", '"N/A"')
HEADS = tuple(f'{{"visited": {visited}, "open": {opened}, "objects": [' for visited, opened in
              itertools.product(("true", "false"), OPEN))
"""What stands between a receptacle's name and its objects."""
LIST = "["
"""The same in an object list."""
CONDITIONS = ("(hot)", "(cool)", "(clean)", "(on)")
PHRASES = ('{"agent_location": "', '", "inventory": null, "world_state": {', '", "inventory": "', '", "world_state": {',
           "]}}}", ']}], ["', *CONDITIONS, *MARKS, "middle of the room", "Seen in earlier trials:",
           "Failed in earlier trials:", "State:", "Seen:", "Success:")
_CONDITION = r"\((?:hot|cool|clean|on)\)"
_KEY = r'"[a-z]+ \d+": \{"v'
DROPPED = (
    (rf'"?\]\}}, (?={_KEY})', " "),  # between receptacles
    (r'"?\]\}\}\}', " ]}}} "), (r'"?\]\}\], \["', ' ]}], [" '),
    (r'(?<=\[)"(?=[a-z])', " "),  # before the first object
    (r'(?<=[a-z\d)])", "(?!inventory|world_state)(?=[a-z])', " "),  # between objects
    (r'"\](?=[,}])', " ] "), (r'", (?=\{)', " "), (r'", null, (?=\{)', " null "),
)
"""(pattern, what it becomes): the signs that are dropped."""
PUT_BACK = (
    (rf" (?={_CONDITION})", ""),
    (r'(?<="objects": \[) (?=[a-z])', '"'),
    (r"(?<=[\d)]) (?=[a-z]+ \d)", '", "'),
    (rf"(?<=[\d)]) (?={_KEY})", '"]}, '), (rf"(?<=\[) (?={_KEY})", "]}, "),
    (r"(?<=[\d)]) (?=\]\}\}\})", '"'), (r"(?<=\[) (?=\]\}\}\})", ""),
    (r'(?<="agent_location": ") ', ""), (r'(?<="inventory": ") ', ""), (r'(?<="world_state": \{) ', ""),
    (r' (?=", "(?:inventory|world_state)")', ""),
)


def heads(places: Mapping[str, bool], counts: Mapping[str, int]) -> Iterator[str]:
    """All heads.  ``places``: their types, and whether they can be closed.

    ``counts``: one more than the highest number of each type.
    """
    for name, opens in places.items():
        for number, head in itertools.product(range(1, counts[name]), (LIST, *HEADS)):
            if opens or head == LIST or OPEN[2] in head:
                yield f'"{name} {number}": {head}'
