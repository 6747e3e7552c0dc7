"""OpenAILM against `transformers serve` with a random model, and against scripted answers on real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import socket
import string
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from itp.lm.base import GenParams, Generation, Usage, metered
from itp.lm.openai import NO_KEY, OpenAILM
from itp.runtime import UserError, derive_seed

KEY_ENV, KEY = "ITP_TEST_KEY", "sk-this-must-never-be-seen"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)


def ask(lm: OpenAILM, call: Callable[[OpenAILM], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        try:
            return await call(lm)
        finally:
            await lm.close()

    return asyncio.run(run())


# --- transformers serve -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


# --- scripted answers ---------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """An HTTP server whose answers a test writes: ``answer(body) -> (status, headers, payload)``."""

    answer: Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.requests.append(body)
            self.headers.append(handler.headers)
            self.times.append(time.monotonic())
            self.running += 1
            self.peak = max(self.peak, self.running)
        status, headers, payload = self.answer(body)
        with self.lock:
            self.running -= 1
        data = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
        try:
            handler.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": len(data), **headers}.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            handler.wfile.write(data)
        except ConnectionError:
            pass  # the client had stopped waiting, which is what the test is about

    def lm(self, **options: Any) -> OpenAILM:
        return OpenAILM(**{"model": "m", "base_url": self.url, "api_key_env": KEY_ENV, **options})


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers = []

    def start(answer: Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]) -> Scripted:
        script = Scripted(answer)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                script.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        script.url = f"http://127.0.0.1:{server.server_port}/v1"
        return script

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def said(text: str, reason: str | None = "stop", usage: dict[str, Any] | None = None,
         **more: Any) -> tuple[int, dict[str, str], Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, **(usage or {})}
    return 200, {}, {"choices": [{"text": text, "finish_reason": reason, **more}], "usage": usage}


def one(lm: OpenAILM, **params: Any) -> Generation:
    return ask(lm, lambda lm: lm.generate(["p"], GenParams(**params)))[0]


def test_no_more_requests_than_concurrency_and_answers_in_order(scripted: Callable[..., Scripted]) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.1 if int(body["prompt"]) % 2 else 0.02)
        return said("answer " + body["prompt"])

    server = scripted(slow)
    answers = ask(server.lm(concurrency=3), lambda lm: lm.generate([str(i) for i in range(12)], GenParams()))
    assert [a.text for a in answers] == [f"answer {i}" for i in range(12)]
    assert server.peak == 3


def test_requests_carry_every_parameter_and_the_key_of_the_named_variable(
        scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "another")
    monkeypatch.setenv(KEY_ENV, KEY + "\n")  # as read from a file
    server = scripted(lambda body: said("x"))
    params = GenParams(max_new_tokens=9, temperature=0.7, top_p=0.9, stop=("\n",), seed=5)
    ask(server.lm(concurrency=1), lambda lm: lm.generate(["p", "p"], params))
    common = {"model": "m", "prompt": "p", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "stop": ["\n"]}
    assert server.requests == [common | {"seed": derive_seed(5, i) >> 32} for i in range(2)]
    assert all(0 <= r["seed"] < 2**31 for r in server.requests)
    one(server.lm())
    assert server.requests[-1] == {"model": "m", "prompt": "p", "max_tokens": 64, "temperature": 0.0}
    monkeypatch.delenv(KEY_ENV)
    one(server.lm())
    assert [h["authorization"] for h in server.headers] == [f"Bearer {KEY}"] * 3 + [f"Bearer {NO_KEY}"]


@pytest.mark.parametrize(("usage", "cached"), [
    ({}, 0), ({"prompt_tokens_details": {"cached_tokens": 5}}, 5), ({"prompt_tokens_details": None}, 0),
    ({"prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 3}, 4),
])
def test_tokens_are_those_that_the_server_reports(
        scripted: Callable[..., Scripted], usage: dict[str, Any], cached: int) -> None:
    assert one(scripted(lambda body: said("x", usage=usage)).lm()) == Generation("x", 7, 3, cached, "stop")


def test_usage_is_metered_under_the_role(scripted: Callable[..., Scripted]) -> None:
    with metered() as usage:
        lm = scripted(lambda body: said("x")).lm(role="world_model")
        ask(lm, lambda lm: lm.generate(["p", "q"], GenParams()))
    assert usage == {"world_model": Usage(calls=2, prompt_tokens=14, completion_tokens=6)}


def test_stop_strings_hold_where_the_server_ignores_them(
        scripted: Callable[..., Scripted], caplog: pytest.LogCaptureFixture) -> None:
    server = scripted(lambda body: said("go north\nObservation: a wall. Action:", "length"))
    answer = one(server.lm(), stop=("Observation", "\n"))
    assert (answer.text, answer.finish_reason) == ("go north", "stop")
    assert "ignores `stop`" in caplog.text


def test_a_chat_answer_without_content_is_empty(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda body: said("", "length", message={"role": "assistant", "content": None}))
    assert one(server.lm(api="chat")) == Generation("", 7, 3, 0, "length")
    assert server.requests[0]["messages"] == [{"role": "user", "content": "p"}]


def test_retries_what_may_pass_and_waits_as_long_as_the_server_asks(scripted: Callable[..., Scripted]) -> None:
    refusals = iter([(429, {"retry-after": "1"}, {"error": {"message": "slow down"}}), (500, {}, {"detail": "oops"})])
    server = scripted(lambda body: next(refusals, said("x")))
    assert one(server.lm()).text == "x"
    waits = [b - a for a, b in zip(server.times, server.times[1:])]
    # Retry-After said 1 s; the second retry waits 1 s less up to a quarter.
    assert len(waits) == 2 and 1.0 <= waits[0] < 1.5 and 0.75 <= waits[1] < 1.5


@pytest.mark.parametrize(("status", "tries", "advice"), [
    (400, 1, "prompt too long"), (401, 1, KEY_ENV), (404, 1, "usually .../v1"), (429, 2, "concurrency"),
    (500, 2, "server's log"),
])
def test_lasting_errors_are_one_line_after_the_tries_they_deserve(
        scripted: Callable[..., Scripted], status: int, tries: int, advice: str) -> None:
    refusal = {"error": {"message": "prompt too long\nfor this model", "type": "x"}}
    server = scripted(lambda body: (status, {"retry-after-ms": "10"}, refusal))
    with pytest.raises(UserError) as caught:
        one(server.lm(max_retries=1))
    assert re.fullmatch(rf"m at {server.url}: HTTP {status}: prompt too long for this model.*", str(caught.value))
    assert advice in str(caught.value)
    assert len(server.requests) == tries


@pytest.mark.parametrize("status", [502, 503])
def test_a_server_that_stays_away_is_given_up_after_retry_for_s(scripted: Callable[..., Scripted], status: int) -> None:
    server = scripted(lambda body: (status, {}, {"detail": "starting"}))
    with pytest.raises(UserError, match=rf"HTTP {status}: starting; see the server's log"):
        one(server.lm(max_retries=0, retry_for_s=0.9))
    # A pause of 0.75 to 0.9 s, and what is left of the 0.9 s.
    assert len(server.times) in (2, 3) and 0.85 < server.times[-1] - server.times[0] < 2


def test_a_server_that_never_answers_is_given_up(scripted: Callable[..., Scripted]) -> None:
    def hang(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.8)
        return said("too late")

    server = scripted(hang)
    with pytest.raises(UserError, match=r"no answer within 0\.2 s, asked 2 times; raise the timeout"):
        one(server.lm(timeout_s=0.2, max_retries=1))
    assert len(server.requests) == 2


def test_nobody_at_the_url() -> None:
    lm = OpenAILM("m", f"http://127.0.0.1:{free_port()}/v1", KEY_ENV, max_retries=0, retry_for_s=0.3)
    with pytest.raises(UserError, match=r"m at http.*: no connection \(ConnectError\); is the server running there"):
        one(lm)


@pytest.mark.parametrize("payload", ["<html>Welcome</html>", "{broken", {"hello": 1}, {"choices": [{"text": "x"}]}])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_an_answer_that_is_no_completion_is_refused(
        scripted: Callable[..., Scripted], payload: Any, kind: str) -> None:
    server = scripted(lambda body: (200, {"content-type": kind}, payload))
    with pytest.raises(UserError, match="isn't a completion with token counts"):
        one(server.lm())


def test_the_first_failure_stops_the_other_requests(scripted: Callable[..., Scripted]) -> None:
    def refuse_first(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (400, {}, {"detail": "no"}) if body["prompt"] == "0" else said("x")

    server = scripted(refuse_first)

    async def run(lm: OpenAILM) -> None:
        with pytest.raises(UserError):
            await lm.generate([str(i) for i in range(50)], GenParams())
        await asyncio.sleep(0.3)

    ask(server.lm(concurrency=1), run)
    assert len(server.requests) <= 2


def test_the_key_is_nowhere_but_in_the_header(
        scripted: Callable[..., Scripted], caplog: pytest.LogCaptureFixture) -> None:
    def quote(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (401, {}, {"error": {"message": f"bad key {KEY}"}}) if body["prompt"] == "bad" else said("x")

    server = scripted(quote)
    lm = server.lm()
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(UserError) as caught:
            ask(lm, lambda lm: lm.generate(["good", "bad"], GenParams()))
    assert "bad key ***" in str(caught.value)
    assert "/chat/completions" in caplog.text or "/completions" in caplog.text  # the log does hold the requests
    for text in (caplog.text, str([r.__dict__ for r in caplog.records]), repr(lm), repr(vars(lm)), repr(caught.value)):
        assert KEY not in text


@pytest.mark.parametrize(("options", "message"), [
    ({"base_url": "localhost:8000"}, "no server's URL"),
    ({"base_url": "http://127.0.0.1:port/v1"}, "no server's URL"),
    ({"base_url": f"http://user:{KEY}@127.0.0.1/v1"}, "no user, password"),
    ({"api": "responses"}, "unknown API 'responses'"),
    ({"concurrency": 0}, "concurrency >= 1"),
])
def test_settings_that_cannot_work_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        OpenAILM(**{"model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": KEY_ENV, **options})
    assert KEY not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_without_quoting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, f"{KEY}\nsecond line")
    with pytest.raises(UserError, match=KEY_ENV) as caught:
        OpenAILM("m", "http://127.0.0.1:1/v1", KEY_ENV)
    assert KEY not in str(caught.value)


def test_choices_need_a_local_model(scripted: Callable[..., Scripted]) -> None:
    with pytest.raises(UserError, match="needs a local model"):
        one(scripted(lambda body: said("x")).lm(), choices=("a", "b"))


# --- scoring ------------------------------------------------------------------------------------------------------


def echo(server_tokens: list[str], logprobs: list[float | None],
         n_new: int = 1) -> Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]:
    """What vLLM answers to echo with logprobs: the prompt's tokens, then the new one."""
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        assert (body["echo"], body["logprobs"]) == (True, 1)
        new = ["!"] * n_new
        told = {"tokens": server_tokens + new, "token_logprobs": logprobs + [-9.0] * n_new}
        return said(body["prompt"] + "".join(new), "length", {"prompt_tokens": len(server_tokens)}, logprobs=told)

    return answer


@pytest.mark.parametrize("n_new", [0, 1])
def test_only_the_completions_tokens_are_scored(scripted: Callable[..., Scripted], n_new: int) -> None:
    server = scripted(echo(["<s>", "go", " to", " shelf", " 1"], [None, -4.0, -3.0, -0.5, -0.25], n_new))
    [score] = ask(server.lm(), lambda lm: lm.loglikelihood([("go to", " shelf 1")]))
    assert score.logprobs == (-0.5, -0.25) and math.isclose(score.total, -0.75)
    assert score.prompt_tokens == 5


@pytest.mark.parametrize(("tokens", "logprobs", "pair", "message"), [
    (["go", " to", " shelf"], [None, -1.0, -2.0], ("go to ", "shelf"), "don't break between them"),
    (["go", " to"], [None, -1.0], ("", "go to"), "needs a context"),
])
def test_pairs_that_cannot_be_told_apart_are_refused(
        scripted: Callable[..., Scripted], tokens: list[str], logprobs: list[float | None], pair: tuple[str, str],
        message: str) -> None:
    server = scripted(echo(tokens, logprobs))
    with pytest.raises(UserError, match=message):
        ask(server.lm(), lambda lm: lm.loglikelihood([pair]))


def test_a_server_that_scores_only_new_tokens_is_refused(scripted: Callable[..., Scripted]) -> None:
    alone = {"tokens": ["!"], "token_logprobs": [-1.0]}
    for server in (scripted(lambda body: said("!", logprobs=alone)),
                   scripted(lambda body: said(body["prompt"] + "!", logprobs=alone))):
        with pytest.raises(UserError, match="can't score text"):
            ask(server.lm(), lambda lm: lm.loglikelihood([("go to", " shelf")]))
