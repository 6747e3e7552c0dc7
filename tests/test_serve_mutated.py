"""A thousand requests that are nearly right: each is answered, with 200 or with one line of what is wrong."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from itp.serve.app import make_app
from itp.serve.planner import Planner
from itp.serve.requests import Requests
from itp.serve.settings import ServeSettings
from tests.tiny import write_tiny_model

FIRST = "You are in the middle of a room. Looking quickly around you, you see a desk 2, and a fridge 1."
BELIEF = {"agent_location": "desk 2", "inventory": "plate 1(clean)", "world_state": {
    "desk 2": {"visited": True, "open": "N/A", "objects": ["mug 2(hot)"]},
    "fridge 1": {"visited": False, "open": False, "objects": []}}}
STEP = {"action": "go to desk 2", "observation": "You arrive at desk 2. On the desk 2, you see a mug 2."}
VALID = {
    "/plan": {"task": "put a mug in fridge.", "first_observation": FIRST, "history": [STEP], "invalid": [False],
              "admissible_actions": ["look", "go to fridge 1"], "seed": 7, "method": "sft",
              "earlier": [{"history": [STEP], "success": False, "note": "look first", "invalid": [False]}]},
    "/generate_policy": {"current_goals": ["put a mug in fridge."], "current_states": [BELIEF],
                         "histories": [["1. You successfully go to desk 2.",
                                        "2. You attempt to open desk 2 but fail."]],
                         "current_tasks": ["put"], "model": "any", "conditions_1": [{"desk 2": ["mug"]}],
                         "conditions_2": [[["open desk 2", "desk 2", None, {}]]]},
    "/perception": {"samples": [{"action": "take mug 2 from desk 2", "success": True, "old_state": BELIEF,
                                 "observation": "You pick up the mug 2 from the desk 2."}]},
}
TEXTS = ("", " ", "\x00", "é\u202e\U0001f600", "\n\r\t", "{}", "go to " * 3000, "9" * 5000, "[PRE]", "N/A", "\ud800",
         "desk 2", "mug 2(wet)", "1. You successfully .", "true", "../../etc", "<CTRL>", "%s %d {0}")
VALUES = (None, True, False, 0, -1, 1 << 62, 1 << 70, 10 ** 400, 1.5, 1e308, float("nan"), float("inf"), [], {}, [[]],
          [None], {"": None}, [{}] * 300, {"a b": {"c": [1]}})


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, one in inner for deep in _paths(one, (*path, key)))]


def _nested(draw: random.Random) -> Any:
    value: Any = "deep"
    for _ in range(draw.choice((5, 60, 200))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def _changed(value: Any, draw: random.Random) -> Any:
    """``value`` with something wrong at a random place."""
    value = copy.deepcopy(value)
    path = draw.choice(_paths(value))
    other = draw.choice((draw.choice(TEXTS), draw.choice(VALUES), _nested(draw)))
    if not path:
        return other
    at = value
    for key in path[:-1]:
        at = at[key]
    key, how = path[-1], draw.randrange(6)
    if how == 0:
        del at[key]
    elif how == 1 and isinstance(at, dict):
        at[draw.choice(TEXTS)] = other
    elif how == 2 and isinstance(at, list):
        at *= draw.choice((2, 40))
    elif how == 3:
        at[key] = [at[key]] * draw.choice((1, 3))
    else:
        at[key] = other
    return value


def _body(valid: Any, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 3))):
        valid = _changed(valid, draw) if isinstance(valid, (dict, list)) else valid
    body = json.dumps(valid).encode()
    if draw.random() > 0.15:
        return body
    at = draw.randrange(len(body))
    return draw.choice((body[:at], body[:at] + bytes([draw.randrange(256)]) + body[at + 1:], b"", b"\xff\xfe" + body,
                        body + body, b"[" * 20_000, body.replace(b'"', b"'")))


def test_a_thousand_mutated_requests(tmp_path: Path) -> None:
    """No mutation of a valid body ends in an error of the server, and the server goes on."""
    settings = ServeSettings(policy_model=str(write_tiny_model(tmp_path / "policy")), prompt_style="tuned",
                             method="sft", act_tokens=4, device="cpu", max_body_bytes=60_000, max_waiting=64)
    draw = random.Random(11)
    made = [(path, _body(VALID[path], draw)) for path in random.Random(5).choices(list(VALID), k=1000)]
    statuses: Counter[int] = Counter()

    async def play() -> None:
        planner, requests = await Planner.load(settings), Requests(settings)
        transport = httpx.ASGITransport(make_app(settings, planner, requests), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            for begin in range(0, len(made), 20):
                these = made[begin:begin + 20]
                answers = await asyncio.gather(*(client.post(path, content=body, headers={
                    "Content-Type": "application/json"}) for path, body in these))
                for (path, body), answer in zip(these, answers, strict=True):
                    statuses[answer.status_code] += 1
                    told = answer.json() if answer.status_code != 500 else answer.text
                    assert answer.status_code in (200, 400, 413, 422), (answer.status_code, path, body[:300], told)
                    if answer.status_code != 200:
                        assert list(told) == ["detail"] and isinstance(told["detail"], str), (path, body[:300], told)
                        assert told["detail"].strip() and len(told["detail"]) < 2000, (path, body[:300], told)
                        assert len(told["detail"].splitlines()) == 1, (path, body[:300], told)
            for path, body in VALID.items():
                assert (await client.post(path, json=body)).status_code == 200
            assert (await client.get("/health")).json()["under_way"] == 0
        await planner.close()

    asyncio.run(play())
    assert statuses[200] > 50 and statuses[422] > 500, statuses
