"""Keys and values: rows computed side by side in one block of memory, and rows remembered for later.

Row i of a :class:`KVBatch` has its tokens in columns 0 .. n_i - 1, and new tokens are written behind them in place.  So
a row grows without a copy, and when rows end, only single other rows move into their places.  An attention mask of
shape (B, 1, S, T) and explicit positions make every row attend to exactly the tokens that it would attend to alone.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from itp.lm.decode_graph import COLUMNS, FIRST_STEPS, DecodeGraph

log = logging.getLogger(__name__)
KVSegment = torch.Tensor
"""Keys and values of some consecutive tokens: (layers, 2, heads, tokens, head size)."""

KV = tuple[KVSegment, ...]
"""Keys and values of a row, oldest tokens first.  Rows with a common beginning can share its segments."""

MAX_SEGMENTS = 8
"""A row with more segments is copied into one, because many small copies cost more than one large copy."""


def tokens_of(kv: KV) -> int:
    return sum(segment.shape[-2] for segment in kv)


def beginning(kv: KV, tokens: int) -> KV:
    """The first ``tokens`` tokens, without copying."""
    kept: list[KVSegment] = []
    for segment in kv:
        if tokens > 0:
            kept.append(segment[..., :tokens, :])
        tokens -= segment.shape[-2]
    return tuple(kept)


class PrefixCache:
    """Keys and values of recent rows, found by the longest prefix they share with a new one.

    A row is registered under a hash of each of its beginnings of 16, 32, ... tokens.  A later row with the same
    beginning takes over the entry.  The least recently used rows are dropped first.

    ``bytes`` counts memory.  A tensor that several rows share counts once, and it counts in full as long as one row
    needs a part of it.
    """

    BLOCK = 16

    def __init__(self, max_bytes: int) -> None:
        self._rows: OrderedDict[tuple[int, ...], tuple[KV, list[int]]] = OrderedDict()
        """Rows by their ids: KV, and the hashes under which the row is registered."""
        self._owner: dict[int, tuple[int, ...]] = {}
        self._uses: Counter[int] = Counter()
        """The number of segments in rows, by the address of their memory."""
        self.max_bytes = max_bytes
        self.bytes = 0

    def longest(self, ids: tuple[int, ...]) -> KV | None:
        """The KV of the longest known prefix (from one block on), leaving at least one token to compute."""
        for start in reversed(self.beginnings(ids)):
            key = self._owner.get(start)
            if key is None:
                continue
            shared = _common_prefix(key, ids, len(ids) - 1)
            if shared:
                self._rows.move_to_end(key)
                return beginning(self._rows[key][0], shared)
        return None

    def put(self, ids: Sequence[int], kv: KV) -> None:
        """Remember a row.  ``ids`` may be longer than ``kv``; the row has the tokens of ``kv``."""
        key = tuple(ids[:tokens_of(kv)])
        self._drop(key)
        self._rows[key] = kv, self.beginnings(key)
        self._owner.update(dict.fromkeys(self._rows[key][1], key))
        for memory in map(torch.Tensor.untyped_storage, kv):
            self._uses[memory.data_ptr()] += 1
            if self._uses[memory.data_ptr()] == 1:
                self.bytes += memory.nbytes()
        self.resize(self.max_bytes)

    def resize(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        while self.bytes > max_bytes and self._rows:
            self._drop(next(iter(self._rows)))

    def clear(self) -> None:
        self._rows.clear()
        self._owner.clear()
        self._uses.clear()
        self.bytes = 0

    def _drop(self, key: tuple[int, ...]) -> None:
        if key in self._rows:
            kv, beginnings = self._rows.pop(key)
            for memory in map(torch.Tensor.untyped_storage, kv):
                self._uses[memory.data_ptr()] -= 1
                if not self._uses[memory.data_ptr()]:
                    del self._uses[memory.data_ptr()]
                    self.bytes -= memory.nbytes()
            for start in beginnings:
                if self._owner.get(start) == key:
                    del self._owner[start]

    def beginnings(self, ids: tuple[int, ...]) -> list[int]:
        """A hash of each beginning of 16, 32, ... tokens, shortest first."""
        found, value = [], 0
        for start in range(0, len(ids) - self.BLOCK + 1, self.BLOCK):
            value = hash((value, ids[start:start + self.BLOCK]))
            found.append(value)
        return found


def _common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    limit = min(limit, len(a))
    if a[:limit] == b[:limit]:  # usual, and much faster than a loop
        return limit
    low, high = 0, limit  # alike up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class BatchMemory:
    """The block in which batches are computed.  Batches reuse it, because new memory pages cost time on a CPU."""

    def __init__(self, graphs: bool = False) -> None:
        self._block = torch.empty(0)
        self.graphs = graphs
        """Whether steps of one token a row are repeated by CUDA graphs (:mod:`itp.lm.decode_graph`)."""
        self.graph: DecodeGraph | None = None
        """The last one, whose memory the next one takes over."""
        self.passes, self.tokens_read = 0, 0
        """The forward passes so far, and the tokens whose keys and values they have read."""

    def take(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A tensor of ``shape`` with arbitrary finite numbers, which a mask must exclude."""
        size = torch.Size(shape).numel()
        if self._block.numel() < size or self._block.dtype != like.dtype or self._block.device != like.device:
            self._block = like.new_zeros(size + size // 4)
        return self._block[:size].view(shape)


class _Layer(CacheLayerMixin):
    """One layer of a batch's keys and values."""

    def __init__(self, batch: KVBatch, index: int) -> None:
        super().__init__()
        self.batch, self.index = batch, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the new tokens (B, heads, S, head size) at the batch's places.  Returns all columns in use."""
        rows, places, used = self.batch.places
        keys, values = self.batch.block_like(key_states)[self.index]
        keys[rows, :, places] = key_states.transpose(1, 2)
        values[rows, :, places] = value_states.transpose(1, 2)
        return keys[:len(rows), :, :used], values[:len(rows), :, :used]

    def get_seq_length(self) -> int:
        return max(self.batch.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.batch.places[2], 0

    def get_max_length(self) -> int:
        return self.batch.columns


class KVBatch:
    """Rows computed side by side.  ``total[i]``: the most tokens that row i can have."""

    def __init__(self, model: PreTrainedModel, memory: BatchMemory, rows: Sequence[KV | None],
                 total: Sequence[int]) -> None:
        self.model, self._memory, self._size = model, memory, len(rows)
        self._known = [kv or () for kv in rows]
        self.lengths = [tokens_of(kv) for kv in self._known]
        self.columns = max(total) + 1  # the last takes the padding
        self._layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_Layer(self, i) for i in range(self._layers)])
        self._block: torch.Tensor | None = None
        for i, kv in enumerate(self._known):
            start = 0
            for segment in kv:
                end = start + segment.shape[-2]
                self.block_like(segment)[:, :, i, :, start:end] = segment
                start = end
        self.places: tuple[torch.Tensor, torch.Tensor, int] = (torch.empty(0), torch.empty(0), 0)
        """Where the current pass writes: row (B, 1) and column (B, S) indices, and the columns in use after it."""
        self._graph: DecodeGraph | None = None
        self._steps = 0
        """Passes so far, one after the other, that gave every row one token."""

    def block_like(self, some: torch.Tensor) -> torch.Tensor:
        """(layers, 2, B, heads, columns, size); ``some`` (..., heads, tokens, size) gives the heads and their size."""
        if self._block is None:
            heads, _, size = some.shape[-3:]
            self._block = self._memory.take((self._layers, 2, self._size, heads, self.columns, size), some)
        return self._block

    def forward(self, new: Sequence[Sequence[int]], keep: int = 1) -> torch.Tensor:
        """Append ``new[i]`` (at least one token) to row i.  Returns logits (B, keep, V) of the last positions.

        ``new`` may hold tokens for the first rows only; the other rows stay as they are.
        """
        one_each = len(new) == len(self.lengths) and all(len(ids) == 1 for ids in new)
        self._steps = self._steps + 1 if one_each else 0
        graph = self._graph_for(len(new)) if self._steps > FIRST_STEPS and self._memory.graphs else None
        if graph is None:
            return self.model(**self._inputs(new), logits_to_keep=keep).logits
        logits = graph.step([ids[0] for ids in new], self.lengths)
        self.lengths = [n + 1 for n in self.lengths]
        self._memory.passes += 1
        self._memory.tokens_read += sum(self.lengths)
        return logits

    def _graph_for(self, rows: int) -> DecodeGraph | None:
        """A graph of the next step; None where the model has something in it that no graph can repeat."""
        used = max(self.lengths) + 1
        if self._graph is None or not self._graph.fits(rows, used):
            columns = min(-(-(used + COLUMNS // 2) // COLUMNS) * COLUMNS, self.columns)
            graph = DecodeGraph(self.model, rows, columns, self.columns - 1, self._memory.graph)
            self.places = graph.places
            try:
                graph.make(self.cache)
            except RuntimeError as error:
                log.warning("decoding goes on without CUDA graphs: %s", str(error).partition("\n")[0])
                self._memory.graphs = False
                return None
            self._graph = self._memory.graph = graph
        return self._graph

    def hidden(self, new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append like :meth:`forward`.  Returns the last hidden state (B, H) of each row, behind the final norm."""
        return self.model.base_model(**self._inputs(new)).last_hidden_state[:, -1]

    def _inputs(self, new: Sequence[Sequence[int]]) -> dict:
        device, counts = self.model.device, [len(ids) for ids in new]
        width = max(counts)
        padded = [[0] * (width - n) + list(row) for row, n in zip(new, counts, strict=True)]
        known = self.lengths[:len(new)]
        before = torch.tensor(known)[:, None] - torch.tensor([width - n for n in counts])[:, None]
        positions = before + torch.arange(width)  # (B, S); columns left of a row's own new tokens are padding
        padding = positions < torch.tensor(known)[:, None]
        known = [n + more for n, more in zip(known, counts, strict=True)]
        self.lengths[:len(new)] = known
        self._memory.passes += 1
        self._memory.tokens_read += sum(known)
        used = max(known)
        columns = positions.masked_fill(padding, self.columns - 1).to(device)
        self.places = (torch.arange(len(new), device=device)[:, None], columns, used)
        # A query sees the tokens up to itself.  A padding query sees the first token, because a softmax over no token
        # would be NaN.
        positions = positions.masked_fill(padding, 0).to(device)
        hidden = torch.arange(used, device=device) > positions[:, :, None]  # (B, S, T)
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=device)
        mask.masked_fill_(hidden, torch.finfo(self.model.dtype).min)
        return {"input_ids": torch.tensor(padded, device=device), "attention_mask": mask[:, None],
                "position_ids": positions, "past_key_values": self.cache, "use_cache": True}

    def drop(self, done: Sequence[int]) -> list[int]:
        """Remove rows; the last rows move into their places.  Returns the old index of every remaining row."""
        ended = set(done)
        left = len(self.lengths) - len(ended)
        order = list(range(left))
        movers = [i for i in range(left, len(self.lengths)) if i not in ended]
        for hole, mover in zip(sorted(i for i in ended if i < left), movers, strict=True):
            n = self.lengths[mover]
            self._block[:, :, hole, :, :n] = self._block[:, :, mover, :, :n]
            order[hole] = mover
        self.lengths = [self.lengths[i] for i in order]
        self._known = [self._known[i] for i in order]
        return order

    def rows(self, wanted: Sequence[int]) -> list[KV]:
        """The keys and values of some rows, without a copy of the segments that were known before."""
        found = []
        for i in wanted:
            known = self._known[i] if len(self._known[i]) < MAX_SEGMENTS else ()
            found.append((*known, self._block[:, :, i, :, tokens_of(known):self.lengths[i]].clone()))
        return found
