"""Other goals in a loaded ALFWorld world: training data for the cost of a reset.

The engine knows one goal per game, and loading another game costs a translation.  For collecting trajectories it is
enough to pose the goal in words.  :class:`GoalEnv` gives the task sentence of the goal that ``Game.goal`` names.  The
expert's record of the episode tells when that goal is reached; on a game's own goal, a test compares this record with
the engine's ``won``.  Evaluation never uses it: only the engine's ``won`` counts there.
"""

from __future__ import annotations

from dataclasses import replace

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import posed_task, task_params
from itp.envs.base import Observation, StepResult
from itp.games import Game


class GoalEnv(AlfworldEnv):
    """AlfworldEnv that poses ``game.goal``.  The game's own goal is played and judged as in AlfworldEnv."""

    _judge: Expert | None = None

    def reset(self, game: Game) -> Observation:
        observation = super().reset(game)
        self._judge = None
        if not game.goal:
            return observation
        self._judge = Expert(task_params(game), game.task_type, observation.text)
        self._task = posed_task(game)
        return replace(observation, task=self._task)

    def step(self, action: str) -> StepResult:
        result = super().step(action)
        if self._judge is None:
            return result
        self._judge.observe(action, result.obs.text)
        accomplished = self._judge.finished
        return replace(result, reward=float(accomplished), terminated=accomplished, score=100.0 * accomplished,
                       success=accomplished)
