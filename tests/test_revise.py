"""Gated revision: the draft below the margin, the revision above it; records, refusals, real engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foresight_eval import results
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from foresight_eval.summary import summarize
from itp.agent.engine_world_model import NAME
from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.envs.base import Observation
from itp.errors import UserError
from itp.lm.base import GenParams, Generation, TokenLogprobs, asking
from itp.methods.base import Decision, Revision
from itp.methods.registry import build
from itp.methods.settings import MethodSettings
from itp.plan import check_scores, make_plan
from itp.text.prompts import action_target, foresight_text, policy_prompt
from tests.test_evaluation import timeless
from tests.test_methods import START, VIEW
from tests.tiny import write_tiny_model
from tests.toy import ToyLM

DRAFT, OTHER, SEEN = "take plate 1", "clean mug 2", "you see a moon 1"
MARGIN = 1.25
"""By how many nats the toy policy prefers OTHER to DRAFT, after it has read SEEN."""


class Wavering(ToyLM):
    """Drafts DRAFT, and prefers OTHER by MARGIN nats once it has read about the moon; or only DRAFT, if ``firm``."""

    def __init__(self, role: str, firm: bool = False) -> None:
        super().__init__(role)
        self.firm, self.scored = firm, []

    def answer(self, prompt: str, seed: int, params: GenParams) -> Generation:
        if self.role == "world_model":
            return Generation(f" {SEEN}", 9, 4, 0, "stop", -1.0)
        action = OTHER if SEEN in prompt and not self.firm else DRAFT
        return Generation(f" {action}" + "\n" * bool(params.choices), 9, 4, 0, "stop", -1.0)

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        self.scored += pairs
        with asking(self.role) as answers:
            answers += [TokenLogprobs((-1.0, 0.0 if target == action_target(OTHER) else -MARGIN), 9)
                        for _, target in pairs]
        return answers


def decided(selection: str = "generate", firm: bool = False, **how: Any) -> tuple[Decision, Wavering, Wavering]:
    policy, world_model = Wavering("policy", firm), Wavering("world_model")
    method = build("revise", Policy(policy, selection=selection), WorldModel(world_model), MethodSettings(**how))
    view = dataclasses.replace(VIEW, observation=Observation(START.observation, START.task, (OTHER, "look", DRAFT)))
    assert method.want_admissible == (selection != "generate")
    return asyncio.run(method.act(view)), policy, world_model


@pytest.mark.parametrize("selection", ["generate", "constrained"])
@pytest.mark.parametrize("threshold, taken", [(0.0, True), (MARGIN - 0.01, True), (MARGIN, False), (3.0, False)])
def test_the_revision_is_taken_above_the_margin_and_the_draft_below(selection: str, threshold: float,
                                                                    taken: bool) -> None:
    decision, policy, world_model = decided(selection, revise_margin=threshold)
    assert decision.action == (OTHER if taken else DRAFT) and decision.k == 1
    assert decision.revision == Revision(DRAFT, OTHER, pytest.approx(MARGIN), taken)
    assert decision.imagined.steps == ((DRAFT, SEEN),)  # the draft's outcome, not another action's
    assert [prompt for prompt, _ in policy.asked] == [
        policy_prompt(START.render()), policy_prompt(START.render(), foresight=foresight_text([(DRAFT, SEEN)]))]
    assert policy.scored == [(policy.asked[1][0], action_target(action)) for action in (OTHER, DRAFT)]
    assert len(world_model.asked) == 1


def test_where_nothing_changes_nothing_is_scored() -> None:
    for threshold in (0.0, 1.0):
        decision, policy, _ = decided(firm=True, revise_margin=threshold)
        assert decision.action == DRAFT and decision.revision == Revision(DRAFT, DRAFT, 0.0, False)
        assert not policy.scored


def test_k_steps_follow_the_draft() -> None:
    decision, policy, world_model = decided(fixed_k=3, revise_margin=9.0)
    assert decision.k == 3 == len(world_model.asked)
    assert decision.imagined.steps == ((DRAFT, SEEN), (OTHER, SEEN), (OTHER, SEEN))
    assert policy.scored[0][0] == policy_prompt(START.render(), foresight=foresight_text(decision.imagined.steps))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    """Two tiny random models, which imagine words at random."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("policy", "world_model")):
        write_tiny_model(folder / name, seed=seed)
    return AlfworldSettings(
        policy_model=str(folder / "policy"), wm_model=str(folder / "world_model"), out_dir="", method="revise",
        revise_margin=0.0, env_data_root=str(games_root), split="train", only_ids="0,1,2", max_steps=4, act_tokens=8,
        wm_max_new_tokens=16, action_selection="constrained", prompt_style="tuned", wm_prompt_style="tuned",
        device="cpu", env_processes=1)


def played(base: AlfworldSettings, folder: Path, **changes: Any) -> dict[int, dict[str, Any]]:
    asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(folder), **changes)))
    return results.read_episodes(folder)


@pytest.mark.parametrize("engine", [False, True])
def test_records_say_what_was_drafted_imagined_and_revised(base: AlfworldSettings, tmp_path: Path,
                                                           engine: bool) -> None:
    if engine:
        base = dataclasses.replace(base, wm_model="", wm_backend="engine")
    records = played(base, tmp_path / "free", concurrency=3)
    steps = [step for record in records.values() for step in record["foresight_steps"]]
    margins = sorted(step["revision"]["margin"] for step in steps
                     if step["revision"]["action"] != step["revision"]["draft"])
    assert len(steps) == 12 and len(margins) > 4
    middle = max(0.01, margins[len(margins) // 2])
    gated = played(base, tmp_path / "gated", concurrency=3, revise_margin=middle)
    for threshold, some in ((0.0, records), (middle, gated)):
        for step in (step for record in some.values() for step in record["foresight_steps"]):
            made = step["revision"]
            other = made["action"] != made["draft"]
            assert made["taken"] == (other and (not threshold or made["margin"] > threshold))
            assert step["action"] == made["action" if made["taken"] else "draft"]
            assert step["imagined_actions"] == [made["draft"]] and len(step["wm_raw_output"]) == step["k"] == 1
            assert other or made["margin"] == 0
    taken = [step["revision"]["taken"] for record in gated.values() for step in record["foresight_steps"]]
    summary = json.loads((tmp_path / "gated" / "summary.json").read_text())
    assert summary["revisions"]["taken"] == sum(taken) / 12 and 0 < sum(taken) < len(margins)
    assert summary["revisions"]["decisions"] == 12
    assert (summary.get("world_model") == NAME) == engine
    assert timeless(played(base, tmp_path / "alone", concurrency=1)) == timeless(records)


def test_the_summary_of_other_methods_has_no_revisions(base: AlfworldSettings, tmp_path: Path) -> None:
    records = played(base, tmp_path / "sft", method="sft", wm_model="", only_ids="0")
    assert "revisions" not in summarize(list(records.values()))
    assert "revision" not in records[0]["foresight_steps"][0]


def test_a_record_with_half_a_revision_is_refused(base: AlfworldSettings, tmp_path: Path) -> None:
    played(base, tmp_path / "out", only_ids="0", max_steps=1)
    path = tmp_path / "out" / "0.json"
    record = json.loads(path.read_text())
    del record["foresight_steps"][0]["revision"]["margin"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="0.json: step 0: revision.*margin.*delete it"):
        results.read_episodes(tmp_path / "out")


@pytest.mark.parametrize("changes, says", [
    ({"fixed_k": 0}, "--fixed_k 1 or more"),
    ({"disable_wm": 1}, "no --disable_wm"),
    ({"k_policy": "random"}, "leave --k_policy random out"),
    ({"k_policy": "head"}, "--method foresight, whose K-head decides"),
    ({"wm_model": ""}, "--method revise needs --wm_model"),
    ({"thinking": True, "action_selection": "generate"}, "can't think first"),
])
def test_what_leaves_nothing_to_revise_is_refused(base: AlfworldSettings, tmp_path: Path, changes: dict[str, Any],
                                                  says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(tmp_path / "out"), **changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_server_that_cannot_score_is_refused(base: AlfworldSettings) -> None:
    class Mute(ToyLM):
        async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
            raise UserError("it can't score")

    with pytest.raises(UserError, match="--method revise needs the log-probabilities of given text: it can't score"):
        asyncio.run(check_scores(base, Mute("policy")))


def test_one_step_is_imagined_where_none_is_named(base: AlfworldSettings) -> None:
    plan = make_plan(base)
    assert plan.method_settings.fixed_k == 1 and plan.how_k == "fixed" and plan.uses_world_model
    assert make_plan(dataclasses.replace(base, fixed_k=2, k_policy="fixed")).method_settings.fixed_k == 2
