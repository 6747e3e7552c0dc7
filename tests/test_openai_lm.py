"""OpenAILM against scripted answers on real sockets: requests, retries, refusals, scoring."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from foresight_eval.settings import AlfworldSettings
from itp.agent.policy import Policy
from itp.errors import PromptTooLong, UserError
from itp.lm.base import GenParams, Generation, Usage, metered
from itp.lm.openai import NO_KEY, OpenAILM
from itp.plan import check_scores
from itp.program import CHATTY
from itp.seeding import derive_seed
from itp.text.prompts import NO, YES
from itp.text.state import State
from tests.openai_client import KEY, KEY_ENV, ask, free_port


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)


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


@pytest.mark.parametrize("refusal", [
    {"error": {"message": "too many tokens", "type": "invalid_request_error", "code": "context_length_exceeded"}},
    {"error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."}},
    {"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."}])
def test_a_prompt_beyond_the_servers_context_is_told_apart(scripted: Callable[..., Scripted], refusal: dict) -> None:
    server = scripted(lambda body: (400, {}, refusal))
    with pytest.raises(PromptTooLong, match="HTTP 400"):
        one(server.lm(max_retries=0))


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
    for name in (None, *CHATTY):  # a program that ran before in this process may have silenced them
        caplog.set_level(logging.DEBUG, name)
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


def answers_of(yes: float, no: float) -> Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]:
    """A server that gives the first token of either answer this log-probability, and the line break -0.1."""
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        word = body["prompt"].rpartition(" ")[2]
        tokens = [body["prompt"].removesuffix(f" {word}"), f" {word.strip()}", "\n"]
        return echo(tokens, [None, yes if word == "yes\n" else no, -0.1])(body)

    return answer


@pytest.mark.parametrize("yes, no, p", [(-0.5, -1.5, 0.731059), (-3.0, -2.0, 0.268941), (-2000.0, -1.0, 0.0)])
def test_how_sure_a_served_policy_is_of_yes(
        scripted: Callable[..., Scripted], yes: float, no: float, p: float) -> None:
    server = scripted(answers_of(yes, no))
    found = ask(server.lm(), lambda lm: Policy(lm, score_answers=True).judge(State("t", "o"), "\nIf: look"))
    assert found == pytest.approx(p, abs=1e-6)
    assert {r["prompt"].rpartition("Helps:")[2] for r in server.requests} == {YES, NO}


def test_a_served_policy_that_knows_neither_yes_nor_no_is_refused(scripted: Callable[..., Scripted]) -> None:
    settings = AlfworldSettings(policy_model="p", out_dir="", method="mpc", policy_backend="openai")
    ask(scripted(answers_of(-1.0, -2.0)).lm(), lambda lm: check_scores(settings, lm))
    with pytest.raises(UserError, match="yes or no, and to deepseek-chat both are the same"):
        ask(scripted(answers_of(-9.0, -9.0)).lm(), lambda lm: check_scores(settings, lm))


def test_a_server_that_scores_only_new_tokens_is_refused(scripted: Callable[..., Scripted]) -> None:
    alone = {"tokens": ["!"], "token_logprobs": [-1.0]}
    for server in (scripted(lambda body: said("!", logprobs=alone)),
                   scripted(lambda body: said(body["prompt"] + "!", logprobs=alone))):
        with pytest.raises(UserError, match="can't score text"):
            ask(server.lm(), lambda lm: lm.loglikelihood([("go to", " shelf")]))
