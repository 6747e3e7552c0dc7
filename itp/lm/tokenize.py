"""Token ids of texts: of a prompt, and of what comes behind it.  Training and inference both use this module.

**Continuations.**  Tokenizers of the SentencePiece kind put a space before every text that they are given (Llama-2,
Mistral).  The ids of an answer behind a prompt are therefore not the ids of the answer as a text of its own.
``Encoder.continuation`` gives the ids of a text behind another one, and ``Encoder.decode`` is its inverse.

**Texts that grow by lines.**  Prompts are states, and states grow by lines.  To tokenize whole states at every step
would take longer than the answers of a small model.  If no token crosses the start of a line, the ids of a text are the
ids of its lines, one after the other.  Whether this is true for a tokenizer is tested once, on a sample.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from itp.errors import UserError
from itp.pretrained import bos_ids

_LINE_STARTS = re.compile(r"(?<=\n)(?=\S)")
_SAMPLE = ("Task: put a clean plate 1 in fridge.\nObservation: You see a mug 2, and a cup 10.\n  It is open:\n"
           "Action: go to cabinet 1\nObservation: nothing\n\n<CTRL>\nIf: look\nThen: You arrive at loc 12\nAction:")
_CONTINUATIONS = ("Action: go to cabinet 1\n", " go to cabinet 1\n", "Observation: nothing")
_ANCHORS = ("\n", ":", "\u203b")
"""Texts to put before a continuation.  A tokenizer may know tokens that begin with a line break or a colon, but hardly
one that begins with the last, a reference mark."""
_KEPT_LINES = 1 << 16


class Encoder:
    """``encode(text)`` gives the ids of a text, without the ids that the tokenizer puts before it (``start``)."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start: list[int] = bos_ids(tokenizer)
        self._known: dict[tuple[str, bool], list[int]] = {}
        self._anchors = [] if self._is_same_everywhere() else [(a, ids) for a, ids in zip(
            _ANCHORS, self._encode(_ANCHORS), strict=True) if ids]
        lines = _LINE_STARTS.split(_SAMPLE)
        self.by_line = sum(self._ids(lines, begins=True), []) == self._encode([_SAMPLE])[0]
        self._before_decoded, self._cut = self._context_of_decoding()

    def __call__(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(self._ids(self.parts(text), begins=True)))

    def continuation(self, text: str) -> list[int]:
        """The ids of a text behind another one.  Raises UserError where the tokenizer gives it none of its own."""
        return list(itertools.chain.from_iterable(self._ids(self.parts(text), begins=False)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a continuation, without special tokens."""
        return self.tokenizer.decode([*self._before_decoded, *ids], skip_special_tokens=True)[self._cut:]

    def count(self, text: str) -> int:
        """The number of tokens of a text, with the ids that the tokenizer puts before it."""
        return len(self.start) + len(self(text))

    def parts(self, text: str) -> list[str]:
        """The parts of a text whose ids, one after the other, are those of the text.  Only the last can still grow."""
        return _LINE_STARTS.split(text) if self.by_line else [text]

    def prepare(self, texts: Iterable[str]) -> None:
        """Tokenize the lines of many texts in one call."""
        if self.by_line:
            self._ids(list(dict.fromkeys(part for text in texts for part in self.parts(text))), begins=False)

    def check_line_breaks(self) -> None:
        """Raises UserError for a tokenizer that can't write the end of an answer of one line."""
        if "\n" not in self.decode(self.continuation(" look\n")):
            raise UserError(f"{self.tokenizer.name_or_path}: its tokenizer writes no line break, so a model can't end "
                            "an action; choose a model whose tokenizer keeps line breaks")

    def _ids(self, parts: Sequence[str], begins: bool) -> list[list[int]]:
        """The ids of each part; ``begins``: the first is the beginning of a text."""
        # To a tokenizer that puts nothing before a text, a beginning is like any other part.
        keys = [(part, begins and i == 0 and bool(self._anchors)) for i, part in enumerate(parts)]
        ids = {key: self._known.get(key) for key in keys}
        missing = [key for key, found in ids.items() if found is None]
        if missing:
            new = dict(zip(missing, self._tokenized(missing), strict=True))
            ids.update(new)
            if len(self._known) >= _KEPT_LINES:
                self._known.clear()
            self._known.update(new)
        return [ids[key] for key in keys]

    def _tokenized(self, keys: Sequence[tuple[str, bool]]) -> list[list[int]]:
        behind = [(text, begins) for text, begins in keys if text and not begins and self._anchors]
        alone = [key for key in keys if key not in set(behind)]
        found = dict(zip(behind, self._encode_behind([text for text, _ in behind]), strict=True))
        found |= zip(alone, self._encode([text for text, _ in alone]), strict=True)
        return [found[key] for key in keys]

    def _encode_behind(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text behind the first anchor with which it shares no token."""
        found: dict[str, list[int]] = {}
        for anchor, start in self._anchors:
            left = [text for text in texts if text not in found]
            for text, ids in zip(left, self._encode([anchor + text for text in left]), strict=True):
                if ids[:len(start)] == start and len(ids) > len(start):
                    found[text] = ids[len(start):]
        if lost := next((text for text in texts if text not in found), None):
            raise UserError(f"{self.tokenizer.name_or_path}: its tokenizer has no tokens for {lost[:40]!r} behind a "
                            "prompt, so training wouldn't see what is prompted; choose a model with another tokenizer")
        return [found[text] for text in texts]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _is_same_everywhere(self) -> bool:
        """Whether a continuation has the ids that it has as a text of its own."""
        alone = self._encode(_CONTINUATIONS)

        def same_behind(anchor: str) -> bool:
            start, *joined = self._encode([anchor, *(anchor + text for text in _CONTINUATIONS)])
            return joined == [start + ids for ids in alone]

        return any(map(same_behind, _ANCHORS))

    def _context_of_decoding(self) -> tuple[list[int], int]:
        """Ids to decode before a continuation, and the length of their text; none where they make no difference.

        Tokenizers that put a space before every text take it away when they decode.
        """
        text = " look"
        if self._anchors and self.tokenizer.decode(ids := self.continuation(text)) != text:
            for before in map(self, ("a", *_ANCHORS)):
                shown = self.tokenizer.decode(before, skip_special_tokens=True)
                if shown and self.tokenizer.decode([*before, *ids], skip_special_tokens=True) == shown + text:
                    return before, len(shown)
        return [], 0


class Growing:
    """The ids of a text that grows, for the cost of what is new."""

    def __init__(self, encode: Encoder) -> None:
        self._encode = encode
        self._closed: list[int] = []
        self._open, self._begins = "", True

    def add(self, text: str) -> None:
        self._open += text

    def ids(self) -> list[int]:
        """The ids of the text so far: those of ``Encoder.__call__``."""
        *closed, last = self._encode.parts(self._open)
        ids = self._encode._ids([*closed, last], self._begins)
        if closed:
            self._closed += itertools.chain.from_iterable(ids[:-1])
            self._open, self._begins = last, False
        return [*self._closed, *ids[-1]]
