"""What only a GPU can tell, in a few minutes: do the paths work there, how fast are they, how much memory do they take?

    python scripts/gpu_check.py --out_dir runs/gpu --parts tests,demo,bench,memory --sizes 0.5b,8b

tests     `pytest -m gpu`: half precision, LoRA and QLoRA, ZeRO-2 and ZeRO-3, attention, one device and two, heads
demo      the quickstart's base LM, base policy and world model, --demo_scale times as large on as many times the
          episodes, evaluated on unseen games; runs beside `tests`
bench     scripts/bench.py with random models of real ones' shapes (--sizes) in bf16, for policy and world model alike;
          and `foresight` again without CUDA graphs
memory    peak memory of stage 3 and of a step of world-model training (--size), and what stage 3 printed before; runs
          beside `tests`, too: none of these is timed

The models speak the tokenizer of a small base LM that is trained first (`inputs`).  OUT/gpu_check.json gets a part's
figures as soon as it ends, OUT/PART.log what its programs said.  Exit status 1 where a part failed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import read_json, write_json
from itp.program import run_main
from itp.run_dir import versions
from random_model import SHAPES

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "demo", "bench", "memory")


@dataclass
class CheckSettings:
    out_dir: str = flag(help="folder of the figures and logs")
    parts: str = flag(",".join(PARTS), help="what to do")
    sizes: str = flag("0.5b,8b", help="shapes of the random models of the part bench")
    size: str = flag("8b", help="shape of what is trained in the part memory", choices=tuple(SHAPES))
    wm_size: str = flag("0.5b", help="shape of the world model beside it", choices=tuple(SHAPES))
    device: str = flag("cuda", help="cpu rehearses the script with small sizes")
    seconds: int = flag(480, help="what still runs then is ended")
    scratch: str = flag("", help="folder for models, some 20 GB for 8b; empty: the machine's own for such")
    tests: str = flag("", help="which tests, in pytest's words (-k); empty: all that are marked gpu")
    bench_parts: str = flag("foresight,label,rl_k,wm_training", help="parts of scripts/bench.py")
    games: int = flag(64, at_least=1, help="games of the benchmark, and episodes at a time")
    steps: int = flag(4, at_least=1, help="steps of its episodes")
    demo_scale: int = flag(10, at_least=1, help="how many times as much the part demo takes")
    processes: int = flag(os.cpu_count() or 1, help="processes that run environments")


def main() -> None:
    settings = parse_settings(CheckSettings, prog="python scripts/gpu_check.py", description=__doc__)
    for name, given, known in (("parts", settings.parts, PARTS), ("sizes", settings.sizes, SHAPES)):
        if unknown := set(given.split(",")) - set(known):
            raise UserError(f"--{name}: {', '.join(sorted(unknown))} isn't one of {', '.join(known)}")
    scratch = Path(tempfile.mkdtemp(dir=settings.scratch or None))
    try:
        sys.exit(0 if Check(settings, scratch).run() else 1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Check:
    """The parts that were asked for, and their figures."""

    def __init__(self, settings: CheckSettings, scratch: Path) -> None:
        self.settings, self.scratch, self.out = settings, scratch, Path(settings.out_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + settings.seconds
        self.figures: dict[str, Any] = {"settings": asdict(settings), "versions": versions()}
        self.lock = threading.Lock()

    def run(self) -> bool:
        chosen = self.settings.parts.split(",")
        self.part("machine", self.machine)
        self.part("inputs", self.inputs)
        side = threading.Thread(target=self.part, args=("tests", self.tests)) if "tests" in chosen else None
        if side:
            side.start()
        for name, work in (("demo", self.demo), ("memory", self.memory)):
            if name in chosen:
                self.part(name, work)
        if side:
            side.join()
        for size in self.settings.sizes.split(",") if "bench" in chosen else []:
            self.part(f"bench_{size}", functools.partial(self.bench, size=size))
        return all(figures["ok"] for name, figures in self.figures.items() if name not in ("settings", "versions"))

    def part(self, name: str, work: Callable[[dict[str, Any], Callable[..., str]], None]) -> None:
        """``work(figures to fill, what runs a program)``; put down its figures, seconds, and error, if it had one."""
        start, log = time.monotonic(), self.out / f"{name}.log"
        log.write_text("")
        found: dict[str, Any] = {"ok": True}
        try:
            work(found, lambda *command, **options: self.call(log, *command, **options))
        except (subprocess.SubprocessError, UserError, OSError, RuntimeError, KeyError, ValueError) as error:
            said = log.read_text(encoding="utf-8", errors="replace")
            found |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300], "said": said[-1500:]}
        found["seconds"] = round(time.monotonic() - start, 1)
        with self.lock:
            self.figures[name] = found
            write_json(self.out / "gpu_check.json", self.figures)
        print(f"{name}: {found}", flush=True)

    def call(self, log: Path, *command: str | Path) -> str:
        """Run a Python program of the repository; what it printed.  Raises CalledProcessError, TimeoutExpired."""
        left = max(1.0, self.deadline - time.monotonic())
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n$ {' '.join(map(str, command))}\n")
            file.flush()
            at = file.tell()
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                           timeout=left, check=True)
        return log.read_text(encoding="utf-8", errors="replace")[at:]

    # ------------------------------------------------------------ the parts

    def machine(self, found: dict[str, Any], call: Callable[..., str]) -> None:
        """The card, the bytes a second that a copy moves (read and written), and the rate of a product in bf16."""
        import torch

        if self.settings.device != "cuda":
            found["card"] = "none"
            return
        found["card"], found["memory_gb"] = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / 2**30
        found["cards"] = torch.cuda.device_count()
        one = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
        other = torch.empty_like(one)
        found["copy_gbs"] = 2 * one.nbytes / 1e9 / _timed(lambda: other.copy_(one))
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found["bf16_tflops"] = 2 * 8192**3 / 1e12 / _timed(lambda: a @ b)

    def inputs(self, found: dict[str, Any], call: Callable[..., str]) -> None:
        """Games, an expert's transitions and a small base LM, of which the random models get the tokenizer."""
        call("-m", "itp.envs.alfworld_games", "--out", self.data, "--train", 110, "--seen", 6, "--unseen", 102,
             "--processes", self.settings.processes)
        self.collect(call, "expert", self.data, actor="expert", missions=1)
        self.collect(call, "all_words", self.data, actor="random", missions=1, max_steps=40)
        call("-m", "itp.training.base_lm", "--transitions", self.both("expert", "all_words"), "--words_of",
             self.scratch / "expert" / "dialogues.json", "--out_dir", self.scratch / "small", "--epochs", 0.1,
             "--hidden_size", 32, "--num_layers", 1, "--intermediate_size", 32, "--config", self.from_nothing)

    def both(self, *names: str) -> str:
        return ",".join(str(self.scratch / name / "transitions.jsonl") for name in names)

    @property
    def data(self) -> Path:
        return self.scratch / "data"

    @property
    def from_nothing(self) -> Path:
        return ROOT / "configs" / "demo" / "from_nothing.yaml"

    def collect(self, call: Callable[..., str], name: str, data: Path, **flags: Any) -> None:
        call("-m", "world_model.collect", "--env_data_root", data, "--out_dir", self.scratch / name,
             "--env_processes", self.settings.processes, "--concurrency", 64,
             *(word for flag_name, value in flags.items() for word in (f"--{flag_name}", value)))

    def tests(self, found: dict[str, Any], call: Callable[..., str]) -> None:
        report = self.out / "tests.xml"
        chosen = ["-k", self.settings.tests] if self.settings.tests else []
        try:
            call("-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-n", min(8, self.settings.processes),
                 "--junitxml", report, "--tb", "short", *chosen)
        finally:
            cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
            failed = [case.get("name") for case in cases if case.find("failure") is not None
                      or case.find("error") is not None]
            skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
            found |= {"run": len(cases) - len(skipped), "failed": failed, "skipped": skipped}

    def demo(self, found: dict[str, Any], call: Callable[..., str]) -> None:
        """The first part of scripts/quickstart.sh, without corrections, ``demo_scale`` times as large."""
        scale = self.settings.demo_scale
        width = 32 * max(2, round(4 * scale ** 0.4))  # the parameters of a layer grow with its square
        layers = max(1, round(scale * 3 * 128**2 / width**2))
        batch = ("--batch_size", 8 * max(1, round(scale / 3)))
        data = self.scratch / "many"
        call("-m", "itp.envs.alfworld_games", "--out", data, "--train", 110 * scale, "--seen", 6, "--unseen", 102,
             "--processes", self.settings.processes)
        shape = ("--hidden_size", width, "--num_layers", layers, "--intermediate_size", width * 5 // 2)
        self.collect(call, "d_exp", data, actor="expert", missions=16, noise="0,0,0.15,0.3")
        self.collect(call, "walks", data, actor="random", missions=2, max_steps=40)
        expert = self.scratch / "d_exp"
        call("-m", "itp.training.base_lm", "--transitions", self.both("d_exp", "walks"),
             "--words_of", expert / "dialogues.json", "--out_dir", self.scratch / "base_lm", "--drills", 20000,
             "--epochs", 2, "--config", self.from_nothing, *shape, *batch)
        base = self.scratch / "base_lm" / "merged_full"
        call("-m", "itp.training.base_policy", "--train_json", expert / "dialogues.json", "--model_path", base,
             "--out_dir", self.scratch / "policy", "--epochs", 2, "--lora_r", 0, "--lr", 0.006,
             "--config", self.from_nothing, *batch)
        self.evaluate(call, data, "sft")
        found["sft"] = read_json(self.scratch / "sft" / "summary.json")["overall"]
        for name in ("base_lm", "policy"):
            metrics = read_json(self.scratch / name / "metrics.json")
            found[name] = {key: metrics[key] for key in ("train_seconds", "tokens_per_second", "eval_loss", "steps")}
        call("-m", "world_model.base_tuning.finetune", "--model_path", base, "--data_path",
             expert / "transitions.jsonl", "--out_dir", self.scratch / "world_model", "--max_rows", 2600 * scale,
             "--config", ROOT / "configs" / "demo" / "world_model.yaml", *batch)
        self.evaluate(call, data, "foresight", "--wm_model", self.scratch / "world_model" / "merged_full")
        found["foresight"] = read_json(self.scratch / "foresight" / "summary.json")["overall"]

    def evaluate(self, call: Callable[..., str], data: Path, method: str, *flags: str | Path) -> None:
        call("-m", "foresight_eval", "--policy_model", self.scratch / "policy" / "merged_full", "--env_data_root", data,
             "--split", "unseen", "--method", method, "--action_selection", "constrained", "--max_k", 2,
             "--max_steps", 40, "--output_path", self.scratch / method, "--env_processes", self.settings.processes,
             "--concurrency", 102, "--policy_device", self.settings.device, "--wm_device", self.settings.device, *flags)

    def bench(self, found: dict[str, Any], call: Callable[..., str], size: str) -> None:
        settings, model = self.settings, self.random_model(call, size, heads=True)
        common = ("scripts/bench.py", "--policy_model", model, "--wm_model", model, "--heads_model", model,
                  "--env_data_root", self.data, "--expert_jsonl", self.scratch / "expert" / "transitions.jsonl",
                  "--games", settings.games, "--concurrency", settings.games, "--sequential_rows", 1, "--rows",
                  settings.games, "--max_steps", settings.steps, "--fixed_k", 1, "--wm_max_new_tokens", 48,
                  "--train_rows", 64, "--batch_size", 8, "--env_processes", min(8, settings.processes),
                  "--device", settings.device, "--dtype", self.dtype,
                  "--peak_bandwidth_gbs", round(self.figures["machine"].get("copy_gbs", 0)))
        passes = [("bench", ("--parts", settings.bench_parts, "--sequential_games", 1))]
        if "foresight" in settings.bench_parts.split(","):
            passes.append(("without_graphs",
                           ("--parts", "foresight", "--sequential_games", 0, "--cuda_graphs", "false")))
        for name, flags in passes:
            out = self.scratch / f"{name}.json"
            call(*common, *flags, "--out_json", out)
            found[name] = {key: value for key, value in read_json(out).items() if key in ("passes", "training")}

    def memory(self, found: dict[str, Any], call: Callable[..., str]) -> None:
        settings, half = self.settings, ("--bf16", "true")
        policy = self.random_model(call, settings.size, heads=True)
        world_model = self.random_model(call, settings.wm_size, heads=False)
        out = self.scratch / "rl_k"
        said = call("-m", "itp.training.train_adaptive_k", "rl_k", "--policy_model", policy, "--wm_model", world_model,
                    "--env_data_root", self.data, "--out_dir", out, "--episodes_per_epoch", 8,
                    "--episodes_per_update", 8, "--num_envs", 8, "--max_steps", 6, "--fixed_k", 1,
                    "--wm_max_new_tokens", 48, "--max_seq_len", 512, "--update_batch_tokens", 4096, "--value_updates",
                    0, "--lora_r", 8, "--action_selection", "constrained", "--eval_every", 0, "--report_to", "none",
                    "--policy_device", settings.device, "--wm_device", settings.device, *half)
        found["rl_k_said"] = re.findall(r"will need about.*", said)
        found["rl_k_peak_bytes"] = read_json(out / "metrics.json")["peak_memory_bytes"]
        shutil.rmtree(out)
        out = self.scratch / "wm_step"
        call("-m", "world_model.base_tuning.finetune", "--model_path", policy, "--data_path",
             self.scratch / "expert" / "transitions.jsonl", "--out_dir", out, "--max_rows", 64, "--batch_size", 4,
             "--grad_accum", 1, "--epochs", 1, "--merge", "false", "--eval_share", 0, *half)
        metrics = read_json(out / "metrics.json")
        found["wm_step"] = {key: metrics[key] for key in ("peak_memory_bytes", "tokens_per_second", "steps")}
        shutil.rmtree(out)

    @property
    def dtype(self) -> str:
        return "bf16" if self.settings.device == "cuda" else "fp32"

    def random_model(self, call: Callable[..., str], size: str, *, heads: bool) -> Path:
        folder = self.scratch / f"random_{size}{'_heads' if heads else ''}"
        if not folder.exists():
            call("scripts/random_model.py", "--tokenizer", self.scratch / "small" / "merged_full", "--size", size,
                 "--out_dir", folder, "--dtype", self.dtype, "--device", self.settings.device, "--max_k",
                 2 if heads else 0)
        return folder


def _timed(work: Callable[[], Any], times: int = 10) -> float:
    """Seconds of one, on average, after three to warm up."""
    import torch

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.monotonic() - start) / times


if __name__ == "__main__":
    run_main(main)
