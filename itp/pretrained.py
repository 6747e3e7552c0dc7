"""Model folders and hub names: checks, fingerprints, and loading of tokenizers and models."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from itp.devices import resolve_device, resolve_dtype
from itp.errors import UserError, first_line
from itp.files import read_json, refusal

SMALL_FILES = ["*.json", "policy_heads.safetensors", "adaptive_heads.pt"]
"""Files that hold the prompt format and the heads.  Besides them, only weights and tokenizer are read."""
ADAPTER = "adapter_config.json"
"""PEFT's file in a folder that holds an adapter."""
IS_ADAPTER = "holds a LoRA adapter, which isn't a whole model"
MERGE_IT = "merge it with its base model first (PEFT's merge_and_unload; programs here do so with --merge)"
TRUST_REMOTE_CODE = "ITP_TRUST_REMOTE_CODE"
MASKED_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that take a mask of any form."""


def check_model_path(model_path: str) -> None:
    """Raises UserError where ``model_path`` is neither a model folder nor a model that the hub has."""
    path = Path(model_path)
    if path.is_dir():
        _check_whole(path)
        return
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path) or model_path.startswith("."):
        released = "; the released models are in the repository, not in the installed package: clone it" \
            if model_path.startswith("models/") else ""
        raise UserError(f"{model_path}: no such model folder; give a Hugging Face model folder or hub name{released}")
    import huggingface_hub
    import huggingface_hub.constants

    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            _reach(huggingface_hub.constants.ENDPOINT)  # the hub's client retries for half a minute
        there = Path(huggingface_hub.snapshot_download(model_path, allow_patterns=SMALL_FILES))
        if (there / ADAPTER).is_file() and not (there / "config.json").is_file():
            raise UserError(f"{model_path}: {IS_ADAPTER}; {MERGE_IT}")
    except (OSError, ValueError) as error:
        if why := refusal(error):
            raise UserError(f"{model_path}: no such folder, and nothing can be fetched from the Hugging Face hub: its "
                            f"cache can't be written ({why}); set HF_HOME to a folder that can") from error
        if not (model_folder(model_path) / "config.json").is_file():
            raise UserError(f"{model_path}: no such folder, and the Hugging Face hub gave no such model "
                            f"({type(error).__name__}); check the name and the network") from error


def _check_whole(folder: Path) -> None:
    """Raises UserError for a folder without a model, and for what a training leaves beside its model."""
    weights = any(file for kind in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(kind))
    otherwise = "give a Hugging Face model folder"
    if (folder / ADAPTER).is_file() and not weights:
        what, otherwise = IS_ADAPTER, MERGE_IT
    elif not (folder / "config.json").is_file():
        what = "no config.json in this folder"
    elif _is_record(folder / "config.json"):
        what = "the folder of a run, and not of its model"
    else:
        return
    places = (folder / "merged_full", folder / "last", folder.parent / "merged_full", folder.parent)
    model = next((place for place in places if _is_model(place)), None)
    raise UserError(f"{folder}: {what}; {f'give {model}' if model else otherwise}")


def _is_model(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and not _is_record(config) and not (folder / ADAPTER).is_file()


def _is_record(config: Path) -> bool:
    """Whether it is a program's record (:mod:`itp.run_dir`) rather than a model's configuration."""
    try:
        found = read_json(config)
    except (UserError, ValueError):  # transformers says what is wrong with it
        return False
    return isinstance(found, dict) and {"config", "versions"} <= found.keys()


def model_folder(path: str | Path) -> Path:
    """Where a model's small files lie: its folder, or for a hub name what :func:`check_model_path` fetched of it."""
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub
    import huggingface_hub.errors

    try:
        config = huggingface_hub.try_to_load_from_cache(str(path), "config.json")
    except huggingface_hub.errors.HFValidationError:  # no hub name either
        config = None
    return Path(config).parent if isinstance(config, str) else Path(path)


def _reach(url: str) -> None:
    """Raises OSError where nothing answers at ``url``; any status is an answer."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return


def remote_code() -> dict[str, bool]:
    """Arguments for every Auto class.  A model's own code runs only if the user sets ITP_TRUST_REMOTE_CODE=1.

    An environment variable also reaches processes that a launcher starts.
    """
    return {"trust_remote_code": os.environ.get(TRUST_REMOTE_CODE) == "1"}


@contextlib.contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Around a loader of the Auto classes: UserError, which says ``what`` it met at ``path``.

    The libraries check little, and there is no list of what they raise for a broken file: tokenizers a bare Exception,
    safetensors an error of its own, transformers a TypeError for a value.  A fault of the device isn't the file's.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's, which isn't imported here
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{path}: this model comes with Python code of its own; read it, and if you trust it, "
                            f"start the same command with {TRUST_REMOTE_CODE}=1 in front") from error
        advice = "" if isinstance(error, ImportError) else "; is the folder whole?"  # a package is missing or too old
        raise UserError(f"{path}: {what} ({first_line(error)}){advice}") from error


def load_tokenizer(path: str):
    """A model's tokenizer.  Raises UserError where there is none."""
    from transformers import AutoTokenizer

    with loading(path, "no tokenizer there"):
        return AutoTokenizer.from_pretrained(path, **remote_code())


def bos_ids(tokenizer) -> list[int]:
    """The BOS token if the tokenizer adds one, else nothing.  A sample text shows whether it does."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def load_causal_lm(path: str, *, device: str = "cpu", dtype: str = "fp32", attn_implementation: str = "sdpa"):
    """(model, tokenizer) of a Hugging Face causal LM for inference.  Raises UserError if it isn't one.

    ``attn_implementation``: of ``MASKED_ATTENTION``.  flash_attention_2 isn't supported: KV batches
    (:mod:`itp.lm.kv_cache`) and token trees need 4-D masks (B, 1, S, T).
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    device = resolve_device(device)
    resolved = resolve_dtype(dtype, device)
    with loading(path, "not a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=resolved, attn_implementation=attn_implementation,
                                                     **remote_code())
    return model.to(device).eval(), tokenizer


def model_fingerprint(path: str) -> str:
    """Identity of a model folder's weights (names, sizes and ends of its files); of a hub name, it with its revision.

    Two results with the same fingerprint come from the same weights, so a retrained model under an old
    path is noticed.
    """
    folder = Path(path)
    if not folder.is_dir():
        there = model_folder(path)
        return path if there == folder else f"{path}@{there.name}"
    digest = hashlib.sha256()
    kinds = ("*.safetensors", "*.json", "pytorch_model*.bin", "*.pt")
    for file in (file for kind in kinds for file in sorted(folder.glob(kind))):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with open(file, "rb") as content:
            digest.update(content.read(1 << 20))
            content.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(content.read())
    return digest.hexdigest()[:16]
