"""Models behind servers: the flags of the programs, and the client that they describe."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from itp.config import flag
from itp.errors import UserError
from itp.lm.openai import Api, OpenAILM, check_url
from itp.model_card import trained_format
from itp.pretrained import load_tokenizer

BACKENDS = ("local", "openai", "deepseek_api")
ENGINE = "engine"
"""The world model's backend that is no model: the game itself (:mod:`itp.agent.engine_world_model`)."""
DEEPSEEK_URL = "https://api.deepseek.com"


@dataclass
class PolicyServerFlags:
    """A policy behind a server."""

    policy_backend: str = flag("local", help="where the policy runs", choices=BACKENDS)
    policy_api_base_url: str = flag("", help="server of --policy_backend openai, such as http://127.0.0.1:8000/v1")
    policy_api_key_env: str = flag("DEEPSEEK_API_KEY", help="environment variable that holds the server's key",
                                   affects_result=False)
    policy_api_model: str = flag("deepseek-chat", help="name of the model on the server")
    policy_api_timeout_s: float = flag(120.0, help="seconds that a request may take", affects_result=False)
    policy_api_max_retries: int = flag(3, help="tries after a request that timed out or was refused for now",
                                       affects_result=False)


@dataclass
class WorldModelServerFlags:
    """A world model behind a server, or the game itself in its place."""

    wm_backend: str = flag("local", choices=(*BACKENDS, ENGINE),
                           help="where the world model runs; engine: there is none, and the game itself says what is "
                                "imagined (perfect imagination)")
    wm_api_base_url: str = flag("", help="server of --wm_backend openai, such as http://127.0.0.1:8000/v1")
    wm_api_key_env: str = flag("DEEPSEEK_API_KEY", help="environment variable that holds the server's key",
                               affects_result=False)
    wm_api_model: str = flag("deepseek-chat", help="name of the model on the server")
    wm_api_timeout_s: float = flag(120.0, help="seconds that a request may take", affects_result=False)
    wm_api_max_retries: int = flag(3, help="tries after a request that timed out or that the server refused for now",
                                   affects_result=False)


@dataclass(frozen=True)
class Server:
    """A model on a server: the arguments of :class:`OpenAILM`."""

    model: str
    url: str
    key_env: str
    api: Api
    timeout_s: float
    max_retries: int

    @property
    def identity(self) -> str:
        """The record's substitute for a fingerprint of the weights, which only the server has."""
        return f"{self.model} at {self.url}"

    def connect(self, role: str, concurrency: int) -> OpenAILM:
        return OpenAILM(self.model, self.url, self.key_env, role=role, api=self.api, concurrency=concurrency,
                        timeout_s=self.timeout_s, max_retries=self.max_retries)

    def needs_template(self, path: str, style: str) -> bool:
        """Whether this side applies the chat template of the model at ``path``, since the completions API doesn't."""
        return bool(path) and self.api == "completions" and trained_format(path, style) is None

    def tokenizer(self, path: str, style: str) -> Any:
        """The tokenizer with the chat template to apply here; None where none is needed."""
        return load_tokenizer(path) if self.needs_template(path, style) else None

    def check_selection(self, selection: str) -> None:
        if selection == "constrained":
            raise UserError(f"--action_selection constrained: {self.identity} is behind a server, which gives no "
                            "logits to walk a trie with; use generate, score where the server can, or a local policy")


def server_of(settings: Any, prefix: str) -> Server | None:
    """The server that ``--{prefix}_backend`` and the flags beside it name; None for a model here, or for the engine.

    Raises UserError for flags that hold a key, before anything is written.
    """
    backend, url, key_env, model, timeout_s, max_retries = (
        getattr(settings, f"{prefix}_{name}") for name in ("backend", "api_base_url", "api_key_env", "api_model",
                                                           "api_timeout_s", "api_max_retries"))
    if url:  # whatever the backend: the run's record holds it
        check_url(url)
    if key_env and not (re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_env) or key_env in os.environ):
        raise UserError(f"--{prefix}_api_key_env takes the name of an environment variable, and what was given is none "
                        "that is set; a key itself goes into such a variable")
    if backend in ("local", ENGINE):
        return None
    if backend == "openai" and not url:
        raise UserError(f"--{prefix}_backend openai needs --{prefix}_api_base_url, such as http://127.0.0.1:8000/v1")
    chat = backend == "deepseek_api"
    return Server(model, url or DEEPSEEK_URL, key_env, "chat" if chat else "completions", timeout_s, max_retries)
