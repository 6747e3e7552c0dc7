"""The estimate of memory: exact where it can be, by hand where it is a formula."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM, FalconConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen2Config,
    Qwen3Config,
)

from itp.config import parse_settings
from itp.errors import UserError
from itp.training.itp_r import gpu_memory_estimate as memory
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.gpu_memory_estimate import GB, Shape, check, policy_bytes, world_model_bytes
from itp.training.models import load_base, lora_config
from itp.training.settings import FinetuneSettings, check_settings
from tests.families import FAMILIES, write_family


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    """Weights, those of LoRA on all linear layers, and a token's keys and values, against the model itself."""
    folder = write_family(tmp_path, family)
    shape, model = Shape.of(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    assert shape.kv * 3 == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    adapted = peft.get_peft_model(model, lora_config(FinetuneSettings(model_path="", out_dir="", lora_r=4), model))
    names = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert 4 * shape.linear == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_targets(family: str, tmp_path: Path) -> None:
    """Those of the release, and a name that no module has."""
    model = AutoModelForCausalLM.from_pretrained(write_family(tmp_path, family))
    settings = FinetuneSettings(model_path="m", out_dir="")
    adapted = peft.get_peft_model(model, lora_config(settings, model, "q_proj,v_proj"))
    assert {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match="--lora_targets query: .* has no such linear layers; it has down_proj, gate"):
        lora_config(settings, adapted.unload(), "q_proj,query")


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


SHAPE = Shape(parameters=1000, linear=50, hidden=4, intermediate=6, layers=2, kv=16, vocabulary=10)


def test_formulas_by_hand() -> None:
    block = 5 * (4 * 38 + 6 * 9)
    common = {"width": 2, "update_tokens": 5, "rows": 3, "length": 7}
    lora = policy_bytes(SHAPE, lora_r=2, checkpointing=False, **common)
    assert lora == {"weights": 2000 + 400, "gradients and Adam": 1200, "activations of the update": 2 * block,
                    "masks of the update": 25 * 7,
                    "keys and values": 3 * 7 * 2 * 8 * 2 + memory.CACHE_BYTES, "logits": 5 * 10 * 10}
    whole = policy_bytes(SHAPE, lora_r=0, checkpointing=True, **common)
    assert (whole["weights"], whole["gradients and Adam"]) == (4000 + 2000, 12000)
    assert whole["activations of the update"] == block + 2 * 5 * 4 * 2  # one block's, and the inputs of both
    assert policy_bytes(SHAPE, lora_r=2, checkpointing=False, supervised=1.0, **common) == lora | {"logits": 1000}
    assert world_model_bytes(SHAPE, width=2, rows=1, length=1)["weights"] == 2000


@pytest.mark.parametrize("largest, shared, advice", [
    ("policy's activations of the update", False, "add --gradient_checkpointing"),
    ("policy's masks of the update", False, "lower --update_batch_tokens (8192 now"),
    ("policy's gradients and Adam", False, "train with LoRA"), ("policy's keys and values", True, "lower --num_envs"),
    ("policy's weights", True, "put the world model on another device"), ("policy's weights", False, "a smaller model"),
])
def test_advice(largest: str, shared: bool, advice: str) -> None:
    parts = {largest: 80 * GB, "policy's logits": 1 * GB}
    settings = RlSettings(policy_model="", out_dir="")
    check("cuda:0", parts, 100 * GB, settings, shared)
    with pytest.raises(UserError) as refused:
        check("cuda:0", parts, 79 * GB, settings, shared)
    assert advice in str(refused.value) and "has 79 GB free and about 89 GB" in str(refused.value)


def test_advice_that_helps() -> None:
    """Below a step's tokens, a smaller budget changes nothing."""
    settings = RlSettings(policy_model="", out_dir="", gradient_checkpointing=True, update_batch_tokens=2000,
                          max_seq_len=999)
    for changes, said in (({}, "lower --update_batch_tokens"), ({"max_seq_len": 1000}, "lower --max_seq_len")):
        with pytest.raises(UserError, match=said):
            check("cuda:0", {"policy's activations of the update": 1}, 0, replace(settings, **changes), False)


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(write_family(tmp_path, "llama"))
    settings = RlSettings(policy_model=folder, wm_model=folder, out_dir="")
    with caplog.at_level(logging.INFO):
        memory.report(settings, ("cpu", "cpu"), 4)
        assert not caplog.records
        monkeypatch.setattr(memory, "_free", lambda device: 80 * GB)
        memory.report(settings, ("cuda:0", "cuda:1"), 2)
    assert [r.getMessage().split(" will")[0] for r in caplog.records] == ["cuda:0", "cuda:1"]
    asked = []
    monkeypatch.setattr(memory, "policy_bytes", lambda shape, **how: asked.append(how) or policy_bytes(shape, **how))
    for weight in (0.0, 0.1):  # observations are learned at any token, and behind a prompt of any length
        memory.report(replace(settings, update_batch_tokens=1, max_seq_len=100, observation_loss=weight),
                      ("cuda:0", "cuda:1"), 2)
    assert [(how["update_tokens"], how["supervised"]) for how in asked] == [(200, 0.5), (200 + 16 + 256, 1.0)]
    monkeypatch.setattr(memory, "_free", lambda device: 0)
    with pytest.raises(UserError, match="cuda:0 has 0 GB free"):
        memory.report(settings, ("cuda:0", "cuda:0"), 2)


REAL = {
    "qwen2.5-7b": (Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False), 7_615_616_512),
    "qwen3-8b": (Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                             num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
                 8_190_735_360),
    "llama-3.1-8b": (LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                 num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                                 tie_word_embeddings=False), 8_030_261_248),
}
"""The models of the recipes, with their numbers of weights as published."""


@pytest.mark.parametrize("model", REAL)
def test_recipes_fit_a_gpu_of_80_gb(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and world model on one, with room for what the estimate doesn't know."""
    config, published = REAL[model]
    config.architectures = None
    config.save_pretrained(tmp_path)
    shape = Shape.of(str(tmp_path))
    assert shape.parameters == published
    monkeypatch.setattr(Shape, "of", lambda path: shape)
    for recipe in sorted((Path(__file__).parents[1] / "configs").glob(f"*/{model}.yaml")):
        settings = parse_settings(RlSettings, [f"--config={recipe}:rl_k", "--policy_model=p",
                                               "--wm_model=w", "--out_dir=o"])
        monkeypatch.setattr(memory, "_free", lambda device: 66 * GB)
        memory.report(settings, ("cuda:0", "cuda:0"), 2)
        monkeypatch.setattr(memory, "_free", lambda device: 79 * GB)
        with pytest.raises(UserError, match="add --gradient_checkpointing"):
            memory.report(replace(settings, gradient_checkpointing=False), ("cuda:0", "cuda:0"), 2)
    assert recipe


@pytest.mark.parametrize("config", [
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50),
    GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=50),
    FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50),
], ids=lambda config: config.model_type)
def test_families_that_name_things_otherwise(config: PretrainedConfig, tmp_path: Path) -> None:
    """Their linear layers may be Conv1D, their MLP four times as wide without saying so, their keys of all heads."""
    config.save_pretrained(tmp_path)
    shape, model = Shape.of(str(tmp_path)), AutoModelForCausalLM.from_config(config)
    assert (shape.hidden, shape.intermediate, shape.layers, shape.vocabulary) == (32, 128, 2, 50)
    heads = 1 if config.model_type == "falcon" else 4  # of keys, and of values
    assert shape.kv == 2 * 2 * heads * 8
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert 4 * shape.linear == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_activations_are_about_what_a_block_keeps(lora_r: int) -> None:
    """Against what autograd really saves for one block more, in bfloat16 as on a GPU."""
    tokens = 256

    def saved(layers: int) -> int:
        config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=50)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora_r else torch.float32)
        decoder = model.model
        if lora_r:  # with dropout of 0: the CPU's keeps four bytes where CUDA's keeps one
            model = peft.get_peft_model(model, peft.LoraConfig(r=lora_r, target_modules="all-linear"))
        weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[:1] == (tokens,) or tensor.shape[:2] == (1, tokens) or tensor.shape[2:3] == (tokens,):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            decoder(input_ids=torch.ones(1, tokens, dtype=torch.long))
        return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)

    block = saved(3) - saved(2)
    shape = Shape(parameters=0, linear=0, hidden=64, intermediate=192, layers=1, kv=0, vocabulary=0)
    estimate = policy_bytes(shape, lora_r=lora_r, width=2, update_tokens=tokens, checkpointing=False, rows=0, length=0)
    assert block <= 1.05 * estimate["activations of the update"] <= 1.6 * block
