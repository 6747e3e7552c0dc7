"""What a base LM that is to copy starts out with: contents directly behind their place, and an induction head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from itp.errors import UserError
from itp.training.from_scratch.base_lm import BaseLMSettings, main, write_initial
from itp.transitions import Transition
from tests.tiny import TEXTS


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lm") / "initial"
    state = "Task: put a mug in shelf.\nObservation: You are in a room."
    settings = BaseLMSettings(transitions="", out_dir="", num_heads=4, copying=1)
    write_initial(settings, [[Transition("e", 0, state, "look", "You see.")]], folder, TEXTS)
    return folder


@pytest.mark.parametrize(("text", "place"), [
    ("You arrive at shelf 1. On the shelf 1, you see a mug 2, a mug 1, and a pen 3.", "shelf 1, you see"),
    ("You open the fridge 1. The fridge 1 is open. In it, you see a pan 1.", "fridge 1 is open. In it, you see"),
])
def test_contents_stand_directly_behind_their_place(initial: Path, text: str, place: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(initial)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[tokens.index(place) + 1] in ("mug 2", "pan 1")
    assert tokenizer.decode(ids) == text
    closed = "You arrive at fridge 1. The fridge 1 is closed."
    assert tokenizer.decode(tokenizer(closed, add_special_tokens=False)["input_ids"]) == closed


def test_a_head_finds_what_followed_the_same_token_before(initial: Path) -> None:
    """Untrained, the first head of layer 0 looks one token back, and that of layer 1 behind the last equal token."""
    tokenizer = AutoTokenizer.from_pretrained(initial)
    model = AutoModelForCausalLM.from_pretrained(initial, attn_implementation="eager").eval()
    text = ("You arrive at shelf 1. On the shelf 1, you see a mug 2, a pen 1, and a pan 3.\nAction: go to desk 1\n"
            "Observation: You arrive at desk 1. On the desk 1, you see a cup 4, and a vase 2.\nAction: go to shelf 1\n"
            "Observation: You arrive at shelf 1. On the shelf 1, you see")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    with torch.no_grad():
        back, copying = (layer[0, 0] for layer in model(ids, output_attentions=True).attentions[:2])
    assert all(back[t, t - 1] > 0.9 for t in range(1, len(tokens)))
    assert tokens[-1] == "shelf 1, you see"
    assert tokens[copying[-1].argmax()] == "mug 2" and copying[-1].max() > 0.25


@pytest.mark.parametrize("flag", ["--num_layers=1", "--num_heads=64"])
def test_a_model_without_room_for_an_induction_head_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["base_lm", "--transitions=t.jsonl", "--out_dir=out", "--copying=1", flag])
    with pytest.raises(UserError, match="--num_layers 2 or more"):
        main()
