"""Devices and precisions, by what the machine has.  torch is imported inside the functions."""

from __future__ import annotations

import logging
import resource
import sys

from itp.distributed import local_processes

log = logging.getLogger(__name__)
DTYPES = ("fp16", "bf16", "fp32")


def resolve_device(name: str) -> str:
    """``name`` where the machine has it, otherwise the best it has, with one warning line."""
    import torch

    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            there = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.device_count() else "cpu"
            log.warning("device %s doesn't exist here; using %s", name, there)
            return there
    return name


def resolve_dtype(name: str, device: str):
    """The torch dtype for inference.  The CPU computes in float32: half precision is slower there."""
    import torch

    if device == "cpu" and name != "fp32":
        return torch.float32
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def free_bytes(device: str) -> int | None:
    """This process's part of what is free on a GPU, what torch holds unused included; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    import torch

    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Processes beyond the number of GPUs share them (itp.distributed.rank_devices).
    return free // -(-local_processes() // torch.cuda.device_count())


def peak_memory() -> dict[str, int]:
    """The most bytes that this process had at a time: resident on the host, allocated by torch on each GPU."""
    import torch

    kilo = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo}
    return peak | {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
