"""Result folders made of hand-written episodes, in the very files that an evaluation writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foresight_eval import results
from foresight_eval.summary import write_summary
from itp.agent.imagination import ImaginedTrajectory
from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES, GAME_FIELDS
from itp.games import Game
from itp.lm.base import Usage
from itp.methods.base import Decision
from itp.rollout import Episode, Step
from itp.text.state import State

ROOM = "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a fridge 1."
DESK = "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 2."
TAKEN = "You pick up the mug 1 from the desk 1."
PLAYED = (("go to desk 1", DESK), ("take mug 1 from desk 1", TAKEN), ("go to fridge 1", "The fridge 1 is closed."))
"""What is done, and what comes of it."""
CONFIG = {"method": "foresight", "disable_wm": 0, "fixed_k": -1, "max_k": 2, "policy_fingerprint": "p",
          "wm_fingerprint": "w", "split": "unseen", "max_steps": 40, "action_selection": "constrained",
          "out_dir": ""}


def make_games(folder: Path, n: int) -> list[Game]:
    """``n`` games over the six task types; the solution of the i-th has 4 + i steps."""
    games = []
    for i in range(n):
        path = folder / str(i) / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        texts = dict.fromkeys(GAME_FIELDS, f"game {i}")
        path.write_text(json.dumps(texts | {"walkthrough": ["look"] * (4 + i)}))
        games.append(Game("alfworld", "valid_unseen", f"game_{i}", str(path), ALFWORLD_TASK_TYPES[i % 6]))
    return games


def make_episode(game: Game, *, success: bool, imagined: Sequence[Sequence[tuple[str, str]]], task: str = "",
                 played: Sequence[tuple[str, str]] = PLAYED, tokens: int = 100) -> Episode:
    """An episode of ``played`` steps; ``imagined`` is what was imagined before each."""
    state = State(task or f"put a mug in fridge {game.game_id}", ROOM)
    episode = Episode(game, success=success, score=100.0 * success, reason="success" if success else "step_limit")
    for t, (action, observation) in enumerate(played):
        steps = tuple(imagined[t]) if t < len(imagined) else ()
        decision = Decision(action, len(steps), ImaginedTrajectory(state, steps), k_raw=f" {len(steps)}\n")
        episode.steps.append(Step(state, decision, observation, 0.0, episode.score, t == len(played) - 1, False,
                                  {"policy": Usage(2, tokens, 4, tokens // 2)}, seconds=0.1 * (t + 1)))
        state = state.after(action, observation)
    return episode


def write_result(folder: Path, episodes: Sequence[Episode], **config: Any) -> results.Result:
    """A finished result folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, episode in enumerate(episodes):
        results.write_episode(folder, i, episode)
    (folder / "config.json").write_text(json.dumps({"config": CONFIG | config, "versions": {}}))
    write_summary(folder)
    return results.read_results([folder])[0]
