"""OpenAILM against `transformers serve` with a random model."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from itp.lm.base import GenParams, Generation
from itp.lm.openai import OpenAILM
from itp.runtime import UserError
from tests.openai_client import KEY, KEY_ENV, ask, free_port

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)


@dataclass
class Served:
    """A tiny model in a folder, in this process, and behind `transformers serve`."""

    folder: Path
    port: int
    model: Any = None
    tokenizer: Any = None
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def start(self) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self.folder),
                   "--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def wait(self) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError(f"the server didn't start: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def greedy(self, text: str, n: int) -> str:
        ids = self.tokenizer(text, return_tensors="pt")
        made = self.model.generate(**ids, max_new_tokens=n, do_sample=False)
        return self.tokenizer.decode(made[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)

    def lm(self, **options: Any) -> OpenAILM:
        return OpenAILM(**{"model": str(self.folder), "base_url": self.url, "api_key_env": KEY_ENV, **options})


def save_tiny_model(folder: Path) -> None:
    """One token a character, so that texts, tokens and their counts can be told by eye.  Never ends by itself."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = string.ascii_letters + string.digits + " .,:<>"
    core = Tokenizer(models.WordLevel({"<unk>": 0} | {c: i + 1 for i, c in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(characters) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ))
    model.generation_config.do_sample = True  # without it, `transformers serve` is greedy at any temperature
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder)
    served = Served(folder, free_port())
    served.start()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        served.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        served.tokenizer = AutoTokenizer.from_pretrained(folder)
        served.wait()
        yield served
    finally:
        served.kill()


def test_greedy_completions_are_those_of_the_model_itself(served: Served) -> None:
    prompts = [f"go to shelf {i}." for i in range(12)]
    answers = ask(served.lm(concurrency=5), lambda lm: lm.generate(prompts, GenParams(max_new_tokens=24)))
    assert answers == [Generation(served.greedy(p, 24), len(p), 24, 0, "length") for p in prompts]
    assert len({a.text for a in answers}) > 1


def test_chat_asks_with_the_models_own_template(served: Served) -> None:
    [answer] = ask(served.lm(api="chat"), lambda lm: lm.generate(["hello"], GenParams(max_new_tokens=24)))
    assert answer.text == served.greedy("<user>hello<assistant>", 24)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len("<user>hello<assistant>"), 24)


def test_a_stop_string_ends_decoding_and_is_not_in_the_text(served: Served) -> None:
    whole = served.greedy("take plate 1", 40)
    stop = whole[10:12]
    params = GenParams(max_new_tokens=40, stop=("never seen", stop))
    [answer] = ask(served.lm(), lambda lm: lm.generate(["take plate 1"], params))
    assert answer.text == whole[:whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.completion_tokens == whole.index(stop) + len(stop)


def test_samples_are_repeated_by_their_seed(served: Served) -> None:
    def sample(seed: int) -> list[str]:
        params = GenParams(max_new_tokens=24, temperature=1.0, seed=seed)
        return [a.text for a in ask(served.lm(concurrency=1), lambda lm: lm.generate(["open fridge"] * 2, params))]

    first = sample(1)
    assert first[0] != first[1]
    assert sample(1) == first
    assert sample(2)[0] not in first


def test_errors_of_a_real_server_say_what_to_mend(served: Served) -> None:
    def failure(call: str = "generate", **options: Any) -> str:
        argument = (["hi"], GenParams()) if call == "generate" else ([("a", "b")],)
        with pytest.raises(UserError) as caught:
            ask(served.lm(**options), lambda lm: getattr(lm, call)(*argument))
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert re.fullmatch(rf"nobody at {served.url}: HTTP 400: .*requested 'nobody'.*", failure(model="nobody"))
    assert "HTTP 404: Not Found; is this the model's name" in failure(base_url=served.url + "/v2")
    assert "can't score text (no echo with logprobs)" in failure("loglikelihood")
    assert "chat API can't score" in failure("loglikelihood", api="chat")


def test_requests_in_flight_survive_a_killed_and_restarted_server(
        served: Served, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [f"examine desk {i}." for i in range(6)]
    expected = [served.greedy(p, 150) for p in prompts]
    offset = served.log.stat().st_size

    async def outage(lm: OpenAILM) -> list[Generation]:
        task = asyncio.create_task(lm.generate(prompts, GenParams(max_new_tokens=150)))
        while b"Request received" not in served.log.read_bytes()[offset:]:
            await asyncio.sleep(0.01)
        assert not task.done()
        served.kill()
        served.start()
        return await task

    with caplog.at_level(logging.WARNING, "itp"):
        answers = ask(served.lm(max_retries=1, concurrency=4, retry_for_s=180), outage)
    assert [a.text for a in answers] == expected
    assert [m for m in caplog.messages if "is away" in m] and [m for m in caplog.messages if "answers again" in m]
