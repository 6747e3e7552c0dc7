"""What a run of the fine-tuning core is given: examples of text, as token ids with labels, and which are held out."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from itp.runtime import UserError, bos_ids
from itp.text.prompts import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("itp.finetune")
IGNORED = -100
"""The label of a token without loss: what PyTorch's cross entropy skips."""


@dataclass(frozen=True)
class Example:
    """One training sequence.

    ``segments``: (text, supervised), tokenised each on its own, so that what is given and what is
    learned never share a token.  What is to be learned in the place of a text is learned up to where the two
    part: behind it the sequence goes on with the text.  ``eos``: an end-of-sequence token follows, supervised.
    ``keep_first``: the cut to ``max_seq_len`` spares the first segment.  ``group``: examples of one
    group (an episode) are held out together.
    """

    segments: list[Segment]
    eos: bool = True
    keep_first: bool = False
    group: str = ""


Row = dict[str, Any]
"""One training sequence: ``input_ids``, and for text ``labels`` of the same length."""


@dataclass
class Encoding:
    """Tokenised examples.  ``groups[i]``: what ``rows[i]`` is held out together with."""

    rows: list[Row]
    groups: list[str]
    counts: dict[str, int] = field(default_factory=dict)


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_len: int) -> Encoding:
    """Token ids and labels of every example, at most ``max_len`` long.

    What is too long loses tokens on the left, after a first segment that is to be kept, but never of
    its last supervised segment.  An example whose target alone is too long is left out.  ``counts``
    says how often each happened.
    """
    texts = list(dict.fromkeys(text for example in examples for segment in example.segments for text in segment
                               if isinstance(text, str)))
    ids_of = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)) if texts else {}
    bos = bos_ids(tokenizer)
    if any(example.eos for example in examples) and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    encoding = Encoding([], [], dict.fromkeys(("examples", "cut", "lost_tokens", "lost_supervised", "too_long",
                                               "unsupervised"), 0))
    counts = encoding.counts
    for example in examples:
        counts["examples"] += 1
        parts = [(ids_of[text], _labels(ids_of, text, learned)) for text, learned in example.segments]
        if example.eos:
            parts.append(([tokenizer.eos_token_id], [tokenizer.eos_token_id]))
        ids = bos + [i for part, _ in parts for i in part]
        labels = [IGNORED] * len(bos) + [label for _, part in parts for label in part]
        if all(label == IGNORED for label in labels[1:]):  # the first token is predicted from nothing
            counts["unsupervised"] += 1
            continue
        if (excess := len(ids) - max_len) > 0:
            target = _last_target(labels)
            head = len(bos) + (len(parts[0][0]) if example.keep_first else 0)
            if excess > target - len(bos):
                counts["too_long"] += 1
                continue
            start = min(head, target - excess)
            lost = labels[start:start + excess]
            counts["cut"] += 1
            counts["lost_tokens"] += excess
            counts["lost_supervised"] += sum(label != IGNORED for label in lost)
            ids, labels = ids[:start] + ids[start + excess:], labels[:start] + labels[start + excess:]
        encoding.rows.append({"input_ids": ids, "labels": labels})
        encoding.groups.append(example.group)
    return encoding


def _labels(ids_of: dict[str, list[int]], text: str, learned: bool | str) -> list[int]:
    """What is to be predicted at each token of a text."""
    ids = ids_of[text]
    if not isinstance(learned, str):
        return list(ids) if learned else [IGNORED] * len(ids)
    better = ids_of[learned][:len(ids)]
    parted = next((i + 1 for i, (a, b) in enumerate(zip(ids, better, strict=False)) if a != b), len(better))
    return better[:parted] + [IGNORED] * (len(ids) - parted)


def _last_target(labels: list[int]) -> int:
    """Where the last run of supervised tokens starts."""
    end = max(i for i, label in enumerate(labels) if label != IGNORED)
    return next((i + 1 for i in range(end, -1, -1) if labels[i] == IGNORED), 0)


def report_counts(counts: dict[str, int], max_len: int) -> None:
    if counts["cut"]:
        log.warning("%d of %d examples were longer than max_seq_len %d and lost %d tokens on the left "
                    "(%d of them supervised)", counts["cut"], counts["examples"], max_len, counts["lost_tokens"],
                    counts["lost_supervised"])
    if counts["too_long"]:
        log.warning("%d of %d examples were left out: their target alone is longer than max_seq_len %d",
                    counts["too_long"], counts["examples"], max_len)
    if counts["unsupervised"]:
        log.warning("%d of %d examples were left out: nothing in them is supervised", counts["unsupervised"],
                    counts["examples"])


def hold_out(groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (train, held out): about ``share`` of them, whole groups where there are several.

    Rows of one episode repeat each other's text, so a split inside an episode would flatter the loss.
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
    for key in order:
        if count < wanted and count + sizes[key] < len(keys):
            held.add(key)
            count += sizes[key]
    return ([i for i, key in enumerate(keys) if key not in held], [i for i, key in enumerate(keys) if key in held])
