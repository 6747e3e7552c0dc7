"""IMPLEMENT's world model on symbolic states: perception and prediction by one language model.

Its card says ``"predicts": "state"``.  It was trained on rows of :mod:`world_model.data_processing.metaicl`.  Its
prompts are those of world-model training, with the text of a mode in the place of the state
(:func:`itp.text.prompts.perception_state`, :func:`itp.text.prompts.prediction_state`), and it answers with the new
state as JSON.
"""

from __future__ import annotations

import random
from dataclasses import replace

from itp.agent.world_model import WorldModel
from itp.envs.alfworld.vocabulary import openable_types
from itp.errors import UserError
from itp.lm.vision import VisionLM
from itp.seeding import derive_seed
from itp.text import prompts
from itp.text.answers import answer
from itp.text.belief import Belief
from itp.text.conditions import Conditions
from itp.text.state import State


class StateModel:
    """Both modes on ``world_model``, which :func:`itp.models.load_world_model` loads.

    ``state_tokens``: of a new state at most.
    """

    def __init__(self, world_model: WorldModel, state_tokens: int = 2048) -> None:
        self.lm, self.form = world_model.lm, world_model.form
        self.params = replace(world_model.params, max_new_tokens=state_tokens)

    def told(self, known: Conditions, seed: int) -> StateDynamics:
        """What ``implement`` asks, told of what earlier trials showed."""
        return StateDynamics(self, known, seed)

    async def close(self) -> None:
        await self.lm.close()

    async def perceive(self, belief: Belief, action: str, observation: str, success: bool, image: str = "") -> Belief:
        """[PER]: the state after ``action`` was answered, at temperature 0.  Raises UserError for a malformed reply.

        ``image``: the file of a picture of what was seen, for a model that sees.
        """
        state = prompts.perception_state(belief.to_json(), success, observation)
        reply, = await self._replies(state, action, 1, 0, 0.0, image)
        return Belief.parse(reply, f"state after {action!r}")

    async def predict(self, belief: Belief, action: str, conditions: Conditions, n: int, seed: int,
                      temperature: float = 1.0) -> list[Belief]:
        """[PRE]: ``n`` sampled states after ``action``; a reply that is no state leaves the state as it is.

        ``conditions``: as :meth:`itp.text.conditions.Conditions.chosen` selects them for this action.
        """
        state = prompts.prediction_state(belief.to_json(), conditions.object_lists,
                                         [one.row for one in conditions.failed])
        return [_state_or(belief, reply) for reply in await self._replies(state, action, n, seed, temperature)]

    async def _replies(self, state: str, action: str, n: int, seed: int, temperature: float,
                       image: str = "") -> list[str]:
        params = replace(self.params, temperature=temperature, seed=seed)
        prompt = prompts.world_model_prompt(state, action, self.form)
        if image:
            if not isinstance(self.lm, VisionLM):
                raise UserError(f"{self.lm.name} sees no pictures; give a vision-language model that was trained on "
                                "rows with images, or no image")
            return [reply.text for reply in await self.lm.generate([prompt] * n, params, [image] * n)]
        return [reply.text for reply in await self.lm.generate([prompt] * n, params)]


class StateDynamics:
    """A state model that answers with observations, those by which the game would say what it predicts.

    ``known``: conditions of all earlier trials, of which each prediction is given those that are chosen for it.
    """

    def __init__(self, model: StateModel, known: Conditions, seed: int) -> None:
        self.model, self.known, self.seed = model, known, seed

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        """``n`` observations after ``action`` in ``state``, which has its whole history."""
        before, draw = Belief.of(state), random.Random(derive_seed(self.seed, "conditions", action))
        given = self.known.chosen(before, action, openable_types(), draw)
        return [answer(before, action, after)
                for after in await self.model.predict(before, action, given, n, seed, temperature)]


def _state_or(belief: Belief, reply: str) -> Belief:
    try:
        return Belief.parse(reply)
    except UserError:
        return belief
