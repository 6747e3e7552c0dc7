"""OpenAILM against `transformers serve` with a random model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
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

from foresight_eval import results
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.errors import UserError
from itp.lm.base import GenParams, Generation
from itp.lm.openai import OpenAILM
from tests.openai_client import KEY, KEY_ENV, ask, free_port
from world_model import collect

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

    characters = string.ascii_letters + string.digits + " .,:<>\n"
    core = Tokenizer(models.WordLevel({"<unk>": 0} | {c: i + 1 for i, c in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(characters) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.5,
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


SAID = ("action", "policy_raw_output", "thought", "reflection", "k", "k_raw_output", "imagined_actions",
        "wm_raw_output", "obs_next")


def play(settings: AlfworldSettings) -> list[dict[str, Any]]:
    """What was said and asked for at each step."""
    asyncio.run(evaluate(settings))
    return [{name: step[name] for name in SAID} | {role: (spent["calls"], spent["prompt_tokens"])
                                                   for role, spent in step["usage"].items()}
            for record in results.read_episodes(Path(settings.out_dir)).values()
            for step in record["foresight_steps"]]


@pytest.fixture
def here(served: Served, games_root: Path, tmp_path: Path) -> AlfworldSettings:
    return AlfworldSettings(
        policy_model=str(served.folder), wm_model=str(served.folder), out_dir=str(tmp_path / "here"),
        env_data_root=str(games_root), split="unseen", max_steps=2, act_tokens=10, wm_max_new_tokens=10, rounds=2,
        decision_tokens=6, max_k=1, device="cpu", env_processes=1)


def behind(server: Served, settings: AlfworldSettings, *prefixes: str, **changes: Any) -> AlfworldSettings:
    """The same with its models on ``server``."""
    for prefix in prefixes:
        changes |= {f"{prefix}_backend": "openai", f"{prefix}_api_base_url": server.url,
                    f"{prefix}_api_model": str(server.folder), f"{prefix}_api_key_env": KEY_ENV}
    return dataclasses.replace(settings, out_dir=str(Path(settings.out_dir).with_name("there")), **changes)


@pytest.mark.parametrize("changes", [
    {"method": "cot"}, {"method": "react", "use_history": 1}, {"method": "self_refine"},
    {"method": "sft", "prompt_style": "tuned"}, {"method": "foresight"},
    {"method": "foresight", "fixed_k": 1, "prompt_style": "tuned", "wm_prompt_style": "tuned"}],
    ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_served_policy_plays_as_the_same_model_does_here(served: Served, here: AlfworldSettings,
                                                           changes: dict[str, Any]) -> None:
    here = dataclasses.replace(here, **changes)
    expected = play(here)
    assert play(behind(served, here, "policy", "wm")) == expected
    assert len(expected) == 4 and len({step["policy_raw_output"] for step in expected}) > 1
    assert all(step["k_raw_output"] if here.fixed_k < 0 else step["world_model"][0] == 1 for step in expected
               if here.method == "foresight")


def test_another_servers_policy_is_another_configuration(served: Served, here: AlfworldSettings) -> None:
    there = behind(served, here, "policy", method="sft", max_steps=1)
    play(there)
    config = json.loads((Path(there.out_dir) / "config.json").read_text())["config"]
    assert config["policy_fingerprint"] == f"{served.folder} at {served.url}" and KEY not in json.dumps(config)
    for name, value in (("policy_api_model", "other"), ("policy_api_base_url", "http://127.0.0.1:1/v1")):
        with pytest.raises(UserError, match=f"another configuration .*{name}: .* there, '{value}' now"):
            play(dataclasses.replace(there, **{name: value}))


@pytest.mark.parametrize("changes, what", [
    ({"method": "mpc"}, "--method mpc"), ({"method": "sft", "action_selection": "score"}, "--action_selection score")])
def test_what_needs_log_probabilities_is_refused_by_a_server_without_them(
        served: Served, here: AlfworldSettings, changes: dict[str, Any], what: str) -> None:
    there = behind(served, here, "policy", **changes)
    with pytest.raises(UserError, match=f"^{what} needs the log-probabilities of given text: .*no echo") as caught:
        play(there)
    assert "\n" not in str(caught.value) and not results.read_episodes(Path(there.out_dir))


def test_a_served_policy_collects(served: Served, games_root: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--actor", "policy", "--policy_model", str(served.folder), "--policy_device", "cpu", "--split", "unseen",
             "--env_data_root", str(games_root), "--max_steps", "2", "--temperature", "0", "--env_processes", "1"]
    for out, more in (("here", []), ("there", ["--policy_backend", "openai", "--policy_api_base_url", served.url,
                                               "--policy_api_model", str(served.folder)])):
        monkeypatch.setattr("sys.argv", ["collect", *flags, "--out_dir", str(tmp_path / out), *more])
        collect.main()
    rows = [(tmp_path / out / "transitions.jsonl").read_text() for out in ("here", "there")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 4
    config = json.loads((tmp_path / "there" / "config.json").read_text())["config"]
    assert config["policy_fingerprint"] == f"{served.folder} at {served.url}"


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
