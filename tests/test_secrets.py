"""No key reaches a log, a result, a record or a message, not even from a server that quotes what it was sent."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from itp.errors import UserError
from itp.lm.openai import OpenAILM
from itp.lm.server import server_of
from itp.program import CHATTY, without_secrets

KEY, HUB_TOKEN, OTHER = "sk-never-to-be-seen-0123456789", "hf_NeverToBeSeen0123456789", "sk-of-another-service-987654"
ROOT = Path(__file__).resolve().parents[1]


class Quoting(BaseHTTPRequestHandler):
    """Answers ``good`` requests, then refuses with the whole request in its message."""

    good, status, seen = 0, 401, 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        Quoting.seen += 1
        answer = {"choices": [{"text": " look\n", "finish_reason": f"for {self.headers['authorization']}"}],
                  "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        status = 200
        if Quoting.seen > Quoting.good:
            status, answer = Quoting.status, {"error": {"message": f"{self.headers} {body[:50]}"}}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Quoting)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def everything(result: subprocess.CompletedProcess[str], folder: Path) -> str:
    return "\n".join([result.stdout, result.stderr, *(
        file.read_text(encoding="utf-8", errors="replace") for file in folder.rglob("*") if file.is_file())])


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    secrets = {"OPENAI_API_KEY": KEY, "HF_TOKEN": HUB_TOKEN, "DEEPSEEK_API_KEY": OTHER}
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False,
                          env={**os.environ, **secrets, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("status", [401, 400, 500])
def test_server_that_quotes_the_request(url: str, status: int, games_root: Path, tmp_path: Path) -> None:
    """Through a whole evaluation: the first answers are good, so that there are logs and results."""
    Quoting.seen, Quoting.good, Quoting.status = 0, 3, status
    result = run(tmp_path, "foresight_eval", "--method", "sft", "--policy_model", "", "--policy_backend", "openai",
                 "--policy_api_base_url", url, "--policy_api_model", "m", "--policy_api_key_env", "OPENAI_API_KEY",
                 "--policy_api_max_retries", "0", "--env_data_root", str(games_root), "--split", "train",
                 "--max_steps", "2", "--concurrency", "1", "--env_processes", "1", "--out_dir", "out")
    assert result.returncode == 2 and f"HTTP {status}" in result.stderr.splitlines()[-1], result.stderr
    assert "ended an answer for the reason 'for Bearer ***'" in result.stderr
    said = everything(result, tmp_path)
    assert (tmp_path / "out/config.json").is_file() and (tmp_path / "out/0.json").is_file()
    assert not [secret for secret in (KEY, HUB_TOKEN, OTHER) if secret in said]
    assert "HTTP Request" not in result.stderr  # a line for every request


SERVER = {"policy_backend": "openai", "policy_api_base_url": "http://127.0.0.1:1/v1", "policy_api_key_env": "SOME_KEY",
          "policy_api_model": "m", "policy_api_timeout_s": 1.0, "policy_api_max_retries": 0}


@pytest.mark.parametrize("backend", ["openai", "local", "deepseek_api"])
@pytest.mark.parametrize("flags", [{"policy_api_base_url": url} for url in (
    f"http://user:{KEY}@127.0.0.1/v1", f"http://{KEY}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={KEY}",
    f"http://127.0.0.1/v1#{KEY}", f"user:{KEY}@127.0.0.1/v1", f"http://user:{KEY}@", f"http://user:{KEY}@host:port/v1",
    f"127.0.0.1/v1?api_key={KEY}", f"http://user:{KEY}@host:99999/v1")] + [
    {"policy_api_key_env": name} for name in (KEY, HUB_TOKEN, f"Bearer {KEY}", f"KEY={KEY}")])
def test_flag_that_holds_a_key_is_refused_without_quoting_it(flags: dict[str, str], backend: str) -> None:
    with pytest.raises(UserError) as caught:
        server_of(SimpleNamespace(**SERVER | flags | {"policy_backend": backend}), "policy")
    assert KEY not in str(caught.value) and HUB_TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    if "policy_api_base_url" in flags:
        with pytest.raises(UserError) as caught:
            OpenAILM("m", flags["policy_api_base_url"], "SOME_KEY")
        assert KEY not in str(caught.value)


def test_key_variables_that_are_usual_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("my_key", KEY)
    for name in ("OPENAI_API_KEY", "my_key", ""):
        assert server_of(SimpleNamespace(**SERVER | {"policy_api_key_env": name}), "policy").key_env == name


@pytest.mark.parametrize("words", [["--policy_api_key", KEY], [f"--policy_api_key={KEY}"],
                                   ["--policy_api_key_env", KEY],
                                   ["--policy_api_base_url", f"http://user:{KEY}@127.0.0.1/v1"]])
def test_key_on_the_command_line_is_on_no_record(words: list[str], games_root: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "foresight_eval", "--method", "sft", "--policy_model", "", "--policy_backend", "openai",
                 "--policy_api_base_url", "http://127.0.0.1:1/v1", "--env_data_root", str(games_root), "--out_dir",
                 "out", *words)
    assert result.returncode == 2 and KEY not in everything(result, tmp_path)
    assert words[0].partition("=")[0] in result.stderr or "the URL of a server" in result.stderr


def test_logs_and_messages_hold_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("VLLM_API_KEY", "EMPTY")
    assert without_secrets(f"refused: Bearer {HUB_TOKEN}; EMPTY") == "refused: Bearer ***; EMPTY"
    assert without_secrets("https://user:pass@hub.local/x") == "https://***@hub.local/x"
    said = subprocess.run([sys.executable, "-c", f"""
import logging
from itp.errors import UserError
from itp.program import run_main
def main():
    logging.getLogger("any").warning("sent %s", "{HUB_TOKEN}")
    raise UserError("the hub said {HUB_TOKEN}")
run_main(main)"""], capture_output=True, text=True, check=False, cwd=ROOT)
    assert said.returncode == 2 and said.stderr.count("***") == 2 and HUB_TOKEN not in said.stderr


def test_loggers_of_http_clients_are_silent() -> None:
    """Those that the openai package uses, whatever their names are in this version."""
    import openai  # noqa: F401

    names = {name for name in logging.root.manager.loggerDict if name.startswith(("http", "openai"))}
    assert names and {name.partition(".")[0] for name in names} <= set(CHATTY)
