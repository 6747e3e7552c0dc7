"""Seeds: a function of what identifies a draw, never of process, thread or order."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what identifies a draw, such as (seed, game, step, call).

    Independent of process, thread and order, so that an episode's random choices don't depend on
    what else runs at the same time.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
