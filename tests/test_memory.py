"""The estimate of memory: exact where it can be, by hand where it is a formula."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from itp.runtime import UserError
from itp.training import memory
from itp.training.finetune import FinetuneSettings, check_settings
from itp.training.hf_trainer import load_base, lora_config
from itp.training.memory import GB, Shape, check, policy_bytes, world_model_bytes
from tests.families import FAMILIES, write_family


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    """Weights, those of LoRA on all linear layers, and a token's keys and values, against the model itself."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = write_family(tmp_path, family)
    shape, model = Shape.of(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    assert shape.kv * shape.layers * 3 == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    adapted = peft.get_peft_model(model, lora_config(FinetuneSettings(model_path="", out_dir="", lora_r=4), model))
    names = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert 4 * shape.linear == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_targets(family: str, tmp_path: Path) -> None:
    """Those of the release, and a name that no module has."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_family(tmp_path, family))
    settings = FinetuneSettings(model_path="m", out_dir="", lora_targets="q_proj,v_proj")
    adapted = peft.get_peft_model(model, lora_config(settings, model))
    assert {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    settings.lora_targets = "q_proj,query"
    with pytest.raises(UserError, match="--lora_targets query: m has no such linear layers; it has down_proj, gate"):
        lora_config(settings, adapted.unload())


def test_frozen_modules_dont_train_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    folder = str(write_family(tmp_path, "llama"))
    whole = FinetuneSettings(model_path=folder, out_dir="", lora_r=0, frozen="embed_tokens")
    model = load_base(whole, torch.float32)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"model.embed_tokens.weight"}
    with pytest.raises(UserError, match="--frozen 'words': .* no such module; it has .*embed_tokens"):
        load_base(replace(whole, frozen="words"), torch.float32)
    with pytest.raises(UserError, match="--frozen '': .* no such module"):  # not the whole model
        load_base(replace(whole, frozen="embed_tokens,"), torch.float32)
    with pytest.raises(UserError, match="--frozen is for training every weight"):
        check_settings(replace(whole, lora_r=8))


SHAPE = Shape(parameters=1000, linear=50, hidden=4, intermediate=6, layers=2, kv=8, vocabulary=10)


def test_formulas_by_hand() -> None:
    lora = policy_bytes(SHAPE, lora_r=2, width=2, update_tokens=5, rows=3, length=7)
    assert lora == {"weights": 2000 + 400, "gradients and Adam": 1200, "activations of the update": 5 * 2 * 2 * 56,
                    "keys and values": 3 * 7 * 2 * 8 * 2 + memory.CACHE, "logits": 5 * 10 * 10}
    whole = policy_bytes(SHAPE, lora_r=0, width=2, update_tokens=5, rows=3, length=7)
    assert (whole["weights"], whole["gradients and Adam"]) == (4000, 12000)
    assert world_model_bytes(SHAPE, width=2, rows=1, length=1)["weights"] == 2000


@pytest.mark.parametrize("largest, shared, advice", [
    ("policy's activations of the update", False, "lower --update_batch_tokens (8192 now"),
    ("policy's gradients and Adam", False, "train with LoRA"), ("policy's keys and values", True, "lower --num_envs"),
    ("policy's weights", True, "put the world model on another device"), ("policy's weights", False, "a smaller model"),
])
def test_advice(largest: str, shared: bool, advice: str) -> None:
    parts = {largest: 80 * GB, "policy's logits": 1 * GB}
    check("cuda:0", parts, 100 * GB, 8192, shared)
    with pytest.raises(UserError) as refused:
        check("cuda:0", parts, 79 * GB, 8192, shared)
    assert advice in str(refused.value) and "has 79 GB free and about 89 GB" in str(refused.value)


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from itp.training.rl_k import RlSettings

    folder = str(write_family(tmp_path, "llama"))
    settings = RlSettings(policy_model_path=folder, wm_model_path=folder, out_dir="")
    with caplog.at_level(logging.INFO):
        memory.report(settings, ("cpu", "cpu"), 4)
        assert not caplog.records
        monkeypatch.setattr(memory, "_free", lambda device: 80 * GB)
        memory.report(settings, ("cuda:0", "cuda:1"), 2)
    assert [r.getMessage().split(" will")[0] for r in caplog.records] == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(memory, "_free", lambda device: 0)
    with pytest.raises(UserError, match="cuda:0 has 0 GB free"):
        memory.report(settings, ("cuda:0", "cuda:0"), 2)
