"""Measures a planning server: latency, requests a second and mean batch size with so many clients at a time.

    python -m itp.serve --policy_model models/alfworld/policy --wm_model models/alfworld/world_model \\
        --method foresight --fixed_k 1
    python scripts/load_serve.py --results runs/demo/eval/acts-at-once --clients 1,8,64

The requests are states of recorded episodes, each with a seed of its own.  A client sends its next request when it has
its answer.  The batch size is that of the models in the server's process, between its two words on it (``/health``).
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from foresight_eval.results import read_episodes
from foresight_eval.statistics import percentile
from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.program import run_main
from itp.text.state import State, parse


@dataclass
class LoadSettings:
    results: str = flag(help="result folder whose episodes the states are of")
    url: str = flag("http://127.0.0.1:30972", help="the server")
    clients: str = flag("1,8,64", help="numbers of clients at a time, one after the other")
    requests: int = flag(256, at_least=1, help="requests for each of these numbers")
    method: str = flag("", help="method to ask for (empty: the server's)")
    token_env: str = flag("", help="environment variable that holds the server's token")


def main() -> None:
    settings = parse_settings(LoadSettings, prog="python scripts/load_serve.py", description=__doc__)
    bodies = list(itertools.islice(itertools.cycle(recorded_requests(settings)), settings.requests))
    print("clients  requests  failed  p50 s  p95 s  requests/s  mean batch")
    for clients in (int(n) for n in settings.clients.split(",")):
        before, start = ask(settings, "GET", "/health"), time.monotonic()
        run = Run(settings, [json.dumps(body | {"seed": i}) for i, body in enumerate(bodies)])
        run.play(clients)
        seconds, after = time.monotonic() - start, ask(settings, "GET", "/health")
        batches = after["batches"] - before["batches"]
        size = f"{(after['rows'] - before['rows']) / batches:.1f}" if batches else "-"
        p50, p95 = (percentile(run.seconds, q) or 0.0 for q in (50, 95))
        print(f"{clients:7d}  {len(bodies):8d}  {len(run.failed):6d}  {p50:5.2f}  {p95:5.2f}  "
              f"{len(run.seconds) / seconds:10.1f}  {size:>10}", flush=True)
        if run.failed:
            print(f"error: {run.failed[0]}", file=sys.stderr)


def recorded_requests(settings: LoadSettings) -> list[dict[str, Any]]:
    """A request for each step of the recorded episodes.  Raises UserError where there are none."""
    found = [body(state, settings.method) for record in read_episodes(Path(settings.results)).values()
             for state in states(record)]
    if not found:
        raise UserError(f"--results {settings.results}: no recorded steps; give what an evaluation's --out_dir named")
    return found


def states(record: dict[str, Any]) -> Iterator[State]:
    """The states in which an episode's actions were chosen."""
    state = parse(record["conversations"][0]["value"]) if record["foresight_steps"] else None
    for step in record["foresight_steps"]:
        yield state
        state = state.after(step["action"], step["obs_next"])


def body(state: State, method: str) -> dict[str, Any]:
    """The request for a decision in ``state``."""
    return {"task": state.task, "first_observation": state.first, "method": method,
            "history": [{"action": action, "observation": observation} for action, observation in state.history]}


@dataclass
class Run:
    """Clients that share the requests ``bodies``; ``seconds`` of each answer, and what went wrong with the others."""

    settings: LoadSettings
    bodies: list[str]
    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def play(self, clients: int) -> None:
        threads = [threading.Thread(target=self._client, args=(self.bodies[i::clients],)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, bodies: list[str]) -> None:
        for one in bodies:
            start = time.monotonic()
            try:
                ask(self.settings, "POST", "/plan", one)
            except UserError as error:
                self.failed.append(str(error))
            else:
                self.seconds.append(time.monotonic() - start)


def ask(settings: LoadSettings, verb: str, path: str, text: str = "") -> dict[str, Any]:
    """The server's answer.  Raises UserError where it is none of status 200."""
    where = urlsplit(settings.url)
    headers = {"Content-Type": "application/json"}
    if settings.token_env:
        headers["Authorization"] = f"Bearer {os.environ.get(settings.token_env, '')}"
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 80, timeout=600)
    try:
        connection.request(verb, path, text or None, headers)
        response = connection.getresponse()
        said = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{settings.url}{path}: no answer ({error}); is the server there?") from error
    finally:
        connection.close()
    if response.status != 200:
        raise UserError(f"{settings.url}{path}: status {response.status}, {said[:200].decode(errors='replace')}")
    return json.loads(said)


if __name__ == "__main__":
    run_main(main)
