"""A Hugging Face model in this process: requests of concurrent episodes become batches.

Coroutines only queue their requests.  One worker per device takes all requests that wait for a model, runs them as a
batch in a thread, and delivers the answers.  :mod:`itp.lm.scheduler` decides when a batch starts and which model is
next, so that batches are full.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itp.errors import PromptTooLong, UserError
from itp.lm.base import GenParams, Generation, HeadOutputs, TokenLogprobs, asking, requester
from itp.lm.memory_budget import BATCH_TOKENS, CACHE_BYTES, split_share, token_bytes
from itp.lm.scheduler import BatchBarrier
from itp.seeding import derive_seed

log = logging.getLogger(__name__)
CALLS = ("read_heads", "score", "generate")
"""The engine's calls, in the order of their answers."""


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length",
                 "sliding_window")
"""The names of a context's length in the configurations of model families."""


@dataclass
class _Job:
    """One prompt for one of the engine's calls (read_heads, generate, score).

    ``work`` turns the prompt's token ids into the call's argument.  The model's thread tokenizes the prompt when the
    batch starts, outside the event loop.
    """

    call: str
    prompt: str
    work: Callable[[list[int]], Any]
    answer: asyncio.Future


class LocalLM:
    """The LM contract on a loaded model.  Build with :meth:`load`.

    ``heads`` (:data:`itp.lm.engine.Heads`) compute the outputs of :meth:`read_heads`.  ``fit_batch`` and ``fit_cache``:
    on a GPU, ``max_batch_tokens`` and ``cache_bytes`` follow from its free memory (:mod:`itp.lm.memory_budget`).
    """

    def __init__(self, model, tokenizer, *, name: str, role: str = "policy", heads=None,
                 barrier: BatchBarrier | None = None, max_batch_tokens: int = BATCH_TOKENS, max_batch_rows: int = 0,
                 cache_bytes: int = CACHE_BYTES, fit_batch: bool = True, fit_cache: bool = True,
                 cuda_graphs: bool = True) -> None:
        from itp.lm.engine import Engine

        self.name, self.role = name, role
        self.model, self.tokenizer = model, tokenizer
        self.barrier = barrier or BatchBarrier()
        self._fit_batch, self._fit_cache = fit_batch, fit_cache
        self.engine = Engine(model, tokenizer, heads=heads, max_batch_tokens=max_batch_tokens,
                             max_batch_rows=max_batch_rows, cache_bytes=cache_bytes, cuda_graphs=cuda_graphs)
        self.context_length = context_of(model.config)
        self.encode = self.engine.encode
        self.busy_s = 0.0
        self.batches: list[int] = []
        """The number of rows of every batch so far; the mean is the occupancy."""
        self._jobs: list[_Job] = []
        self._scheduler = self.barrier.scheduler(str(self.model.device))
        self._scheduler.join(self)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"lm-{name}")

    @classmethod
    def load(cls, path: str, *, device: str = "cpu", dtype: str = "fp32", **options: Any) -> LocalLM:
        """Load a model folder (or hub name) for inference on ``device`` in ``dtype`` (fp16, bf16, fp32)."""
        from itp.pretrained import load_causal_lm

        model, tokenizer = load_causal_lm(path, device=device, dtype=dtype)
        return cls(model, tokenizer, name=Path(path).name, **options)

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        from itp.lm.engine import Request

        choices = [self.encode.continuation(c) for c in params.choices]
        _check_choices(choices, params.choices)
        longest = max(map(len, choices)) if choices else params.max_new_tokens

        def request(ids: list[int], seed: int) -> Request:
            return Request(self._fitting(ids, longest), params, seed, choices)

        seeds = [derive_seed(params.seed, i) if i else params.seed for i in range(len(prompts))]
        return await self._submit("generate", prompts, [functools.partial(request, seed=seed) for seed in seeds])

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        def pair(ids: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
            return self._fitting(ids, len(completion)), completion

        work = [functools.partial(pair, completion=self.encode.continuation(completion)) for _, completion in pairs]
        return await self._submit("score", [context for context, _ in pairs], work)

    async def read_heads(self, prompts: Sequence[str]) -> list[HeadOutputs]:
        if self.engine.heads is None:
            raise UserError(f"{self.name}: this model has no heads to choose K with; train them with "
                            "`python -m itp.training.train_adaptive_k sft`, or choose another --k_policy")
        return await self._submit("read_heads", prompts, [self._fitting] * len(prompts))

    async def close(self) -> None:
        self._scheduler.leave(self)
        self._thread.shutdown(wait=True)

    def fit_memory(self, share: int) -> None:
        """Set the sizes of cache and batches for ``share`` bytes of the device."""
        config, width = self.model.config.get_text_config(), self.model.dtype.itemsize
        cache_bytes, batch_tokens = split_share(share, token_bytes(config, width))
        if self._fit_batch:
            self.engine.max_batch_tokens = batch_tokens
        if self._fit_cache:
            self.engine.cache.resize(cache_bytes)
        log.info("%s on %s: %.1f GB for computed prefixes, %d tokens a batch", self.name, self.model.device,
                 self.engine.cache.max_bytes / 2**30, self.engine.max_batch_tokens)

    def _fitting(self, ids: list[int], more: int = 0) -> list[int]:
        """``ids``, if the model's context holds them and ``more`` tokens; raises PromptTooLong otherwise."""
        if self.context_length and len(ids) + more > self.context_length:
            raise PromptTooLong(f"{self.name}: a prompt of {len(ids)} tokens and {more} new ones exceed its context of "
                                f"{self.context_length}; imagine fewer steps, or let answers be shorter")
        return ids

    async def _submit(self, call: str, prompts: Sequence[str], work: Sequence[Callable[[list[int]], Any]]) -> list[Any]:
        """The engine's answers to some prompts, from the next batch."""
        if not prompts:
            return []
        loop = asyncio.get_running_loop()
        jobs = [_Job(call, prompt, make, loop.create_future()) for prompt, make in zip(prompts, work, strict=True)]
        self._jobs += jobs
        self._scheduler.wake()
        with self.barrier.wait(requester()), asking(self.role) as answers:
            answers += await asyncio.gather(*(job.answer for job in jobs))
        return answers

    @property
    def waiting_prompts(self) -> int:
        """The number of prompts that wait for an answer."""
        return len(self._jobs)

    @property
    def cache_bytes_used(self) -> int:
        """The memory that its computed prefixes take now."""
        return self.engine.cache.bytes

    async def run_batch(self) -> None:
        """Answer all waiting requests of one kind of call."""
        # Heads are read first and alone, because the episodes with an answer can then join the next batch of actions.
        call = min((job.call for job in self._jobs), key=CALLS.index)
        jobs = [job for job in self._jobs if job.call == call]
        self._jobs = [job for job in self._jobs if job.call != call]
        start = time.monotonic()
        await self._answer(call, jobs)
        self.busy_s += time.monotonic() - start

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` for all waiting requests."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            if not job.answer.done():
                job.answer.set_exception(error)

    def _run(self, call: str, jobs: list[_Job]) -> list[Any]:
        """The answers to jobs of one kind, or a PromptTooLong in place of an answer.  Runs in the model's thread."""
        run: Callable[[list[Any]], list[Any]] = getattr(self.engine, call)
        work = [self._work(job) for job in jobs]
        fitting = [one for one in work if not isinstance(one, PromptTooLong)]
        answers = iter(run(fitting) if fitting else [])
        return [one if isinstance(one, PromptTooLong) else next(answers) for one in work]

    def _work(self, job: _Job) -> Any:
        try:
            return job.work([*self.encode.start, *self.encode(job.prompt)])
        except PromptTooLong as error:  # an error of this job alone, not of its batch
            return error

    async def _answer(self, call: str, jobs: list[_Job]) -> None:
        self.batches.append(len(jobs))
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, call, jobs)
        await asyncio.wait([running])
        failed = running.exception()  # the error goes to everyone who waits for an answer
        answers = [failed] * len(jobs) if failed is not None else running.result()
        for job, answer in zip(jobs, answers, strict=True):
            if job.answer.done():  # its episode was canceled meanwhile
                continue
            if isinstance(answer, BaseException):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)


def context_of(config: Any) -> int | None:
    """The tokens that a model's context holds; None where its family has no limit.

    The engine attends to all tokens, and so does a model with sliding attention within its window.  A model that also
    sees images has a configuration of its own for text.
    """
    known = vars(config.get_text_config())
    return min((known[name] for name in CONTEXT_NAMES if known.get(name)), default=None)


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
