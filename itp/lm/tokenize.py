"""Token ids of texts that grow line by line, for the cost of their new lines.

Prompts are states, and states grow by lines.  To tokenize whole states at every step would take longer than the answers
of a small model.  If no token crosses the start of a line, the ids of a text are the ids of its lines, one after the
other.  Whether this is true for a tokenizer is tested once, on a sample.
"""

from __future__ import annotations

import re

from itp.pretrained import bos_ids

_LINE_STARTS = re.compile(r"(?<=\n)(?=\S)")
_SAMPLE = ("Task: put a clean plate 1 in fridge.\nObservation: You see a mug 2, and a cup 10.\n  It is open:\n"
           "Action: go to cabinet 1\nObservation: nothing\n\n<CTRL>\nIf: look\nThen: You arrive at loc 12\nAction:")
_KEPT_LINES = 1 << 16


class Encoder:
    """``encode(text)`` gives the ids of a text, without the ids that the tokenizer puts before it (``start``)."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start: list[int] = bos_ids(tokenizer)
        self._known: dict[str, list[int]] = {}
        self.by_line = sum(self._encode(_LINE_STARTS.split(_SAMPLE)), []) == self._encode([_SAMPLE])[0]

    def __call__(self, text: str) -> list[int]:
        lines = _LINE_STARTS.split(text) if self.by_line else [text]
        ids = {line: self._known.get(line) for line in lines}
        missing = [line for line, found in ids.items() if found is None]
        if missing:
            new = dict(zip(missing, self._encode(missing), strict=True))
            ids.update(new)
            if len(self._known) >= _KEPT_LINES:
                self._known.clear()
            self._known.update(new)
        return [i for line in lines for i in ids[line]]

    def count(self, text: str) -> int:
        """The number of tokens of a text, with the ids that the tokenizer puts before it."""
        return len(self.start) + len(self(text))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
