"""Decoding and scoring with a Hugging Face causal LM: batches of any prompts, prefixes computed once.

Everything works on rows of token ids.  A row's keys and values are taken from the longest prefix that
was computed before (states grow at their end, so most of a prompt is there already); what is left is
computed in left-padded batches.  An attention mask of our own (B, 1, S, T) and explicit positions make
a padded row attend to exactly what it would attend to alone.

Synchronous and without threads; :mod:`itp.lm.local` puts the asynchronous contract on top.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from itp.lm.base import GenParams, Generation, TokenLogprobs

KV = torch.Tensor
"""Keys and values of one row: (layers, 2, heads, tokens, head size)."""


class PrefixCache:
    """Keys and values of recent rows, found by the longest prefix they share with a new one.

    A row is registered under a hash of each of its beginnings of 16, 32, ... tokens; a later row with
    the same beginning takes the place.  Least recently used rows go first.
    """

    BLOCK = 16

    def __init__(self, max_bytes: int) -> None:
        self._rows: OrderedDict[tuple[int, ...], KV] = OrderedDict()
        self._owner: dict[int, tuple[int, ...]] = {}
        self._max_bytes = max_bytes
        self._bytes = 0

    def longest(self, ids: tuple[int, ...]) -> KV | None:
        """The KV of the longest known prefix (from one block on), leaving at least one token to compute."""
        for beginning in reversed(self._beginnings(ids)):
            key = self._owner.get(beginning)
            if key is None:
                continue
            shared = _common_prefix(key, ids, len(ids) - 1)
            if shared:
                self._rows.move_to_end(key)
                return self._rows[key][..., :shared, :]
        return None

    def put(self, ids: Sequence[int], kv: KV) -> None:
        """Remember a row.  ``ids`` may be longer than ``kv``, whose tokens are the ones known."""
        key = tuple(ids[:kv.shape[-2]])
        self._drop(key)
        self._rows[key] = kv
        self._owner.update(dict.fromkeys(self._beginnings(key), key))
        self._bytes += kv.nbytes
        while self._bytes > self._max_bytes and self._rows:
            self._drop(next(iter(self._rows)))

    def _drop(self, key: tuple[int, ...]) -> None:
        if key in self._rows:
            self._bytes -= self._rows.pop(key).nbytes
            for beginning in self._beginnings(key):
                if self._owner.get(beginning) == key:
                    del self._owner[beginning]

    def _beginnings(self, ids: tuple[int, ...]) -> list[int]:
        found, value = [], 0
        for start in range(0, len(ids) - self.BLOCK + 1, self.BLOCK):
            value = hash((value, ids[start:start + self.BLOCK]))
            found.append(value)
        return found


def _common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    limit = min(limit, len(a))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


class Batch:
    """Rows computed side by side.  ``valid`` (B, T) marks the real tokens of the padded cache."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[KV | None]) -> None:
        self.model = model
        known = [0 if kv is None else kv.shape[-2] for kv in rows]
        longest = max(known)
        self.lengths = torch.tensor(known, device=model.device)
        self.valid = torch.arange(longest, device=model.device) >= longest - self.lengths[:, None]
        if longest == 0:
            self.cache = DynamicCache()
            return
        some = next(kv for kv in rows if kv is not None)
        layers, _, heads, _, size = some.shape
        padded = some.new_zeros(layers, 2, len(rows), heads, longest, size)
        for i, kv in enumerate(rows):
            if kv is not None:
                padded[:, :, i, :, longest - known[i]:] = kv
        self.cache = DynamicCache([(layer[0], layer[1]) for layer in padded])

    def forward(self, new: Sequence[Sequence[int]], keep: int = 1) -> torch.Tensor:
        """Append ``new[i]`` (at least one token) to row i.  Returns logits (B, keep, V) of the last positions."""
        device, counts = self.model.device, [len(ids) for ids in new]
        width, known = max(counts), self.valid.shape[1]
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in new], device=device)
        real = torch.arange(width, device=device) >= width - torch.tensor(counts, device=device)[:, None]
        self.valid = torch.cat([self.valid, real], dim=1)
        # A query sees the real tokens up to itself.  A padding query sees itself, because a softmax over
        # nothing would be NaN; nobody sees a padding key.
        columns, queries = torch.arange(known + width, device=device), known + torch.arange(width, device=device)
        causal, itself = columns <= queries[:, None], columns == queries[:, None]
        visible = (self.valid[:, None, :] & causal) | itself  # (B, S, T)
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=device)
        mask.masked_fill_(~visible, torch.finfo(self.model.dtype).min)
        positions = (self.lengths[:, None] + real.long().cumsum(1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask[:, None], position_ids=positions,
                         past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        self.lengths = self.lengths + real.sum(1)
        return out.logits

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        index = torch.tensor(rows, device=self.valid.device)
        self.cache.batch_select_indices(index)
        self.valid, self.lengths = self.valid[index], self.lengths[index]

    def rows(self, wanted: Sequence[int]) -> list[KV]:
        """The keys and values of some rows, without padding."""
        found = []
        for i in wanted:
            real = self.valid[i].nonzero()[:, 0]
            pairs = [(layer.keys[i].index_select(1, real), layer.values[i].index_select(1, real))
                     for layer in self.cache.layers]
            found.append(torch.stack([torch.stack(pair) for pair in pairs]))
        return found


class Decoder(Protocol):
    """What chooses the tokens of one row."""

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        """Given log p of the next token (V,), the tokens to append; empty when the row is finished."""


@dataclass
class Request:
    """One row to complete: its prompt, how to decode it, and the seed of its draws."""

    ids: list[int]
    params: GenParams
    seed: int
    choices: list[list[int]]
    """Token ids of ``params.choices``."""


class Engine:
    """Batched generation and scoring.  ``max_batch_tokens`` bounds rows x longest row of a forward pass."""

    def __init__(self, model: PreTrainedModel, tokenizer, *, max_batch_tokens: int = 16384,
                 cache_bytes: int = 1 << 30) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.cache = PrefixCache(cache_bytes)
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self._ends: dict[tuple[tuple[str, ...], int], bool] = {}

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Complete every request, in order."""
        answers: list[Generation | None] = [None] * len(requests)
        room = [len(r.ids) + _longest_completion(r) for r in requests]
        for group in self._groups(room):
            for i, answer in zip(group, self._generate_group([requests[i] for i in group]), strict=True):
                answers[i] = answer
        return answers

    def _generate_group(self, requests: Sequence[Request]) -> list[Generation]:
        batch, logits, cached = self._start([r.ids for r in requests])
        decoders = [_Choose(r) if r.choices else _Sample(r, self) for r in requests]
        live, sequences = list(range(len(requests))), [list(r.ids) for r in requests]
        while True:
            logprobs = logits.float().log_softmax(-1)  # (live rows, V)
            new = [decoders[i].advance(row) for i, row in zip(live, logprobs, strict=True)]
            going = [j for j, tokens in enumerate(new) if tokens]
            done = [j for j, tokens in enumerate(new) if not tokens]
            for j, kv in zip(done, batch.rows(done), strict=True):
                self.cache.put(sequences[live[j]], kv)
            if done and going:
                batch.select(going)
            live = [live[j] for j in going]
            if not live:
                break
            new = [new[j] for j in going]
            logits = batch.forward(new)[:, -1]
            for i, tokens in zip(live, new, strict=True):
                sequences[i] += tokens
        return [d.result(len(r.ids), c) for d, r, c in zip(decoders, requests, cached, strict=True)]

    def _start(self, prompts: Sequence[list[int]]) -> tuple[Batch, torch.Tensor, list[int]]:
        """The prompts as one batch to go on from, the logits (B, V) after them, and cached tokens."""
        known = [self.cache.longest(tuple(ids)) for ids in prompts]
        skip = [0 if kv is None else kv.shape[-2] for kv in known]
        todo = [ids[n:] for ids, n in zip(prompts, skip, strict=True)]
        if len(set(map(tuple, prompts))) == len(prompts) and len(self._groups(list(map(len, todo)))) == 1:
            batch = Batch(self.model, known)
            return batch, batch.forward(todo)[:, -1], skip
        rows, logits, cached = self.prefill(prompts)
        return Batch(self.model, rows), logits, cached

    def prefill(self, prompts: Sequence[list[int]]) -> tuple[list[KV], torch.Tensor, list[int]]:
        """Compute prompts, each distinct one once: their KV, the logits (B, V) after them, cached tokens."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        known = [self.cache.longest(ids) for ids in distinct]
        skip = [0 if kv is None else kv.shape[-2] for kv in known]
        todo = [list(ids[n:]) for ids, n in zip(distinct, skip, strict=True)]
        rows: dict[tuple[int, ...], KV] = {}
        logits: dict[tuple[int, ...], torch.Tensor] = {}
        for group in self._groups([len(ids) for ids in todo], [len(ids) for ids in distinct]):
            batch = Batch(self.model, [known[i] for i in group])
            last = batch.forward([todo[i] for i in group])[:, -1]
            for j, (i, kv) in enumerate(zip(group, batch.rows(range(len(group))), strict=True)):
                rows[distinct[i]], logits[distinct[i]] = kv, last[j]
                self.cache.put(distinct[i], kv)
        cached, first = [], dict(zip(distinct, skip, strict=True))
        for ids in map(tuple, prompts):
            cached.append(first.get(ids, len(ids)))
            first[ids] = len(ids)  # the same prompt again costs nothing
        keys = [tuple(ids) for ids in prompts]
        return [rows[k] for k in keys], torch.stack([logits[k] for k in keys]), cached

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[TokenLogprobs]:
        """log p of each completion's tokens after its context; a shared context is computed once."""
        rows, logits, cached = self.prefill([context for context, _ in pairs])
        found: list[list[float]] = [
            [float(row.float().log_softmax(-1)[ids[0]])] if ids else []
            for row, (_, ids) in zip(logits, pairs, strict=True)
        ]
        longer = [i for i, (_, ids) in enumerate(pairs) if len(ids) > 1]
        lengths = [len(pairs[i][1]) for i in longer]
        for group in self._groups(lengths, [len(pairs[i][0]) + n for i, n in zip(longer, lengths, strict=True)]):
            chosen = [longer[g] for g in group]
            fed = [pairs[i][1][:-1] for i in chosen]
            width = max(map(len, fed))
            out = Batch(self.model, [rows[i] for i in chosen]).forward(fed, keep=width).float().log_softmax(-1)
            for j, i in enumerate(chosen):
                targets = torch.tensor(pairs[i][1][1:], device=out.device)
                here = out[j, width - len(targets):].gather(1, targets[:, None])[:, 0]
                found[i] += here.tolist()
        return [
            TokenLogprobs(tuple(values), len(context) + len(ids), already)
            for values, (context, ids), already in zip(found, pairs, cached, strict=True)
        ]

    def _groups(self, new: Sequence[int], total: Sequence[int] | None = None) -> list[list[int]]:
        """Row indices in batches: alike in length, so that padding stays small, and within the budget.

        ``new``: tokens of a row to be computed; ``total``: those it occupies (the same where not given).
        """
        total = total or new
        groups: list[list[int]] = []
        for i in sorted(range(len(new)), key=lambda i: new[i]):
            group = groups[-1] if groups else []
            padded, real = new[i] * (len(group) + 1), sum(new[j] for j in group) + new[i]
            size = max([total[i], *(total[j] for j in group)]) * (len(group) + 1)
            # A forward pass costs about as much as 256 tokens whatever it holds: less padding isn't worth one.
            if group and size <= self.max_batch_tokens and padded <= 1.5 * real + 256:
                group.append(i)
            else:
                groups.append([i])
        return groups

    def may_end(self, token: int, stop: tuple[str, ...]) -> bool:
        """Could a stop string end with this token?  Saves decoding the text at every token."""
        if (stop, token) not in self._ends:
            text = self.tokenizer.decode([token])
            self._ends[stop, token] = any(s[-1] in text for s in stop)
        return self._ends[stop, token]


class _Sample:
    """Greedy or sampled tokens until a stop string, an end token, or the limit."""

    def __init__(self, request: Request, engine: Engine) -> None:
        self.params, self.engine = request.params, engine
        self.draw = random.Random(request.seed)
        self.tokens: list[int] = []
        self.logprob = 0.0
        self.text, self.finish_reason = "", "length"

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        token = self._pick(logprobs)
        self.logprob += float(logprobs[token])
        self.tokens.append(token)
        if token in self.engine.eos:
            self.text, self.finish_reason = self._decode(self.tokens[:-1]), "stop"
            return []
        if self.params.stop and self.engine.may_end(token, self.params.stop):
            text = self._decode(self.tokens)
            ends = [at for s in self.params.stop if (at := text.find(s)) >= 0]
            if ends:
                self.text, self.finish_reason = text[:min(ends)], "stop"
                return []
        if len(self.tokens) == self.params.max_new_tokens:
            self.text = self._decode(self.tokens)
            return []
        return [token]

    def _decode(self, tokens: list[int]) -> str:
        return self.engine.tokenizer.decode(tokens, skip_special_tokens=True)

    def _pick(self, logprobs: torch.Tensor) -> int:
        if self.params.temperature == 0:
            return int(logprobs.argmax())
        probs, order = (logprobs / self.params.temperature).softmax(-1).double().sort(descending=True, stable=True)
        before = probs.cumsum(-1) - probs
        kept = int((before < self.params.top_p).sum())  # always at least the most likely token
        cumulative = probs[:kept].cumsum(-1)
        draw = torch.tensor(self.draw.random() * float(cumulative[-1]), dtype=torch.double, device=probs.device)
        return int(order[min(int(torch.searchsorted(cumulative, draw, right=True)), kept - 1)])

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        return Generation(self.text, prompt_tokens, len(self.tokens), cached, self.finish_reason, self.logprob)


class _Choose:
    """One of the given choices, by walking their token trie.

    Where only one token can follow, it is appended without asking the model, so a decision costs as
    many forward passes as the trie has branchings on its way.
    """

    def __init__(self, request: Request) -> None:
        self.params = request.params
        self.draw = random.Random(request.seed)
        self.left = list(range(len(request.choices)))
        self.choices = request.choices
        self.depth = 0
        self.logprob = 0.0

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        fed = self._forced() if self.depth == 0 else []
        if fed:
            # A common beginning of all choices: these logits are about its first token, not about a choice.
            return fed
        options = sorted({self.choices[c][self.depth] for c in self.left}) if len(self.left) > 1 else []
        if options:
            allowed = logprobs[options].log_softmax(-1)
            picked = self._pick(allowed)
            self.logprob += float(allowed[picked])
            self.left = [c for c in self.left if self.choices[c][self.depth] == options[picked]]
            self.depth += 1
            fed = [options[picked], *self._forced()]
        return fed if len(self.left) > 1 else []

    def _forced(self) -> list[int]:
        fed = []
        while len(self.left) > 1 and len({self.choices[c][self.depth] for c in self.left}) == 1:
            fed.append(self.choices[self.left[0]][self.depth])
            self.depth += 1
        return fed

    def _pick(self, logprobs: torch.Tensor) -> int:
        if self.params.temperature == 0:
            return int(logprobs.argmax())
        weights = (logprobs / self.params.temperature).softmax(-1).tolist()
        return self.draw.choices(range(len(weights)), weights)[0]

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        chosen = self.left[0]
        return Generation(self.params.choices[chosen], prompt_tokens, len(self.choices[chosen]), cached, "stop",
                          self.logprob)


def _longest_completion(request: Request) -> int:
    return max(map(len, request.choices)) if request.choices else request.params.max_new_tokens
