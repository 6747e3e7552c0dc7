"""CUDA graphs of a decoding step: a GPU repeats it without Python, which would start hundreds of kernels one by one.

In a step that can be repeated, every row gets one token.  The shapes of a graph are fixed, so it is made for as many
rows as the batch has, and for columns up to a multiple of :data:`COLUMNS`.  A row that ended goes on computing, into
the column for padding.  Making a graph takes about as long as two steps without one, hence :data:`FIRST_STEPS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

COLUMNS = 64
FIRST_STEPS = 3
"""Steps in a row that a batch must have made before its next ones are repeated: many decisions need fewer."""


class DecodeGraph:
    """A step for ``rows`` rows that see ``columns`` columns; ``padding`` is the column where nothing is read.

    ``before``: the graph made before this one, whose memory this one uses too.  It must not be repeated any more.
    """

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, padding: int,
                 before: DecodeGraph | None = None) -> None:
        self.model, self.rows, self.columns, self.padding = model, rows, columns, padding
        device = model.device
        self._numbers = torch.zeros((3, rows, 1), dtype=torch.long, device=device)
        """Token, position and column of each row."""
        self.places = (torch.arange(rows, device=device)[:, None], self._numbers[2], columns)
        """Where a step writes, as in ``KVBatch.places``."""
        self._mask = torch.zeros((rows, 1, 1, columns), dtype=model.dtype, device=device)
        self._all_columns = torch.arange(columns, device=device)
        self._stream = torch.cuda.Stream(device) if before is None else before._stream
        self._pool = torch.cuda.graph_pool_handle() if before is None else before._pool
        self._graph = torch.cuda.CUDAGraph()

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it serves so many rows with so many columns, without computing more than twice as many rows."""
        return columns <= self.columns and rows <= self.rows <= 2 * rows

    def make(self, cache: Any) -> None:
        """Record a step that writes into ``cache``.  Nothing is computed yet."""
        tokens, positions, _ = self._numbers
        torch.cuda.synchronize(self.model.device)
        # Not torch.cuda.graph, which empties the allocator's cache every time.
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._logits = self.model(input_ids=tokens, attention_mask=self._mask, position_ids=positions,
                                          past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            finally:
                self._graph.capture_end()

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append a token to each row, behind its ``lengths`` known ones.  Returns logits (B, 1, V)."""
        none = [0] * (self.rows - len(tokens))
        columns = [*lengths, *[self.padding] * len(none)]
        self._numbers.copy_(torch.tensor([[*tokens, *none], [*lengths, *none], columns])[:, :, None])
        hidden = self._all_columns > self._numbers[1]  # (B, T)
        self._mask.zero_().masked_fill_(hidden[:, None, None], torch.finfo(self._mask.dtype).min)
        self._graph.replay()
        return self._logits[:len(tokens)]
