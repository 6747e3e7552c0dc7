"""Examples of one episode packed into one training sequence, which computes their common beginning once.

The prompt of a transition is the beginning of the next transition's prompt, so an episode of T steps has hardly more
tokens than its last transition, where T rows have T / 2 times as many.  The losses are those of the rows::

    Task: .. Observation: .. Action: a_0  Observation: o_1  Action: a_1  Observation: o_2
                                          ------------ EOS               ------------ EOS

The stop token behind o_1 is learned at the last token of o_1, while the text goes on with the next action.  In chat
turns the text doesn't go on like this: each answer is a branch of a tree (:mod:`itp.training.token_tree`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from itp.training.examples import IGNORED, Encoding, TrainingRow
from itp.training.token_tree import TokenTree


def pack(encoding: Encoding, most: int, max_len: int, *, branches: bool = True) -> Encoding:
    """Rows of up to ``most`` (0: any number of) examples of one group, with at most ``max_len`` tokens.

    A row has ``input_ids``, ``targets``, pairs (node, id of the token that is to follow it), and ``starts``: the
    number of targets before each of its examples.  A row that branches has its ``tree`` too; else node i is token i.
    An example joins only examples that it shares tokens with, and without ``branches`` only those that it continues.
    An example without a group, or longer than ``max_len``, has a row of its own.
    """
    packed = Encoding([], [], encoding.counts)
    for group, rows in _groups(encoding):
        for sequence in _sequences(rows, most, max_len, branches):
            packed.rows.append(sequence.row())
            packed.groups.append(group)
    return packed


def examples_of(row: TrainingRow) -> Iterator[tuple[list[int], list[int]]]:
    """The examples of a row, packed or of one prompt and its target: the ids of each."""
    if "labels" in row:
        prompt = sum(label == IGNORED for label in row["labels"])
        yield row["input_ids"][:prompt], row["labels"][prompt:]
        return
    tree, targets = row.get("tree"), row["targets"]
    for start, end in zip(row["starts"], [*row["starts"][1:], len(targets)], strict=True):
        node = targets[start][0]
        yield tree.path(node) if tree else row["input_ids"][:node + 1], [token for _, token in targets[start:end]]


def _groups(encoding: Encoding) -> Iterator[tuple[str, list[TrainingRow]]]:
    """The rows of each group, shorter ones first, so that an episode's come in its order."""
    groups: dict[str, list[TrainingRow]] = {}
    for row, group in zip(encoding.rows, encoding.groups, strict=True):
        if group:
            groups.setdefault(group, []).append(row)
        else:
            yield "", [row]
    for group, rows in groups.items():
        yield group, sorted(rows, key=lambda row: len(row["input_ids"]))


@dataclass
class _Packed:
    tree: TokenTree = field(default_factory=TokenTree)
    targets: list[tuple[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        nodes = self.tree.add(ids)
        self.starts.append(len(self.targets))
        self.targets += [(nodes[i - 1], label) for i, label in enumerate(labels) if i and label != IGNORED]

    def takes(self, ids: Sequence[int], most: int, max_len: int, branches: bool) -> bool:
        if len(self.starts) == most:
            return False
        known = self.tree.known(ids)
        continues = branches or known == len(self.tree)
        return known > 0 and continues and len(self.tree) + len(ids) - known <= max_len

    def row(self) -> TrainingRow:
        row: TrainingRow = {"input_ids": self.tree.ids, "targets": self.targets, "starts": self.starts}
        if not self.tree.is_chain:
            self.tree.close()
            row["tree"] = self.tree
        return row


def _sequences(rows: Sequence[TrainingRow], most: int, max_len: int, branches: bool) -> list[_Packed]:
    sequences: list[_Packed] = []
    for row in rows:
        last = max(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        ids = row["input_ids"][:last]  # nothing is predicted from the last target itself
        fitting = (s for s in reversed(sequences) if s.takes(ids, most, max_len, branches))
        sequence = next(fitting, None)
        if sequence is None:
            sequences.append(sequence := _Packed())
        sequence.add(ids, row["labels"])
    return sequences
