"""The sizes of a local model's batches and of its prefix cache: from the flags, else from the free memory.

The models of a GPU share its free memory when the first batch starts, because all of them are loaded then.  Each model
gets an equal part: half of it for computed prefixes, and half for the current batch.  On a CPU, and beside a model in
training, both sizes are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from itp.config import flag

CACHE_BYTES = 256 << 20
BATCH_TOKENS = 16384
LEAST_BATCH_TOKENS = 2048
USED = 0.8
"""The share of the free memory to use.  The rest is for logits, masks and the allocator's losses."""


@dataclass
class EngineFlags:
    """Memory of models in this process."""

    cache_gb: float = flag(0.0, at_least=0, help="GB for each model's computed prefixes (0: a share of what is free on "
                                                 "a GPU; else .25)", affects_result=False)
    max_batch_tokens: int = flag(0, at_least=0, help="rows x longest row of a forward pass at most (0: by what is free "
                                                     f"on a GPU; else {BATCH_TOKENS})", affects_result=False)
    cuda_graphs: bool = flag(True, help="on a GPU, repeat decoding steps by CUDA graphs: faster, above all for small "
                                        "models; same results to rounding", affects_result=False)
    fixed_cache_gb: ClassVar[float] = CACHE_BYTES / 2**30

    @property
    def engine(self) -> dict[str, Any]:
        """LocalLM's options."""
        return {"cache_bytes": int((self.cache_gb or self.fixed_cache_gb) * 2**30), "fit_cache": not self.cache_gb,
                "max_batch_tokens": self.max_batch_tokens or BATCH_TOKENS, "fit_batch": not self.max_batch_tokens,
                "cuda_graphs": self.cuda_graphs}

    @property
    def fixed_engine(self) -> dict[str, Any]:
        """LocalLM's options for a model that leaves the device's free memory to others."""
        return self.engine | {"fit_cache": False, "fit_batch": False}


def split_share(share: int, token_bytes: int) -> tuple[int, int]:
    """(bytes of computed prefixes, tokens of a batch) for a model with ``share`` bytes, ``token_bytes`` a token."""
    half = int(share * USED) // 2
    return half, max(LEAST_BATCH_TOKENS, half // token_bytes)


def token_bytes(config: Any, width: int) -> int:
    """Memory of a token in a batch, for a Hugging Face configuration and numbers of ``width`` bytes.

    It holds the keys and values of every layer, a quarter more for the block that grows (kv_cache.BatchMemory), and the
    activations of one layer: normed inputs, q, k, v, the attention's output, residuals, and four times the MLP's width.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2 names none
    kept = kv_bytes(config, width)
    return kept + kept // 4 + width * (8 * config.hidden_size + 4 * inner)


def kv_bytes(config: Any, width: int) -> int:
    """Keys and values of a token in all layers."""
    # GPT-2 names neither: all its heads have keys and values.
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width * config.num_hidden_layers * 2 * heads * size
