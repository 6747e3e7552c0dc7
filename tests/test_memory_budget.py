"""How much models may compute at a time and remember; that the cache counts memory; that two devices work at once."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from transformers import GPT2Config, Qwen2Config

from itp.devices import free_bytes
from itp.lm.base import GenParams, metered
from itp.lm.kv_cache import PrefixCache, beginning
from itp.lm.local import LocalLM
from itp.lm.memory_budget import BATCH_TOKENS, CACHE_BYTES, EngineFlags, split_share, token_bytes
from itp.lm.scheduler import BatchBarrier
from tests.tiny import write_tiny_model

GB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_what_is_free_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16 * GB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert free_bytes("cuda:1") == 54 * GB and free_bytes("cpu") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # so that two of them are on one GPU
    assert free_bytes("cuda:1") == 27 * GB


def test_room_by_hand() -> None:
    assert split_share(10 * GB, 1 << 20) == (4 * GB, 4096)
    assert split_share(1000, 1 << 20) == (400, 2048)
    qwen = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4)
    assert token_bytes(qwen, 2) == 57344 + 57344 // 4 + 2 * (8 * 3584 + 4 * 18944)
    assert token_bytes(GPT2Config(n_embd=8, n_layer=3, n_head=2), 4) == 4 * (48 + 12 + 64 + 4 * 32)


def sizes(lm: LocalLM) -> tuple[int, int]:
    return lm.engine.cache.max_bytes, lm.engine.max_batch_tokens


def ask(*lms: LocalLM) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(lm.generate(["Task: look\nAction:"], GenParams(max_new_tokens=2)) for lm in lms))

    asyncio.run(all_of_them())


def test_models_of_one_gpu_share_it_once_all_are_loaded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, asked = BatchBarrier(), []

    def free(device: str) -> int:
        asked.append(device)
        return 10 * GB

    policy = LocalLM.load(folder, barrier=barrier)
    wm = LocalLM.load(folder, barrier=barrier, role="world_model", cache_bytes=GB, fit_cache=False)
    assert sizes(policy) == (CACHE_BYTES, BATCH_TOKENS) and sizes(wm) == (GB, BATCH_TOKENS)
    monkeypatch.setattr("itp.lm.scheduler.free_bytes", free)
    ask(policy, wm)
    # Two layers with two heads of 8, 32 wide, 64 within: 4 (64 + 16 + 256 + 256) bytes a token.
    assert sizes(policy) == (2 * GB, 2 * GB // 2368) and sizes(wm) == (GB, 2 * GB // 2368)
    ask(policy, wm)
    assert asked == ["cpu"]  # once
    held = policy.engine.cache.bytes + wm.engine.cache.bytes
    third = LocalLM.load(folder, barrier=barrier, cache_bytes=5, max_batch_tokens=7, fit_batch=False, fit_cache=False)
    ask(third)
    assert held and sizes(policy)[0] == int((10 * GB + held) // 3 * 0.8) // 2 and sizes(third) == (5, 7)


def test_on_a_cpu_sizes_are_fixed(folder: str) -> None:
    lm = LocalLM.load(folder, **EngineFlags().engine)
    ask(lm)
    assert sizes(lm) == (CACHE_BYTES, BATCH_TOKENS)


def test_flags_win() -> None:
    assert EngineFlags().engine == {"cache_bytes": CACHE_BYTES, "max_batch_tokens": BATCH_TOKENS, "fit_cache": True,
                                    "fit_batch": True, "cuda_graphs": True}
    given = EngineFlags(cache_gb=2.0, max_batch_tokens=9, cuda_graphs=False)
    assert given.engine == {"cache_bytes": 2 * GB, "max_batch_tokens": 9, "fit_cache": False, "fit_batch": False,
                            "cuda_graphs": False}
    assert EngineFlags(cache_gb=2.0).engine["fit_batch"] and not EngineFlags().fixed_engine["fit_batch"]


def segment(tokens: int) -> torch.Tensor:
    """256 bytes a token."""
    return torch.zeros(2, 2, 2, tokens, 8)


def held(cache: PrefixCache) -> int:
    """Bytes of all memory that its rows keep alive, found from the rows themselves."""
    memories = [segment.untyped_storage() for kv, _ in cache._rows.values() for segment in kv]
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())


def test_the_cache_counts_the_memory_that_it_keeps_alive() -> None:
    cache = PrefixCache(256 * 200)
    long = (segment(100),)
    cache.put(range(100), long)
    for i in range(3):  # each begins like the long one, and keeps all of it alive
        cache.put([*range(16), *range(1000 * (i + 1), 1000 * (i + 1) + 10)], (*beginning(long, 16), segment(10)))
    assert cache.bytes == held(cache) == 256 * 130  # what is shared counts once
    del long
    cache.put(range(5000, 5060), (segment(60),))  # 190
    cache.put(range(6000, 6020), (segment(20),))  # 210: the long row goes, its memory stays, so another goes
    assert cache.bytes == held(cache) == 256 * 200 and len(cache._rows) == 4
    assert cache.longest((*range(6000, 6020), 1)) is not None
    cache.resize(256 * 20)
    assert cache.bytes == held(cache) == 256 * 20
    cache.put(range(6000, 6020), (segment(20),))  # in its own place
    assert cache.bytes == held(cache) == 256 * 20
    cache.clear()
    assert cache.bytes == held(cache) == 0


@pytest.mark.parametrize("devices, together", [(("one", "other"), True), (("one", "one"), False)])
def test_models_on_two_devices_work_at_the_same_time(folder: str, monkeypatch: pytest.MonkeyPatch,
                                                     devices: tuple[str, str], together: bool) -> None:
    """Of two episodes one asks the policy, the other the world model: each computes until the other does, too."""
    barrier = BatchBarrier()
    scheduler, named = barrier.scheduler, iter(devices)
    monkeypatch.setattr(barrier, "scheduler", lambda device: scheduler(next(named)))
    lms = [LocalLM.load(folder, role=role, barrier=barrier) for role in ("policy", "world_model")]
    at_work = [threading.Event(), threading.Event()]
    met: list[bool] = []
    for i, lm in enumerate(lms):
        def generate(requests, i: int = i, answer=lm.engine.generate):
            at_work[i].set()
            met.append(at_work[1 - i].wait(30 if together else 0.2))
            return answer(requests)

        monkeypatch.setattr(lm.engine, "generate", generate)

    async def episode(i: int) -> str:
        with metered():
            answer, = await lms[i].generate(["Task: look\nAction:"], GenParams(max_new_tokens=2))
        return answer.text

    async def episodes() -> list[str]:
        barrier.add(live=2)
        return await asyncio.gather(episode(0), episode(1))

    first, second = asyncio.run(episodes())
    assert first == second  # the same model
    assert met == ([True, True] if together else [False, True])
