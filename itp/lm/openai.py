"""The LM contract on any OpenAI-compatible server: vLLM, SGLang, ``transformers serve``, DeepSeek, ...

Every prompt is a request of its own; ``concurrency`` requests run at once, and the server batches them.

Failed requests:

- After 429, 5xx, 408, 409, a lost connection or no answer in ``timeout_s``, the ``openai`` package tries up to
  ``max_retries`` more times.  It waits 0.5, 1, 2, 4, 8, 8, ... seconds less up to a quarter, or the seconds in the
  server's Retry-After (at most 120).
- If the connection is still lost after these tries, or the answer is still 502 or 503, the server is away.  The request
  is sent again until ``retry_for_s`` seconds have passed, so that a run survives the server's restart.
- Every other error, and every error that lasts, is a UserError.

Differences between servers:

- Token counts are the server's own.  An answer without them is refused, since costs are results here.
- Stop strings are sent, and the text is also cut here where one appears, because ``transformers serve`` leaves them in
  the text and some servers ignore them.
- ``transformers serve`` samples only where the model's ``generation_config.json`` says ``do_sample``; otherwise it
  decodes greedily at any temperature.  Its seed is one for the whole process, so sampled text repeats only at
  ``concurrency`` 1.  DeepSeek takes no seed.
- A request doesn't set top_k or the repetition penalty, so the server's defaults apply.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from itp.errors import PromptTooLong, UserError
from itp.lm.base import GenParams, Generation, HeadOutputs, TokenLogprobs, asking
from itp.seeding import derive_seed

log = logging.getLogger(__name__)

Api = Literal["completions", "chat"]
PATHS: dict[str, str] = {"completions": "/completions", "chat": "/chat/completions"}
NO_KEY = "no-api-key-is-set"  # the client requires a key; servers without keys ignore it
CONNECT_TIMEOUT_S = 10.0
AWAY = (502, 503)  # the answers of a gateway or of a starting server while the model isn't available
TOO_LONG = ("context length", "context_length_exceeded", "maximum context", "context size", "context window",
            "maximum model length", "maximum sequence length", "prompt is too long", "input token count",
            "max_new_tokens` must be", "too many tokens")
"""What servers say of a prompt that their model's context doesn't hold: OpenAI, vLLM, llama.cpp, TGI and others."""
T = TypeVar("T")


class OpenAILM:
    """A model behind ``base_url`` (up to and including ``/v1``), by the completions or the chat API.

    ``api_key_env`` names the environment variable that holds the key; unset means a server without keys.  The key goes
    into the request's header and nowhere else.  With ``api="chat"`` a prompt is one user message.
    """

    def __init__(self, model: str, base_url: str, api_key_env: str = "DEEPSEEK_API_KEY", *,
                 role: str = "policy", api: Api = "completions", concurrency: int = 16, timeout_s: float = 120.0,
                 max_retries: int = 3, retry_for_s: float = 60.0) -> None:
        import openai

        check_url(base_url)
        if api not in PATHS:
            raise UserError(f"unknown API {api!r}: must be one of {', '.join(PATHS)}")
        if concurrency < 1 or max_retries < 0 or timeout_s <= 0:
            raise UserError(f"an LM server needs concurrency >= 1, max_retries >= 0 and a timeout above 0 s, "
                            f"not {concurrency}, {max_retries} and {timeout_s:g}")
        self.name, self.role = model, role
        self.tokenizer, self.context_length = None, None  # only the server knows them
        self._url, self._api, self._api_key_env = base_url.rstrip("/"), api, api_key_env
        self._timeout_s, self._max_retries, self._retry_for_s = timeout_s, max_retries, retry_for_s
        self._slots = asyncio.Semaphore(concurrency)
        self._away = False
        self._noted: set[str] = set()
        self._client = openai.AsyncOpenAI(
            api_key=_read_key(api_key_env), base_url=self._url, max_retries=max_retries,
            timeout=openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        )

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        """Complete every prompt.  ``params.choices`` needs a local model: servers don't walk a token trie."""
        if params.choices:
            raise UserError(f"{self.name} at {self._url}: choosing among given strings (choices) needs a local model")
        with asking(self.role) as answers:
            answers += await _all(self._complete(prompt, params, index) for index, prompt in enumerate(prompts))
        return answers

    async def read_heads(self, prompts: Sequence[str]) -> list[HeadOutputs]:
        raise UserError(f"{self.name} at {self._url}: a server has no heads to choose K with; use a local policy, "
                        "or another --k_policy")

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        """Score completions: the server echoes the joined text with its log-probabilities.

        Only the server has the tokenizer, so it tokenizes the joined text.  A pair is refused if one token covers both
        the end of the context and the start of the completion.
        """
        if self._api != "completions":
            raise UserError(f"{self.name} at {self._url}: the chat API can't score text; "
                            "use the completions API or a local model")
        with asking(self.role) as answers:
            answers += await _all(self._score(context, completion) for context, completion in pairs)
        return answers

    async def close(self) -> None:
        await self._client.close()

    async def _complete(self, prompt: str, params: GenParams, index: int) -> Generation:
        body: dict[str, Any] = {"max_tokens": params.max_new_tokens, "temperature": params.temperature}
        if params.temperature > 0:
            # 31 bits, which every server accepts as a seed, whatever its integer type.
            body |= {"top_p": params.top_p, "seed": derive_seed(params.seed, index) >> 32}
        if params.stop:
            body["stop"] = list(params.stop)
        if self._api == "completions":
            body["prompt"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        choice, usage = await self._request(body)
        # The content of a chat answer is null where a thinking model has used up its tokens before it.
        said = (choice["text"] if self._api == "completions" else choice["message"].get("content")) or ""
        text, rest = _cut(said, params.stop)
        reason = choice.get("finish_reason")
        if rest and reason == "length":
            self._note("goes on after a stop string: it ignores `stop`, and every answer costs max_new_tokens")
        if reason not in ("stop", "length"):
            self._note(f"ended an answer for the reason {self._one_line(reason)!r}; its text is taken as it is")
        return Generation(
            text=text,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=_cached_tokens(usage),
            finish_reason="length" if reason == "length" and text == said else "stop",
        )

    async def _score(self, context: str, completion: str) -> TokenLogprobs:
        # The request is for one new token, which is ignored, because not every server accepts max_tokens 0.
        choice, usage = await self._request({
            "prompt": context + completion, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0,
        })
        logprobs, n_prompt = choice.get("logprobs") or {}, usage["prompt_tokens"]
        tokens, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
        # A server that doesn't echo returns the new token's log-probability alone, or none.
        if not choice["text"].startswith(context + completion) or not n_prompt <= len(tokens) == len(values):
            raise UserError(f"{self.name} at {self._url}: this server can't score text (no echo with logprobs); "
                            "use one that can, such as vLLM, or a local model")
        start = _start_of(tokens[:n_prompt], completion)
        if start is None:
            raise UserError(f"{self.name} at {self._url}: can't score {completion[:40]!r} after {context[-40:]!r}: the "
                            "server's tokens don't break between them; let the completion start with the space")
        scored = values[start:n_prompt]
        if None in scored:
            raise UserError(f"{self.name} at {self._url}: no log-probability for a token of {completion[:40]!r}; "
                            "a completion needs a context before it")
        return TokenLogprobs(tuple(scored), prompt_tokens=n_prompt, cached_tokens=_cached_tokens(usage))

    async def _request(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first choice and the usage of the server's answer to ``body``."""
        async with self._slots:
            answer = await self._post({"model": self.name, **body})
        whole = isinstance(answer, dict) and answer.get("choices") and answer.get("usage")
        if not whole:
            raise UserError(f"{self.name} at {self._url}: the answer isn't a completion with token counts "
                            f"({self._one_line(answer)}); is it the URL of an OpenAI-compatible API (usually .../v1)?")
        return answer["choices"][0], answer["usage"]

    async def _post(self, body: Mapping[str, Any]) -> Any:
        import openai

        give_up, pause = None, 1.0
        while True:
            try:
                answer = await self._client.post(PATHS[self._api], cast_to=object, body=body)
            except json.JSONDecodeError:
                return "broken JSON"
            except openai.APIError as error:
                now = time.monotonic()
                give_up = give_up or now + self._retry_for_s
                if not _is_away(error) or now >= give_up:
                    # `from None`: the chained error carries the whole request.
                    raise self._explain(error) from None
                if not self._away:
                    self._away = True
                    log.warning("%s at %s is away; asking on for %.0f s", self.name, self._url, self._retry_for_s)
                await asyncio.sleep(min(pause * random.uniform(0.75, 1.0), give_up - now))
                pause = min(2 * pause, 4.0)
            else:
                if self._away:
                    self._away = False
                    log.warning("%s at %s answers again", self.name, self._url)
                return answer

    def _explain(self, error: Any) -> UserError:
        """One line for an ``openai.APIError``: the model and its URL, the error, and the remedy."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            what = (f"no answer within {self._timeout_s:g} s, asked {self._max_retries + 1} times; "
                    "raise the timeout or lower the concurrency")
        elif isinstance(error, openai.APIStatusError):
            what = f"HTTP {error.status_code}: {self._one_line(error.body)}{self._advice(error.status_code)}"
        else:
            what = f"no connection ({type(error.__cause__ or error).__name__}); is the server running there?"
        kind = PromptTooLong if _says_too_long(error) else UserError
        return kind(f"{self.name} at {self._url}: {what}")

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            state = "doesn't hold a key that is valid there" if os.environ.get(self._api_key_env) else "isn't set"
            return f"; the environment variable {self._api_key_env} {state}"
        return {
            404: f"; is this the model's name, and does the URL (usually .../v1) offer {PATHS[self._api]}?",
            429: "; lower the concurrency or raise the number of retries",
        }.get(status, "; see the server's log" if status >= 500 else "")

    def _one_line(self, body: Any) -> str:
        """The server's message, shortened, and without the key in case the server quotes it."""
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body.get("error") or body
        said = " ".join(str(body).split()).replace(self._client.api_key, "***")
        return said if len(said) <= 300 else said[:300] + "..."

    def _note(self, what: str) -> None:
        if what not in self._noted:
            self._noted.add(what)
            log.warning("%s at %s %s", self.name, self._url, what)


def check_url(base_url: str) -> None:
    """Raises UserError for a text that is no server's URL, or that holds what may be a key, which isn't quoted."""
    if any(mark in base_url for mark in "@?#"):
        raise UserError("the URL of a server must hold no user, password, ?query or #fragment; "
                        "keys go into an environment variable")
    try:
        url = urlsplit(base_url)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{base_url!r} is no server's URL; one looks like http://127.0.0.1:8000/v1")


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        # Such a header can't be sent, and the HTTP library's error would quote it.
        raise UserError(f"the environment variable {variable} holds characters that no API key has")
    return key or NO_KEY


def _is_away(error: Any) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in AWAY
    return isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)


def _says_too_long(error: Any) -> bool:
    """Whether a server refused a prompt that exceeds its context: by OpenAI's code, or by words in the message."""
    import openai

    if not isinstance(error, openai.APIStatusError) or error.status_code not in (400, 413, 422):
        return False
    said = str(error.body).lower()
    return any(words in said for words in TOO_LONG)


def _cut(text: str, stop: Sequence[str]) -> tuple[str, str]:
    """``text`` before the first stop string, and what follows that string."""
    found = [(text.index(s), s) for s in stop if s in text]
    if not found:
        return text, ""
    at, string = min(found)
    return text[:at], text[at + len(string):]


def _start_of(tokens: Sequence[str], completion: str) -> int | None:
    """The index of the token at which ``completion`` starts; None where no token starts there.

    It is counted from the end by the text of the tokens.  A begin-of-text token shifts the offsets that servers report,
    and SGLang reports no offsets.
    """
    start, length = len(tokens), 0
    while length < len(completion) and start > 0:
        start -= 1
        length += len(tokens[start])
    return start if "".join(tokens[start:]) == completion else None


def _cached_tokens(usage: Mapping[str, Any]) -> int:
    """Prompt tokens from the server's cache: the field of OpenAI and vLLM, or DeepSeek's field; 0 without either."""
    details = usage.get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results in order.  The first failure cancels the other calls, which would only cost more."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
