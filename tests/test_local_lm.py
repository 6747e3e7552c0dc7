"""The local LM against plain Transformers: batches, prefixes, choices, stop strings and seeds change nothing."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from itp.errors import UserError
from itp.lm.base import GenParams, metered
from itp.lm.kv_cache import KVBatch
from itp.lm.local import LocalLM
from itp.lm.scheduler import BatchBarrier
from tests.tiny import write_tiny_model

STATE = ("Task: put a clean plate in fridge\nObservation: You are in the middle of a room. Looking quickly around "
         "you, you see a cabinet 1, a fridge 1, and a desk 2.")
STEP = "\nAction: go to cabinet 1\nObservation: You arrive at cabinet 1. The cabinet 1 is closed."
PROMPTS = [STATE + "\nAction:", STATE + STEP + "\nAction:", STATE + 3 * STEP + "\nAction:", "Task: look\nAction:",
           STATE + STEP + "\nAction: open cabinet 1\nObservation:"]
CHOICES = (" go to cabinet 1\n", " go to desk 2\n", " open cabinet 1\n", " take plate 1 from cabinet 1\n",
           " take mug 2 from cabinet 1\n", " look\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def lm(folder: Path) -> LocalLM:
    return LocalLM.load(str(folder))


def run(coroutine):
    return asyncio.run(coroutine)


def slow_logprobs(lm: LocalLM, context: str, completion: str) -> list[float]:
    """Token log-probabilities by one plain forward pass without padding or cache."""
    a, b = (lm.tokenizer.encode(t, add_special_tokens=False) for t in (context, completion))
    with torch.no_grad():
        logits = lm.model(torch.tensor([a + b])).logits[0].log_softmax(-1)
    return [float(logits[len(a) + i - 1, token]) for i, token in enumerate(b)]


def test_greedy_batches_equal_transformers_generate(lm: LocalLM) -> None:
    answers = run(lm.generate(PROMPTS, GenParams(max_new_tokens=12)))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([lm.tokenizer.encode(prompt, add_special_tokens=False)])
        expected = lm.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
        assert answer.text == lm.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.completion_tokens == len(expected)


@pytest.mark.parametrize("pass_tokens", [0, 1 << 20], ids=["many_passes", "one_pass"])
def test_passes_that_save_padding_change_nothing(folder: Path, lm: LocalLM, pass_tokens: int,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [run(LocalLM.load(str(folder)).generate([p], GenParams(max_new_tokens=8)))[0] for p in PROMPTS]
    shapes = []
    forward = KVBatch.forward

    def watched(batch: KVBatch, new, keep: int = 1):
        shapes.append((len(new), max(map(len, new))))
        return forward(batch, new, keep)

    monkeypatch.setattr(KVBatch, "forward", watched)
    monkeypatch.setattr("itp.lm.engine.MIN_SHARED_TOKENS", 1 << 20)  # or one of them would be computed after the other
    lm.engine.pass_tokens = pass_tokens
    answers = run(lm.generate(PROMPTS, GenParams(max_new_tokens=8)))
    assert [a.text for a in answers] == [a.text for a in alone]
    assert [a.logprob for a in answers] == pytest.approx([a.logprob for a in alone], abs=1e-5)
    begun = [rows for rows, width in shapes if width > 1]
    assert begun[-1] == 5  # all rows
    assert (len(begun) > 1) == (pass_tokens == 0)


def test_cached_prefixes_change_nothing(folder: Path, lm: LocalLM) -> None:
    fresh = [run(LocalLM.load(str(folder)).generate([p], GenParams(max_new_tokens=8)))[0] for p in PROMPTS]

    async def one_after_the_other():
        return [(await lm.generate([p], GenParams(max_new_tokens=8)))[0] for p in PROMPTS]

    answers = run(one_after_the_other())
    assert [a.text for a in answers] == [a.text for a in fresh]
    assert [a.logprob for a in answers] == pytest.approx([a.logprob for a in fresh], abs=1e-5)
    assert fresh[1].cached_tokens == 0 < answers[1].cached_tokens < answers[1].prompt_tokens
    long = answers[2]
    assert long.cached_tokens >= len(lm.tokenizer.encode(STATE + STEP)) - 1  # all that the second prompt had


def test_loglikelihood_equals_plain_forward_passes(lm: LocalLM) -> None:
    pairs = [(p, c) for p in PROMPTS for c in CHOICES]
    scores = run(lm.loglikelihood(pairs))
    for (context, completion), score in zip(pairs, scores, strict=True):
        assert score.logprobs == pytest.approx(slow_logprobs(lm, context, completion), abs=1e-5)
    computed = sum(s.prompt_tokens - s.cached_tokens for s in scores)
    encode = lm.tokenizer.encode
    once = sum(len(encode(p)) for p in PROMPTS) + len(PROMPTS) * sum(len(encode(c)) for c in CHOICES)
    assert computed <= once  # a context that six completions share is computed once


def test_choices_have_exact_normalised_probabilities(lm: LocalLM) -> None:
    """The chance of a choice is the product over branchings of p(token) / p(tokens that could follow)."""
    ids = [lm.tokenizer.encode(c, add_special_tokens=False) for c in CHOICES]

    def by_hand(chosen: int) -> float:
        total, left = 0.0, range(len(ids))
        for depth in itertools.count():
            if len(left) == 1:
                return total
            options = sorted({ids[c][depth] for c in left})
            context = lm.tokenizer.encode(PROMPTS[1], add_special_tokens=False) + ids[chosen][:depth]
            with torch.no_grad():
                logits = lm.model(torch.tensor([context])).logits[0, -1, options].log_softmax(-1)
            total += float(logits[options.index(ids[chosen][depth])])
            left = [c for c in left if ids[c][depth] == ids[chosen][depth]]

    assert sum(math.exp(by_hand(c)) for c in range(len(ids))) == pytest.approx(1, abs=1e-5)
    drawn = set()
    for seed in range(40):
        answer, = run(lm.generate([PROMPTS[1]], GenParams(temperature=1.0, choices=CHOICES, seed=seed)))
        assert answer.logprob == pytest.approx(by_hand(CHOICES.index(answer.text)), abs=1e-4)
        drawn.add(answer.text)
    assert len(drawn) > 1


def test_choices_that_cannot_be_told_apart_are_refused(lm: LocalLM) -> None:
    with pytest.raises(ValueError, match="beginning"):
        run(lm.generate(["Task: look\nAction:"], GenParams(choices=(" look", " look\n"))))


def test_sampling_depends_on_the_seed_and_not_on_the_company(lm: LocalLM) -> None:
    params = [GenParams(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=s) for s in range(6)]

    async def together():
        return await asyncio.gather(*(lm.generate([PROMPTS[s % 5]], p) for s, p in enumerate(params)))

    alone = [run(lm.generate([PROMPTS[s % 5]], p))[0].text for s, p in enumerate(params)]
    assert [a[0].text for a in run(together())] == alone
    same_prompt = {run(lm.generate([PROMPTS[0]], p))[0].text for p in params}
    assert len(same_prompt) > 1


def test_top_p_keeps_the_likeliest_tokens_only(lm: LocalLM) -> None:
    greedy = run(lm.generate(PROMPTS, GenParams(max_new_tokens=6)))
    tight = run(lm.generate(PROMPTS, GenParams(max_new_tokens=6, temperature=1.0, top_p=1e-6, seed=3)))
    assert [a.text for a in tight] == [a.text for a in greedy]


def test_a_stop_string_ends_decoding(lm: LocalLM) -> None:
    free, = run(lm.generate([PROMPTS[0]], GenParams(max_new_tokens=30)))
    word = free.text.split()[3]
    answer, = run(lm.generate([PROMPTS[0]], GenParams(max_new_tokens=30, stop=(word,))))
    assert answer.text == free.text[:free.text.index(word)]
    assert answer.finish_reason == "stop"
    assert answer.completion_tokens < free.completion_tokens


def test_concurrent_requests_share_batches_and_are_metered(lm: LocalLM) -> None:
    async def episodes():
        async def one(i: int):
            with metered() as usage:
                await lm.generate([PROMPTS[i % 5]], GenParams(max_new_tokens=4))
                return usage["policy"]
        lm.barrier.add(live=8)
        return await asyncio.gather(*(one(i) for i in range(8)))

    usages = run(episodes())
    assert lm.batches == [8]
    assert [u.calls for u in usages] == [1] * 8
    assert usages[0].prompt_tokens == len(lm.tokenizer.encode(PROMPTS[0]))


def test_an_episode_with_several_requests_waits_for_the_others(lm: LocalLM) -> None:
    async def episodes():
        async def one(i: int):
            with metered():
                await asyncio.sleep(0.005 * i)  # within the barrier's patience
                await asyncio.gather(*(lm.generate([PROMPTS[j]], GenParams(max_new_tokens=2)) for j in range(4)))
        lm.barrier.add(live=2)
        await asyncio.gather(one(0), one(1))

    run(episodes())
    assert lm.batches == [8]


@pytest.mark.parametrize("imagine, turns", [
    (4, [("policy", 8), ("policy", 8), ("policy", 4), ("policy", 4), ("world_model", 8)]),
    (6, [("policy", 8), ("policy", 8), ("world_model", 6), ("policy", 2), ("policy", 2), ("world_model", 2)])])
def test_the_world_model_waits_until_two_thirds_want_it(folder: Path, imagine: int, turns: list) -> None:
    barrier = BatchBarrier()
    policy, world_model = (LocalLM.load(str(folder), role=role, barrier=barrier) for role in ("policy", "world_model"))
    order = []

    async def episode(i: int, imagines: bool) -> None:
        params = GenParams(max_new_tokens=1)
        with metered():
            for _ in range(2 if imagines else 4):
                await policy.generate([PROMPTS[i % 5]], params)
            await world_model.generate([PROMPTS[i % 5]], params)

    def noting(lm: LocalLM):
        answer = lm.run_batch

        async def run_batch() -> None:
            order.append((lm.role, lm.waiting_prompts))
            await answer()
        return run_batch

    for lm in (policy, world_model):
        lm.run_batch = noting(lm)

    async def episodes() -> None:
        barrier.add(live=8)
        await asyncio.gather(*(episode(i, imagines=i < imagine) for i in range(8)))

    run(episodes())
    assert order == turns


def test_a_prompt_that_does_not_fit_is_refused(lm: LocalLM) -> None:
    with pytest.raises(UserError, match="exceed its context of 2048"):
        run(lm.generate([STATE + 200 * STEP], GenParams()))


def test_a_prompt_that_does_not_fit_is_its_own_error_alone(lm: LocalLM) -> None:
    params, long = GenParams(max_new_tokens=6), STATE + 200 * STEP
    expected = [answer.text for answer in run(lm.generate(PROMPTS, params))]

    asked = [*PROMPTS[:2], long, *PROMPTS[2:]]
    answers = run(_gathered(lm.generate([prompt], params) for prompt in asked))
    assert lm.batches[-1] == len(PROMPTS) + 1
    assert isinstance(answers.pop(2), UserError)
    assert [answer.text for answer, in answers] == expected
    scores = run(_gathered(lm.loglikelihood([(prompt, CHOICES[0])]) for prompt in (PROMPTS[0], long)))
    assert scores[0][0].logprobs == pytest.approx(slow_logprobs(lm, PROMPTS[0], CHOICES[0]), abs=1e-5)
    assert isinstance(scores[1], UserError)


async def _gathered(coroutines) -> list:
    return await asyncio.gather(*coroutines, return_exceptions=True)


def test_an_error_in_a_batch_reaches_those_who_wait(lm: LocalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(requests):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lm.engine, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(lm.generate(PROMPTS, GenParams()))


def test_an_error_before_a_batch_reaches_those_who_wait(lm: LocalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("itp.lm.scheduler.free_bytes", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        run(asyncio.wait_for(lm.generate([PROMPTS[0]], GenParams()), 10))


def drawn_logprob(lm: LocalLM, prompt: str, answer) -> float:
    """The log-probability of a traced draw, from plain forward passes: what the trace says of itself."""
    context = lm.tokenizer.encode(prompt, add_special_tokens=False)
    with torch.no_grad():
        logits = lm.model(torch.tensor([context + list(answer.trace.token_ids)])).logits[0, len(context) - 1:]
    total = 0.0
    for row, token, allowed in zip(logits, answer.trace.token_ids, answer.trace.allowed, strict=False):
        ids = list(range(len(row))) if allowed is None else list(allowed)
        total += float((row[ids] / answer.trace.temperature).log_softmax(-1)[ids.index(token)])
    return total


@pytest.mark.parametrize("params", [
    GenParams(choices=CHOICES), GenParams(max_new_tokens=9, top_p=0.6), GenParams(max_new_tokens=9)],
    ids=["choices", "nucleus", "free"])
def test_a_trace_says_what_each_token_was_drawn_from(lm: LocalLM, params: GenParams) -> None:
    for seed in range(6):
        answer, = run(lm.generate([PROMPTS[2]], replace(params, temperature=0.7, seed=seed, trace=True)))
        assert answer.trace.logprob == pytest.approx(drawn_logprob(lm, PROMPTS[2], answer), abs=1e-4)
        assert answer.trace.logprob < 0
        assert lm.tokenizer.decode(answer.trace.token_ids, skip_special_tokens=True).strip() == answer.text.strip()
    greedy, = run(lm.generate([PROMPTS[2]], replace(params, trace=True)))
    assert greedy.trace.logprob == 0 and all(len(ids) == 1 for ids in greedy.trace.allowed)


def test_what_candidates_share_is_computed_once_within_one_call(lm: LocalLM) -> None:
    """Foresights of growing length behind one state, as pseudo-labels are scored."""
    state = STATE + 4 * STEP
    contexts = [state + k * "\nIf: look\nThen: You arrive at desk 2." + "\nAction:" for k in range(4)]
    scores = run(lm.loglikelihood([(c, CHOICES[0]) for c in contexts]))
    for context, score in zip(contexts, scores, strict=True):
        assert score.logprobs == pytest.approx(slow_logprobs(lm, context, CHOICES[0]), abs=1e-5)
    computed = [s.prompt_tokens - s.cached_tokens for s in scores]
    assert computed[3] == scores[3].prompt_tokens  # the longest is computed, the others find themselves in it
    assert sum(computed) < 1.5 * computed[3]


def test_heads_read_the_last_hidden_state_and_generation_goes_on_from_there(lm: LocalLM) -> None:
    torch.manual_seed(1)
    k_head, v_head = torch.nn.Linear(32, 4), torch.nn.Linear(32, 1)
    lm.engine.heads = lambda hidden: (k_head(hidden), v_head(hidden)[:, 0])
    readings = run(lm.read_heads(PROMPTS))
    for prompt, reading in zip(PROMPTS, readings, strict=True):
        ids = torch.tensor([lm.tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.no_grad():
            hidden = lm.model(ids, output_hidden_states=True).hidden_states[-1][:, -1]
            assert reading.k_logprobs == pytest.approx(k_head(hidden).log_softmax(-1)[0].tolist(), abs=1e-5)
            assert reading.value == pytest.approx(float(v_head(hidden)), abs=1e-5)
    answer, = run(lm.generate([PROMPTS[2] + " open"], GenParams(max_new_tokens=2)))
    assert answer.cached_tokens == readings[2].prompt_tokens
    assert readings[0].choose_k(2, None) == max(range(3), key=readings[0].k_logprobs.__getitem__)
    assert len({readings[0].choose_k(3, seed) for seed in range(60)}) > 1


def test_without_heads_there_is_nothing_to_read(lm: LocalLM) -> None:
    with pytest.raises(UserError, match="no heads"):
        run(lm.read_heads(PROMPTS))


def test_reset_forgets_what_old_weights_computed(folder: Path, lm: LocalLM) -> None:
    run(lm.generate(PROMPTS, GenParams(max_new_tokens=4)))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1.3)
    lm.engine.reset()
    answer, = run(lm.loglikelihood([(PROMPTS[2], CHOICES[3])]))
    assert answer.cached_tokens == 0
    assert answer.logprobs == pytest.approx(slow_logprobs(lm, PROMPTS[2], CHOICES[3]), abs=1e-5)
