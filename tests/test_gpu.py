"""What only a GPU does: half precision with loss scaling, 4 bits, two devices, ZeRO.  Skipped where there is none.

Short runs of tiny models.  They say that a path works and learns, not how well: what is computed is tested on the CPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.agent.policy_with_heads import PolicyWithHeads
from itp.lm.base import GenParams
from itp.lm.local import LocalLM
from itp.text.prompts import CTRL
from itp.training.base_policy import BasePolicySettings, read_dialogues
from itp.training.itp_r import a2c
from itp.training.run import finetune
from tests import rl_runs
from tests.openai_client import free_port
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).resolve().parents[1]
DEEPSPEED = ROOT / "world_model" / "base_tuning" / "config"
STATE = ("Task: put a clean plate in fridge\nObservation: You are in the middle of a room. Looking quickly around you, "
         "you see a cabinet 1, a fridge 1, and a desk 2.")
PROMPTS = [f"{STATE}\nAction:", f"{STATE}\nAction: look\nObservation: Nothing happens.\nAction:"]
HALF = {"fp16": "float16", "bf16": "bfloat16"}


def dialogues(path: Path) -> str:
    """What is in sight is taken: sixteen short dialogues."""
    rows = [{"id": str(i), "conversations": [
        {"from": "human", "value": f"Task: put a {thing} in fridge\nObservation: In it, you see a {thing}."},
        {"from": "gpt", "value": f"Action: take {thing} from cabinet 1"}]}
        for i, thing in enumerate(8 * ["plate 1", "mug 2"])]
    path.write_text(json.dumps(rows))
    return str(path)


def settings_for(root: Path, **changes) -> BasePolicySettings:
    common = {"model_path": str(write_tiny_model(root / "base")), "out_dir": str(root / "out"),
              "train_json": dialogues(root / "dialogues.json"), "epochs": 10.0, "batch_size": 4, "grad_accum": 1,
              "lr": 1e-2, "logging_steps": 1, "eval_share": 0.2}
    return BasePolicySettings(**(common | changes))


def losses(out: Path) -> list[float]:
    """Those of a run's steps, in order."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# ---------------------------------------------------------------- supervised training


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("changes", [{"lora_r": 4}, {"lora_r": 0}, {"lora_r": 0, "optimizer": "muon"}],
                         ids=["lora", "whole", "muon"])
def test_fine_tuning_in_half_precision_learns(tmp_path: Path, half: str, changes: dict) -> None:
    settings = settings_for(tmp_path, **{half: True}, **changes)
    metrics = finetune(settings, read_dialogues(settings.train_json))
    found = losses(tmp_path / "out")
    assert metrics["dtype"] == HALF[half] and all(map(math.isfinite, found))
    assert found[-1] < 0.7 * found[0] and metrics["eval_loss"] < 0.7 * found[0]
    weights = load_file(settings.merged_path / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def without(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@without("bitsandbytes")
@pytest.mark.parametrize("half", HALF)
def test_fine_tuning_on_4_bits_learns(tmp_path: Path, half: str) -> None:
    settings = settings_for(tmp_path, q_lora=True, lora_r=4, **{half: True})
    finetune(settings, read_dialogues(settings.train_json))
    found = losses(tmp_path / "out")
    assert all(map(math.isfinite, found)) and found[-1] < 0.7 * found[0]
    merged = load_file(settings.merged_path / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} <= {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flash_attention_2", marks=without("flash_attn"))])
def test_every_kind_of_attention_learns_the_same(tmp_path: Path, attention: str) -> None:
    """The first step's loss, in which no rounding has added up, is that of float32 on the CPU."""
    one = {"lora_r": 4, "lora_dropout": 0.0, "bf16": True}
    settings = settings_for(tmp_path, attn_implementation=attention, **one)
    finetune(settings, read_dialogues(settings.train_json))
    found = losses(tmp_path / "out")
    assert found[-1] < 0.7 * found[0]
    plain = settings_for(tmp_path, out_dir=str(tmp_path / "plain"), epochs=0.5, **one | {"bf16": False})
    finetune(plain, read_dialogues(plain.train_json))
    assert found[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None or shutil.which("deepspeed") is None,
                    reason="needs deepspeed")
@pytest.mark.parametrize("stage", ["s2", "s3"])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_zero_leaves_whole_weights(tmp_path: Path, stage: str, lora_r: int) -> None:
    """Under ZeRO-3 a process holds its share of a weight only; the model that is written has all of each."""
    zero = DEEPSPEED / f"deepspeed_config_{stage}.json"
    settings = settings_for(tmp_path, bf16=True, lora_r=lora_r, deepspeed=str(zero))
    flags = [f"--{name}={getattr(settings, name)}" for name in (
        "model_path", "out_dir", "train_json", "epochs", "batch_size", "grad_accum", "lr", "logging_steps",
        "eval_share", "bf16", "lora_r", "deepspeed")]
    run = subprocess.run(
        ["deepspeed", "--num_gpus", str(torch.cuda.device_count()), "--master_port", str(free_port()),
         "--no_local_rank", "--module", "itp.training.base_policy", *flags], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["world_size"] == torch.cuda.device_count() and metrics["dtype"] == "bfloat16"
    found = losses(tmp_path / "out")
    assert found[-1] < 0.7 * found[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", settings.merged_path))
    assert {name: weight.shape for name, weight in after.items()} == {
        name: weight.shape for name, weight in before.items()}
    assert any(not torch.equal(weight.float(), before[name].float()) for name, weight in after.items())


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("half", HALF)
def test_a_model_in_half_precision_answers_as_in_float32(tmp_path: Path, half: str) -> None:
    folder = str(write_tiny_model(tmp_path / "model"))
    pairs = [(prompt, " take plate 1 from cabinet 1\n") for prompt in PROMPTS]

    async def ask(device: str, dtype: str) -> tuple[list[int], list[float]]:
        lm = LocalLM.load(folder, device=device, dtype=dtype)
        written = await lm.generate(PROMPTS, GenParams(max_new_tokens=8))
        chosen = await lm.generate(PROMPTS, GenParams(choices=(" look\n", " inventory\n"), temperature=1.0, seed=1))
        assert all(answer.text in (" look\n", " inventory\n") for answer in chosen)
        scores = [score.total for score in await lm.loglikelihood(pairs)]
        await lm.close()
        return [answer.completion_tokens for answer in written], scores

    tokens, scores = asyncio.run(ask("cuda", half))
    assert all(0 < n <= 8 for n in tokens)
    _, expected = asyncio.run(ask("cpu", "fp32"))
    assert scores == pytest.approx(expected, rel=0.005 if half == "fp16" else 0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_repeated_steps_write_what_single_ones_do(tmp_path: Path, dtype: str) -> None:
    """Rows of many lengths that end at different times, sampled and greedy: more than one graph a batch."""
    folder = str(write_tiny_model(tmp_path / "model"))
    prompts = [PROMPTS[i % 2] + " look\nAction:" * (i % 5) for i in range(12)]

    async def write(cuda_graphs: bool) -> tuple[list[str], int]:
        lm = LocalLM.load(folder, device="cuda", dtype=dtype, cuda_graphs=cuda_graphs)
        calls = [lm.generate(prompts[i:i + 4], GenParams(max_new_tokens=40 * (i + 1), temperature=temperature, seed=i))
                 for i, temperature in ((0, 0.0), (4, 0.0), (8, 0.7))]
        texts = [answer.text for answers in await asyncio.gather(*calls) for answer in answers]
        again = [answer.text for answer in await lm.generate(prompts, GenParams(max_new_tokens=70))]
        made = lm.engine.memory.graph is not None
        await lm.close()
        return texts + again, made

    repeated, made = asyncio.run(write(True))
    single, without = asyncio.run(write(False))
    assert made and not without
    alike = sum(a == b for a, b in zip(repeated, single, strict=True))
    assert alike == len(single) if dtype == "fp32" else alike > len(single) // 2  # rounding may turn a choice


def test_a_model_that_no_graph_can_repeat_is_computed_step_by_step(tmp_path: Path, caplog) -> None:
    folder = str(write_tiny_model(tmp_path / "model"))

    def from_the_cpu(*_) -> None:
        """What PEFT does for tokens that it trains; a graph can't wait for it."""
        torch.tensor([1]).to("cuda")

    async def write(spoil: bool) -> list[str]:
        lm = LocalLM.load(folder, device="cuda", dtype="fp32")
        if spoil:
            lm.model.register_forward_pre_hook(from_the_cpu)
        answers = await lm.generate(PROMPTS, GenParams(max_new_tokens=30))
        assert lm.engine.memory.graphs != spoil
        await lm.close()
        return [answer.text for answer in answers]

    assert asyncio.run(write(True)) == asyncio.run(write(False))
    assert "without CUDA graphs" in caplog.text


@pytest.mark.parametrize("devices", [
    ("cuda:0", "cuda:0"),
    pytest.param(("cuda:0", "cuda:1"), marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two")),
], ids=["one", "two"])
def test_an_evaluation_on_one_device_and_on_two(tmp_path: Path, games_root: Path, devices: tuple[str, str]) -> None:
    policy, world_model = rl_runs.write_models(tmp_path / "models", games_root)
    asyncio.run(evaluate(AlfworldSettings(
        policy_model=str(policy), wm_model=str(world_model), out_dir=str(tmp_path / "out"),
        env_data_root=str(games_root), split="train", max_steps=3, fixed_k=1, wm_max_new_tokens=4,
        action_selection="constrained", policy_device=devices[0], wm_device=devices[1], policy_dtype="bf16",
        wm_dtype="fp16", env_processes=1, concurrency=3)))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["overall"]["n"] == 6
    peak = json.loads((tmp_path / "out" / "cost.json").read_text())["peak_memory_bytes"]
    assert all(peak[device] > 0 for device in devices)


# ---------------------------------------------------------------- stage 3


@pytest.mark.parametrize("changes", [
    {"bf16": True, "lora_r": 4}, {"bf16": True, "gradient_checkpointing": True},
    {"fp16": True, "lora_r": 4, "episodes_per_epoch": 24},  # its first updates may be skipped, until the scale fits
], ids=["lora", "whole", "scaled"])
def test_a2c_learns_in_half_precision(tmp_path: Path, games_root: Path, changes: dict) -> None:
    models = rl_runs.write_models(tmp_path / "models", games_root)
    second = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
    settings = rl_runs.settings(models, games_root, tmp_path / "out", policy_device="cuda:0", wm_device=second,
                                max_steps=2, eval_every=0, **changes)
    a2c.run(settings)
    rows = rl_runs.metrics(tmp_path / "out")
    assert len(rows) == settings.total_updates
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "value_mean"))
    before, after = (load_file(folder / "model.safetensors") for folder in (models[0], tmp_path / "out" / "last"))
    assert any(not torch.equal(weight.float(), before[name].float()) for name, weight in after.items())
    assert all(weight.isfinite().all() for weight in after.values())
    # The heads on file are those of the GPU: read again, they say there what they say on the CPU.
    told = []
    for device in ("cuda", "cpu"):
        policy, tokenizer = PolicyWithHeads.from_pretrained(tmp_path / "out" / "last", device=device)
        ids = tokenizer(f"{STATE}\n{CTRL}", return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        with torch.no_grad():
            out = policy(ids, None, torch.tensor([ids.shape[1] - 1], device=device))
        told.append(torch.cat([out.k_logits.flatten(), out.values]).cpu())
    torch.testing.assert_close(told[0], told[1], rtol=1e-2, atol=1e-2)
    assert not torch.equal(told[1], torch.zeros_like(told[1]))
