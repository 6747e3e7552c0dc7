"""A Hugging Face model in this process: requests of concurrent episodes become batches.

Coroutines only queue what they want.  One worker per model takes everything that waits, runs it as a
batch in a thread, and hands the answers out.  When it starts is what makes batches full: see Quorum.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itp.lm.base import GenParams, Generation, TokenLogprobs, record
from itp.runtime import UserError, derive_seed

log = logging.getLogger(__name__)


class Quorum:
    """Counts the live episodes and how many of them wait for a model.

    A model starts its batch when every live episode waits for some model, since then nobody can still
    join; or after ``patience_s``, when an environment is slow.  Shared by the models of a run.  Models on
    one device take turns (``turn``): while one computes, the other's requests gather into a fuller batch.
    """

    def __init__(self, patience_s: float = 0.05) -> None:
        self.patience_s = patience_s
        self.live = 0
        self.waiting = 0
        self.changed = asyncio.Event()
        self._turns: dict[str, asyncio.Lock] = {}

    def turn(self, device: str) -> asyncio.Lock:
        return self._turns.setdefault(device, asyncio.Lock())

    def add(self, live: int = 0, waiting: int = 0) -> None:
        self.live += live
        self.waiting += waiting
        self.changed.set()

    async def complete(self) -> None:
        """Return when everyone waits, or when patience is over."""
        deadline = time.monotonic() + self.patience_s
        await asyncio.sleep(0)  # let the coroutines that are ready put their requests first
        while self.waiting < self.live and (left := deadline - time.monotonic()) > 0:
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), left)
            except asyncio.TimeoutError:  # an alias of TimeoutError since Python 3.11
                return


@dataclass
class _Job:
    work: Any
    answer: asyncio.Future


class LocalLM:
    """The LM contract on a loaded model.  Build with :meth:`load`."""

    def __init__(self, model, tokenizer, *, name: str, role: str = "policy",
                 quorum: Quorum | None = None, max_batch_tokens: int = 16384, cache_bytes: int = 256 << 20) -> None:
        from itp.lm.decoding import Engine

        self.name, self.role = name, role
        self.model, self.tokenizer = model, tokenizer
        self.quorum = quorum or Quorum()
        self.engine = Engine(model, tokenizer, max_batch_tokens=max_batch_tokens, cache_bytes=cache_bytes)
        # Not every family has a limit.
        self.context_length: int | None = getattr(model.config, "max_position_embeddings", None)
        # What the tokenizer puts before a text (Llama's BOS), found out rather than looked up.
        self._start = tokenizer.encode("", add_special_tokens=True)[:1] if tokenizer.bos_token_id is not None else []
        self._start = [i for i in self._start if i == tokenizer.bos_token_id]
        self.busy_s = 0.0
        self.batches: list[int] = []
        """Rows of every batch so far: its mean is the occupancy."""
        self._jobs: list[_Job] = []
        self._worker: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"lm-{name}")

    @classmethod
    def load(cls, path: str, *, device: str = "cpu", dtype: str = "fp32", **options: Any) -> LocalLM:
        """Load a model folder (or hub name) for inference on ``device`` in ``dtype`` (fp16, bf16, fp32)."""
        from itp.runtime import load_causal_lm

        model, tokenizer = load_causal_lm(path, device=device, dtype=dtype)
        return cls(model, tokenizer, name=Path(path).name, **options)

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        from itp.lm.decoding import Request

        choices = [self._encode(c) for c in params.choices]
        _check_choices(choices, params.choices)
        requests = []
        for i, prompt in enumerate(prompts):
            ids = self._encode(prompt, start=True)
            longest = max(map(len, choices)) if choices else params.max_new_tokens
            self._check_fits(len(ids), longest)
            requests.append(Request(ids, params, derive_seed(params.seed, i) if i else params.seed, choices))
        answers = await self._enqueue([("generate", r) for r in requests])
        record(self.role, answers)
        return answers

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        work = []
        for context, completion in pairs:
            ids = self._encode(context, start=True), self._encode(completion)
            self._check_fits(*map(len, ids))
            work.append(("score", ids))
        answers = await self._enqueue(work)
        record(self.role, answers)
        return answers

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown(wait=True)

    def _encode(self, text: str, start: bool = False) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [*self._start, *ids] if start else ids

    def _check_fits(self, prompt: int, completion: int) -> None:
        if self.context_length and prompt + completion > self.context_length:
            raise UserError(
                f"{self.name}: a prompt of {prompt} tokens and {completion} new ones exceed its context of "
                f"{self.context_length}; keep less history (--history_keep_steps)"
            )

    async def _enqueue(self, work: list[Any]) -> list[Any]:
        if not work:
            return []
        loop = asyncio.get_running_loop()
        jobs = [_Job(w, loop.create_future()) for w in work]
        self._jobs += jobs
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._serve())
        self.quorum.add(waiting=1)
        try:
            return list(await asyncio.gather(*(job.answer for job in jobs)))
        finally:
            self.quorum.add(waiting=-1)

    async def _serve(self) -> None:
        """Run batches until nobody waits any more."""
        loop = asyncio.get_running_loop()
        while self._jobs:
            async with self.quorum.turn(str(self.model.device)):
                await self.quorum.complete()
                jobs, self._jobs = self._jobs, []
                start = time.monotonic()
                for kind, run in (("generate", self.engine.generate), ("score", self.engine.score)):
                    chosen = [job for job in jobs if job.work[0] == kind]
                    if chosen:
                        await self._answer(loop, run, chosen)
                self.busy_s += time.monotonic() - start
                for _ in range(4):
                    await asyncio.sleep(0)  # those who were answered stop waiting before the next turn is taken

    async def _answer(self, loop: asyncio.AbstractEventLoop, run: Callable[[list], list], jobs: list[_Job]) -> None:
        self.batches.append(len(jobs))
        running = loop.run_in_executor(self._thread, run, [job.work[1] for job in jobs])
        await asyncio.wait([running])
        error = running.exception()
        for i, job in enumerate(jobs):
            if job.answer.done():  # its episode was cancelled meanwhile
                continue
            if error is not None:  # it belongs to those who wait for the answer
                job.answer.set_exception(error)
            else:
                job.answer.set_result(running.result()[i])


def _check_choices(ids: list[list[int]], texts: tuple[str, ...]) -> None:
    by_ids = {tuple(i): text for i, text in zip(ids, texts, strict=True)}
    if len(by_ids) < len(texts):
        same = [text for i, text in zip(ids, texts, strict=True) if by_ids[tuple(i)] != text]
        raise UserError(f"the tokenizer writes {same[0]!r} like another admissible action, for want of a word; "
                        "use --action_selection generate, or a model whose tokenizer knows these games")
    for key, text in by_ids.items():
        for n in range(1, len(key)):
            if key[:n] in by_ids:
                raise ValueError(f"choice {by_ids[key[:n]]!r} is the beginning of {text!r}: end them with a line break")
