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

from itp.agent.prompt_budget import RESERVE
from itp.errors import UserError
from itp.lm.memory_budget import CACHE_BYTES
from itp.pretrained import loading, remote_code

if TYPE_CHECKING:
    from itp.training.itp_r.a2c_settings import RlSettings

log = logging.getLogger(__name__)
GB = 1 << 30
SLACK = 1.1


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides about memory."""

    parameters: int
    linear: int
    """Σ (in + out) over the linear layers of its blocks: LoRA of rank r has r times as many weights."""
    hidden: int
    intermediate: int
    """The widest input of such a layer: the inside of the MLP."""
    layers: int
    kv: int
    """Elements of keys and values a token, in all layers."""
    vocabulary: int

    @classmethod
    def of(cls, path: str) -> Shape:
        """Of a model folder or hub name.  Raises UserError."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        with loading(path, "not a causal language model"):
            config = AutoConfig.from_pretrained(path, **remote_code()).get_text_config()
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **remote_code(),
                                                         dtype=torch.bfloat16)  # what experts' kernels know
        head = model.get_output_embeddings()
        # GPT-2's linear layers are Conv1D, with a transposed weight.
        linear = [tuple(m.weight.shape) if isinstance(m, Conv1D) else (m.in_features, m.out_features)
                  for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
        # Families name their heads in too many ways; what they cache of a token they all show.
        with torch.device("meta"):
            cache = model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values
        return cls(sum(p.numel() for p in model.parameters()), sum(map(sum, linear)), config.hidden_size,
                   max(wide for wide, _ in linear), config.num_hidden_layers,
                   sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers), config.vocab_size)


def policy_bytes(shape: Shape, *, lora_r: int, width: int, update_tokens: int, checkpointing: bool, rows: int,
                 length: int, supervised: float = 0.5) -> dict[str, int]:
    """Bytes of each part of a policy that acts and learns.

    ``width``: bytes of a number in the computation (2: bf16, fp16).  ``update_tokens``: tokens of a forward pass of the
    update; ``checkpointing``: it recomputes activations.  ``rows`` episodes of at most ``length`` tokens act at a time.
    ``supervised``: share of the update's tokens that logits are computed of, at most.
    """
    trained = lora_r * shape.linear if lora_r else shape.parameters
    block = update_tokens * (shape.hidden * (18 + 10 * width) + shape.intermediate * (1 + 4 * width))
    cast = 0 if lora_r or width == 4 else width * shape.parameters  # autocast's copies of what trains in float32
    return {
        "weights": shape.parameters * (width if lora_r else 4) + (4 * trained if lora_r else cast),
        "gradients and Adam": 12 * trained,
        # A block keeps what its two norms compute in float32; q, k, v and attention's output; three of the MLP's width;
        # the input of each linear layer once more, as autocast or LoRA cast it, and a byte where LoRA dropped it.
        # Recomputed, one block at a time has these, and all others have their input only.
        "activations of the update": (update_tokens * shape.layers * shape.hidden * width + block if checkpointing
                                      else shape.layers * block),
        # One row at worst: who sees whom in float32, as boolean, and in the computation's width.
        "masks of the update": update_tokens ** 2 * (4 + 1 + width),
        "keys and values": rows * length * shape.kv * width + CACHE_BYTES,
        # Two copies in the computation's width and four in float32, gradients among them.
        "logits": int(supervised * update_tokens * shape.vocabulary * (2 * width + 16)),
    }


def world_model_bytes(shape: Shape, *, width: int, rows: int, length: int) -> dict[str, int]:
    """The same for a model that only answers."""
    return {"weights": shape.parameters * width,
            "keys and values": rows * length * shape.kv * width + CACHE_BYTES}


def report(settings: RlSettings, devices: tuple[str, str], width: int) -> None:
    """Say what each GPU will need.  Raises UserError where that is more than it has; says nothing on a CPU."""
    needs: dict[str, dict[str, int]] = {}
    length = settings.max_seq_len
    # A step is never cut in two: its action's prompt, that of its heads where they have other history, and behind it
    # the executed action with its observation.
    longest = length if settings.fixed_k == 0 else 2 * length
    if settings.observation_loss:
        longest += RESERVE["action"][settings.env] + RESERVE["observation"][settings.env]
    update = max(settings.update_batch_tokens, longest)
    if devices[0].startswith("cuda"):
        parts = policy_bytes(Shape.of(settings.policy_model), lora_r=settings.lora_r, width=width,
                             update_tokens=update, checkpointing=settings.gradient_checkpointing,
                             rows=settings.num_envs, length=length,
                             # Between two actions stand their labels, an answer and the control token, about as many
                             # tokens as an action has at most; most answers are longer.
                             supervised=1.0 if settings.observation_loss else 0.5)
        parts["keys and values"] += settings.engine["cache_bytes"] - CACHE_BYTES
        needs.setdefault(devices[0], {}).update({f"policy's {name}": size for name, size in parts.items()})
    if settings.fixed_k != 0 and devices[1].startswith("cuda"):
        parts = world_model_bytes(Shape.of(settings.wm_model), width=4 if settings.wm_dtype == "fp32" else 2,
                                  rows=settings.num_envs, length=length + settings.wm_max_new_tokens)
        parts["keys and values"] += settings.engine["cache_bytes"] - CACHE_BYTES
        needs.setdefault(devices[1], {}).update({f"world model's {name}": size for name, size in parts.items()})
    for device, parts in needs.items():
        log.info("%s will need about %.0f GB: %s", device, SLACK * sum(parts.values()) / GB, _list(parts))
        check(device, parts, _free(device), settings, len(set(devices)) == 1)


def check(device: str, parts: Mapping[str, int], free: int, settings: RlSettings, shared: bool) -> None:
    """Raises UserError where ``parts`` don't fit into ``free`` bytes, saying what to change first."""
    need = SLACK * sum(parts.values())
    if need <= free:
        return
    largest = max(parts, key=lambda name: parts[name])
    tokens, length = settings.update_batch_tokens, settings.max_seq_len
    shorter = (f"lower --update_batch_tokens ({tokens} now; it changes memory only)" if tokens > 2 * length else
               f"lower --max_seq_len ({length} now)")
    advice = {
        "activations of the update": shorter if settings.gradient_checkpointing else "add --gradient_checkpointing",
        "masks of the update": shorter,
        "logits": shorter,
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
