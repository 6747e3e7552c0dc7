"""Other missions in a loaded ALFWorld world: training data at the price of a reset.

The engine knows one goal a game, and loading another costs a translation.  For gathering trajectories the
goal may just as well be posed in words: :class:`MissionEnv` gives the task sentence of the mission that
``Game.mission`` names, and the teacher's own bookkeeping says when it is accomplished (it agrees with the
engine's ``won`` wherever both speak; tested).  Not for evaluation, where only the engine's word counts.
"""

from __future__ import annotations

from dataclasses import replace

from itp.envs.alfworld import AlfworldEnv
from itp.envs.alfworld_expert import Expert
from itp.envs.base import Observation, StepResult
from itp.games import Game, posed_task, task_params


class MissionEnv(AlfworldEnv):
    """AlfworldEnv that poses ``game.mission``; the game's own mission is played and judged as ever."""

    _judge: Expert | None = None

    def reset(self, game: Game) -> Observation:
        observation = super().reset(game)
        self._judge = None
        if not game.mission:
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
