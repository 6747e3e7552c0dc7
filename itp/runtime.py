"""What every program needs and no paper mentions: seeds, devices, atomic files, provenance.

Nothing here imports torch at module level, so that ``--help`` stays fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("itp")


class UserError(Exception):
    """Something that the user can mend.  Its message is one line: what, where, what to do."""


def _keep_freed_memory() -> None:
    """Ask glibc to use freed blocks again instead of returning them to the system.

    Tensors of a megabyte would else be mapped, and their pages zeroed, at every use: on a CPU that took more
    time than the arithmetic of a small model.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def run_main(main: Callable[[], None]) -> None:
    """Run a program: a UserError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    # Threads that wait leave the cores to those that have work: models and environments share them.  torch
    # reads it when it is imported, which no program has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpcore", "openai", "matplotlib", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        sys.exit(130)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what identifies a draw, such as (seed, game, step, call).

    Independent of process, thread and order, so that an episode's random choices don't depend on
    what else runs at the same time.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def write_atomic(path: str | Path, text: str) -> None:
    """Write a file that is either whole or absent: beside it, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Names for some folders: as many last parts of their paths as tell them apart."""
    whole = [Path(path).resolve() for path in paths]
    depth = next((n for n in range(1, max(len(path.parts) for path in whole))
                  if len({path.parts[-n:] for path in whole}) == len(set(whole))), 1)
    return ["/".join(path.parts[-depth:]) for path in whole]


def versions() -> dict[str, str]:
    """The versions that a result depends on, and the git revision of this code where it has one."""
    found = {"python": platform.python_version()}
    for package in ("itp", "torch", "transformers", "peft", "deepspeed", "alfworld", "textworld", "scienceworld",
                    "openai"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if shutil.which("git") is None:
        return found
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )
    if revision.returncode == 0:
        found["revision"] = revision.stdout.strip()
    return found


def claim_output(out_dir: str | Path, config: Mapping[str, Any], *, override: bool = False,
                 ignore: tuple[str, ...] = (), may_grow: tuple[str, ...] = ()) -> Path:
    """Make ``out_dir`` this run's: write ``config.json`` there, or check that it is the same run's.

    A folder that holds results of another configuration is refused, because the two would mix.
    ``ignore`` names settings that don't change a result (devices, concurrency), ``may_grow`` numbers that a run
    may turn out to need more of: the record then has the larger one.  ``override`` replaces the record; what
    else the folder holds is the caller's to remove.  Returns the folder's path.
    """
    out_dir = Path(out_dir)
    record = out_dir / "config.json"
    wanted = json.loads(json.dumps(dict(config), default=str))
    if record.exists() and not override:
        written = read_json(record)
        recorded = written["config"]
        grown = {k: wanted[k] for k in may_grow if k in recorded and wanted[k] > recorded[k]}
        differing = [k for k in sorted({*recorded, *wanted} - {*ignore, *grown}) if recorded.get(k) != wanted.get(k)]
        if differing:
            said = ", ".join(f"{k}: {recorded.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
            raise UserError(f"{out_dir} holds results of another configuration ({said}); "
                            "choose another output path, or --override to start it anew")
        if grown:
            write_json(record, written | {"config": recorded | grown})
        return out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, {"config": wanted, "versions": versions()})
    return out_dir


TIMING = "timing.jsonl"
"""In the output folder of a program: a line with its ``seconds`` for every time that it worked there."""


@contextlib.contextmanager
def timed(folder: str | Path) -> Iterator[None]:
    """Put on record in ``folder`` how long the block took, also where it was interrupted (a kill leaves nothing)."""
    start = time.monotonic()
    try:
        yield
    finally:
        with open(Path(folder) / TIMING, "a", encoding="utf-8") as file:
            file.write(json.dumps({"seconds": round(time.monotonic() - start, 3)}) + "\n")


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


def rank_devices(policy: str, world_model: str, pairs: bool = True) -> tuple[str, str]:
    """Where this process's models go.  Among several on a machine with GPUs: one for both, or two if there are enough.

    ``pairs``: whether a second one is of use.  Alone, or where no GPU is wanted: as given.
    """
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here == 1 or not policy.startswith("cuda") or not torch.cuda.device_count():
        return policy, world_model
    local = int(os.environ["LOCAL_RANK"])
    if pairs and torch.cuda.device_count() >= 2 * here:
        return f"cuda:{2 * local}", f"cuda:{2 * local + 1}"
    one = f"cuda:{local % torch.cuda.device_count()}"
    return one, one


def resolve_dtype(name: str, device: str):
    """The torch dtype for inference.  The CPU computes in float32: half precision is slower there."""
    import torch

    if device == "cpu" and name != "fp32":
        return torch.float32
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def check_model_path(model_path: str) -> None:
    """Raises UserError where ``model_path`` is neither a model folder nor a model that the hub has."""
    path = Path(model_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{model_path}: no config.json in this folder; give a Hugging Face model folder")
        return
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path) or model_path.startswith("."):
        raise UserError(f"{model_path}: no such model folder; give a Hugging Face model folder or hub name")
    import huggingface_hub
    import huggingface_hub.constants

    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            _reach(huggingface_hub.constants.ENDPOINT)  # the hub's client retries for half a minute
        huggingface_hub.snapshot_download(model_path, allow_patterns=SMALL_FILES)
    except (OSError, ValueError) as error:
        if not (model_folder(model_path) / "config.json").is_file():
            raise UserError(f"{model_path}: no such folder, and the Hugging Face hub gave no such model "
                            f"({type(error).__name__}); check the name and the network") from error


SMALL_FILES = ["*.json", "policy_heads.safetensors", "adaptive_heads.pt"]
"""What tells how a model is to be asked, and its heads: all that is read of it but weights and tokenizer."""


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


TRUST_REMOTE_CODE = "ITP_TRUST_REMOTE_CODE"


def remote_code() -> dict[str, bool]:
    """What every loader of the Auto classes is told: a model's own code runs only where the user asks for it.

    By a variable of the environment, which processes that a launcher or a script starts have as well.
    """
    return {"trust_remote_code": os.environ.get(TRUST_REMOTE_CODE) == "1"}


def not_loaded(path: str, what: str, error: Exception) -> UserError:
    """The error to raise where a loader of the Auto classes failed at ``path``."""
    if "trust_remote_code" in str(error):
        return UserError(f"{path}: this model comes with Python code of its own; read it, and if you trust it, start "
                         f"the same command with {TRUST_REMOTE_CODE}=1 in front")
    return UserError(f"{path}: {what} ({str(error).splitlines()[0]})")


def load_tokenizer(path: str):
    """A model's tokenizer.  Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **remote_code())
    except (OSError, ValueError) as error:
        raise not_loaded(path, "no tokenizer there", error) from error


def progress_bar(total: int, unit: str):
    """A tqdm bar; in a log file it says a line every half minute."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, **({} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}))


def bos_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: Llama's BOS, or nothing.  Found out rather than looked up."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


MASKED_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that take a mask of any form."""


def load_causal_lm(path: str, *, device: str = "cpu", dtype: str = "fp32", attn_implementation: str = "sdpa"):
    """(model, tokenizer) of a Hugging Face causal LM for inference.  Raises UserError if it isn't one.

    ``attn_implementation``: of ``MASKED_ATTENTION``.  Not flash_attention_2: batches of unequal prefixes
    (:mod:`itp.lm.kv_cache`) and token trees come with masks of their own (B, 1, S, T), of which it knows nothing.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    device = resolve_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=resolve_dtype(dtype, device),
                                                     attn_implementation=attn_implementation, **remote_code())
    except (OSError, ValueError) as error:
        raise not_loaded(path, "not a causal language model", error) from error
    return model.to(device).eval(), tokenizer


MODEL_CARD = "itp_model.json"
"""Beside a model's config.json: how it was trained here, so that inference asks it the same way."""


def model_card(path: str) -> dict[str, Any]:
    """What training left beside a model (``prompt_style``, ...); empty for a model from elsewhere."""
    card = model_folder(path) / MODEL_CARD if path else None
    return read_json(card) if card and card.is_file() else {}


def prompt_style(path: str) -> str:
    """How a model is asked: ``tuned`` if it was trained here, ``instruct`` if it comes from elsewhere."""
    return model_card(path).get("prompt_style", "instruct")


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
