"""Packed training sequences: the losses of a row each, in plain text and in chat turns, for less computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from itp.lm.tokenize import Encoder
from itp.text.prompt_format import PLAIN, PromptFormat, PromptTemplate
from itp.text.segments import dialogue_examples
from itp.text.state import State
from itp.training.base_policy import BasePolicySettings
from itp.training.examples import Example, encode
from itp.training.packing import examples_of, pack
from itp.training.text_task import Collator, TextTask
from itp.transitions import Transition
from tests.tiny import write_tiny_model
from world_model.base_tuning.examples import WorldModelSettings, sample, to_examples

CHAT = PromptTemplate("<user> ", " <end>\n<model> ")


def episodes(count: int, steps: int) -> list[Transition]:
    rows = []
    for number in range(count):
        state = State("put a mug in shelf 1.", f"You see a shelf {number}, and a drawer 1.")
        for step in range(steps):
            action, seen = f"go to shelf {step}", f"You arrive at shelf {step}. On it is a mug {number + step}."
            rows.append(Transition(f"game {number}", step, state.render(), action, seen))
            state = state.after(action, seen)
    return rows


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.set_num_threads(1)
    words = ["<user> <end> <model>", *(t.state + t.next_state for t in episodes(6, 9))]
    return write_tiny_model(tmp_path_factory.mktemp("lm"), words=words)


def losses(model, rows):
    """Sum of the losses of all targets, computed row by row, and their number."""
    task, total, count = TextTask(WorldModelSettings(model_path="", out_dir="", data_path=""), []), 0.0, 0
    for row in rows:
        batch = Collator(0)([row])
        out = task.forward(model, batch)
        total, count = total + out["sums"][0].item(), count + int(out["sums"][1])
    return total, count


@pytest.mark.parametrize("template", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("most", [1, 2, 0])
def test_a_packed_episode_has_the_losses_of_its_rows(model_path, template, most):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    alone = encode(list(to_examples(episodes(3, 4), PromptFormat(template=template))), tokenizer, 999)
    packed = pack(alone, most, 999)
    assert len(packed.rows) == {1: 12, 2: 6, 0: 3}[most]
    assert any("tree" in row for row in packed.rows) == (template != PLAIN and most != 1)
    (expected, n), (total, m) = losses(model, alone.rows), losses(model, packed.rows)
    assert n == m and total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("template", [PLAIN, CHAT], ids=["plain", "chat"])
def test_a_batch_of_packed_rows_has_the_gradient_of_a_batch_of_rows(model_path, template):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    alone = encode(list(to_examples(episodes(3, 4), PromptFormat(template=template))), tokenizer, 999)
    task = TextTask(WorldModelSettings(model_path="", out_dir="", data_path=""), [])
    gradients = []
    for rows in (alone.rows, pack(alone, 0, 999).rows):
        model = AutoModelForCausalLM.from_pretrained(model_path).eval()
        task.forward(model, Collator(0)(rows))["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert functional.cosine_similarity(*gradients, dim=0) > 1 - 1e-5
    assert gradients[1].norm() == pytest.approx(gradients[0].norm().item(), rel=1e-4)


def test_packing_computes_the_common_beginning_once(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    alone = encode(list(to_examples(episodes(1, 8))), tokenizer, 999)
    row, = pack(alone, 0, 999).rows
    assert len(row["input_ids"]) == len(alone.rows[-1]["input_ids"]) - 1  # all but the last end of sequence


def test_the_examples_of_a_packed_row_are_those_that_went_in(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for template in (PLAIN, CHAT):
        alone = encode(list(to_examples(episodes(2, 3), PromptFormat(template=template))), tokenizer, 999)
        assert [example for row in alone.rows for example in examples_of(row)] == [
            ([*row["input_ids"][:-len(target)]], target) for row in alone.rows
            for target in [[label for label in row["labels"] if label != -100]]]
        wanted = [(row["input_ids"][:sum(label == -100 for label in row["labels"])],
                   [label for label in row["labels"] if label != -100]) for row in alone.rows]
        assert [example for row in pack(alone, 0, 999).rows for example in examples_of(row)] == wanted


def test_a_sequence_has_at_most_max_len_tokens_and_no_foreign_episode(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    alone = encode(list(to_examples(episodes(2, 8))), tokenizer, 999)
    longest = max(len(row["input_ids"]) for row in alone.rows)
    packed = pack(alone, 0, longest // 2)
    assert max(len(row["input_ids"]) for row in packed.rows if len(row["starts"]) > 1) <= longest // 2
    assert sum(len(row["starts"]) for row in packed.rows) == 16
    assert len(packed.rows) > 2 and set(packed.groups) == {"game 0", "game 1"}


def test_without_branches_chat_turns_stay_alone_and_rows_without_an_episode_always(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    chat = encode(list(to_examples(episodes(2, 3), PromptFormat(template=CHAT))), tokenizer, 999)
    assert len(pack(chat, 0, 999, branches=False).rows) == 6
    nameless = [Transition("", 0, t.state, t.action, t.next_state) for t in episodes(2, 3)]
    assert len(pack(encode(list(to_examples(nameless)), tokenizer, 999), 0, 999).rows) == 6


def test_transitions_whose_history_was_cut_do_not_share_what_they_do_not_have(model_path):
    """With a budget each prompt may lose other steps: then it isn't the continuation of the one before."""
    from itp.agent.prompt_budget import PromptBudget

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    encoder = Encoder(tokenizer)
    budget = PromptBudget(60, 80, encoder.count, "world_model")
    alone = encode(list(to_examples(episodes(1, 8), budget=budget, encode=encoder)), tokenizer, 80)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    (expected, n), (total, m) = losses(model, alone.rows), losses(model, pack(alone, 0, 80).rows)
    assert n == m and total == pytest.approx(expected, rel=1e-5)


def test_the_replies_of_a_chat_dialogue_share_a_sequence(model_path):
    """base_policy, in chat turns: the same loss in one row of a dialogue as in a row for each reply."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    state = State("put a mug in shelf 1.", "You see a shelf 0.")
    turns = [{"from": "human", "value": state.render()}, {"from": "gpt", "value": "Action: go to shelf 0"},
             {"from": "human", "value": "Observation: You arrive at shelf 0."},
             {"from": "gpt", "value": "Action: look", "weight": 0, "correction": "Action: go to shelf 1"},
             {"from": "human", "value": "Observation: You see."}, {"from": "gpt", "value": "Action: go to shelf 2"}]
    examples = [Example(segments, eos=False, group="talk") for segments in dialogue_examples(turns, CHAT)]
    rows = {}
    for steps in (1, 0):
        settings = BasePolicySettings(model_path=str(model_path), out_dir="", train_json="", steps_per_sequence=steps)
        rows[steps] = TextTask(settings, examples).encode(tokenizer).rows
    assert len(rows[1]) == 3 and len(rows[0]) == 1
    (expected, n), (total, m) = losses(model, rows[1]), losses(model, rows[0])
    assert n == m and total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("longest, packed", [(32, True), (999, False)])
def test_no_row_branches_beyond_the_window_of_sliding_attention(model_path, tmp_path, longest, packed):
    """The mask of a tree replaces that of the window, so each token would see more than in a row of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=32)).eval()
    model.save_pretrained(tmp_path)
    rows = {}
    for steps in (1, 0):
        settings = WorldModelSettings(model_path=str(tmp_path), out_dir="", data_path="", max_seq_len=longest,
                                      max_packed_len=999, steps_per_sequence=steps)
        examples = list(to_examples(episodes(2, 5), PromptFormat(template=CHAT)))
        rows[steps] = TextTask(settings, examples).encode(tokenizer).rows
    assert packed == any("tree" in row for row in rows[0]) == all(len(row["input_ids"]) <= 32 for row in rows[1])
    (expected, n), (total, m) = losses(model, rows[1]), losses(model, rows[0])
    assert n == m and total == pytest.approx(expected, rel=1e-5)


def test_max_rows_takes_whole_episodes_where_they_share_sequences():
    rows = episodes(6, 4)
    settings = WorldModelSettings(model_path="", out_dir="", data_path="", max_rows=10)
    taken = sample(settings, rows)
    assert len(taken) == 10 and sorted({t.episode_id: 0 for t in taken}) != sorted({t.episode_id for t in rows})
    counts = [sum(t.episode_id == name for t in taken) for name in dict.fromkeys(t.episode_id for t in taken)]
    assert counts == [4, 4, 2]
