"""Decoding and scoring with a Hugging Face causal LM: batches of any prompts, and each prefix computed once.

The engine works on rows of token ids.  It takes a row's keys and values from the longest prefix in its cache.  States
grow at their end, so this prefix is most of a prompt.  It computes the remaining tokens in batches of rows
(:mod:`itp.lm.kv_cache`).

The engine is synchronous and has no threads; :mod:`itp.lm.local` puts the asynchronous contract on top.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from itp.chat_template import end_of_turn
from itp.lm.base import GenParams, Generation, HeadOutputs, TokenLogprobs, Trace
from itp.lm.kv_cache import KV, BatchMemory, KVBatch, PrefixCache, tokens_of
from itp.lm.tokenize import Encoder

MIN_SHARED_TOKENS = 64
"""Rows that share this many uncomputed tokens are computed one after the other instead of side by side."""

PASS_OVERHEAD_TOKENS = {"cpu": 64}
"""The fixed cost of a forward pass in tokens, by device.  Another pass must save more padding than this.  Devices that
aren't listed have 1,024 (not measured): a GPU computes many tokens in the time that Python takes to start a pass."""


@dataclass(frozen=True)
class NextToken:
    """log p of a row's next token: all of it (V,) where the model is, and what was fetched for all rows at once.

    To fetch a number from a GPU takes as long as many small operations there, so no row does it on its own.
    """

    logprobs: torch.Tensor
    best: int
    best_logprob: float
    options: Sequence[int]
    option_logprobs: torch.Tensor
    """log p of the decoder's ``options``, on the CPU."""


class Decoder(Protocol):
    """Chooses the tokens of one row."""

    options: Sequence[int]
    """The tokens among which it chooses next; none: all."""

    def advance(self, next_token: NextToken) -> list[int]:
        """The tokens to append; none when the row is finished."""

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        """The completion, with the sizes of its prompt."""


@dataclass
class Request:
    """One row to complete: its prompt, how to decode it, and the seed of its samples."""

    ids: list[int]
    params: GenParams
    seed: int
    choices: list[list[int]]
    """Token ids of ``params.choices``."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    """Token ids to compute.  ``known``: KV of the first ``skip`` tokens, the longest beginning in the cache."""

    ids: tuple[int, ...]
    known: KV | None
    skip: int

    @property
    def todo(self) -> tuple[int, ...]:
        """The tokens that are left to compute."""
        return self.ids[self.skip:]


Heads = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From hidden states (B, H) at the control token to K logits (B, K_max + 1) and values (B,)."""


class Engine:
    """Batched generation and scoring.

    ``max_batch_tokens`` bounds rows x longest row of a forward pass.  ``max_batch_rows`` bounds its rows (0: no bound).
    ``cuda_graphs``: on a GPU, repeat decoding steps by CUDA graphs.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, *, heads: Heads | None = None,
                 max_batch_tokens: int = 16384, max_batch_rows: int = 0, cache_bytes: int = 1 << 30,
                 cuda_graphs: bool = True) -> None:
        self.model = model.eval()
        self.encode = Encoder(tokenizer)
        self.heads = heads
        self.max_batch_tokens, self.max_batch_rows = max_batch_tokens, max_batch_rows
        self.cache = PrefixCache(cache_bytes)
        self.memory = BatchMemory(graphs=cuda_graphs and model.device.type == "cuda")
        self.pass_tokens = PASS_OVERHEAD_TOKENS.get(model.device.type, 1024)
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.eos |= end_of_turn(tokenizer)
        self._ends: dict[tuple[tuple[str, ...], int], bool] = {}

    def reset(self) -> None:
        """Forget all computed prefixes, after a change of the model's weights."""
        self.cache.clear()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Complete every request, in order."""
        rows = [_Row(request, self) for request in requests]
        # The groups only bound memory: rows decode one token at a time, and _feed keeps the padding of prompts small.
        for group in self._groups([1] * len(rows), [row.total for row in rows]):
            self._complete([rows[i] for i in group])
        return [row.result() for row in rows]

    def _complete(self, rows: Sequence[_Row]) -> None:
        """Complete rows in one batch."""
        live, batch, logits = self._start(rows)
        while True:
            coming = next_tokens(logits.float().log_softmax(-1), [row.decoder.options for row in live])
            new = [row.decoder.advance(token) for row, token in zip(live, coming, strict=True)]
            done = [j for j, tokens in enumerate(new) if not tokens]
            for j, kv in zip(done, batch.rows(done), strict=True):
                self.cache.put(live[j].ids, kv)
            if done:
                order = batch.drop(done)
                live, new = [live[j] for j in order], [new[j] for j in order]
            if not live:
                break
            logits = batch.forward(new)[:, -1]
            for row, tokens in zip(live, new, strict=True):
                row.ids += tokens

    def _start(self, rows: Sequence[_Row]) -> tuple[list[_Row], KVBatch, torch.Tensor]:
        """Compute the rows' prompts.  Returns the rows in the batch's order, the batch, and its last logits (B, V).

        Prompts without a long common beginning are computed side by side in this batch, without a copy.  Otherwise
        :meth:`_prefill` computes each common beginning once, and the batch starts with copies of the results.
        """
        prompts = {row: self._look_up(row.ids) for row in rows}
        rows = sorted(rows, key=lambda row: -len(prompts[row].todo))  # most tokens to compute first
        ordered = [prompts[row] for row in rows]
        if len(self._leaders(ordered)) == len(ordered):
            batch = KVBatch(self.model, self.memory, [p.known for p in ordered], [row.total for row in rows])
            logits, cached = self._feed(batch, [p.todo for p in ordered]), [p.skip for p in ordered]
        else:
            kvs, logits, cached = self._prefill([p.ids for p in ordered])
            batch = KVBatch(self.model, self.memory, kvs, [row.total for row in rows])
        for row, n in zip(rows, cached, strict=True):
            row.cached_tokens = n
        return rows, batch, logits

    def _feed(self, batch: KVBatch, todo: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append new tokens to a batch's rows, most tokens first.  Returns the last logits (B, V).

        If it saves enough padding, the beginnings of the long rows get a pass of their own.
        """
        counts = list(map(len, todo))

        def padded(width: int) -> int:
            return sum(n > width for n in counts) * (counts[0] - width) + width * len(counts)

        width = min(counts, key=padded)
        if padded(width) + self.pass_tokens < padded(counts[0]):
            self._feed(batch, [ids[:-width] for ids in todo if len(ids) > width])
            todo = [ids[-width:] for ids in todo]
        return batch.forward(todo)[:, -1]

    def _look_up(self, ids: Sequence[int]) -> _Prompt:
        known = self.cache.longest(tuple(ids))
        return _Prompt(tuple(ids), known, 0 if known is None else tokens_of(known))

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[list[KV], torch.Tensor, list[int]]:
        """Compute each distinct prompt once.  Returns the KV, last logits (B, V) and cached tokens of all prompts.

        Prompts are computed in waves.  The prompts of one wave have no long common beginning, and the prompts of the
        next wave find their beginnings in the cache.
        """
        done: dict[tuple[int, ...], tuple[KV, torch.Tensor]] = {}
        skipped: dict[tuple[int, ...], int] = {}
        left = list(dict.fromkeys(prompts))
        while left:
            looked_up = [self._look_up(ids) for ids in left]
            skipped.update((prompt.ids, prompt.skip) for prompt in looked_up)
            done |= self._compute(self._leaders(looked_up))
            left = [ids for ids in left if ids not in done]
        cached = []
        for ids in prompts:
            cached.append(skipped[ids])
            skipped[ids] = len(ids)  # the same prompt again costs nothing
        return [done[ids][0] for ids in prompts], torch.stack([done[ids][1] for ids in prompts]), cached

    def _compute(self, prompts: Sequence[_Prompt]) -> dict[tuple[int, ...], tuple[KV, torch.Tensor]]:
        """KV and the logits (V,) at the end of each prompt, by the prompt's ids.  The cache keeps the KV."""
        done = {}
        for group in self._groups([len(p.todo) for p in prompts], [len(p.ids) for p in prompts]):
            chosen = [prompts[i] for i in reversed(group)]  # most tokens to compute first
            batch = KVBatch(self.model, self.memory, [p.known for p in chosen], [len(p.ids) for p in chosen])
            logits = self._feed(batch, [p.todo for p in chosen])
            for prompt, kv, last in zip(chosen, batch.rows(range(len(chosen))), logits, strict=True):
                done[prompt.ids] = kv, last
                self.cache.put(prompt.ids, kv)
        return done

    def _leaders(self, prompts: Sequence[_Prompt]) -> list[_Prompt]:
        """The prompts to compute now, in their order.

        Among prompts whose next MIN_SHARED_TOKENS unknown tokens are the same, the longest comes first: the others will
        find their beginnings in it.
        """
        def next_tokens(prompt: _Prompt) -> tuple[int, ...]:
            return prompt.ids[:prompt.skip + MIN_SHARED_TOKENS]

        leaders: dict[tuple[int, ...], _Prompt] = {}
        for prompt in sorted(prompts, key=lambda p: -len(p.ids)):
            leaders.setdefault(next_tokens(prompt), prompt)
        return [prompt for prompt in prompts if leaders[next_tokens(prompt)] is prompt]

    @torch.inference_mode()
    def read_heads(self, prompts: Sequence[list[int]]) -> list[HeadOutputs]:
        """The heads' outputs at the end of each prompt."""
        answers: list[HeadOutputs | None] = [None] * len(prompts)
        looked_up = [self._look_up(ids) for ids in prompts]
        for group in self._groups([len(p.todo) for p in looked_up], [len(p.ids) for p in looked_up]):
            chosen = [looked_up[i] for i in group]
            batch = KVBatch(self.model, self.memory, [p.known for p in chosen], [len(p.ids) for p in chosen])
            k_logits, values = self.heads(batch.hidden([p.todo for p in chosen]))  # (B, K_max + 1), (B,)
            k_logprobs = k_logits.float().log_softmax(-1)
            for j, (i, kv) in enumerate(zip(group, batch.rows(range(len(group))), strict=True)):
                self.cache.put(chosen[j].ids, kv)
                answers[i] = HeadOutputs(tuple(k_logprobs[j].tolist()), float(values[j]), len(chosen[j].ids),
                                         chosen[j].skip)
        return answers

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[TokenLogprobs]:
        """log p of each completion's tokens after its context; a shared context is computed once."""
        rows, logits, cached = self._prefill([tuple(context) for context, _ in pairs])
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
            batch = KVBatch(self.model, self.memory, [rows[i] for i in chosen],
                            [tokens_of(rows[i]) + len(ids) for i, ids in zip(chosen, fed, strict=True)])
            out = batch.forward(fed, keep=width).float().log_softmax(-1)
            for j, i in enumerate(chosen):
                targets = torch.tensor(pairs[i][1][1:], device=out.device)
                here = out[j, width - len(targets):].gather(1, targets[:, None])[:, 0]
                found[i] += here.tolist()
        return [
            TokenLogprobs(tuple(values), len(context) + len(ids), already)
            for values, (context, ids), already in zip(found, pairs, cached, strict=True)
        ]

    def _groups(self, new: Sequence[int], total: Sequence[int]) -> list[list[int]]:
        """Row indices in batches of similar lengths, so that padding stays small, and within the budget.

        ``new``: tokens of each row to compute side by side.  ``total``: tokens that each row occupies.
        """
        groups: list[list[int]] = []
        for i in sorted(range(len(new)), key=lambda i: (new[i], total[i])):
            group = groups[-1] if groups else []
            padded, real = new[i] * (len(group) + 1), sum(new[j] for j in group) + new[i]
            size = max([total[i], *(total[j] for j in group)]) * (len(group) + 1)
            room = size <= self.max_batch_tokens and not 0 < self.max_batch_rows <= len(group)
            if group and room and padded <= 1.5 * real + self.pass_tokens:
                group.append(i)
            else:
                groups.append([i])
        return groups

    def may_end(self, token: int, stop: tuple[str, ...]) -> bool:
        """Whether a stop string could end with this token, so that the text needn't be decoded at every token."""
        if (stop, token) not in self._ends:
            text = self.encode.tokenizer.decode([token])
            self._ends[stop, token] = any(s[-1] in text for s in stop)
        return self._ends[stop, token]


def next_tokens(logprobs: torch.Tensor, options: Sequence[Sequence[int]]) -> list[NextToken]:
    """A :class:`NextToken` for each row of ``logprobs`` (B, V), with log p of its ``options``."""
    best = logprobs.argmax(-1)
    best_logprobs = logprobs.gather(1, best[:, None])[:, 0].tolist()
    rows = torch.tensor([i for i, tokens in enumerate(options) for _ in tokens], dtype=torch.long)
    wanted = torch.tensor([token for tokens in options for token in tokens], dtype=torch.long)
    fetched = logprobs[rows.to(logprobs.device), wanted.to(logprobs.device)].cpu().split([len(o) for o in options])
    return list(map(NextToken, logprobs, best.tolist(), best_logprobs, options, fetched))


class _Row:
    """A request in progress; ``ids`` are its tokens so far."""

    def __init__(self, request: Request, engine: Engine) -> None:
        self.ids = list(request.ids)
        self.prompt_tokens, self.cached_tokens = len(request.ids), 0
        self.decoder: Decoder = _Choose(request) if request.choices else _Sample(request, engine)
        longest = max(map(len, request.choices)) if request.choices else request.params.max_new_tokens
        self.total = len(request.ids) + longest
        """The most tokens that the row can have."""

    def result(self) -> Generation:
        return self.decoder.result(self.prompt_tokens, self.cached_tokens)


class _Sample:
    """Greedy or sampled tokens until a stop string, an end token, or the limit."""

    options: Sequence[int] = ()

    def __init__(self, request: Request, engine: Engine) -> None:
        self.params, self.engine = request.params, engine
        self.random = random.Random(request.seed)
        self.tokens: list[int] = []
        self.allowed: list[tuple[int, ...] | None] = []
        self.logprob, self.traced_logprob = 0.0, 0.0
        self.text, self.finish_reason = "", "length"

    def advance(self, next_token: NextToken) -> list[int]:
        token, logprob = self._pick(next_token)
        self.logprob += logprob
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
        return self.engine.encode.decode(tokens)

    def _pick(self, next_token: NextToken) -> tuple[int, float]:
        """A token, and its log p."""
        if self.params.temperature == 0:
            self.allowed.append((next_token.best,))
            return next_token.best, next_token.best_logprob
        logprobs = next_token.logprobs
        probs, order = (logprobs / self.params.temperature).softmax(-1).double().sort(descending=True, stable=True)
        # In falling order, rounding can add or remove tokens at the nucleus's end only: no other token moves.
        before = probs.cumsum(-1) - probs
        kept = int((before < self.params.top_p).sum())  # always at least the most likely token
        cumulative = probs[:kept].cumsum(-1)
        place = torch.tensor(self.random.random() * float(cumulative[-1]), dtype=torch.double, device=probs.device)
        at = min(int(torch.searchsorted(cumulative, place, right=True)), kept - 1)
        if self.params.trace:
            self.allowed.append(tuple(order[:kept].tolist()) if self.params.top_p < 1 else None)
            self.traced_logprob += float((probs[at] / cumulative[-1]).log())
        return int(order[at]), float(logprobs[order[at]])

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        trace = None
        if self.params.trace:
            trace = Trace(tuple(self.tokens), tuple(self.allowed), self.params.temperature, self.traced_logprob)
        return Generation(self.text, prompt_tokens, len(self.tokens), cached, self.finish_reason, self.logprob, trace)


class _Choose:
    """Chooses one of the given strings by walking their token trie.

    Where only one token can follow, it is appended without the model.  So a decision costs as many forward passes as
    there are branchings on its way.
    """

    def __init__(self, request: Request) -> None:
        self.params = request.params
        self.random = random.Random(request.seed)
        self.left = list(range(len(request.choices)))
        self.choices = request.choices
        self.depth = 0
        self.possible: dict[int, tuple[int, ...]] = {}
        """The tokens that were possible, by depth."""
        self.logprob, self.traced_logprob = 0.0, 0.0

    @property
    def options(self) -> Sequence[int]:
        return sorted({self.choices[c][self.depth] for c in self.left}) if len(self.left) > 1 else ()

    def advance(self, next_token: NextToken) -> list[int]:
        options = next_token.options
        if self.depth == 0 and len(options) == 1:
            # All choices begin alike: these logits are about the first common token, not about a choice.
            return self._forced()
        fed: list[int] = []
        if options:
            allowed = next_token.option_logprobs.log_softmax(-1)
            picked = self._pick(allowed)
            self.possible[self.depth] = tuple(options)
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
        scaled = (logprobs / self.params.temperature).log_softmax(-1)
        picked = self.random.choices(range(len(scaled)), scaled.exp().tolist())[0]
        self.traced_logprob += float(scaled[picked])
        return picked

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        chosen = self.left[0]
        ids, trace = self.choices[chosen], None
        if self.params.trace:
            # A greedy choice isn't a sample: it has probability 1, like a forced token.
            possible = self.possible if self.params.temperature else {}
            allowed = tuple(possible.get(depth, (token,)) for depth, token in enumerate(ids))
            trace = Trace(tuple(ids), allowed, self.params.temperature, self.traced_logprob)
        return Generation(self.params.choices[chosen], prompt_tokens, len(ids), cached, "stop", self.logprob, trace)
