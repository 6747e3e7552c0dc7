"""The programs that scripts/chaos.py disturbs, as runs of a few seconds, and what two runs are compared by.

Each program runs once undisturbed in ROOT/NAME.  That run is what the others are compared with, and the models that it
leaves are what the programs after it work with.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itp.files import read_json, write_json

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / "configs" / "demo"
LONGEST = 900
"""Seconds that a run may take, however loaded the machine is."""
CLOCK = ("second", "per_hour", "memory", "resumed", "cached_tokens", "restarts", "padding_share")
"""Parts of the names of figures that depend on the machine, that count the disturbances, or that are those of the last
session of a training only, as its speed is."""


@dataclass(frozen=True)
class Program:
    """``command``: what follows ``python``, or a script; {root}: the folder of all runs, {out}: this run's.

    ``content``: what a finished run's folder holds that must be the same each time.  ``needs_server``: it asks the
    server of chaos_server.py, at {url}.
    """

    name: str
    command: str
    content: Callable[[Path], dict[str, Any]]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_server: bool = False

    def argv(self, root: Path, out: Path, url: str = "") -> list[str]:
        words = self.command.format(root=root, out=out, configs=CONFIGS, repo=REPO, url=url).split()
        return words if words[0] == "bash" else [sys.executable, *words]

    def start(self, root: Path, out: Path, log: Path, url: str = "") -> subprocess.Popen:
        """Start it with its output in ``log``, as the first process of a session."""
        values = {name: value.format(root=root, out=out) for name, value in self.environment.items()}
        with open(log, "a", encoding="utf-8") as file:
            return subprocess.Popen(self.argv(root, out, url), cwd=REPO, stdout=file, stderr=subprocess.STDOUT,
                                    env=environment(root) | values, start_new_session=True)

    def finish(self, root: Path, out: Path, log: Path, url: str = "") -> int:
        """Run it to its end; its exit status."""
        process = self.start(root, out, log, url)
        try:
            return process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return -1


def environment(root: Path) -> dict[str, str]:
    """One thread, so that sums have one order; this environment's programs first; nothing of a launcher's."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "PATH": path, "HF_HUB_OFFLINE": "1",
                        "ITP_CACHE": str(root / "cache"), "DEEPSEEK_API_KEY": "none", "CUDA_VISIBLE_DEVICES": ""}


# ---------------------------------------------------------------- what must be the same


def without_clock(value: Any) -> Any:
    """``value`` without the figures that depend on the machine (CLOCK)."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not any(part in k for part in CLOCK)}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two values differ.  Numbers may in their last bits: of several requests, batches form as they come."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        odd = [f"{where}/{key}: only in one" for key in sorted(found.keys() ^ wanted.keys(), key=str)]
        return odd + [line for key in sorted(found.keys() & wanted.keys(), key=str)
                      for line in differences(found[key], wanted[key], f"{where}/{key}")]
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            return [f"{where}: {len(found)} instead of {len(wanted)}"]
        return [line for i, (one, other) in enumerate(zip(found, wanted, strict=True))
                for line in differences(one, other, f"{where}/{i}")]
    if isinstance(found, float) and isinstance(wanted, (int, float)):
        return [] if abs(found - wanted) <= 1e-4 + 1e-3 * abs(wanted) else [f"{where}: {found}, not {wanted}"]
    return [] if found == wanted else [f"{where}: {str(found)[:60]!r}, not {str(wanted)[:60]!r}"]


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(file: Path) -> dict[str, Any]:
    """The tensors of a file as lists of numbers."""
    from safetensors.numpy import load_file

    return {name: tensor.ravel().tolist() for name, tensor in load_file(file).items()}


def collected(out: Path) -> dict[str, Any]:
    """The data as text.  Episodes are put on file as they end, so their order is that of this run."""
    return {"transitions": (out / "transitions.jsonl").read_text(), "dialogues": (out / "dialogues.json").read_text(),
            "episodes": sorted((out / "episodes.jsonl").read_text().splitlines())}


def trained(out: Path) -> dict[str, Any]:
    metrics = {k: v for k, v in read_json(out / "metrics.json").items() if not isinstance(v, (str, list))}
    return {"weights": weights(out / "merged_full" / "model.safetensors"), "metrics": without_clock(metrics),
            "card": read_json(out / "merged_full" / "itp_model.json")}


def warmed_up(out: Path) -> dict[str, Any]:
    return trained(out) | {"heads": weights(out / "merged_full" / "policy_heads.safetensors")}


def labeled(out: Path) -> dict[str, Any]:
    rows = json_lines(out / "labeled.jsonl")
    kept = json_lines(out / "labeled.jsonl.run" / "rows.jsonl")
    return {"rows": without_clock(rows), "kept": sorted(row["row"] for row in kept)}


def learned(out: Path) -> dict[str, Any]:
    return {"weights": weights(out / "last" / "model.safetensors"), "rows": without_clock(json_lines(
        out / "metrics.jsonl")), "heads": weights(out / "last" / "policy_heads.safetensors")}


def evaluated(out: Path) -> dict[str, Any]:
    """Result files, and the summary's figures."""
    games = {file.name: without_clock(read_json(file)) for file in out.glob("[0-9]*.json")}
    return games | {"summary": without_clock(read_json(out / "summary.json")), "log": (out / "log.txt").read_text()}


# ---------------------------------------------------------------- the programs

COLLECT = "-m world_model.collect --env_data_root {root}/games --out_dir {out} --env_processes 1 --concurrency 2 " \
          "--actor expert --missions 2 --noise 0,0.3 --max_k 2 --foresight_share 0.5"
EVALUATE = "foresight_eval --policy_model {root}/policy/merged_full --env_data_root {root}/games --split unseen " \
           "--max_steps 6 --out_dir {out} --env_processes 1 --concurrency 1 --device cpu"
FORESIGHT = " --wm_model {root}/world_model/merged_full --method foresight --max_k 2 --action_selection constrained " \
            "--wm_max_new_tokens 24"
MODELS = "--policy_model {root}/policy/merged_full --wm_model {root}/world_model/merged_full --max_k 2"

PROGRAMS = (
    Program("games", "-m itp.envs.alfworld_games --out {out} --train 6 --seen 1 --unseen 6 --processes 1",
            lambda out: {}),
    Program("base_lm", "-m itp.training.base_lm --transitions {root}/collect/transitions.jsonl --words_of "
            "{root}/collect/dialogues.json --out_dir {out} --drills 128 --epochs 1 --hidden_size 32 --num_layers 1 "
            "--intermediate_size 32 --config {configs}/from_nothing.yaml", lambda out: {}),
    Program("collect", COLLECT, collected),
    Program("policy", "-m itp.training.base_policy --train_json {root}/collect/dialogues.json --model_path "
            "{root}/base_lm/merged_full --out_dir {out} --epochs 1 --lora_r 0 --lr 0.006 --config "
            "{configs}/from_nothing.yaml --save_every_steps 3", trained),
    Program("world_model", "bash {repo}/world_model/base_tuning/run_worldmodel_tuning.sh --max_rows 60 --lora_dropout "
            "0.1 --config {configs}/world_model.yaml", trained, {
                "MODEL_PATH": "{root}/base_lm/merged_full", "DATA_PATH": "{root}/collect/transitions.jsonl",
                "OUTPUT_DIR": "{out}", "SAVE_STEPS": "2", "FP16": "False"}),
    Program("label", "-m itp.training.train_adaptive_k label --expert_jsonl {root}/collect/transitions.jsonl "
            "--out_labeled_jsonl {out}/labeled.jsonl --max_rows 12 --wm_max_new_tokens 24 --concurrency 2 " + MODELS,
            labeled),
    Program("sft", "-m itp.training.train_adaptive_k sft --train_jsonl {root}/label/labeled.jsonl --max_k 2 "
            "--policy_model {root}/policy/merged_full --out_dir {out} --config {configs}/warm_up.yaml --batch_size 1 "
            "--epochs 2 --save_every_steps 2", warmed_up),
    Program("rl_k", "-m itp.training.train_adaptive_k rl_k --policy_model {root}/sft/merged_full --wm_model "
            "{root}/world_model/merged_full --env_data_root {root}/games --out_dir {out} --episodes_per_epoch 8 "
            "--env_processes 1 --config {configs}/rl_k.yaml --num_envs 1 --episodes_per_update 2 --save_every 1 "
            "--max_steps 3 --wm_max_new_tokens 12", learned),
    Program("evaluate", "-m " + EVALUATE + FORESIGHT, evaluated),
    Program("fidelity", "-m world_model.fidelity --wm_model {root}/world_model/merged_full --transitions "
            "{root}/collect/transitions.jsonl --out_json {out}/fidelity.json --max_rows 6 --max_starts 4 --max_depth 2 "
            "--wm_max_new_tokens 12 --device cpu", lambda out: read_json(out / "fidelity.json")["models"]),
    Program("two_ranks", "-m torch.distributed.run --standalone --nproc_per_node 2 -m " + EVALUATE + FORESIGHT,
            evaluated),
    Program("scienceworld", "-m foresight_eval.runner_sciworld --policy_model {root}/policy/merged_full --method sft "
            "--pairs find-plant:0,find-plant:1,find-plant:2 --prompt_style tuned --act_tokens 4 --max_steps_override 3 "
            "--concurrency 1 --env_processes 1 --device cpu --policy_device cpu --wm_device cpu --out_dir {out}",
            evaluated),
    Program("served", "-m " + EVALUATE + " --method sft --action_selection generate --act_tokens 8 --policy_backend "
            "openai --policy_api_base_url {url} --policy_api_model {root}/policy/merged_full --policy_api_max_retries "
            "1", evaluated, needs_server=True),
)
BY_NAME = {program.name: program for program in PROGRAMS}
NEEDS = {"games": (), "collect": ("games",), "base_lm": ("collect",), "policy": ("base_lm",),
         "world_model": ("base_lm",), "label": ("policy", "world_model"), "sft": ("label",), "rl_k": ("sft",),
         "evaluate": ("policy", "world_model"), "two_ranks": ("policy", "world_model"), "scienceworld": ("policy",),
         "fidelity": ("world_model",), "served": ("policy",)}
"""Program -> those whose results it works with."""


# ---------------------------------------------------------------- undisturbed


def prepare(root: Path, names: Sequence[str]) -> dict[str, float]:
    """Run what ``names`` need, and them, undisturbed; the processor's seconds that each of all runs so far took.

    They hardly depend on what else the machine does.
    """
    root.mkdir(parents=True, exist_ok=True)
    record = root / "seconds.json"
    seconds: dict[str, float] = read_json(record) if record.exists() else {}
    for program in _with_needs(names):
        if program.name in seconds:
            continue
        with Server(root, program.needs_server) as server:
            start = _spent_by_children()
            status = program.finish(root, root / program.name, root / f"{program.name}.log", server.url)
        if status != 0:
            raise RuntimeError(f"{program.name} failed undisturbed (status {status}); see {root}/{program.name}.log")
        seconds[program.name] = round(_spent_by_children() - start, 2)
        write_json(record, seconds)
        print(f"undisturbed: {program.name} took {seconds[program.name]} s", flush=True)
    return seconds


def _spent_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _with_needs(names: Iterable[str]) -> list[Program]:
    """The programs ``names`` and all that they need, in an order in which they can run."""
    order: dict[str, Program] = {}
    for name in names:
        order |= {program.name: program for program in _with_needs(NEEDS[name])}
        order[name] = BY_NAME[name]
    return list(order.values())


class Server:
    """The server of chaos_server.py, where it is ``wanted``; it can be killed and started again on its port."""

    def __init__(self, root: Path, wanted: bool) -> None:
        self.root, self.wanted, self.process, self.url = root, wanted, None, ""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __enter__(self) -> Server:
        if self.wanted:
            self.start()
        return self

    def __exit__(self, *about: object) -> None:
        if self.process is not None:
            self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [sys.executable, REPO / "scripts" / "chaos_server.py", self.port]
        with open(self.root / "server.log", "ab") as log:
            self.process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log,
                                            env=environment(self.root))
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError(f"the server didn't start; see {self.root / 'server.log'}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
