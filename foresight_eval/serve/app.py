"""The routes: ``/plan``, and ``/generate_policy``, ``/perception`` and ``/health`` in the published form."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from foresight_eval.serve.guard import Guard
from foresight_eval.serve.planner import ModelFailed, Planner, answer
from foresight_eval.serve.published import PublishedState, Text, perceive, text_state
from foresight_eval.serve.requests import Requests
from foresight_eval.serve.settings import ServeSettings
from itp.errors import UserError
from itp.program import without_secrets
from itp.seeding import derive_seed
from itp.text.state import State

SHOWN = 5
"""Mistakes of a request, as many as its answer names."""
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Executed(_Body):
    action: Text
    observation: Text


class PlanRequest(_Body):
    """One state.  ``invalid``: which actions of the history the engine didn't take; by default "Nothing happens."."""

    task: Text
    first_observation: Text
    history: list[Executed] = Field(default_factory=list)
    admissible_actions: list[Text] | None = None
    seed: Seed = 0
    method: Text = ""
    invalid: list[bool] | None = None


class PolicyRequest(_Body):
    """A batch in the published form.  ``model``, ``current_tasks`` and the conditions aren't read."""

    current_goals: list[Text]
    current_states: list[PublishedState]
    histories: list[list[Text] | Text]
    current_tasks: list[Any] | None = None
    model: Text = ""
    conditions_1: Any = None
    conditions_2: Any = None


class Sample(_Body):
    """``old_state``, and what came of ``action`` in it."""

    action: Text
    success: bool = True
    old_state: PublishedState
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
        state = State(body.task, body.first_observation, tuple((e.action, e.observation) for e in body.history))
        if body.invalid is not None and len(body.invalid) != len(body.history):
            raise UserError(f"invalid has {len(body.invalid)} entries, and history {len(body.history)}")
        return answer(await requests.run(request, planner.decide(
            state, body.admissible_actions, body.seed, method=body.method, invalid=body.invalid)))

    @app.post("/generate_policy")
    async def generate_policy(request: Request, body: PolicyRequest) -> Any:
        states = _text_states(body)
        if not states:
            return []
        if len(states) > settings.max_waiting:
            raise UserError(f"{len(states)} states in one request, and at most {settings.max_waiting} decisions may "
                            "wait (--max_waiting); send fewer")
        made = await requests.run(request, _decide_all(planner, settings, states), len(states))
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


async def _decide_all(planner: Planner, settings: ServeSettings, states: list[State]) -> list[Any]:
    """The decisions in some states, written freely: the published form lists no admissible actions."""
    return await asyncio.gather(*(
        planner.decide(state, None, derive_seed(settings.seed, state.task, len(state.history)), selection="generate")
        for state in states))


def _text_states(body: PolicyRequest) -> list[State]:
    """The text states of a batch.  Raises UserError."""
    lengths = {"current_goals": len(body.current_goals), "current_states": len(body.current_states),
               "histories": len(body.histories)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"lists of different lengths: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
    return [text_state(*each) for each in zip(body.current_goals, body.current_states, body.histories, strict=True)]


def _say_what_is_wrong(app: FastAPI) -> None:
    """Every error is JSON with one ``detail``."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
        more = f"; and {len(found) - SHOWN} more" * (len(found) > SHOWN)
        return JSONResponse({"detail": "; ".join(found[:SHOWN]) + more}, 422)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": without_secrets(str(error))}, 502 if isinstance(error, ModelFailed) else 422)
