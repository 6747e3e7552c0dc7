r"""How much memory online RL will need on its GPUs, from the models' configurations alone, before they are loaded.

An estimate to decide by, not a measurement.  Weights, gradients and Adam's moments are counted exactly (the
models are built without memory, on torch's meta device); the tensors that an update keeps for its backward
pass follow from the shapes of a decoder layer; what allocators lose is covered by ``SLACK``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itp.runtime import UserError

if TYPE_CHECKING:
    from itp.training.rl_k import RlSettings

log = logging.getLogger("itp.rl_k")
GB = 1 << 30
CACHE = 256 << 20
"""What LocalLM keeps of computed prefixes, unless --cache_gb says otherwise."""
SLACK = 1.1


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides about memory."""

    parameters: int
    linear: int
    """Σ (in + out) over the linear layers of its blocks: LoRA of rank r has r times as many weights."""
    hidden: int
    intermediate: int
    layers: int
    kv: int
    """Elements of keys and values a token and layer."""
    vocabulary: int

    @classmethod
    def of(cls, path: str) -> Shape:
        """Of a model folder or hub name.  Raises UserError."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(path).get_text_config()
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a causal language model ({str(error).splitlines()[0]})") from error
        head = model.get_output_embeddings()
        linear = sum(m.in_features + m.out_features for m in model.modules()
                     if isinstance(m, torch.nn.Linear) and m is not head)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(sum(p.numel() for p in model.parameters()), linear, config.hidden_size, config.intermediate_size,
                   config.num_hidden_layers, 2 * config.num_key_value_heads * width, config.vocab_size)


def policy_bytes(shape: Shape, *, lora_r: int, width: int, update_tokens: int, rows: int,
                 length: int) -> dict[str, int]:
    """Bytes of each part of a policy that acts and learns.

    ``width``: bytes of a number in the computation (2: bf16, fp16).  ``update_tokens``: tokens of a forward pass of the
    update.  ``rows`` episodes of at most ``length`` tokens act at a time.
    """
    trained = lora_r * shape.linear if lora_r else shape.parameters
    return {
        "weights": shape.parameters * (width if lora_r else 4) + (4 * trained if lora_r else 0),
        "gradients and Adam": 12 * trained,
        # A block keeps its normed inputs, q, k, v, attention's output and residuals, and three of the MLP's width.
        "activations of the update": update_tokens * shape.layers * width * (8 * shape.hidden + 4 * shape.intermediate),
        "keys and values": rows * length * shape.layers * shape.kv * width + CACHE,
        # Logits in the computation's width, in float32, and their gradient.
        "logits": update_tokens * shape.vocabulary * (width + 8),
    }


def world_model_bytes(shape: Shape, *, width: int, rows: int, length: int) -> dict[str, int]:
    """The same for a model that only answers."""
    return {"weights": shape.parameters * width,
            "keys and values": rows * length * shape.layers * shape.kv * width + CACHE}


def report(settings: RlSettings, devices: tuple[str, str], width: int) -> None:
    """Say what each GPU will need.  Raises UserError where that is more than it has; says nothing on a CPU."""
    needs: dict[str, dict[str, int]] = {}
    length = settings.max_seq_len
    if devices[0].startswith("cuda"):
        parts = policy_bytes(Shape.of(settings.policy_model_path), lora_r=settings.lora_r, width=width,
                             update_tokens=settings.update_batch_tokens, rows=settings.num_envs, length=length)
        parts["keys and values"] += settings.engine["cache_bytes"] - CACHE
        needs.setdefault(devices[0], {}).update({f"policy's {name}": size for name, size in parts.items()})
    if settings.force_k != 0 and devices[1].startswith("cuda"):
        parts = world_model_bytes(Shape.of(settings.wm_model_path), width=4 if settings.wm_dtype == "fp32" else 2,
                                  rows=settings.num_envs, length=length + settings.wm_max_new_tokens)
        parts["keys and values"] += settings.engine["cache_bytes"] - CACHE
        needs.setdefault(devices[1], {}).update({f"world model's {name}": size for name, size in parts.items()})
    for device, parts in needs.items():
        log.info("%s will need about %.0f GB: %s", device, SLACK * sum(parts.values()) / GB, _list(parts))
        check(device, parts, _free(device), settings.update_batch_tokens, len(set(devices)) == 1)


def check(device: str, parts: Mapping[str, int], free: int, update_tokens: int, shared: bool) -> None:
    """Raises UserError where ``parts`` don't fit into ``free`` bytes, saying what to change first."""
    need = SLACK * sum(parts.values())
    if need <= free:
        return
    largest = max(parts, key=lambda name: parts[name])
    advice = {
        "activations of the update": f"lower --update_batch_tokens ({update_tokens} now; it changes memory only)",
        "logits": f"lower --update_batch_tokens ({update_tokens} now; it changes memory only)",
        "gradients and Adam": "train with LoRA (--lora_r 8)",
        "keys and values": "lower --num_envs, or keep less history (--history_keep_steps)",
        "weights": "put the world model on another device (--wm_device)" if shared else "take a smaller model",
    }[largest.split("'s ", 1)[1]]
    raise UserError(f"{device} has {free / GB:.0f} GB free and about {need / GB:.0f} GB are needed ({_list(parts)}); "
                    f"{advice}")


def _list(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GB:.1f}" for name, size in sorted(parts.items(), key=lambda p: -p[1]))


def _free(device: str) -> int:
    import torch

    free: Any = torch.cuda.mem_get_info(device)[0]
    return int(free)
