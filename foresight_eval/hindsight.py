"""Compares imagined with real observations in the agent's own episodes, to judge the world model.

At step t the agent imagines (â_{t+i}, ô_{t+i+1}), i = 0..K−1.  A prediction can be judged while the agent's real
actions are the imagined ones.  From the first other action on, the real future is a different one.
"""

from __future__ import annotations

from typing import Any

from itp.text.facts import fact_f1


def judged(steps: list[dict[str, Any]], t: int) -> list[float | None]:
    """Fact-F1 of each step imagined at ``t`` of an episode's recorded ``steps``; None where it can't be judged."""
    imagined = list(zip(steps[t]["imagined_actions"], steps[t]["wm_raw_output"], strict=True))
    scores: list[float | None] = [None] * len(imagined)
    for i, ((action, observation), real) in enumerate(zip(imagined, steps[t:], strict=False)):
        if action != real["action"]:
            break
        scores[i] = fact_f1(observation, real["obs_next"])
    return scores


def fact_f1_by_depth(records: dict[int, dict[str, Any]]) -> dict[int, list[float]]:
    """Depth (1 is the next step) -> Fact-F1 of the imagined steps that can be judged."""
    by_depth: dict[int, list[float]] = {}
    for record in records.values():
        steps = record["foresight_steps"]
        for t in range(len(steps)):
            for depth, score in enumerate(judged(steps, t), start=1):
                if score is not None:
                    by_depth.setdefault(depth, []).append(score)
    return by_depth
