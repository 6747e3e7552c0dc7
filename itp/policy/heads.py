"""Policies with heads, as folders: does a model have them, for which K_max, and how it is loaded.

The module itself is :class:`itp.policy.policy_with_heads.PolicyWithHeads`, also to be had from here; torch
is imported with it, not with this file, so that programs can refuse settings at once.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itp.lm.local import LocalLM
from itp.runtime import UserError, model_folder, read_json

if TYPE_CHECKING:
    from itp.policy.policy_with_heads import HeadsOutput, PolicyHeads, PolicyWithHeads

HEADS_WEIGHTS, HEADS_CONFIG = "policy_heads.safetensors", "policy_heads.json"
RELEASE_HEADS = "adaptive_heads.pt"
"""What the authors' release writes: {kmax, k_head, v_head}, the latter two state dicts of linear layers."""
__all__ = ["HeadsOutput", "PolicyHeads", "PolicyWithHeads", "has_heads", "kmax_of", "load_policy_lm"]


def has_heads(folder: str | Path) -> bool:
    """Whether the model in ``folder``, or of that hub name, has a K-head and a value head."""
    return any((model_folder(folder) / name).is_file() for name in (HEADS_CONFIG, RELEASE_HEADS))


def kmax_of(folder: str | Path) -> int:
    """K_max of a folder with heads."""
    folder = model_folder(folder)
    if (folder / HEADS_CONFIG).is_file():
        return int(read_json(folder / HEADS_CONFIG)["kmax"])
    import torch

    try:
        return int(torch.load(folder / RELEASE_HEADS, map_location="cpu", weights_only=True)["kmax"])
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder / RELEASE_HEADS}: not the heads of a policy, a dict of kmax, k_head and v_head "
                        f"({str(error).splitlines()[0]})") from error


def load_policy_lm(path: str, *, device: str = "cpu", dtype: str = "fp32", role: str = "policy",
                   **options: Any) -> LocalLM:
    """A policy to act with: with its heads where the folder has them.  ``options`` are LocalLM's."""
    if not has_heads(path):
        return LocalLM.load(path, device=device, dtype=dtype, role=role, **options)
    from itp.policy.policy_with_heads import PolicyWithHeads

    policy, tokenizer = PolicyWithHeads.from_pretrained(path, device=device, dtype=dtype)
    return LocalLM(policy.causal_lm, tokenizer, heads=policy.heads, name=Path(path).name, role=role, **options)


def __getattr__(name: str) -> Any:
    """PolicyWithHeads and its parts, imported when they are asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from itp.policy import policy_with_heads

    return getattr(policy_with_heads, name)
