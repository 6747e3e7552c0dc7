"""Muon with AdamW as one optimizer: its update, its schedule, its checkpoint, and what it is refused for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from itp.errors import UserError
from itp.training.from_scratch import muon as muon_module
from itp.training.from_scratch.muon import BatchedMuon, MuonAdamW, muon, orthogonal
from itp.training.settings import FinetuneSettings, check_settings

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True))


def steps(model, optimizer, count: int, *, seed: int, schedule=None) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(20, (4, 10), generator=draw)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 16), (2, 16, 24)])
def test_an_orthogonal_update_keeps_directions_and_levels_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3 < torch.linalg.svdvals(matrices).max()
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ found @ vh.mT  # diagonal where the singular vectors are the same
    assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


def test_a_first_step_has_the_size_of_adamws():
    model = tiny_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = MuonAdamW(model, **OPTIONS | {"weight_decay": 0.0})
    steps(model, optimizer, 1, seed=2)
    sizes = {name: float((p - before[name]).square().mean().sqrt() / 0.01) for name, p in model.named_parameters()}
    for name, size in sizes.items():
        if "proj" in name:
            assert 0.1 < size < 0.25, (name, size)  # .2 by design, for singular values of 1
        else:
            assert 0.9 < size <= 1.01, (name, size)  # AdamW's first step has the gradients' signs


def test_one_schedule_drives_both_parts():
    model = tiny_model()
    optimizer = MuonAdamW(model, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    steps(model, optimizer, 1, seed=3, schedule=schedule)
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, 3, seed=4, schedule=schedule)  # the rate is 0 now: nothing moves, decay included
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["momentum_buffer", "momentum"])  # the second is that of earlier versions
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name, tmp_path):
    whole, part = tiny_model(), tiny_model()
    optimizer, first = MuonAdamW(whole, **OPTIONS), MuonAdamW(part, **OPTIONS)
    steps(whole, optimizer, 3, seed=5)
    steps(part, first, 3, seed=5)
    saved = first.state_dict()
    saved["state"] = {number: {{"momentum_buffer": name}.get(key, key): value for key, value in kept.items()}
                      for number, kept in saved["state"].items()}
    torch.save(saved, tmp_path / "optimizer.pt")
    resumed = MuonAdamW(part, **OPTIONS)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(whole, optimizer, 3, seed=6)
    steps(part, resumed, 3, seed=6)
    for weight, expected in zip(part.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_a_model_without_layers_and_deepspeed_are_refused(tmp_path):
    with pytest.raises(UserError, match="--optimizer muon"):
        MuonAdamW(torch.nn.Linear(4, 4), **OPTIONS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "zero.json").write_text("{}")
    with pytest.raises(UserError, match="--optimizer muon isn't for DeepSpeed"):
        check_settings(FinetuneSettings(model_path=str(tmp_path), out_dir="x", optimizer="muon",
                                        deepspeed=str(tmp_path / "zero.json")))


torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")


def torch_muon(matrices: list[torch.nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """What ``muon`` takes on a GPU."""
    return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


@torchs
def test_two_steps_are_those_of_torch_to_the_precision_of_bfloat16():
    draw = torch.Generator().manual_seed(7)
    start = [torch.randn(shape, generator=draw) for shape in ((16, 16), (24, 16), (16, 24), (16, 24))]
    gradients = [[torch.randn(weight.shape, generator=draw) for weight in start] for _ in range(2)]
    moved = []
    for make in (muon, torch_muon):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = make(weights, lr=0.01, weight_decay=0.1)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        moved.append([weight.detach() - before for weight, before in zip(weights, start, strict=True)])
    assert isinstance(muon(weights, lr=0.01, weight_decay=0.1), BatchedMuon)  # on a CPU
    for own, torchs_own in zip(*moved, strict=True):
        assert (own - torchs_own).norm() < 0.02 * torchs_own.norm()


@torchs
@pytest.mark.parametrize("first, second", [(muon, torch_muon), (torch_muon, muon)], ids=["cpu to gpu", "gpu to cpu"])
def test_a_checkpoint_goes_on_with_the_other_form(first, second, monkeypatch):
    def optimizer_for(model, make):
        monkeypatch.setattr(muon_module, "muon", make)
        return MuonAdamW(model, **OPTIONS)

    whole, part = tiny_model(), tiny_model()
    expected, begun = optimizer_for(whole, second), optimizer_for(part, first)
    steps(whole, expected, 3, seed=8)
    steps(part, begun, 3, seed=8)
    resumed = optimizer_for(part, second)
    resumed.load_state_dict(begun.state_dict())
    steps(whole, expected, 3, seed=9)
    steps(part, resumed, 3, seed=9)
    start = tiny_model().state_dict()
    for name, weight in part.state_dict().items():
        apart, moved = (weight - whole.state_dict()[name]).norm(), (whole.state_dict()[name] - start[name]).norm()
        assert apart < 0.1 * moved, (name, float(apart / moved))
