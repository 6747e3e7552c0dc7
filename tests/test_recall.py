"""What an episode's own steps determine is recalled in the engine's words; only the rest is asked of the LM."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from foresight_eval.settings import AlfworldSettings, SciworldSettings
from itp.agent.world_model import WorldModel
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.errors import UserError
from itp.model_card import ModelCard
from itp.models import load_world_model
from itp.plan import make_plan
from itp.text.kinds import kinds_of
from itp.text.recall import recalled
from itp.text.state import State
from itp.training.itp_r import a2c_settings, label
from tests.test_text import ScriptedLM

START = State("put a mug in shelf", "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, "
                                    "a desk 1, and a shelf 1.")
TO_DESK = ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 2, a mug 1, and a pen 1.")
TAKE = ("take mug 2 from desk 1", "You pick up the mug 2 from the desk 1.")
TO_SHELF = ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see nothing.")
PUT = ("move mug 2 to shelf 1", "You move the mug 2 to the shelf 1.")


def after(*steps: tuple[str, str]) -> State:
    return State(START.task, START.first, steps)


def test_random_walks_in_the_engine_are_recalled_exactly_and_first_visits_never(games_root: Path) -> None:
    env, draw, checked = AlfworldEnv(want_admissible=True), random.Random(3), Counter()
    for game in list_games("train", str(games_root))[:4]:
        start = env.reset(game)
        state, admissible = State(start.task, start.text), start.admissible
        for _ in range(150):
            # A walk that goes about in a few places, and acts on what lies there.
            near = [a for a in admissible if not a.startswith(("help", "go to"))]
            action = draw.choice(near if draw.random() < 0.5 else admissible)
            seen = env.step(action).obs
            kinds, known = kinds_of(state, action, seen.text), recalled(state, action)
            assert known == seen.text if kinds[0] == "revisit" else known in (None, seen.text), (action, known)
            assert known is None or kinds[0] not in ("first_visit", "invalid"), (action, known)
            checked.update(kinds)
            state, admissible = state.after(action, seen.text), seen.admissible
    env.close()
    assert checked["revisit_unchanged"] > 20 and checked["revisit_changed"] > 10


def test_the_lm_is_asked_only_for_what_cannot_be_known() -> None:
    lm = ScriptedLM(lambda prompt: "You arrive at cabinet 1. The cabinet 1 is closed.")
    state = after(TO_DESK, TAKE, TO_SHELF, PUT)
    actions = ["go to desk 1", "go to cabinet 1", "examine shelf 1", "go to shelf 1"]
    said = asyncio.run(WorldModel(lm, recall=True).step([state] * 4, actions))
    cabinet = "You arrive at cabinet 1. The cabinet 1 is closed."
    assert said == ["You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 1.", cabinet,
                    "On the shelf 1, you see a mug 2.", cabinet]
    assert len(lm.asked) == 2  # going to where one is, too, is the LM's
    assert asyncio.run(WorldModel(lm, recall=True).sample(state, "go to desk 1", 3, seed=1)) == said[:1] * 3
    assert len(lm.asked) == 2
    asyncio.run(WorldModel(lm).step([state], ["go to desk 1"]))
    assert len(lm.asked) == 3


def test_another_environment_is_refused() -> None:
    with pytest.raises(UserError, match="--wm_recall knows the rules of ALFWorld"):
        load_world_model("nowhere", env="scienceworld", recall=True)


def test_it_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "policy_heads.json").write_text('{"kmax": 8, "hidden_size": 32}')
    model = {"policy_model": str(tmp_path), "wm_model": str(tmp_path), "wm_recall": True}
    of_rows = {"env": "scienceworld", "expert_jsonl": "", "out_labeled_jsonl": ""}
    for refuse in (lambda: make_plan(SciworldSettings(out_dir="", **model)),
                   lambda: label.check(label.LabelSettings(**of_rows, **model)),
                   lambda: a2c_settings.check(a2c_settings.RlSettings(env="scienceworld", out_dir="", **model))):
        with pytest.raises(UserError, match="--wm_recall knows the rules of ALFWorld"):
            refuse()
    ModelCard(predicts="state").write(tmp_path)
    with pytest.raises(UserError, match="symbolic states, which --wm_recall doesn't"):
        make_plan(AlfworldSettings(out_dir="", method="implement", **model))
