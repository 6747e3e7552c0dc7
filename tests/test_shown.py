"""What a policy is shown goes with its rows and its checkpoint, and every later stage shows it the same."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import write_tiny_model

from foresight_eval.runner import make_policy
from foresight_eval.settings import AlfworldSettings
from itp.lm.local import Quorum
from itp.policy.heads import load_policy_lm
from itp.policy.shown import show_as_trained, history_of, settle
from itp.runtime import UserError, model_card, write_json
from itp.text.prompts import foresight_text
from itp.text.state import State
from itp.training import sft
from itp.training.rl_k import RlSettings
from itp.training.rl_play import Player

STATE = State("put a plate in fridge", "You are in a room.")
for _step in range(5):
    STATE = STATE.after(f"go to cabinet {_step}", "The cabinet is closed.")
IMAGINED = [["open cabinet 1", "In it, you see a plate 1."], ["take plate 1 from cabinet 1", "Nothing happens."]]
SHOWN = {"foresight_format": "last_obs", "history_keep_steps": 2}


def row(**changes) -> dict:
    return {"episode_id": "e", "step": 0, "state": STATE.render(), "action": "look", "next_state": "x", "k_label": 2,
            "imagined": IMAGINED, "shown": SHOWN} | changes


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory: pytest.TempPathFactory) -> sft.SftSettings:
    """Settings of a finished warm-up on rows that were labelled with ``SHOWN``, its flags left open."""
    root = tmp_path_factory.mktemp("shown")
    (root / "rows.jsonl").write_text("".join(json.dumps(row(episode_id=f"e{i}")) + "\n" for i in range(4)))
    plain = write_tiny_model(root / "plain")
    write_json(plain / "itp_model.json", {"prompt_style": "tuned"})
    settings = sft.SftSettings(train_jsonl=str(root / "rows.jsonl"), out_dir=str(root / "out"), kmax=2, lora_r=0,
                               policy_model_path=str(plain), epochs=1.0, max_seq_len=400)
    sft.run(settings)
    return settings


def test_every_stage_and_evaluation_show_the_same(warm_up: sft.SftSettings) -> None:
    policy = str(warm_up.merged_path)
    assert model_card(policy).items() >= SHOWN.items()
    rl = show_as_trained(RlSettings(policy_model_path=policy, out_dir=""), policy)
    evaluation = show_as_trained(AlfworldSettings(policy_model=policy, output_path=""), policy)
    lm = load_policy_lm(policy)

    trained = sft.read_labelled(sft.as_labelled(warm_up))[0]
    assert trained.foresight == foresight_text([tuple(pair) for pair in IMAGINED], "last_obs")
    assert trained.state.omitted == 3 and history_of(policy) == 2
    for stage, acting in ((rl, Player(rl, lm, None, Quorum()).greedy), (evaluation, make_policy(evaluation, lm))):
        assert foresight_text([tuple(pair) for pair in IMAGINED], stage.foresight_format) == trained.foresight
        assert acting.prompt(STATE, "Action") == acting.prompt(trained.state, "Action")
        assert "[3 earlier steps omitted]" in acting.prompt(STATE, "Action")


def test_a_contradiction_is_refused(warm_up: sft.SftSettings, tmp_path: Path) -> None:
    policy = str(warm_up.merged_path)
    with pytest.raises(UserError, match="--foresight_format full, but .* was made with last_obs"):
        show_as_trained(AlfworldSettings(policy_model=policy, output_path="", foresight_format="full"), policy)
    with pytest.raises(UserError, match="--history_keep_steps 6"):
        show_as_trained(RlSettings(policy_model_path=policy, out_dir="", history_keep_steps=6), policy)
    with pytest.raises(UserError, match="--history_keep_steps 3, but .*rows.jsonl was made with 2"):
        sft.as_labelled(dataclasses.replace(warm_up, history_keep_steps=3))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps(row()) + "\n" + json.dumps(row(shown=SHOWN | {"history_keep_steps": 0})) + "\n")
    with pytest.raises(UserError, match="mixed.jsonl:2: labelled with"):
        sft.read_labelled(sft.as_labelled(dataclasses.replace(warm_up, train_jsonl=str(mixed))))


def test_where_nothing_is_on_record(tmp_path: Path) -> None:
    settings = AlfworldSettings(policy_model=str(tmp_path), output_path="")
    everything = show_as_trained(settings, str(tmp_path))
    assert (everything.foresight_format, everything.history_keep_steps) == ("full", 0)
    own = dataclasses.replace(settings, foresight_format="last_obs", history_keep_steps=4)
    assert show_as_trained(own, str(tmp_path)) == own
    rl = settle(RlSettings(policy_model_path="", out_dir=""), {}, "x", {"foresight_format": "full",
                                                                        "history_keep_steps": 6})
    assert rl.history_keep_steps == 6


def test_a_hub_name_keeps_heads_and_card(tmp_path: Path) -> None:
    """In the hub's cache, without network: the files that tell how a model is asked are found there."""
    snapshot = tmp_path / "models--me--policy" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--policy" / "refs").mkdir()
    (tmp_path / "models--me--policy" / "refs" / "main").write_text("0123abc")
    for name, content in (("config.json", {}), ("policy_heads.json", {"kmax": 4, "hidden_size": 8}),
                          ("itp_model.json", {"prompt_style": "tuned"} | SHOWN)):
        write_json(snapshot / name, content)
    code = ("from itp.policy.heads import has_heads, kmax_of\n"
            "from itp.runtime import check_model_path, model_card, model_fingerprint\n"
            "check_model_path('me/policy')\n"
            "print(has_heads('me/policy'), kmax_of('me/policy'), model_fingerprint('me/policy'),"
            " model_card('me/policy')['foresight_format'])")
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False,
                          env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert said.stdout == "True 4 me/policy@0123abc last_obs\n", said.stderr
