"""The routes: ``/plan``, and ``/generate_policy``, ``/perception`` and ``/health`` in the published form."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from itp.serve.guard import Guard
from itp.serve.planner import ModelFailed, Planned, Planner, answer, failed
from itp.serve.published import (
    Failed, ObjectLists, PublishedBelief, Text, earlier_trial, perceive, text_state,
)
from itp.serve.requests import Requests
from itp.serve.settings import ServeSettings
from itp.errors import UserError
from itp.methods.base import EarlierTrial
from itp.program import without_secrets
from itp.seeding import derive_seed
from itp.text.conditions import Conditions
from itp.text.state import State

SHOWN = 5
"""Mistakes of a request, as many as its answer names."""
LONGEST_NAME = 60
"""Characters that the answer shows of a field's name, which a client may choose."""
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Executed(_Body):
    action: Text
    observation: Text


class Trial(_Body):
    """An episode of the same game that was played to its end.  ``note``: a reflection on it."""

    history: list[Executed]
    success: bool = False
    note: Text = ""
    invalid: list[bool] | None = None


class PlanRequest(_Body):
    """One state.  ``invalid``: which actions of the history the engine didn't take; by default "Nothing happens."."""

    task: Text
    first_observation: Text
    history: list[Executed] = Field(default_factory=list)
    invalid: list[bool] | None = None
    admissible_actions: list[Text] | None = None
    seed: Seed = 0
    method: Text = ""
    earlier: list[Trial] = Field(default_factory=list)


class PolicyRequest(_Body):
    """A batch in the published form; the conditions are one for each state, or none.

    ``model`` and ``current_tasks`` aren't read.
    """

    current_goals: list[Text]
    current_states: list[PublishedBelief]
    histories: list[list[Text] | Text]
    current_tasks: list[Any] | None = None
    model: Text = ""
    conditions_1: list[ObjectLists] | None = None
    conditions_2: list[Failed] | None = None


class Sample(_Body):
    """``old_state``, and what came of ``action`` in it."""

    action: Text
    success: bool = True
    old_state: PublishedBelief
    observation: Text = ""


class PerceptionRequest(_Body):
    samples: list[Sample]


def make_app(settings: ServeSettings, planner: Planner, requests: Requests) -> FastAPI:
    """The application, whose models are ``planner``'s."""
    app = FastAPI(title="Imagine-then-Plan", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, settings=settings)
    _say_what_is_wrong(app)

    @app.post("/plan")
    async def plan(request: Request, body: PlanRequest) -> Any:
        state, invalid = _episode(body, body)
        earlier = [EarlierTrial(ended, tuple(failed(ended) if wrong is None else wrong), trial.success, trial.note)
                   for trial in body.earlier for ended, wrong in [_episode(body, trial)]]
        return answer(await requests.run(request, planner.decide(
            state, body.admissible_actions, body.seed, method=body.method, invalid=invalid, earlier=earlier)))

    @app.post("/generate_policy")
    async def generate_policy(request: Request, body: PolicyRequest) -> Any:
        cases = _cases(body)
        if not cases:
            return []
        if len(cases) > settings.max_waiting:
            raise UserError(f"{len(cases)} states in one request, and at most {settings.max_waiting} decisions may "
                            "wait (--max_waiting); send fewer")
        made = await requests.run(request, _decide_all(planner, settings, cases), len(cases))
        return [planned.decision.action for planned in made]

    @app.post("/perception")
    async def perception(body: PerceptionRequest) -> Any:
        return [perceive(sample.old_state, sample.action, sample.success, sample.observation)
                for sample in body.samples]

    @app.api_route("/health", methods=["GET", "POST"])
    async def health() -> Any:
        batches = planner.batches
        return {"status": "ending" if requests.ending else "ok", "method": settings.method, "env": settings.env,
                "under_way": requests.under_way, "decisions": planner.decisions, "batches": len(batches),
                "rows": sum(batches)}

    return app


def _episode(request: PlanRequest, played: PlanRequest | Trial) -> tuple[State, list[bool] | None]:
    """The state of an episode in the game of ``request``, and what is said of its actions.  Raises UserError."""
    if played.invalid is not None and len(played.invalid) != len(played.history):
        raise UserError(f"invalid has {len(played.invalid)} entries, and history {len(played.history)}")
    steps = tuple((step.action, step.observation) for step in played.history)
    return State(request.task, request.first_observation, steps), played.invalid


async def _decide_all(planner: Planner, settings: ServeSettings, cases: list[tuple[State, list[EarlierTrial]]],
                      ) -> list[Planned]:
    """The decisions in some states, written freely: the published form lists no admissible actions."""
    tasks = [asyncio.create_task(planner.decide(
        state, None, derive_seed(settings.seed, state.task, len(state.history)), selection="generate", earlier=earlier))
        for state, earlier in cases]
    try:
        return await asyncio.gather(*tasks)
    finally:  # where one fails, nobody waits for the others
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cases(body: PolicyRequest) -> list[tuple[State, list[EarlierTrial]]]:
    """The text states of a batch, and the earlier trials that their conditions tell of.  Raises UserError."""
    given = {"current_goals": body.current_goals, "current_states": body.current_states, "histories": body.histories,
             "conditions_1": body.conditions_1, "conditions_2": body.conditions_2}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise UserError(f"lists of different lengths: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
    none = [None] * len(body.current_goals)
    cases = []
    for goal, belief, lines, lists, failures in zip(body.current_goals, body.current_states, body.histories,
                                                   body.conditions_1 or none, body.conditions_2 or none, strict=True):
        known = Conditions(lists or {}, failures or ())
        earlier = [earlier_trial(goal, belief, known)] if lists or failures else []
        cases.append((text_state(goal, belief, lines), earlier))
    return cases


def _say_what_is_wrong(app: FastAPI) -> None:
    """Every error is JSON with one ``detail``."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{_named(each['loc'][1:]) or 'body'}: {each['msg']}" for each in error.errors()]
        more = f"; and {len(found) - SHOWN} more" * (len(found) > SHOWN)
        return JSONResponse({"detail": _one_line("; ".join(found[:SHOWN]) + more)}, 422)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        status = 502 if isinstance(error, ModelFailed) else 422
        return JSONResponse({"detail": _one_line(without_secrets(str(error)))}, status)


def _named(place: tuple[Any, ...]) -> str:
    return ".".join(str(part)[:LONGEST_NAME] for part in place)


def _one_line(text: str) -> str:
    """``text`` without what would break a line or couldn't be written: a client's own names may have it."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
