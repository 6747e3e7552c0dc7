"""What methods can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodSettings:
    """The methods' part of the command line (``k_policy``: head, prompt, fixed or random)."""

    max_k: int = 2
    min_k: int = 0
    k_policy: str = "prompt"
    k_sample: bool = False
    fixed_k: int = -1
    foresight_format: str = "full"
    reflect: bool = True
