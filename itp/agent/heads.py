"""Policies with heads, as folders: does a model have a K-head and a value head, and for which K_max?

The module is :class:`itp.agent.policy_with_heads.PolicyWithHeads`.  This file doesn't import torch, so that programs
can refuse settings at once.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from itp.errors import UserError
from itp.files import read_object
from itp.pretrained import model_folder

HEADS_WEIGHTS, HEADS_CONFIG = "policy_heads.safetensors", "policy_heads.json"
RELEASE_HEADS = "adaptive_heads.pt"
"""What the authors' release writes: {kmax, k_head, v_head}, the latter two state dicts of linear layers."""


def has_heads(folder: str | Path) -> bool:
    """Whether the model in ``folder``, or of that hub name, has a K-head and a value head."""
    return bool(str(folder)) and any((model_folder(folder) / name).is_file() for name in (HEADS_CONFIG, RELEASE_HEADS))


def kmax_of(folder: str | Path) -> int:
    """K_max of a folder with heads."""
    folder = model_folder(folder)
    if (folder / HEADS_CONFIG).is_file():
        return read_object(folder / HEADS_CONFIG, {"kmax": int}, "copy the whole model folder again")["kmax"]
    import torch

    try:
        return int(torch.load(folder / RELEASE_HEADS, map_location="cpu", weights_only=True)["kmax"])
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder / RELEASE_HEADS}: not the heads of a policy, a dict of kmax, k_head and v_head "
                        f"({str(error).splitlines()[0]})") from error
