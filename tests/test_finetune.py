"""The fine-tuning core: labels, cuts, order, the held-out split, resumption, divergence, LoRA and merging."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from itp.errors import UserError
from itp.text.dialogues import (
    episode_dialogue, foresight_dialogue, horizon_dialogue, judge_dialogue, outcome_dialogue, reflection_dialogue,
    thought_dialogue,
)
from itp.text.prompt_format import PromptTemplate
from itp.text.prompts import foresight_text
from itp.text.segments import dialogue_examples, dialogue_segments
from itp.text.state import State
from itp.training import base_policy
from itp.training.checkpoints import resume_from, row_lengths, whole_checkpoints
from itp.training.dialogue_files import read_dialogue_file
from itp.training.examples import Example, encode, split_off_eval
from itp.training.from_scratch import base_lm
from itp.training.run import finetune, open_run, train
from itp.training.settings import FinetuneSettings, check_settings
from itp.training.text_task import Collator, TextTask
from itp.training.trainer import SimilarLengths
from itp.transitions import Transition, write_transitions
from tests.killed import kill

WORDS = "<eos> <bos> <unk> \n a b c d e f g h Task : Action Observation . , 1 2 3 go to see you".split(" ")
VOCAB = {word: i for i, word in enumerate(WORDS)}
EOS, BOS = VOCAB["<eos>"], VOCAB["<bos>"]


def make_tokenizer(*, bos: bool = False, pad: str = "<eos>") -> PreTrainedTokenizerFast:
    """Words and line breaks.  By default the pad token is the stop token, as in many published models."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad, unk_token="<unk>",
                                   bos_token="<bos>" if bos else None)


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, eos_token_id=EOS, pad_token_id=EOS,
                         bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    torch.set_num_threads(1)
    return str(make_model(tmp_path_factory.mktemp("model")))


EXAMPLES = [Example([(" ".join("abcdefgh"[:1 + i % 7]), False), (f" {'gh'[i % 2]} {1 + i % 3}", True)],
                    group=f"e{i // 2}") for i in range(40)]


def settings_for(model_path: str, out_dir: Path, **changes) -> FinetuneSettings:
    return FinetuneSettings(**{"model_path": model_path, "out_dir": str(out_dir), "epochs": 2.0, "batch_size": 4,
                               "grad_accum": 1, "lr": 1e-2, "eval_share": 0.1, "logging_steps": 5} | changes)


# ---------------------------------------------------------------- tokens and labels


def test_only_supervised_segments_and_the_stop_token_have_labels():
    example = Example([("Task : a\n", False), ("Action :", False), (" go to b\n", True), ("see c\n", False),
                       ("d", True)])
    (row,) = encode([example], make_tokenizer(bos=True), 99).rows
    expected = [("<bos>", 0), ("Task", 0), (":", 0), ("a", 0), ("\n", 0), ("Action", 0), (":", 0), ("go", 1), ("to", 1),
                ("b", 1), ("\n", 1), ("see", 0), ("c", 0), ("\n", 0), ("d", 1), ("<eos>", 1)]
    assert row["input_ids"] == [VOCAB[word] for word, _ in expected]
    assert row["labels"] == [VOCAB[word] if learned else -100 for word, learned in expected]


def test_a_pad_token_that_is_the_stop_token_leaves_the_stop_token_supervised():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    rows = encode([Example([("a", False), ("b", True)]), Example([("a b c", False), ("d", True)])], tokenizer, 99).rows
    a, b, c, d = (VOCAB[word] for word in "abcd")
    batch = Collator(tokenizer.pad_token_id)(rows)
    assert batch["input_ids"].tolist() == [[a, b, EOS, EOS, EOS], [a, b, c, d, EOS]]
    assert batch["target_pos"].tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]
    assert batch["target_ids"].tolist() == [b, EOS, d, EOS]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_logits_of_supervised_places_alone_give_the_loss_of_all_logits_under_a_mask(model_path, tmp_path, lora_r):
    rows = encode(EXAMPLES[:7], make_tokenizer(), 99).rows
    task = TextTask(settings_for(model_path, tmp_path, lora_r=lora_r, lora_dropout=0.0), [])
    torch.manual_seed(0)
    model = task.load(make_tokenizer(), torch.float32).train()
    width = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*ids, *[fill] * (width - len(ids))] for ids in lists])

    labels = padded([row["labels"] for row in rows], -100)
    out = model(input_ids=padded([row["input_ids"] for row in rows], EOS), labels=labels,
                attention_mask=padded([[1] * len(row["input_ids"]) for row in rows], 0))
    out.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    shapes = []
    head = model.get_output_embeddings() if not lora_r else model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape)))
    batch = Collator(EOS)(rows)
    found = task.forward(model, batch)
    assert shapes == [(1, (labels[:, 1:] != -100).sum().item(), len(VOCAB))]
    assert found["loss"].item() == pytest.approx(out.loss.item(), abs=1e-6)
    assert found["sums"].tolist() == pytest.approx([out.loss.item() * shapes[0][1], shapes[0][1]], rel=1e-6)
    found["loss"].backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)
    assert task.forward(model, batch, torch.tensor(10))["loss"].item() == pytest.approx(found["sums"][0].item() / 10)
    assert model(batch["input_ids"]).logits.shape == (7, width, len(VOCAB))  # as before, outside of training


def test_attention_computed_in_another_way_gives_the_same_loss_and_gradients(model_path, tmp_path):
    rows = encode(EXAMPLES[:7], make_tokenizer(), 99).rows
    found = {}
    for how in ("eager", "sdpa"):
        task = TextTask(settings_for(model_path, tmp_path, attn_implementation=how, lora_r=0), [])
        model = task.load(make_tokenizer(), torch.float32)
        assert model.config._attn_implementation == how
        loss = task.forward(model, Collator(EOS)(rows))["loss"]
        loss.backward()
        found[how] = [loss, *(p.grad for p in model.parameters())]
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-6)


def test_flash_attention_is_refused_where_it_cannot_run(model_path, tmp_path, monkeypatch):
    """One line each, before a model is loaded; the package is a folder that does nothing."""
    def refused(**changes) -> str:
        with pytest.raises(UserError, match="--attn_implementation flash_attention_2") as error:
            check_settings(settings_for(model_path, tmp_path, attn_implementation="flash_attention_2", **changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "flash_attn").exists()])
    assert "half precision only; add --bf16, or take sdpa" in refused()
    assert "needs the package flash_attn, which isn't installed; pip install flash-attn" in refused(bf16=True)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if not torch.cuda.is_available():
        assert "needs a CUDA device and there is none; take sdpa" in refused(fp16=True)


def test_too_long_examples_lose_the_left_of_their_context_never_their_target():
    def words(example: Example, length: int) -> str:
        encoding = encode([example], make_tokenizer(), length)
        return " ".join(WORDS[i] for row in encoding.rows for i in row["input_ids"]), encoding.counts

    plain = Example([("a b c d", False), ("e f", True)])
    assert words(plain, 7) == ("a b c d e f <eos>", words(plain, 7)[1])
    text, counts = words(plain, 5)
    assert text == "c d e f <eos>" and (counts["cut"], counts["lost_tokens"], counts["lost_supervised"]) == (1, 2, 0)
    assert words(plain, 4)[0] == "d e f <eos>"
    text, counts = words(plain, 3)  # "e" would be predicted from nothing
    assert text == "" and counts["too_long"] == 1
    episode = Example([("a b", False), (" c", True), (" d", False), (" e f", True)], keep_first=True)
    text, counts = words(episode, 5)
    assert text == "a b e f <eos>" and (counts["lost_tokens"], counts["lost_supervised"]) == (2, 1)
    assert words(episode, 4)[0] == "a e f <eos>"  # no room for all of the first segment: its end goes


def test_episodes_are_held_out_whole_and_always_the_same():
    groups = [f"e{i // 5}" for i in range(100)]
    train, held = split_off_eval(groups, 0.1, seed=1)
    assert sorted(train + held) == list(range(100)) and len(held) == 10
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    assert split_off_eval(groups, 0.1, seed=1) == (train, held) != split_off_eval(groups, 0.1, seed=2)
    train, held = split_off_eval([""] * 40, 0.05, seed=1)
    assert (len(train), len(held)) == (38, 2)
    assert split_off_eval(["only"], 0.5, seed=1) == ([0], [])


@pytest.mark.parametrize("seed", range(4))
def test_a_group_larger_than_the_share_is_trained_on(seed):
    """One group may have most of the rows: files in which many episodes have one name."""
    groups = ["large"] * 99 + [f"e{i}" for i in range(30)]
    assert len(split_off_eval(groups, 0.05, seed)[1]) == 6
    assert len(split_off_eval(["large"] * 99 + ["small"] * 11, 0.05, seed)[1]) == 11


def test_an_epoch_has_every_row_once_grouped_by_length_in_a_reproducible_order():
    lengths = [(i * 37) % 101 + 1 for i in range(203)]

    def order(epoch: int) -> list[int]:
        return list(SimilarLengths(lengths, 4, 0, lambda: epoch))

    assert sorted(order(0)) == list(range(203))
    assert order(0) == order(0) != order(1)
    steps = [[lengths[i] for i in order(0)[s:s + 4]] for s in range(0, 203, 4)]
    padded = sum(len(step) * max(step) for step in steps)
    assert sum(lengths) / padded > 0.95  # in random order it would be about .63
    assert [max(step) for step in steps] != sorted((max(step) for step in steps), reverse=True)


# ---------------------------------------------------------------- runs


def test_lora_run_metrics_and_merged_model(model_path, tmp_path):
    seen = {}

    class Measured(TextTask):
        def measure(self, tokenizer, eval_rows, device):
            seen["rows"] = eval_rows
            return {"extra": 1}

    out = tmp_path / "out"
    settings = settings_for(model_path, out)
    metrics = train(settings, Measured(settings, EXAMPLES))
    assert metrics == json.loads((out / "metrics.json").read_text()) and metrics["extra"] == 1
    assert metrics["steps"] == 18 and metrics["held_out_rows"] == len(seen["rows"]) == 4
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= {f.name for f in out.iterdir()}
    assert [c.name for c in whole_checkpoints(out)] == ["checkpoint-9", "checkpoint-18"]

    import peft
    merged = AutoModelForCausalLM.from_pretrained(out / "merged_full")
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), out)
    base = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(out / "merged_full")("a b")["input_ids"] == [VOCAB["a"], VOCAB["b"]]

    def loss(model) -> float:  # the mean over supervised tokens, row by row without padding
        losses = []
        for row in seen["rows"]:
            logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            losses += [-logits[i - 1, label].item() for i, label in enumerate(row["labels"]) if label != -100]
        return sum(losses) / len(losses)

    assert metrics["eval_loss"] == pytest.approx(loss(merged), abs=1e-5)
    assert metrics["eval_loss"] < loss(base) - 0.2


def test_full_fine_tuning_learns_and_leaves_a_plain_model(model_path, tmp_path):
    rows = [Example([("a b" if i % 2 else "c d", False), (" g 1" if i % 2 else " h 2", True)]) for i in range(16)]
    metrics = finetune(settings_for(model_path, tmp_path / "full", lora_r=0, epochs=8.0), rows)
    assert metrics["eval_loss"] < 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "merged_full")
    out = model.generate(torch.tensor([[VOCAB["c"], VOCAB["d"]]]), max_new_tokens=3, do_sample=False)
    assert [WORDS[i] for i in out[0]] == ["c", "d", "h", "2", "<eos>"]


def dialogues(path: Path, count: int = 40) -> Path:
    rows = [{"id": str(i), "conversations": [
        {"from": "human", "value": f"Task: {'abcdefgh'[i % 8]}\nObservation: see"},
        {"from": "gpt", "value": "Action: go to 1"},
        {"from": "human", "value": "Observation: see " + "b " * (i % 5)},
        {"from": "gpt", "value": f"Action: go to {1 + i % 3}"}]}
        for i in range(count)]
    path.write_text(json.dumps(rows))
    return path


def test_a_killed_run_resumes_to_the_very_weights_of_an_uninterrupted_one(model_path, tmp_path):
    data = dialogues(tmp_path / "dialogues.json")
    flags = {"train_json": str(data), "model_path": model_path, "epochs": 12.0, "batch_size": 4, "grad_accum": 2,
             "lr": 1e-3, "save_every_steps": 7, "save_total_limit": 100, "lora_dropout": 0.2}
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "itp.training.base_policy", "--out_dir", str(killed)]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    kill(command, (killed / "checkpoint-14" / "complete.json").exists, tmp_path / "log")
    assert not (killed / "metrics.json").exists()
    # As if it had been killed while saving: the newest checkpoint is half of one.
    newest = whole_checkpoints(killed)[-1]
    half = killed / f"checkpoint-{int(newest.name.split('-')[1]) + 1000}"
    shutil.copytree(newest, half)
    os.truncate(half / "adapter_model.safetensors", 100)
    (half / "complete.json").rename(half / "trainer_state.json")

    def settings(out: Path) -> base_policy.BasePolicySettings:
        return base_policy.BasePolicySettings(out_dir=str(out), **flags)

    examples = base_policy.read_dialogues(str(data))
    assert not open_run(settings(killed), [data])
    resumed = finetune(settings(killed), examples)
    whole = finetune(settings(tmp_path / "whole"), examples)
    assert resumed["resumed"] and not whole["resumed"]
    assert resumed["steps"] == whole["steps"] == 60
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6)
    weights, expected = (load_file(f / "adapter_model.safetensors") for f in (killed, tmp_path / "whole"))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)

    assert open_run(settings(killed), [data])  # finished
    with pytest.raises(UserError, match="lr: 0.001 there, 0.5 now"):
        open_run(dataclasses.replace(settings(killed), lr=0.5), [data])
    dialogues(data, 41)
    with pytest.raises(UserError, match="data_sha256"):
        open_run(settings(killed), [data])


def test_a_checkpoint_with_a_file_cut_short_is_not_whole(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345")
        (folder / "complete.json").write_text(json.dumps({"sizes": {"weights": 5}}))
    (tmp_path / "checkpoint-20").mkdir()
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]
    os.truncate(tmp_path / "checkpoint-10" / "weights", 4)
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 5)]
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for written, says in (({}, "other rows of the same data"), ({"rows": row_lengths(rows)}, "")):
        (folder / "complete.json").write_text(json.dumps({"sizes": {}, "world_size": 1} | written))
        with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
            assert resume_from(str(tmp_path), 1, row_lengths(rows)) == folder
    assert row_lengths(rows) != row_lengths(rows[::-1])


def test_divergence_stops_the_run_and_only_finite_checkpoints_remain(model_path, tmp_path):
    out = tmp_path / "diverged"
    with pytest.raises(UserError, match="diverged"):
        finetune(settings_for(model_path, out, lora_r=0, lr=1e25, max_grad_norm=0.0, warmup_ratio=0.0,
                              lr_scheduler_type="constant", epochs=20.0, save_every_steps=1), EXAMPLES)
    assert not (out / "metrics.json").exists()
    for checkpoint in whole_checkpoints(out):
        assert all(w.isfinite().all() for w in load_file(checkpoint / "model.safetensors").values())


def test_poisoned_weights_are_refused_at_the_first_step(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    make_tokenizer().save_pretrained(tmp_path / "poisoned")
    with pytest.raises(UserError, match="the loss is nan in step 1"):
        finetune(settings_for(str(tmp_path / "poisoned"), tmp_path / "out"), EXAMPLES)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_precision_without_a_gpu_is_float32_and_says_so(half, model_path, tmp_path, caplog):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    metrics = finetune(settings_for(model_path, tmp_path / "out", epochs=0.2, merge=False, **{half: True}), EXAMPLES)
    assert metrics["dtype"] == "float32" and not (tmp_path / "out" / "merged_full").exists()
    assert [r for r in caplog.messages if "float32 instead" in r] == [
        f"{half} training needs a CUDA device and there is none: training in float32 instead"]


def test_a_folder_is_claimed_by_its_configuration_once_it_holds_a_checkpoint(model_path, tmp_path, monkeypatch):
    data = tmp_path / "data.json"
    data.write_text("[]")
    settings = settings_for(model_path, tmp_path / "out")
    other = dataclasses.replace(settings, lr=0.5)
    assert not open_run(settings, [data])
    assert not open_run(other, [data])  # nothing was trained yet, so nothing can mix
    (tmp_path / "out" / "checkpoint-3").mkdir()
    (tmp_path / "out" / "checkpoint-3" / "complete.json").write_text('{"sizes": {}}')
    with pytest.raises(UserError, match="lr: 0.5 there, 0.01 now"):
        open_run(settings, [data])
    monkeypatch.chdir(tmp_path)  # the same folders by other names, and settings that don't change the result
    assert not open_run(dataclasses.replace(other, out_dir="out", model_path=os.path.relpath(model_path), merge=False),
                         [Path("data.json")])
    foreign = settings_for(model_path, tmp_path / "new", merged_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds files that aren't this run's"):
        open_run(foreign, [data])


# ---------------------------------------------------------------- base policy data

STATE = "Task: a\nObservation: b"


def test_gpt_turns_are_learned_except_those_of_weight_zero(tmp_path):
    row = {"id": 7, "conversations": [
        {"from": "human", "value": STATE}, {"from": "gpt", "value": "Action: b"},
        {"from": "human", "value": "Observation: c"}, {"from": "gpt", "value": "Action: d", "weight": 0}]}
    chat = {"messages": [{"role": "user", "content": STATE}, {"role": "assistant", "content": "Action: b"}]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(chat) + "\n")
    first, second = base_policy.read_dialogues(str(path))
    assert [text for text, learned in first.segments if learned] == [" b\n"] and first.group == "7"
    assert "".join(text for text, _ in first.segments) == f"{STATE}\nAction: b\nObservation: c\nAction: d\n"
    assert second.segments == [(f"{STATE}\n", False), ("Action:", False), (" b\n", True)]


def test_all_dialogues_of_an_episode_are_held_out_together(tmp_path):
    """A foresight dialogue repeats the text of the episode that it is of."""
    talks = []
    for name in ("room/trial#0", "room/trial#1"):
        state, steps = State("a", "b"), []
        for step in range(3):
            steps.append(Transition(name, step, state.render(), "go", "c", "go"))
            state = state.after("go", "c")
        talks += [episode_dialogue(steps), foresight_dialogue(steps, 1, 2), horizon_dialogue(steps, 2, 3),
                  thought_dialogue(steps, 1, "d"),
                  reflection_dialogue(steps, 2, foresight_text([("go", "c")]), "e"),
                  judge_dialogue(steps, 0, foresight_text([("go", "c")]), True),
                  outcome_dialogue(steps, 2, 0, "look", "d")]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(talks))
    groups = [example.group for example in base_policy.read_dialogues(str(path))]
    assert groups == ["room/trial#0"] * 7 + ["room/trial#1"] * 7


@pytest.mark.parametrize("name", [{}, {"id": None}])
def test_the_replies_of_a_dialogue_without_an_id_are_held_out_together(tmp_path, name):
    """In chat turns each is an example of its own."""
    turns = [{"from": "human", "value": STATE}, {"from": "gpt", "value": "Action: b"},
             {"from": "human", "value": "Observation: c"}, {"from": "gpt", "value": "Action: d"}]
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{**name, "conversations": turns}] * 2))
    groups = [example.group for example in base_policy.read_dialogues(str(path), PromptTemplate("<user> ", "<model> "))]
    assert groups[0] == groups[1] != groups[2] == groups[3] and all(groups)


@pytest.mark.parametrize("loss", [False, None, 0, 0.0])
def test_turns_without_loss_are_not_learned(tmp_path, loss):
    """AgentGym's mark.  It also holds for a correction, and for a turn of weight 1."""
    turns = [{"from": "human", "value": STATE, "loss": None},
             {"from": "gpt", "value": "Action: b", "loss": loss, "weight": 1, "correction": "Action: e"},
             {"from": "human", "value": "Observation: c", "loss": None},
             {"from": "gpt", "value": "Action: d", "loss": True}]
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    example, = base_policy.read_dialogues(str(path))
    assert [text for text, learned in example.segments if learned] == [" d\n"]
    chat = base_policy.read_dialogues(str(path), PromptTemplate("<user>", "<assistant>"))
    assert [example.segments[-1] for example in chat] == [(" d\n", True)]
    assert [learned for _, learned in dialogue_segments(turns[:2])] == [False, False, False]
    path.write_text(json.dumps([{"conversations": turns[:2]}]))
    with pytest.raises(UserError, match="no turn of gpt"):
        base_policy.read_dialogues(str(path))


def test_files_that_convert_has_not_seen_are_refused(tmp_path, monkeypatch):
    """On ETO's raw file 2 of 48 actions were right after training, and all of them after conversion."""
    raw = [{"from": "human", "value": "Interact with a household to solve a task."}, {"from": "gpt", "value": "OK"},
           {"from": "human", "value": "You are in the middle of a room. You see a desk 1.\n\nYour task is to: look."},
           {"from": "gpt", "value": "Thought: next.\nAction: go to desk 1"}]
    path = tmp_path / "raw.json"
    advice = f"row 0: not in the form .*: python -m world_model.data_processing.convert --input {path} --out_dir DIR"
    for turns in (raw, raw[2:], [{"from": "system", "value": "Act."}, *raw[2:]]):
        path.write_text(json.dumps([{"id": "e", "conversations": turns}]))
        with pytest.raises(UserError, match=advice) as error:
            base_policy.read_dialogues(str(path))
        assert "\n" not in str(error.value)
        settings = base_lm.BaseLMSettings(transitions="", out_dir="", words_of=str(path))
        with pytest.raises(UserError, match=advice):
            list(read_dialogue_file(settings.words_of))
    rows = tmp_path / "rows.jsonl"
    row = {"episode_id": "e", "step": 0, "state": raw[2]["value"], "action": "look", "next_state": "x"}
    rows.write_text(json.dumps(row))
    with pytest.raises(UserError, match="rows.jsonl:1: field 'state' isn't a state .*data_processing.convert"):
        list(base_lm._episodes(str(rows)))


def test_no_transcript_joins_two_episodes_of_one_id(tmp_path):
    """In files that were joined, the last episode of one and the first of the next may be of the same game."""
    rows = []
    for actions in ("ab", "cd"):
        state = State("a", "b")
        for step, action in enumerate(actions):
            rows.append(Transition("game#0", step, state.render(), action, "c"))
            state = state.after(action, "c")
    write_transitions(tmp_path / "joined.jsonl", rows)
    episodes = list(base_lm._episodes(str(tmp_path / "joined.jsonl")))
    assert [[t.action for t in episode] for episode in episodes] == [["a", "b"], ["c", "d"]]


def test_a_correction_is_learned_up_to_where_it_parts_from_what_was_executed(tmp_path):
    row = {"id": 7, "conversations": [
        {"from": "human", "value": STATE},
        {"from": "gpt", "value": "Action: go to 1", "weight": 0, "correction": "Action: go to 2"},
        {"from": "human", "value": "Observation: c"},
        {"from": "gpt", "value": "Action: b", "weight": 0, "correction": "Action: d"}]}
    path = tmp_path / "d.json"
    path.write_text(json.dumps([row]))
    example, = base_policy.read_dialogues(str(path))
    encoded = encode([example], make_tokenizer(), 100).rows[0]
    said = " ".join(WORDS[i] for i in encoded["input_ids"])
    # The episode as it was.
    assert said == "Task : a \n Observation : b \n Action : go to 1 \n Observation : c \n Action : b \n <eos>"
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    learned = [(WORDS[token], WORDS[label]) for token, label in pairs if label >= 0]
    assert learned == [("go", "go"), ("to", "to"), ("1", "2"), ("b", "d"), ("<eos>", "<eos>")]

    chat = dialogue_examples(row["conversations"], PromptTemplate("<user>", "<assistant>"))
    assert [segments[-1] for segments in chat] == [(" go to 2\n", True), (" d\n", True)]  # a sequence each: all of it


@pytest.mark.parametrize("row, said", [
    ({"id": 1}, "conversations"),
    ({"conversations": [{"from": "human"}]}, "turn 0"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "no turn of gpt"),
    ({"conversations": [{"from": "gpt", "value": "Action: x", "weight": 0, "correction": 1}]},
     "turn 0: a turn whose 'correction' isn't a text"),
    ({"conversations": [{"from": ["gpt"], "value": "Action: x"}]}, "turn 0: a turn whose 'from' isn't one of"),
    ({"conversations": [{"from": "gpt", "value": "Action: x", "loss": "no"}]},
     "turn 0: a turn whose 'loss' is neither"),
])
def test_rows_that_are_no_dialogue_are_named(tmp_path, row, said):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said) as error:
        base_policy.read_dialogues(str(path))
    assert str(error.value).startswith(f"{path}:1: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("held_out, planned", [(0, "no"), (1, "epoch")])
def test_a_single_row_leaves_nothing_to_evaluate(tmp_path, held_out, planned):
    """One row can't be shared out, whatever --eval_share says; transformers refuses an evaluation of no rows."""
    from itp.training.trainer import training_arguments

    settings = FinetuneSettings(model_path="m", out_dir=str(tmp_path))
    assert settings.eval_share and split_off_eval(["e"], settings.eval_share, 1) == ([0], [])
    assert training_arguments(settings, torch.float32, rows=1, held_out=held_out).eval_strategy == planned
