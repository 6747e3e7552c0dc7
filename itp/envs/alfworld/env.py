"""ALFWorld's real text engine behind the :class:`~itp.envs.base.TextEnv` contract.

The engine is TextWorld's PDDL engine with alfworld's names for things.  Its fast form
(:mod:`itp.envs.alfworld.fast_engine`) says exactly the same text; ``fast=False`` chooses TextWorld's own form.

The agent reads the engine's text.  Only the first text is changed: the greeting is removed, and the sentence after
"Your task is to:" becomes ``Observation.task``, without its full stop.

Newer ALFWorld games say ``move X to Y``, and older games say ``put X in/on Y``.  An action that is admissible only in
the game's other wording is executed in that wording.  Every other action is executed as written.

The engine isn't thread-safe.  Several ``AlfworldEnv`` in one process are fine: see :mod:`itp.envs.pool`.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from itp.envs.alfworld.games import read_game_file
from itp.envs.base import Observation, StepResult
from itp.errors import UnplayableGame, UserError
from itp.files import writing
from itp.games import Game
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import GREETING, MOVE, NOTHING_HAPPENS, PUT, TASK, move, put

if TYPE_CHECKING:
    from textworld.core import GameState

EXPERT_MAX_STEPS = 200

_IDLE_ENGINES: defaultdict[tuple[bool, str], list[Any]] = defaultdict(list)
"""Engines of closed environments.  The next environments use them, since unloading the native library can crash."""


class AlfworldEnv:
    """One ALFWorld engine.

    ``expert`` names the expert of alfworld that fills ``Observation.expert_action``.  "handcoded" acts on its
    observations and on some of the engine's facts.  "planner" knows the whole state and makes a new plan at every step,
    which takes from 0.03 s in a small room to 20 s for heating in a large kitchen.  The action is empty where the
    expert has given up or the game is won.

    ``info["executed"]`` is the action as the engine got it.  ``truncated`` is never set: the caller limits the steps of
    an episode.
    """

    def __init__(self, want_admissible: bool = False, fast: bool = True,
                 expert: Literal["", "handcoded", "planner"] = "") -> None:
        if expert not in ("", "handcoded", "planner"):
            raise UserError(f"unknown ALFWorld expert {expert!r}: choose handcoded or planner")
        self.want_admissible = want_admissible
        self.fast = fast
        self.expert = expert
        self._engine: Any = None
        self._loaded: tuple[str, int] | None = None  # path and modification time
        self._task = ""
        self._admissible: tuple[str, ...] = ()
        self._expert_action = ""
        self._expert: _HandcodedExpert | None = None

    def reset(self, game: Game) -> Observation:
        if self._engine is None:
            idle = _IDLE_ENGINES[self.fast, self.expert]
            with writing(tempfile.gettempdir()):  # it copies its library there
                self._engine = idle.pop() if idle else _make_engine(self.fast, self.expert)
        with _faults_of(game.path), writing(tempfile.gettempdir()), _argv_kept():
            self._load(Path(game.path))
            state = self._engine.reset()
            text, self._task = split_intro(state["feedback"], game.path)
            if self.expert == "handcoded":
                self._expert = _HandcodedExpert(game, state)
            self._note(state, "")
        return self._observation(text)

    def _load(self, path: Path) -> None:
        """Load a game file, unless it is loaded already and nobody has written it since."""
        version = (str(path), path.stat().st_mtime_ns) if path.exists() else None
        if version is not None and version == self._loaded:
            return
        read_game_file(path)
        self._loaded = None
        self._engine.load(str(path))
        self._loaded = version

    def step(self, action: str) -> StepResult:
        if self._loaded is None:
            raise RuntimeError("step() before reset()")
        executed = twin_if_admissible(action.strip(), self._admissible)
        with _faults_of(self._loaded[0]), _argv_kept():
            state, _, _ = self._engine.step(executed)
            self._note(state, executed)
        won = bool(state["won"])
        return StepResult(
            obs=self._observation(state["feedback"].strip()),
            reward=1.0 if won else 0.0,
            terminated=won,
            truncated=False,
            score=100.0 if won else 0.0,
            success=won,
            invalid=state["feedback"].strip() == NOTHING_HAPPENS,
            info={"executed": executed},
        )

    def close(self) -> None:
        if self._engine is not None:
            _IDLE_ENGINES[self.fast, self.expert].append(self._engine)
            self._engine = self._loaded = None

    def _note(self, state: GameState, executed: str) -> None:
        self._admissible = tuple(state["admissible_commands"])
        if state["won"]:
            self._expert_action = ""
        elif self.expert == "planner":
            self._expert_action = next(iter(state["policy_commands"]), "")
        elif self._expert is not None:
            self._expert_action = self._expert.act(state, executed)

    def _observation(self, text: str) -> Observation:
        admissible = self._admissible if self.want_admissible else None
        return Observation(text, self._task, admissible=admissible, expert_action=self._expert_action)


def twin_if_admissible(action: str, admissible: tuple[str, ...]) -> str:
    """``action`` in the game's own wording (``move X to Y`` or ``put X in/on Y``), where only that is admissible."""
    if action in admissible:
        return action
    if match := MOVE.fullmatch(action):
        twins = [put(match["object"], match["place"], preposition) for preposition in ("in/on", "in", "on")]
    elif match := PUT.fullmatch(action):
        twins = [move(match["object"], match["place"]), put(match["object"], match["place"])]
    else:
        return action
    return next((twin for twin in twins if twin in admissible), action)


def split_intro(feedback: str, path: str) -> tuple[str, str]:
    """(observation, task) of the first text of a game."""
    observation, found, task = feedback.removeprefix(GREETING).partition(TASK)
    if not found:
        raise UnplayableGame(f"{path}: the game's intro has no {TASK!r}; download or make it again")
    return observation.strip(), task.strip().removesuffix(".")


class _HandcodedExpert:
    """alfworld's handcoded expert, called as alfworld's ``AlfredExpert`` calls it, with two differences.

    Its random choices come from a generator of the episode's own, so they don't depend on the rest of the process.  It
    gives no action for the rest of the episode once it gives up or fails at an unexpected state.  It may meet such a
    state when other actions than its own are executed.
    """

    def __init__(self, game: Game, state: GameState) -> None:
        from alfworld.agents.expert import HandCodedTWAgent

        self._random = random.Random(derive_seed("handcoded expert", game.game_id)).getstate()
        self._agent: HandCodedTWAgent | None = HandCodedTWAgent(max_steps=EXPERT_MAX_STEPS)
        try:
            self._agent.reset(game.path)
        except (OSError, ValueError, KeyError) as error:
            raise UnplayableGame(f"{game.path}: its traj_data.json can't be read ({error!r}); the handcoded expert "
                                 "needs it: download or make the game again") from error
        self._agent.observe(state["feedback"])

    def act(self, state: GameState, last_action: str) -> str:
        from alfworld.agents.expert import HandCodedAgentFailed, HandCodedAgentTimeout

        if not last_action:
            return "look"  # as in AlfredExpert, which only observes the first text
        if self._agent is None:
            return ""
        outside = random.getstate()
        random.setstate(self._random)
        try:
            action = self._agent.act(state, 0, state["won"], last_action)
        except (HandCodedAgentFailed, HandCodedAgentTimeout, IndexError):
            self._agent = None
            return ""
        finally:
            self._random = random.getstate()
            random.setstate(outside)
        return action if action in state["admissible_commands"] else "look"


def _make_engine(fast: bool, expert: str) -> Any:
    with _argv_kept():
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
            from textworld.envs.pddl.pddl import PddlEnv

            sys.argv = ["translate", "domain", "problem"]  # the translator parses sys.argv when it is imported
            import fast_downward.translate.options  # noqa: F401
        except ImportError as error:
            raise UserError(f"ALFWorld's engine isn't installed ({error}): pip install alfworld") from error
        if fast:
            from itp.envs.alfworld.fast_engine import FastPddlEnv as PddlEnv  # noqa: F811
        infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True,
                                   facts=expert == "handcoded", policy_commands=expert == "planner")
        return AlfredInfos(AlfredDemangler(PddlEnv(infos)))


@contextlib.contextmanager
def _faults_of(path: str) -> Iterator[None]:
    """Raises UnplayableGame, which names the game's file, for whatever the engine meets in it.

    The engine's libraries check little, and what they raise says nothing of the file: a KeyError for an unknown type, a
    StopIteration for a problem without text, a SystemExit from a parser.  There is no list of it.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UnplayableGame(f"{path}: the engine can't play this game ({said}); download or make it again") from error


@contextlib.contextmanager
def _argv_kept() -> Iterator[None]:
    """fast_downward overwrites ``sys.argv``, on import and at every translation."""
    argv = sys.argv
    try:
        yield
    finally:
        sys.argv = argv
