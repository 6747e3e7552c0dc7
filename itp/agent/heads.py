"""Policies with heads, as folders: does a model have a K-head and a value head, and for which K_max?

The module is :class:`itp.agent.policy_with_heads.PolicyWithHeads`.  This file doesn't import torch, so that programs
can refuse settings at once.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from itp.errors import UserError, first_line
from itp.files import read_object
from itp.pretrained import model_folder

HEADS_WEIGHTS, HEADS_CONFIG = "policy_heads.safetensors", "policy_heads.json"
RELEASE_HEADS = "adaptive_heads.pt"
"""What the authors' release writes: {kmax, k_head, v_head}, the latter two state dicts of linear layers."""

COPY_AGAIN = "copy the whole model folder again"
_NOT_HEADS = "not the heads of a policy, a dict of kmax, k_head and v_head"


def has_heads(folder: str | Path) -> bool:
    """Whether the model in ``folder``, or of that hub name, has a K-head and a value head."""
    return bool(str(folder)) and any((model_folder(folder) / name).is_file() for name in (HEADS_CONFIG, RELEASE_HEADS))


def kmax_of(folder: str | Path) -> int:
    """K_max of a folder with heads."""
    folder = model_folder(folder)
    if (folder / HEADS_CONFIG).is_file():
        kmax = read_object(folder / HEADS_CONFIG, {"kmax": int}, COPY_AGAIN)["kmax"]
        if kmax < 1:
            raise UserError(f"{folder / HEADS_CONFIG}: kmax is {kmax}; {COPY_AGAIN}")
        return kmax
    return int(read_release(folder)["kmax"])


def read_release(folder: Path) -> dict[str, Any]:
    """The heads of the authors' release.  Raises UserError where they aren't a dict of what RELEASE_HEADS says."""
    import torch

    file = folder / RELEASE_HEADS
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: {_NOT_HEADS} ({first_line(error)})") from error
    if not isinstance(found, dict) or not isinstance(found.get("kmax"), int) or not all(
            isinstance(found.get(head), dict) and all(isinstance(w, torch.Tensor) for w in found[head].values())
            for head in ("k_head", "v_head")):
        raise UserError(f"{file}: {_NOT_HEADS}")
    return found
