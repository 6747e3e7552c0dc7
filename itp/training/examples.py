"""The input of a fine-tuning run: examples of text, as token ids with labels, and which examples are held out."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from itp.errors import UserError
from itp.lm.tokenize import Encoder, Growing
from itp.text.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
IGNORED = -100
"""The label of a token without loss: what PyTorch's cross entropy skips."""


@dataclass(frozen=True)
class Example:
    """One training sequence.

    ``segments``: (text, supervised).  A learned text is tokenized as a continuation of the text before it, so that a
    given text and a learned text never share a token.  A string in the place of ``supervised`` is learned instead of
    the text, up to the first different token.  Behind that token the sequence goes on with the text.  ``eos``: a
    supervised end-of-sequence token follows.
    ``keep_first``: the cut to ``max_seq_len`` spares the first segment.  ``group``: the examples of one group (an
    episode) are held out together.  ``image``: the file of a picture that the first segment is about; empty for none.
    """

    segments: list[Segment]
    eos: bool = True
    keep_first: bool = False
    group: str = ""
    image: str = ""


TrainingRow = dict[str, Any]
"""One training sequence: ``input_ids``, and for text ``labels`` of the same length."""


@dataclass
class Encoding:
    """Tokenized examples.  ``groups[i]``: the group that ``rows[i]`` is held out with."""

    rows: list[TrainingRow]
    groups: list[str]
    counts: dict[str, int] = field(default_factory=dict)


COUNTS = ("examples", "cut", "lost_tokens", "lost_supervised", "too_long", "unsupervised")
"""What :func:`encode` counts: all examples, those it cuts with the tokens lost, and those it leaves out."""
_TOGETHER = 256
"""Examples whose texts are tokenized in one call."""


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_len: int) -> Encoding:
    """Token ids and labels of every example, at most ``max_len`` long.

    An example that is too long loses tokens on the left, behind its first segment where that is to be kept.  It never
    loses tokens of its last supervised segment.  An example whose target leaves no room for a token before it is left
    out, and so is an example without a target.  An example of several targets may need several sequences.  Raises
    UserError for a tokenizer that can't be trained with.
    """
    encoder, eos = Encoder(tokenizer), tokenizer.eos_token_id
    encoder.check_line_breaks()
    if any(example.eos for example in examples) and eos is None:
        raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    encoding = Encoding([], [], dict.fromkeys(COUNTS, 0))
    for start in range(0, len(examples), _TOGETHER):
        together = examples[start:start + _TOGETHER]
        encoder.prepare(text for example in together for text in _texts(example))
        for number, example in enumerate(together, start):
            encoding.counts["examples"] += 1
            sequences = list(_sequences(example, encoder, eos))
            group = example.group or (f"example {number}" if len(sequences) > 1 else "")
            for sequence in sequences:
                if (fitting := _fit(sequence, max_len, encoding.counts)) is not None:
                    encoding.rows.append({"input_ids": fitting.ids, "labels": fitting.labels})
                    encoding.groups.append(group)
    return encoding


def _texts(example: Example) -> Iterator[str]:
    """The texts of an example that are tokenized: its segments, and the lines of all of them."""
    for text, learned in example.segments:
        yield text
        if isinstance(learned, str):
            yield learned
    yield "".join(text for text, _ in example.segments)


@dataclass
class _Sequence:
    """An example as tokens.  A cut never takes the first ``kept`` tokens, and the first ``spared`` only if it must."""

    ids: list[int]
    labels: list[int]
    kept: int
    spared: int

    def add(self, ids: Sequence[int], labels: Sequence[int] | None = None) -> None:
        self.ids += ids
        self.labels += [IGNORED] * len(ids) if labels is None else labels


def _sequences(example: Example, encoder: Encoder, eos: int | None) -> Iterator[_Sequence]:
    """An example as tokens: one sequence, if the prompts of all its targets have the ids of its beginnings.

    The ids before a target are those of the prompt at inference, which is tokenized as a whole.  A tokenizer that
    writes an earlier target in other tokens when text follows it needs another sequence for the next target.
    """
    first = len(encoder(example.segments[0][0])) if example.keep_first and example.segments else 0

    def new() -> _Sequence:
        sequence = _Sequence([], [], kept=len(encoder.start), spared=len(encoder.start) + first)
        sequence.add(encoder.start)
        return sequence

    sequence, so_far, is_prompt = new(), Growing(encoder), False
    for number, (text, learned) in enumerate(example.segments):
        if learned and is_prompt:  # behind another target there is no prompt
            prompt = [*encoder.start, *so_far.ids()]
            if not _begins(prompt, sequence.ids):
                yield sequence
                sequence = new()
            sequence.add(prompt[len(sequence.ids):])
        if learned:
            ids = encoder.continuation(text) if number else encoder(text)
            better = encoder.continuation(learned) if isinstance(learned, str) else ids
            sequence.add(ids, _labels(ids, better))
        is_prompt = not learned
        so_far.add(text)
    whole = [*encoder.start, *so_far.ids()] if is_prompt else sequence.ids
    if _begins(whole, sequence.ids):  # the stop token alone isn't worth another sequence
        sequence.add(whole[len(sequence.ids):])
        if example.eos:
            sequence.add([eos], [eos])
    yield sequence


def _begins(ids: list[int], beginning: list[int]) -> bool:
    return ids[:len(beginning)] == beginning


def _fit(sequence: _Sequence, max_len: int, counts: dict[str, int]) -> _Sequence | None:
    """``sequence`` cut to ``max_len`` tokens; None where it has no target or its target is too long."""
    ids, labels = sequence.ids, sequence.labels
    if all(label == IGNORED for label in labels[1:]):  # the first token is predicted from nothing
        counts["unsupervised"] += 1
        return None
    excess = len(ids) - max_len
    if excess <= 0:
        return sequence
    target = _last_target(labels)
    if excess > target - max(sequence.kept, 1):  # the first token of a target is predicted from the one before
        counts["too_long"] += 1
        return None
    start = min(sequence.spared, target - excess)
    end = start + excess
    counts["cut"] += 1
    counts["lost_tokens"] += excess
    counts["lost_supervised"] += sum(label != IGNORED for label in labels[start:end])
    return dataclasses.replace(sequence, ids=ids[:start] + ids[end:], labels=labels[:start] + labels[end:])


def _labels(ids: list[int], better: list[int]) -> list[int]:
    """The label of each token, if ``better`` is to be learned: up to the first token that differs, which is learned."""
    better = better[:len(ids)]
    shared = next((i + 1 for i, (a, b) in enumerate(zip(ids, better, strict=False)) if a != b), len(better))
    return better[:shared] + [IGNORED] * (len(ids) - shared)


def _last_target(labels: list[int]) -> int:
    """The index at which the last run of supervised tokens starts."""
    end = max(i for i, label in enumerate(labels) if label != IGNORED)
    return next((i + 1 for i in range(end, -1, -1) if labels[i] == IGNORED), 0)


def report_counts(counts: dict[str, int], max_len: int) -> None:
    if counts["cut"]:
        log.warning("%d of %d examples were longer than max_seq_len %d and lost %d tokens on the left "
                    "(%d of them supervised)", counts["cut"], counts["examples"], max_len, counts["lost_tokens"],
                    counts["lost_supervised"])
    if counts["too_long"]:
        log.warning("%d of %d examples were left out: their target leaves no room for a prompt in max_seq_len %d",
                    counts["too_long"], counts["examples"], max_len)
    if counts["unsupervised"]:
        log.warning("%d of %d examples were left out: nothing in them is supervised", counts["unsupervised"],
                    counts["examples"])


def split_off_eval(groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (train, held out): about ``share`` of them, whole groups where there are several.

    Rows of one episode repeat each other's text, so a split inside an episode would flatter the loss.  A group with
    more rows than are wanted is held out only where every group has more; then it is a smallest one.
    """
    keys = [f"group {group}" if group else f"row {i}" for i, group in enumerate(groups)]
    if len(set(keys)) == 1:
        keys = [f"row {i}" for i in range(len(groups))]
    wanted = max(1, round(share * len(keys))) if share and len(keys) > 1 else 0
    sizes = {key: 0 for key in keys}
    for key in keys:
        sizes[key] += 1
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    held: set[str] = set()
    count = 0
    for key in [key for key in order if sizes[key] <= wanted] or sorted(order, key=sizes.__getitem__)[:1]:
        if count < wanted and count + sizes[key] < len(keys):
            held.add(key)
            count += sizes[key]
    return ([i for i, key in enumerate(keys) if key not in held], [i for i, key in enumerate(keys) if key in held])
