"""SFT: the base policy acts, nothing is imagined (K = 0; the SFT rows of the paper's Table 1)."""

from __future__ import annotations

from itp.policy.method import Direct


class Sft(Direct):
    name = "sft"
