"""The planning server as a process of its own: batches, limits, clients that vanish, its end, the published form."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from foresight_eval import results
from foresight_eval.runner import evaluate
from itp.serve.published import (
    PublishedState, belief_of, earlier_trial, first_observation, history_of, perceive, text_state,
)
from foresight_eval.settings import AlfworldSettings
from itp import plan
from itp.agent.policy import Policy
from itp.agent.policy_with_heads import PolicyWithHeads
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.pool import EnvPool
from itp.errors import UserError
from itp.lm.base import LM
from itp.methods.actors import ExpertActor
from itp.methods.memory import remembered
from itp.models import load_policy
from itp.pretrained import load_causal_lm
from itp.rollout import Episode, run_episodes, step_seed
from itp.serve.planner import Planned, Planner
from itp.serve.settings import ServeSettings
from itp.text.belief import Belief
from itp.text.conditions import Conditions, failed_of
from itp.text.state import State
from tests.killed import ENVIRONMENT
from tests.openai_client import free_port
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-of-some-length"
TASK = {"task": "put a mug in fridge.", "first_observation": "You are in the middle of a room. Looking quickly around "
        "you, you see a desk 2, a fridge 1, and a cabinet 1."}
PUBLISHED = {"agent_location": "desk 2", "inventory": "plate 1(clean)", "world_state": {
    "desk 2": {"visited": True, "open": "N/A", "objects": ["mug 2(hot)"]},
    "fridge 1": {"visited": False, "open": False, "objects": []}}}


@dataclasses.dataclass
class Served:
    """A server's process."""

    process: subprocess.Popen
    port: int
    log: Path

    def ask(self, path: str, body: Any = None, *, token: str = "", verb: str = "", timeout: float = 120,
            ) -> tuple[int, Any]:
        """(status, JSON)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        with contextlib.closing(connection):
            connection.request(verb or ("GET" if body is None else "POST"), path,
                               body if body is None or isinstance(body, (bytes, str)) else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def plan(self, **changes: Any) -> tuple[int, Any]:
        return self.ask("/plan", TASK | changes)

    def wait_for(self, test: Callable[[dict[str, Any]], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not test(health := self.ask("/health")[1]):
            assert time.monotonic() < deadline, health
            time.sleep(0.01)


def launch(log: Path, *flags: str, env: dict[str, str] | None = None, port: int = 0) -> Served:
    port = port or free_port()
    command = [sys.executable, "-m", "itp.serve", "--device", "cpu", "--port", str(port), *flags]
    with open(log, "w") as file:
        return Served(subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT | (env or {})), port, log)


@contextlib.contextmanager
def serving(log: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    served = launch(log, *flags, env=env)
    try:
        deadline = time.monotonic() + 180
        while "Application startup complete" not in log.read_text():
            assert served.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags with a tiny policy and a tiny world model."""
    folder = tmp_path_factory.mktemp("models")
    return ["--policy_model", str(write_tiny_model(folder / "policy", seed=0)), "--wm_model",
            str(write_tiny_model(folder / "wm", seed=1)), "--prompt_style", "tuned", "--wm_prompt_style", "tuned",
            "--temperature", "0.7", "--act_tokens", "8", "--wm_max_new_tokens", "12"]


@pytest.fixture(scope="module")
def served(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with serving(log, *models, "--fixed_k", "1", "--max_body_bytes", "20000", "--body_s", "1") as served:
        yield served


SLOW = ("--method", "cot", "--act_tokens", "700", "--temperature", "1")
"""A policy that writes for a second or so."""


def test_concurrent_requests_become_batches_and_each_gets_its_own_answer(served: Served) -> None:
    before = served.ask("/health")[1]
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda seed: served.plan(seed=seed), range(64)))
    after = served.ask("/health")[1]
    assert [status for status, _ in answers] == [200] * 64
    assert after["decisions"] - before["decisions"] == 64 and after["under_way"] == 0
    # The draft, its outcome and the action: 192 requests to the models, in far fewer batches.
    assert after["rows"] - before["rows"] == 192 and after["batches"] - before["batches"] < 48
    assert len({answer["action"] for _, answer in answers}) > 3
    for seed in (0, 17, 63):  # alone, each is answered as it was among others
        status, alone = served.plan(seed=seed)
        assert status == 200 and {k: v for k, v in alone.items() if k != "seconds"} == {
            k: v for k, v in answers[seed][1].items() if k != "seconds"}
    answer = answers[0][1]
    assert answer["method"] == "foresight" and answer["k"] == 1 and set(answer["imagined"][0]) == {
        "action", "observation"}
    assert answer["tokens"]["policy"]["calls"] == 2 and answer["tokens"]["world_model"]["calls"] == 1


def test_a_decision_is_that_of_an_evaluation(served: Served, models: list[str], games_root: Path,
                                             tmp_path: Path) -> None:
    settings = AlfworldSettings(
        policy_model=models[1], wm_model=models[3], out_dir=str(tmp_path / "out"), env_data_root=str(games_root),
        split="seen", max_steps=4, fixed_k=1, act_tokens=8, wm_max_new_tokens=12, prompt_style="tuned",
        wm_prompt_style="tuned", device="cpu", env_processes=1, temperature=0.7)
    asyncio.run(evaluate(settings))
    games = list_games("seen", games_root)
    compared = 0
    for i, record in results.read_episodes(tmp_path / "out").items():
        state = results.parse(record["conversations"][0]["value"])
        for t, step in enumerate(record["foresight_steps"]):
            history = [{"action": action, "observation": seen} for action, seen in state.history]
            _, answer = served.ask("/plan", {"task": state.task, "first_observation": state.first, "history": history,
                                             "seed": step_seed(settings.seed, games[i], t, 0)})
            assert answer["action"] == step["action"]
            assert [(s["action"], s["observation"]) for s in answer["imagined"]] == list(
                zip(step["imagined_actions"], step["wm_raw_output"], strict=True))
            state, compared = state.after(step["action"], step["obs_next"]), compared + 1
    assert compared == 8


def test_any_method_may_be_asked_for(served: Served) -> None:
    for method in ("sft", "react", "self_refine", "implement"):
        status, answer = served.plan(method=method)
        assert status == 200 and answer["method"] == method, answer
    assert served.plan(method="sft")[1]["tokens"].keys() == {"policy"}


@pytest.mark.parametrize("body, says", [
    (b"{", "JSON"),
    (b"[" * 5000, ""),
    ({"task": 3}, "task: .*string; first_observation: Field required"),
    (TASK | {"steps": 3}, "steps: Extra inputs"),
    (TASK | {"seed": -1}, "seed: "), (TASK | {"seed": 2**63}, "seed: "),
    (TASK | {"method": "guess"}, "method 'guess': give one of foresight, "),
    (TASK | {"method": "rap"}, "yes or no"),
    (TASK | {"history": [{"action": "look"}]}, "history.0.observation: Field required"),
    (TASK | {"invalid": [True]}, "invalid has 1 entries, and history 0"),
    (b'{"task": "\\ud800", "first_observation": "x"}', "surrogate"),
    (TASK | {"history": [{"action": "go", "observation": "On the mug 1, you see " * 500}]}, "has 11000 characters"),
    (TASK | {"history": [{"action": "go", "observation": "y " * 2500}]}, "exceed its context"),
])
def test_bad_requests_are_answered_with_what_is_wrong(served: Served, body: Any, says: str) -> None:
    status, answer = served.ask("/plan", body)
    assert status in (400, 422) and (status == 422 or body == b"[" * 5000), answer
    assert re.search(says, answer["detail"]) and "Traceback" not in served.log.read_text()


def test_a_body_that_is_too_large_or_too_slow(served: Served) -> None:
    status, answer = served.ask("/plan", TASK | {"method": "x" * 20000})
    assert status == 413 and "20000 bytes" in answer["detail"]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("POST", "/plan", iter([b"x" * 9000] * 3), {"Content-Type": "application/json"},
                       encode_chunked=True)  # without a length
    assert connection.getresponse().status == 413
    connection.close()
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as slow:
        slow.sendall(b"POST /plan HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert served.plan()[0] == 200


def test_the_examples_of_the_documentation(served: Served) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    examples = re.findall(r"^curl http://127.0.0.1:30972(/\w+)(?: -H 'Content-Type: application/json' -d '(.*?)')?$",
                          page, re.DOTALL | re.MULTILINE)
    assert [path for path, _ in examples] == ["/plan", "/generate_policy", "/perception", "/health"]
    answers = [served.ask(path, body or None) for path, body in examples]
    assert [status for status, _ in answers] == [200] * 4
    assert len(answers[1][1]) == 1 and answers[2][1][0]["inventory"] == "mug 1(hot)"


def test_methods_paths_and_health(served: Served) -> None:
    assert served.ask("/health")[1]["status"] == served.ask("/health", {})[1]["status"] == "ok"
    assert served.ask("/plan")[0] == 405 and served.ask("/nothing")[0] == 404


def test_a_client_that_vanishes_leaves_nothing_behind(models: list[str], tmp_path: Path) -> None:
    with serving(tmp_path / "log", *models, *SLOW, "--max_waiting", "4") as served:
        text = json.dumps(TASK).encode()
        head = b"POST /plan HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        for part in (text, text[:20]):  # with the whole request sent, and within its body
            clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(4)]
            for client in clients:
                client.sendall(head % len(text) + part)
            if part == text:
                served.wait_for(lambda health: health["under_way"] == 4)
                status, answer = served.plan()  # no room for a fifth
                assert status == 503 and "too many requests" in answer["detail"]
            for client in clients:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no goodbye
                client.close()
            served.wait_for(lambda health: health["under_way"] == 0)
        assert served.plan()[0] == 200
        assert served.ask("/health")[1]["decisions"] == 1 and "Traceback" not in served.log.read_text()


@pytest.mark.parametrize("grace, status", [("60", 200), ("0", 503)])
def test_requests_under_way_are_finished_or_refused_at_the_end(models: list[str], tmp_path: Path, grace: str,
                                                               status: int) -> None:
    with serving(tmp_path / "log", *models, *SLOW, "--shutdown_s", grace) as served, ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(served.plan, seed=i) for i in range(8)]
        served.wait_for(lambda health: health["under_way"] == 8)
        served.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
        assert [code for code, _ in answers] == [status] * 8, answers
        assert served.process.wait(60) == 0
        if status == 503:
            assert {answer["detail"] for _, answer in answers} == {
                "the server is shutting down, and this request wasn't finished in time"}
        with pytest.raises(OSError):
            served.plan()
        assert "Traceback" not in served.log.read_text()


def test_a_request_that_takes_too_long(models: list[str], tmp_path: Path) -> None:
    with serving(tmp_path / "log", *models, *SLOW, "--request_s", "0.05") as served:
        status, answer = served.plan()
        assert status == 504 and "--request_s" in answer["detail"]
        served.wait_for(lambda health: health["under_way"] == 0)


def test_a_model_behind_another_server_that_gives_no_answer(models: list[str], tmp_path: Path) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(404, "no such model")

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        flags = ["--method", "sft", "--policy_backend", "openai", "--policy_api_base_url",
                 f"http://127.0.0.1:{other.server_port}/v1"]
        with serving(tmp_path / "log", *models, *flags) as served:
            status, answer = served.plan()
            assert status == 502 and f"{other.server_port}/v1" in answer["detail"], answer
            assert "Traceback" not in served.log.read_text()
        other.shutdown()


def test_a_token(models: list[str], tmp_path: Path) -> None:
    flags = [*models, "--fixed_k", "1", "--token_env", "PLAN_TOKEN"]
    with serving(tmp_path / "log", *flags, env={"PLAN_TOKEN": TOKEN}) as served:
        assert served.ask("/plan", TASK, token=TOKEN)[0] == 200
        for wrong in ("", TOKEN[:-1], TOKEN + "x", "é" * 20):
            status, answer = served.ask("/plan", TASK, token=wrong)
            assert status == 401 and TOKEN not in json.dumps(answer)
        assert served.ask("/perception", {"samples": []})[0] == 401 and served.ask("/health")[0] == 200
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0 and TOKEN not in served.log.read_text()


@pytest.mark.parametrize("flags, env, says", [
    (["--wm_backend", "engine"], {}, "--wm_backend engine"),
    (["--token_env", "PLAN_TOKEN"], {"PLAN_TOKEN": "short"}, "at least 16"),
    (["--token_env", "PLAN_TOKEN"], {}, "must hold a token"),
    (["--token_env", "not a name"], {}, "the name of an environment variable"),
    (["--policy_model", "/no/such/model"], {}, "no such model folder"),
    (["--method", "rap"], {}, "yes or no"),
])
def test_what_cannot_be_served_is_one_line(models: list[str], tmp_path: Path, flags: list[str], env: dict[str, str],
                                           says: str) -> None:
    served = launch(tmp_path / "log", *models, *flags, env=env)
    assert served.process.wait(120) == 2
    errors = [line for line in served.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0] and "Traceback" not in served.log.read_text()
    assert env.get("PLAN_TOKEN", "-") not in errors[0] or env == {}


def test_a_port_in_use_is_one_line(models: list[str], tmp_path: Path, served: Served) -> None:
    second = launch(tmp_path / "log", *models, port=served.port)
    assert second.process.wait(120) == 2 and f"--port {served.port}: can't listen there" in second.log.read_text()


# ---------------------------------------------------------------- the published form


def test_policies_of_a_batch(served: Served) -> None:
    history = ["1. You attempt to open fridge 1 but fail.", "2. You successfully go to desk 2."]
    body = {"current_goals": [TASK["task"]] * 3, "current_states": [PUBLISHED] * 3,
            "histories": [history, "\n".join(history), []], "current_tasks": ["pick"] * 3, "model": "gpt",
            "conditions_1": [{}, None, {}], "conditions_2": [[], [], None]}
    status, actions = served.ask("/generate_policy", body)
    assert status == 200 and len(actions) == 3 and actions[0] == actions[1] and all(map(str.strip, actions))
    for wrong in ({"histories": [history]}, {"conditions_1": [{}]}, {"conditions_1": [{}, {}, {"desk 2": ["a mug"]}]},
                  {"conditions_2": [[["open fridge 1"]], [], []]},
                  {"conditions_2": [[["open \ud800", "desk 2", None, {}]], [], []]}):
        assert served.ask("/generate_policy", body | wrong)[0] == 422
    status, answer = served.ask("/generate_policy", body | {"histories": [["You ponder."], [], []]})
    assert status == 422 and "history line 'You ponder.'" in answer["detail"]
    assert served.ask("/generate_policy", {"current_goals": [], "current_states": [], "histories": []}) == (200, [])
    many = {"current_goals": ["g"] * 300, "current_states": [{"world_state": {}}] * 300, "histories": [[]] * 300}
    status, answer = served.ask("/generate_policy", many)
    assert status == 422 and "300 states" in answer["detail"]


def test_published_conditions_are_an_earlier_trial() -> None:
    belief = belief_of(PublishedState(**PUBLISHED))
    told = earlier_trial("g", belief, Conditions({"desk 2": ("mug", "pen", "mug"), "fridge 1": ()}, failed_of([
        ["open fridge 1", "desk 2", None, {"visited": False}], ["take mug 2 from desk 2", "moon 1", [], None]], "x")))
    assert told.state.first == first_observation(belief) and not told.success
    assert told.state.history == (
        ("go to desk 2", "You arrive at desk 2. On the desk 2, you see a mug 2, a mug 1, and a pen 1."),
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see nothing."),
        ("go to desk 2", "You arrive at desk 2."), ("open fridge 1", "Nothing happens."),
        ("take mug 2 from desk 2", "Nothing happens."))
    assert told.invalid == (False, False, False, False, True, True)
    # What implement remembers of it; also where no look has said yet that a fridge can be closed.
    assert [*remembered([told])] == ["desk 2", "fridge 1"]
    unseen = Belief.of(State("g", told.state.first))
    again = earlier_trial("g", unseen, Conditions({"fridge 1": ()}))
    assert remembered([again])["fridge 1"] == remembered([told])["fridge 1"]


def test_earlier_trials_reach_the_method(served: Served) -> None:
    """Reflexion's prompt has the note of a failed trial in it: a label, a colon and the note's three words."""
    ended = {"history": [{"action": "look", "observation": "Nothing happens."}], "note": "go to desk"}
    plain, noted = (served.plan(method="reflexion", earlier=earlier) for earlier in ([], [ended]))
    assert plain[0] == noted[0] == 200
    assert noted[1]["tokens"]["policy"]["prompt"] > plain[1]["tokens"]["policy"]["prompt"] + 3
    status, answer = served.plan(earlier=[ended | {"invalid": []}])
    assert status == 422 and "invalid has 0 entries, and history 1" in answer["detail"]


def test_perception_of_a_batch(served: Served) -> None:
    take = {"action": "take mug 2 from desk 2", "old_state": PUBLISHED,
            "observation": "You pick up the mug 2 from the desk 2."}
    status, states = served.ask("/perception", {"samples": [take, take | {"success": False}, {
        "action": "go to fridge 1", "old_state": PUBLISHED, "observation":
        "You arrive at fridge 1. The fridge 1 is open. In it, you see a apple 1, and a mug 3."}]})
    assert status == 200
    taken, failed, gone = states
    assert taken["inventory"] == ["mug 2(hot)", "plate 1(clean)"] and taken["world_state"]["desk 2"]["objects"] == []
    assert failed == PUBLISHED and gone["agent_location"] == "fridge 1"
    assert gone["world_state"]["fridge 1"] == {"visited": True, "open": True, "objects": ["apple 1", "mug 3"]}
    status, answer = served.ask("/perception", {"samples": [take | {"old_state": {"world_state": {"desk": {}}}}]})
    assert status == 422 and "samples.0.old_state" in answer["detail"] and "'desk' isn't a rec" in answer["detail"]


@pytest.fixture(scope="module")
def played(games_root: Path) -> list[Episode]:
    """What an expert does in one game of each task type."""
    async def play() -> list[Episode]:
        async with EnvPool(functools.partial(AlfworldEnv), 1) as pool:
            return [e async for e in run_episodes(pool, ExpertActor(), list_games("train", games_root), max_steps=60,
                                                  seed=1, concurrency=3)]
    return asyncio.run(play())


def lines(steps: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{i}. You attempt to {action} but fail." if seen == "Nothing happens." else
            f"{i}. You successfully {action}." for i, (action, seen) in enumerate(steps, start=1)]


def test_published_states_of_real_episodes_say_what_the_game_said(played: list[Episode]) -> None:
    """A published state and its history become the very text that the game wrote, at every step of whole episodes."""
    compared = 0
    for episode in played:
        for step in episode.steps:
            true, belief = step.state, Belief.of(step.state)
            read = belief_of(PublishedState(**json.loads(json.dumps(belief.to_json()))))
            assert read == belief
            made = text_state(true.task, read, lines(true.history))
            for (action, seen), (_, said) in zip(true.history, made.history, strict=True):
                if action != "look":
                    assert said == seen, action
                    compared += 1
            assert sorted(made.first.split()) == sorted(true.first.split())
    assert compared > 200


def test_perception_follows_real_episodes(played: list[Episode]) -> None:
    for episode in played:
        form = Belief.of(episode.steps[0].state).to_json()
        for step in episode.steps:
            before = belief_of(PublishedState(**form))
            form = json.loads(json.dumps(perceive(before, step.decision.action, not step.invalid, step.observation)))
        end = episode.steps[-1].state.after(episode.steps[-1].decision.action, episode.steps[-1].observation)
        assert form == json.loads(json.dumps(Belief.of(end).to_json()))


@pytest.mark.parametrize("given, held", [(None, []), ("", []), ("nothing", []), ("a mug 1(hot)", ["mug 1"]),
                                         (["mug 1", "pen 2"], ["mug 1", "pen 2"])])
def test_inventories(given: Any, held: list[str]) -> None:
    assert sorted(belief_of(PublishedState(inventory=given, world_state={})).inventory) == held


def test_what_is_no_published_state() -> None:
    with pytest.raises(UserError, match="agent_location 'moon 1'"):
        belief_of(PublishedState(agent_location="moon 1", world_state={}))
    with pytest.raises(UserError, match="inventory: 'something' isn't an object"):
        belief_of(PublishedState(inventory="something", world_state={}))
    assert history_of("3. You successfully go to shelf 1.\n4. You attempt to open drawer 1 but fail.") == [
        ("go to shelf 1", True), ("open drawer 1", False)]
    lamp = belief_of(PublishedState(inventory="desklamp 1 (on)", world_state={}))
    assert lamp.conditions == {"desklamp 1": {"lit"}} and text_state("g", lamp, []) == State(
        "g", "You are in the middle of a room. Looking quickly around you, you see nothing.")


def test_the_load_script_measures_it(served: Served, models: list[str], games_root: Path, tmp_path: Path) -> None:
    settings = AlfworldSettings(policy_model=models[1], method="sft", out_dir=str(tmp_path / "out"), split="seen",
                                env_data_root=str(games_root), max_steps=2, prompt_style="tuned", act_tokens=8,
                                device="cpu", env_processes=1)
    asyncio.run(evaluate(settings))
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "load_serve.py"), "--results", str(tmp_path / "out"),
                           "--url", f"http://127.0.0.1:{served.port}", "--clients", "1,8", "--requests", "16"],
                          env=ENVIRONMENT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["1", "16", "0"], ["8", "16", "0"]]
    assert float(rows[0][-1]) == 1.0 < float(rows[1][-1])


def test_the_critic_is_loaded_at_the_start_on_the_device_of_the_policy(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only a request may name a method that asks it."""
    folder = str(write_tiny_model(tmp_path / "policy"))
    model, tokenizer = load_causal_lm(folder, device="cpu", dtype="fp32")
    PolicyWithHeads.create(model, tokenizer, 1).save_pretrained(tmp_path / "critic", tokenizer)
    loaded = []

    def load(path: str, *, device: str, lm: LM | None = None, **others: Any) -> Policy:
        if lm is None:
            loaded.append((Path(path).name, device))
        return load_policy(path, device="cpu", lm=lm, **others)

    monkeypatch.setattr(plan, "load_policy", load)
    settings = ServeSettings(policy_model=folder, critic_model=str(tmp_path / "critic"), method="sft",
                             prompt_style="tuned", temperature=10.0, policy_device="cuda:1", device="cuda:0")

    async def serve() -> Planned:
        planner = await Planner.load(settings)
        assert sorted(loaded) == [("critic", "cuda:1"), ("policy", "cuda:1")]
        planned = await planner.decide(State(TASK["task"], TASK["first_observation"]), ["look", "inventory"], 1,
                                       method="step_q", selection="constrained")
        await planner.close()
        return planned

    planned = asyncio.run(serve())
    assert len(loaded) == 2 and planned.usage["critic"].calls == 2
