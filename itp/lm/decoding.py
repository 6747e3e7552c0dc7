"""Decoding and scoring with a Hugging Face causal LM: batches of any prompts, prefixes computed once.

Everything works on rows of token ids.  A row's keys and values are taken from the longest prefix that
was computed before (states grow at their end, so most of a prompt is there already); what is left is
computed in batches of rows of similar length (:mod:`itp.lm.kv_cache`).

Synchronous and without threads; :mod:`itp.lm.local` puts the asynchronous contract on top.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from itp.lm.base import Control, GenParams, Generation, TokenLogprobs, Trace
from itp.lm.chat import end_of_turn
from itp.lm.kv_cache import KV, Batch, Memory, PrefixCache, tokens_of

WORTH = 64
"""Rows that share so many uncomputed tokens aren't computed side by side, but one after the other."""

PASS = {"cpu": 64}
"""A forward pass costs about as much as so many tokens, whatever it holds: less padding isn't worth another one.
By device; 1,024 elsewhere (not measured): a GPU computes many tokens in the time in which Python starts a pass."""


class Decoder(Protocol):
    """What chooses the tokens of one row."""

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        """Given log p of the next token (V,), the tokens to append; empty when the row is finished."""

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        """What was chosen, with the sizes of its prompt."""


@dataclass
class Request:
    """One row to complete: its prompt, how to decode it, and the seed of its draws."""

    ids: list[int]
    params: GenParams
    seed: int
    choices: list[list[int]]
    """Token ids of ``params.choices``."""


Heads = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From hidden states (B, H) at the control token to K logits (B, K_max + 1) and values (B,)."""


class Engine:
    """Batched generation and scoring.

    ``max_batch_tokens`` bounds rows x longest row of a forward pass, ``max_batch_rows`` its rows (0: not).
    """

    def __init__(self, model: PreTrainedModel, tokenizer, *, heads: Heads | None = None,
                 max_batch_tokens: int = 16384, max_batch_rows: int = 0, cache_bytes: int = 1 << 30) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.heads = heads
        self.max_batch_tokens, self.max_batch_rows = max_batch_tokens, max_batch_rows
        self.cache = PrefixCache(cache_bytes)
        self.memory = Memory()
        self.pass_tokens = PASS.get(model.device.type, 1024)
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.eos |= end_of_turn(tokenizer)
        self._ends: dict[tuple[tuple[str, ...], int], bool] = {}

    def reset(self) -> None:
        """Forget what was computed: the model's weights have changed."""
        self.cache.clear()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Complete every request, in order."""
        rows = [_Row(request, self) for request in requests]
        # For memory only: side by side they compute one token each, and what precedes that pads little (_feed).
        for group in self._groups([1] * len(rows), [row.total for row in rows]):
            self._complete([rows[i] for i in group])
        return [row.result() for row in rows]

    def _complete(self, rows: Sequence[_Row]) -> None:
        """Complete rows in one batch."""
        live, batch, logits = self._start(rows)
        while True:
            logprobs = logits.float().log_softmax(-1)  # (live rows, V)
            new = [row.decoder.advance(p) for row, p in zip(live, logprobs, strict=True)]
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

    def _start(self, rows: Sequence[_Row]) -> tuple[list[_Row], Batch, torch.Tensor]:
        """The rows in another order, as a batch to go on from, and the logits (B, V) after their prompts."""
        known = {row: self.cache.longest(tuple(row.ids)) for row in rows}
        skip = {row: 0 if kv is None else tokens_of(kv) for row, kv in known.items()}
        rows = sorted(rows, key=lambda row: skip[row] - len(row.ids))  # most tokens to compute first
        total = [row.total for row in rows]
        if len(self._leaders([row.ids for row in rows], [skip[row] for row in rows])) == len(rows):
            batch = Batch(self.model, self.memory, [known[row] for row in rows], total)
            logits, cached = self._feed(batch, [row.ids[skip[row]:] for row in rows]), [skip[row] for row in rows]
        else:
            kvs, logits, cached = self.prefill([row.ids for row in rows])
            batch = Batch(self.model, self.memory, kvs, total)
        for row, n in zip(rows, cached, strict=True):
            row.cached_tokens = n
        return rows, batch, logits

    def _feed(self, batch: Batch, todo: Sequence[list[int]]) -> torch.Tensor:
        """Append new tokens to a batch's rows, most tokens first.  Returns the logits (B, V) after them.

        Where that saves padding the beginnings of the long ones have a pass of their own.
        """
        counts = list(map(len, todo))

        def padded(width: int) -> int:
            return sum(n > width for n in counts) * (counts[0] - width) + width * len(counts)

        width = min(counts, key=padded)
        if padded(width) + self.pass_tokens < padded(counts[0]):
            self._feed(batch, [ids[:-width] for ids in todo if len(ids) > width])
            todo = [ids[-width:] for ids in todo]
        return batch.forward(todo)[:, -1]

    def prefill(self, prompts: Sequence[list[int]]) -> tuple[list[KV], torch.Tensor, list[int]]:
        """Compute prompts, each distinct one once: their KV, the logits (B, V) after them, cached tokens."""
        rows: dict[tuple[int, ...], KV] = {}
        logits: dict[tuple[int, ...], torch.Tensor] = {}
        skipped: dict[tuple[int, ...], int] = {}
        left = list(dict.fromkeys(map(tuple, prompts)))
        while left:
            known = {ids: self.cache.longest(ids) for ids in left}
            skip = [0 if kv is None else tokens_of(kv) for kv in known.values()]
            wave = [left[i] for i in self._leaders(left, skip)]
            for ids, n in zip(left, skip, strict=True):
                skipped[ids] = n
            todo = [ids[skipped[ids]:] for ids in wave]
            for group in self._groups([len(ids) for ids in todo], [len(ids) for ids in wave]):
                group.reverse()  # most tokens first
                chosen = [wave[i] for i in group]
                batch = Batch(self.model, self.memory, [known[ids] for ids in chosen], list(map(len, chosen)))
                last = self._feed(batch, [todo[i] for i in group])
                for j, (ids, kv) in enumerate(zip(chosen, batch.rows(range(len(chosen))), strict=True)):
                    rows[ids], logits[ids] = kv, last[j]
                    self.cache.put(ids, kv)
            left = [ids for ids in left if ids not in rows]
        cached = []
        for ids in map(tuple, prompts):
            cached.append(skipped[ids])
            skipped[ids] = len(ids)  # the same prompt again costs nothing
        keys = [tuple(ids) for ids in prompts]
        return [rows[k] for k in keys], torch.stack([logits[k] for k in keys]), cached

    def _leaders(self, prompts: Sequence[Sequence[int]], skip: Sequence[int]) -> list[int]:
        """Indices of the prompts to compute now.

        Of those that go on alike for WORTH tokens behind what is known the longest goes first, since the
        others will find their beginnings in it.
        """
        first: dict[tuple, int] = {}
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            ids, known = prompts[i], skip[i]
            whole = tuple(ids[:known + WORTH]) if len(ids) >= known + WORTH else tuple(ids)
            first.setdefault(whole, i)
        return sorted(first.values())

    @torch.inference_mode()
    def control(self, prompts: Sequence[list[int]]) -> list[Control]:
        """What the heads read at the end of each prompt."""
        answers: list[Control | None] = [None] * len(prompts)
        known = [self.cache.longest(tuple(ids)) for ids in prompts]
        skip = [0 if kv is None else tokens_of(kv) for kv in known]
        todo = [ids[n:] for ids, n in zip(prompts, skip, strict=True)]
        for group in self._groups(list(map(len, todo)), list(map(len, prompts))):
            batch = Batch(self.model, self.memory, [known[i] for i in group], [len(prompts[i]) for i in group])
            k_logits, values = self.heads(batch.hidden([todo[i] for i in group]))  # (B, K_max + 1), (B,)
            k_logprobs = k_logits.float().log_softmax(-1)
            for j, (i, kv) in enumerate(zip(group, batch.rows(range(len(group))), strict=True)):
                self.cache.put(prompts[i], kv)
                answers[i] = Control(tuple(k_logprobs[j].tolist()), float(values[j]), len(prompts[i]), skip[i])
        return answers

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
            batch = Batch(self.model, self.memory, [rows[i] for i in chosen],
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
        """Row indices in batches: alike in length, so that padding stays small, and within the budget.

        ``new``: tokens of a row to be computed side by side; ``total``: those it occupies.
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
        """Could a stop string end with this token?  Saves decoding the text at every token."""
        if (stop, token) not in self._ends:
            text = self.tokenizer.decode([token])
            self._ends[stop, token] = any(s[-1] in text for s in stop)
        return self._ends[stop, token]


class _Row:
    """A request on its way; ``ids`` are its tokens so far."""

    def __init__(self, request: Request, engine: Engine) -> None:
        self.ids = list(request.ids)
        self.prompt_tokens, self.cached_tokens = len(request.ids), 0
        self.decoder: Decoder = _Choose(request) if request.choices else _Sample(request, engine)
        longest = max(map(len, request.choices)) if request.choices else request.params.max_new_tokens
        self.total = len(request.ids) + longest
        """Tokens that it will have at most."""

    def result(self) -> Generation:
        return self.decoder.result(self.prompt_tokens, self.cached_tokens)


class _Sample:
    """Greedy or sampled tokens until a stop string, an end token, or the limit."""

    def __init__(self, request: Request, engine: Engine) -> None:
        self.params, self.engine = request.params, engine
        self.draw = random.Random(request.seed)
        self.tokens: list[int] = []
        self.allowed: list[tuple[int, ...] | None] = []
        self.logprob, self.traced_logprob = 0.0, 0.0
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
            token = int(logprobs.argmax())
            self.allowed.append((token,))
            return token
        probs, order = (logprobs / self.params.temperature).softmax(-1).double().sort(descending=True, stable=True)
        # In falling order, what rounding adds to the nucleus or takes from it stands at its end and moves no other.
        before = probs.cumsum(-1) - probs
        kept = int((before < self.params.top_p).sum())  # always at least the most likely token
        cumulative = probs[:kept].cumsum(-1)
        draw = torch.tensor(self.draw.random() * float(cumulative[-1]), dtype=torch.double, device=probs.device)
        at = min(int(torch.searchsorted(cumulative, draw, right=True)), kept - 1)
        if self.params.trace:
            self.allowed.append(tuple(order[:kept].tolist()) if self.params.top_p < 1 else None)
            self.traced_logprob += float((probs[at] / cumulative[-1]).log())
        return int(order[at])

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        trace = None
        if self.params.trace:
            trace = Trace(tuple(self.tokens), tuple(self.allowed), self.params.temperature, self.traced_logprob)
        return Generation(self.text, prompt_tokens, len(self.tokens), cached, self.finish_reason, self.logprob, trace)


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
        self.options: dict[int, tuple[int, ...]] = {}
        """What was to be chosen from, by depth."""
        self.logprob, self.traced_logprob = 0.0, 0.0

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        fed = self._forced() if self.depth == 0 else []
        if fed:
            # A common beginning of all choices: these logits are about its first token, not about a choice.
            return fed
        if len(self.left) > 1:
            options = sorted({self.choices[c][self.depth] for c in self.left})
            allowed = logprobs[options].log_softmax(-1)
            picked = self._pick(allowed)
            self.options[self.depth] = tuple(options)
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
        drawn_from = (logprobs / self.params.temperature).log_softmax(-1)
        picked = self.draw.choices(range(len(drawn_from)), drawn_from.exp().tolist())[0]
        self.traced_logprob += float(drawn_from[picked])
        return picked

    def result(self, prompt_tokens: int, cached: int) -> Generation:
        chosen = self.left[0]
        ids, trace = self.choices[chosen], None
        if self.params.trace:
            # A greedy choice is no draw: it has probability 1, like a forced token.
            options = self.options if self.params.temperature else {}
            allowed = tuple(options.get(depth, (token,)) for depth, token in enumerate(ids))
            trace = Trace(tuple(ids), allowed, self.params.temperature, self.traced_logprob)
        return Generation(self.params.choices[chosen], prompt_tokens, len(ids), cached, "stop", self.logprob, trace)
