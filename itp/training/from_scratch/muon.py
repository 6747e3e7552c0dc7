"""Muon for the matrices inside a decoder's layers, AdamW for embeddings, norms and heads, as one optimizer.

Muon (Jordan et al., 2024) makes the update of a matrix orthogonal, so that all its directions learn at one pace. An
epoch on transcripts took the demo's base LM, without drills, to a held-out loss of .62 where AdamW got to .72 at
the same rate, and of .41 at three times that rate; for LoRA on a large model AdamW stays the default. Its update is
scaled to the size of AdamW's (Liu et al., 2025), so that both have one learning rate. On a GPU large matrices get
PyTorch's own, from torch 2.9 on. That one computes matrix by matrix and in bfloat16: it takes three times as long on a
CPU, and with small matrices a GPU would spend the step on the starts of hundreds of kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from itp.errors import UserError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: steep at 0, so that five iterations bring every singular value to between .7 and 1.2."""

LARGE = 2**20
"""Entries of a matrix from which on a GPU is busy with its products alone."""


@torch.no_grad()
def orthogonal(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """(n, rows, columns) → the same U and V of each matrix's U S V^T, with singular values near 1."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT, iterations).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon(matrices: list[torch.nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon for ``matrices`` (each of two dimensions, all on one device), scaled to the size of AdamW's update."""
    large = matrices[0].is_cuda and max(matrix.numel() for matrix in matrices) >= LARGE
    if large and hasattr(torch.optim, "Muon"):  # torch 2.9; setup.py allows older ones
        return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return BatchedMuon(matrices, lr=lr, weight_decay=weight_decay)


class BatchedMuon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; matrices of one shape are computed together, in their own precision.

    Otherwise it is ``torch.optim.Muon``, and its state has the same names.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for shape, parameters in same_shape.items():
                directions = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    # An orthogonal matrix's entries have a mean square of 1 / its longer side; AdamW's, about .2 ** 2.
                    parameter.add_(direction, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)

    def _momentum(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        mean = state.setdefault("momentum_buffer", torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


class MuonAdamW(torch.optim.Optimizer):
    """Both as one: one schedule of the learning rate, one state, one checkpoint."""

    def __init__(self, model: torch.nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        matrices = [p for name, p in trained.items() if p.ndim == 2 and ".layers." in name]
        decayed = [p for name, p in trained.items() if p.ndim == 2 and ".layers." not in name]
        others = [p for p in trained.values() if p.ndim != 2]
        if not matrices:
            raise UserError("--optimizer muon: the model has no matrices in `layers` that train; use adamw")
        adamw = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=betas,
                                  weight_decay=weight_decay)
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon(matrices, lr=lr, weight_decay=weight_decay), adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state: what the schedule or a checkpoint sets, they see."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint of a CPU lacks options that a GPU's Muon has in its groups.
        groups = [own | saved for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)]
        # Checkpoints of earlier versions have the momentum under another name.
        state = {number: {"momentum_buffer" if name == "momentum" else name: value for name, value in kept.items()}
                 for number, kept in state_dict["state"].items()}
        super().load_state_dict({"param_groups": groups, "state": state})
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure else None
        for part in self._parts:
            part.step()
        return loss
