"""World-model tuning: the examples, the exact match, and the shell script with a real DeepSpeed launch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from itp.text.prompts import world_model_prompt
from itp.text.state import State, parse
from itp.training.examples import Example, encode
from itp.training.run import finetune
from itp.training.settings import FinetuneSettings
from itp.transitions import Transition
from world_model.base_tuning.examples import WorldModelSettings, examples_for, to_examples
from world_model.base_tuning.task import exact_match

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "world_model" / "base_tuning" / "run_worldmodel_tuning.sh"
WORDS = ("<eos> <pad> <unk> \n Task : Observation Action . , go to take shelf "
         "1 2 3 4 You are here see a b c d").split(" ")


def transitions(episodes: int = 20, steps: int = 3) -> list[Transition]:
    rows = []
    draw = random.Random(0)
    for episode in range(episodes):
        state = State("take a", "You are here")
        for step in range(steps):
            place = draw.randint(1, 4)
            action, seen = f"go to shelf {place}", f"You see {' , '.join('abcd'[:place])}"
            rows.append(Transition(f"e{episode}", step, state.render(), action, seen))
            state = state.after(action, seen)
    return rows


def write_jsonl(path: Path, rows: list[Transition]) -> Path:
    path.write_text("".join(json.dumps({"episode_id": t.episode_id, "state": t.state, "action": t.action,
                                        "next_state": t.next_state}) + "\n" for t in rows))
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wm") / "model"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                            unk_token="<unk>").save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0, pad_token_id=1, bos_token_id=None)).save_pretrained(folder)
    return folder


def tune(cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(["bash", str(SCRIPT), *args], cwd=cwd, capture_output=True, text=True, check=False,
                          env=inherited | {"OMP_NUM_THREADS": "1"} | environment)


# ---------------------------------------------------------------- examples and the exact match


def test_a_state_that_is_too_long_loses_its_oldest_steps_and_keeps_its_task(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    state = State("take a", "You are here")
    for place in (1, 2, 3, 4, 1, 2):
        state = state.after(f"go to shelf {place}", "You see a")
    row = Transition("e", 6, state.render(), "go to shelf 3", "You see c")
    whole = len(tokenizer(world_model_prompt(row.state, row.action))["input_ids"])

    def made(max_seq_len: int) -> Example:
        settings = WorldModelSettings(model_path=str(model_path), out_dir="", data_path="", max_seq_len=max_seq_len)
        example, = examples_for(settings, tokenizer, [row])
        return example

    # A prompt leaves a quarter of a small budget for its answer, and needn't leave more for one that is long.
    roomy = next(n for n in range(1, 999) if n - n // 4 >= whole)
    assert [made(roomy)] == list(to_examples([row]))
    small = roomy - 20
    prompt, target = made(small).segments
    assert target == (" You see c", True)
    kept = next(n for n in range(6, 0, -1)  # one by one where the code bisects
                if len(tokenizer(world_model_prompt(state.last(n).render(), row.action))["input_ids"])
                <= small - small // 4)
    assert 1 <= kept < 6
    assert prompt == (world_model_prompt(state.last(kept).render(), row.action), False)
    assert encode([made(small)], tokenizer, small).counts["cut"] == 0
    assert parse(prompt[0].split("\nAction: go to shelf 3")[0]).task == "take a"
    # Where nothing fits the core cuts tokens, and there the last step counts.
    assert made(5).segments[0][0] == world_model_prompt(state.last(1).render(), row.action)


def pairs(rows):
    """The prompt and the target of each row."""
    return [([i for i, label in zip(row["input_ids"], row["labels"]) if label == -100],
             [label for label in row["labels"] if label != -100]) for row in rows]


def test_exact_match_counts_predictions_that_are_right_to_the_letter(model_path, tmp_path):
    rows = transitions(30, 2)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    encoded = encode(list(to_examples(rows)), tokenizer, 999).rows
    settings = FinetuneSettings(model_path=str(model_path), out_dir=str(tmp_path / "out"), lora_r=0, lr=1e-2,
                                batch_size=8, grad_accum=1, epochs=25.0, eval_share=0.0, max_seq_len=999,
                                save_every_steps=1000)
    finetune(settings, list(to_examples(rows)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged_full").eval()
    # The independent path: row by row, token by token, without padding or cache.
    right = []
    for row in encoded:
        prompt = [i for i, label in zip(row["input_ids"], row["labels"]) if label == -100]
        ids = list(prompt)
        while len(ids) < len(row["input_ids"]) + 1 and (ids == prompt or ids[-1] != tokenizer.eos_token_id):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        right.append(ids == row["input_ids"])
    assert sum(right) > len(encoded) / 2, "the model hasn't learned what it needs to for this test"
    measured = exact_match(model, tokenizer, pairs(encoded))["exact_match"]
    assert measured == pytest.approx(sum(right) / len(right), abs=1e-4)
    # One word more or less in what should have been said, and the prediction is wrong.
    good = [row for row, ok in zip(encoded, right) if ok][:4]
    changed = [dict(good[0], input_ids=[*good[0]["input_ids"][:-1], 5, 0], labels=[*good[0]["labels"][:-1], 5, 0]),
               dict(good[1], input_ids=good[1]["input_ids"][:-2] + [0], labels=good[1]["labels"][:-2] + [0]), *good[2:]]
    assert exact_match(model, tokenizer, pairs(changed)) == {"exact_match": 0.5, "exact_match_rows": 4}


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize("data, said", [
    (None, "no such file"),
    ("", "holds no transitions"),
    ('{"state": "s", "action": "a"}\n', "data.jsonl:1: field 'next_state' is missing"),
    ('{"state": "s", "action": "a", "next_state": "o"}\n{oops\n', "data.jsonl:2: not JSON"),
])
def test_unusable_data_are_refused_in_one_line_before_anything_is_launched(tmp_path, model_path, data, said):
    if data is not None:
        (tmp_path / "data.jsonl").write_text(data)
    start = time.monotonic()
    run = tune(tmp_path, MODEL_PATH=str(model_path), DATA_PATH="data.jsonl")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and said in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
    assert time.monotonic() - start < 10  # importing torch and DeepSpeed alone takes longer where it takes 0.4 s


@pytest.mark.parametrize("environment, said", [
    ({}, "MODEL_PATH is not set"),
    ({"MODEL_PATH": "./nowhere", "DATA_PATH": "data.jsonl"}, "./nowhere: no such model folder"),
    ({"MODEL_PATH": "models/nowhere", "DATA_PATH": "data.jsonl", "HF_ENDPOINT": "http://127.0.0.1:9"},
     "models/nowhere: no such folder"),
    ({"MODEL_PATH": ".", "DATA_PATH": "data.jsonl"}, ".: no config.json in this folder"),
    ({"MODEL_PATH": "{model}"}, "DATA_PATH is not set"),
    ({"MODEL_PATH": "{model}", "DATA_PATH": "data.jsonl", "DS_CONFIG": "none.json"}, "none.json: no such file"),
    ({"MODEL_PATH": "{model}", "DATA_PATH": "data.jsonl", "FP16": "True", "BF16": "True"}, "exclude each other"),
])
def test_unusable_settings_are_refused_in_one_line(tmp_path, model_path, environment, said):
    write_jsonl(tmp_path / "data.jsonl", transitions(2))
    run = tune(tmp_path, **{k: v.format(model=model_path) for k, v in environment.items()})
    assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_the_script_trains_under_deepspeed_and_a_second_run_has_nothing_to_do(tmp_path, model_path):
    write_jsonl(tmp_path / "data.jsonl", transitions())
    (tmp_path / "model").symlink_to(model_path)
    environment = {"MODEL_PATH": "model", "DATA_PATH": "data.jsonl", "RUN_NAME": "tiny", "EPOCHS": "2", "LR": "1e-2",
                   "PER_DEVICE_BS": "4", "GRAD_ACC": "2", "SAVE_STEPS": "10", "LOGGING_STEPS": "5"}
    run = tune(tmp_path, "--eval_rows", "3", "--steps_per_sequence", "1", **environment)
    assert run.returncode == 0, run.stderr[-3000:]
    out = tmp_path / "outputs" / "tiny"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 16 and metrics["held_out_rows"] == 3 == metrics["exact_match_rows"]  # 57 rows / 8, twice
    assert metrics["eval_loss"] < 3.3 and metrics["world_size"] == 1  # ln 26 at the start
    if not torch.cuda.is_available():
        assert metrics["dtype"] == "float32" and run.stderr.count("training in float32 instead") == 1
    assert {f.name for f in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "checkpoint-10",
                                               "checkpoint-16", "trainer_state.json", "merged_full"}
    assert (out / "checkpoint-16" / "global_step16").is_dir()  # written by DeepSpeed's engine
    merged, base = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (out / "merged_full", model_path))
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert any("q_proj" in name for name in changed) and not any("embed" in name for name in changed)

    again = tune(tmp_path, "--eval_rows", "3", "--steps_per_sequence", "1", **environment)
    assert again.returncode == 0 and "already done" in again.stderr
    other = tune(tmp_path, "--eval_rows", "3", "--steps_per_sequence", "1", **environment | {"LR": "1e-3"})
    assert other.returncode == 2 and "lr: 0.01 there, 0.001 now" in other.stderr
