r"""Sequences that share beginnings, as one row of a batch: what they share is computed once.

The states of an episode grow out of one another, and a prompt is a state with something appended, so the
prompts of a whole episode are hardly longer together than its last one::

    s_0 -- Action: a_0 -- s_1 -- If: .. -- Action: a_1   a node is a token, a sequence a path from a root;
     \-- <CTRL>            |\-- <CTRL>                   a token sees its ancestors and itself, and stands
                            \-- ...                      at its depth, as it would alone

Logits at a node are therefore those that its sequence would have alone, whatever else is in the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class TokenTree:
    """Nodes in the order in which they came; ``ids[j]``, ``positions[j]`` (depth) and ``parents[j]`` (-1: root)."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    @classmethod
    def of(cls, ids: Sequence[int]) -> TokenTree:
        """The tree of one sequence."""
        tree = cls()
        tree.add(ids)
        return tree

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int]) -> list[int]:
        """The nodes of a sequence; those of its longest known beginning are there already."""
        node, path = -1, []
        for depth, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                child = self._children[node, token] = len(self.ids)
                self.ids.append(token)
                self.positions.append(depth)
                self.parents.append(node)
            node = child
            path.append(node)
        return path

    def known(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of ``ids`` have nodes."""
        node = -1
        for depth, token in enumerate(ids):
            node = self._children.get((node, token), -2)
            if node == -2:
                return depth
        return len(ids)

    def new(self, *sequences: Sequence[int]) -> int:
        """How many nodes ``sequences`` would add, one after the other; they often share beginnings."""
        return sum(len(ids) - max(self.known(ids), *(_shared(ids, before) for before in sequences[:i]), 0)
                   for i, ids in enumerate(sequences))

    def path(self, node: int) -> list[int]:
        """The ids from the root to ``node``."""
        ids = []
        while node >= 0:
            ids.append(self.ids[node])
            node = self.parents[node]
        return ids[::-1]

    def close(self) -> None:
        """Free what finds known beginnings: no sequence comes any more."""
        self._children.clear()

    @property
    def is_chain(self) -> bool:
        """Whether it is one plain sequence."""
        return self.positions == list(range(len(self.ids)))

    def visible(self) -> torch.Tensor:
        """(T, T) bool: row j is True at j and at its ancestors."""
        import torch

        seen = torch.eye(len(self.ids), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def batch(trees: Sequence[TokenTree], pad_id: int, *, width: int = 0, left: bool = False,
          plain: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids (B, T), additive float mask (B, 1, T, T), position_ids (B, T); padded on the right, or ``left``.

    ``width``: T, if not the size of the largest tree.  ``plain``: trees that are all chains; the mask is then
    the usual (B, T), 1 where a token is.  A padding token sees itself, because a softmax over nothing would be
    NaN; nothing else sees it.
    """
    import torch

    width = width or max(map(len, trees))
    ids = torch.full((len(trees), width), pad_id)
    positions = torch.zeros((len(trees), width), dtype=torch.long)
    there = torch.zeros((len(trees), width), dtype=torch.long)
    slots = [slice(width - len(tree), width) if left else slice(len(tree)) for tree in trees]
    for i, (tree, slot) in enumerate(zip(trees, slots, strict=True)):
        ids[i, slot] = torch.tensor(tree.ids)
        positions[i, slot] = torch.tensor(tree.positions)
        there[i, slot] = 1
    if plain:
        return ids, there, positions
    seen = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for i, (tree, slot) in enumerate(zip(trees, slots, strict=True)):
        seen[i, slot, slot] = tree.visible()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return ids, mask[:, None], positions
