"""Every command in README, CONTRIBUTING and docs/ is run: here at miniature size, or by a test that is named here.

A command runs as it stands on its page, in a folder of its own.  What its flags name as input (:data:`INPUTS`) is put
where the page says.  :data:`MINIATURE` makes it small.  The network ends at :func:`fetched`.  What can't be run stands
in :data:`NOT_RUN` with the reason.  A command that is neither fails.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import json
import re
import runpy
import shutil
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from itp.config import canonical_names, flag_fields
from tests.made_results import PLAYED, make_episode, make_games, write_result
from tests.rl_runs import KMAX, write_models
from tests.test_data_processing import eto
from tests.test_docs import PAGES, ROOT, SETTINGS, commands, module_of

ELSEWHERE = {
    r"scripts/demo\.sh": "test_released.py: demo.sh",
    r"scripts/quickstart\.sh": "test_quickstart.py: quickstart.sh",
    r"scripts/reproduce_(alfworld|scienceworld)\.sh": "test_recipes.py: scripts/reproduce_{self.env}.sh",
    r"world_model/base_tuning/run_worldmodel_tuning\.sh": "test_worldmodel_tuning.py: run_worldmodel_tuning.sh",
    r"^deepspeed .* world_model.base_tuning.finetune": "test_worldmodel_tuning.py: under_deepspeed",
    r"scripts/experiment\.py": "test_experiments.py: scripts/experiment.py",
    r"scripts/chaos\.py": "test_chaos.py: chaos",
    r"scripts/bench\.py": "test_bench.py: bench",
    r"scripts/load_serve\.py": "test_serve.py: load_serve",
    r"itp\.serve": "test_serve.py: itp.serve",
    r"scripts/api_reference\.sh": "test_api.py: scripts/api_reference.sh",
    r"^eval .*register-python-argcomplete": "test_help.py: argcomplete",
    r"^python -m itp\.smollm2": "test_smollm2.py: itp.smollm2",
    r"foresight_eval --policy_model .* --policy_backend openai": "test_openai_server.py: policy_api_base_url",
    r"foresight_eval --method two": "test_docs.py: Two",
    r"world_model\.collect --env scienceworld": "test_scienceworld.py: world_model.collect",
    r"foresight_eval\.runner_sciworld": "test_scienceworld.py: runner_sciworld",
    r"itp\.envs\.alfworld_games --panel": "test_panel.py: generate_panels",
    r"foresight_eval --panel": "test_panel.py: panel=",
    r"itp\.envs\.panel --env scienceworld": "test_panel.py: test_a_scienceworld_panel",
    r"itp\.training\.explore": "test_explore.py: explore.main()",
    r"itp\.training\.critic --learn q": "test_explore.py: critic.main()",
    r"itp\.training\.critic --learn reward": "test_critic.py: \"reward\"",
    r"foresight_eval --method armap": "test_critic.py: Armap(",
    r"foresight_eval\.extract_episodes": "test_extract_episodes.py: extract_episodes.main()",
    r"base_lm .* --words_of runs/metaicl": "test_state_planning.py: test_states_survive_the_tokenizer",
    r"world_model\.state_fidelity": "test_state_planning.py: state_fidelity",
}
"""What matches is run by this test file, at miniature size, with a stub where there is a network; how it names it."""

NOT_RUN = {
    r"^pip install": "installs from the package index; tests/test_wheel.py installs what we build",
    r"^alfworld-download": "another package's program, which downloads 2 GB",
    r"^vllm serve": "another package's program, which needs a GPU",
    r"scripts/test\.sh": "is the test suite",
    r"scripts/real_lm\.sh": "trains a model of 135 million parameters for 86 minutes; its sections: test_recipes.py",
    r"scripts/quickstart_scienceworld\.sh": "trains for long; its programs: test_scienceworld_programs.py",
    r"runner_sciworld .* runs/real_lm/": "plays with what real_lm.sh left, for an hour",
    r"scripts/(train_released|when_it_pays|experience|expert_iteration)\.sh": "trains models for hours",
    r"scripts/(wheelhouse|gpu_check)\.sh": "prepares, and makes, a check on a GPU",
}
"""What matches isn't run by any test, for this reason."""

MINIATURE = {
    "max_games": 1, "max_steps": 2, "env_processes": 1, "concurrency": 2, "num_envs": 2, "trials": 2, "processes": 1,
    "decision_tokens": 2, "act_tokens": 3, "wm_max_new_tokens": 3, "candidates": 2, "beam": 1, "rap_num_rollouts": 2,
    "rap_depth_limit": 2, "max_rows": 4, "branch_steps": 2, "max_starts": 1, "max_depth": 2, "label_rows": 4,
    "epochs": 1, "grad_accum": 2, "lora_r": 2, "max_seq_len": 480, "episodes_per_epoch": 4, "episodes_per_update": 4,
    "group_size": 2, "eval_games": 1, "action_max_new_tokens": 3, "value_updates": 1,
    "imagine_action_max_new_tokens": 3, "missions": 1, "batches": 3, "games": 1, "steps": 4, "train": 1, "seen": 1,
    "unseen": 1, "report_to": "none", "max_k": KMAX,
}
"""Flag -> its value here, in each program that has it."""

KEPT = {"world_model.collect": ("max_k",)}
"""Program -> flags of MINIATURE that keep their value there: they mean something else."""


LAST = ("world_model.fidelity", "foresight_eval.report", "foresight_eval.score",
        "foresight_eval.extract_conditions")
"""Programs whose output is for a reader.  The others name the program that takes it, in their last line."""


@dataclasses.dataclass(frozen=True)
class Command:
    """``words`` of a page's line, without what only a shell does."""

    page: str
    words: tuple[str, ...]

    @property
    def line(self) -> str:
        return " ".join(self.words)

    def __str__(self) -> str:
        return f"{self.page}: {self.line[:60]}"


def documented() -> list[Command]:
    """Each command once, under the first page that has it."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        for words in commands(page):
            found.setdefault(tuple(words), Command(page.stem, tuple(words)))
    return list(found.values())


def named_by(table: dict[str, str], command: Command) -> str:
    return next((said for pattern, said in table.items() if re.search(pattern, command.line)), "")


def is_shell(command: Command) -> bool:
    """Variables, loops and pipes of cat: there is no program of ours in it."""
    if command.words[0] in ("for", "done", "cat", "source"):
        return True
    return all(re.match(r"\w+=", word) for word in command.words)


DOCUMENTED = documented()
HERE = [command for command in DOCUMENTED
        if not (is_shell(command) or named_by(ELSEWHERE, command) or named_by(NOT_RUN, command))]


def test_lists_name_what_is_there() -> None:
    """No pattern without a command, and no test file that doesn't know the script."""
    for pattern in (*ELSEWHERE, *NOT_RUN):
        assert any(re.search(pattern, command.line) for command in DOCUMENTED), f"no page has {pattern}"
    for said in ELSEWHERE.values():
        test, _, name = said.partition(": ")
        assert name in (ROOT / "tests" / test).read_text(encoding="utf-8"), f"{test} runs no {name}"


@pytest.mark.parametrize("command", [c for c in DOCUMENTED if "bash" in c.words], ids=str)
def test_scripts_know_the_variables_that_they_are_given(command: Command) -> None:
    at = command.words.index("bash")
    script = (ROOT / command.words[at + 1]).read_text(encoding="utf-8")
    sourced = (ROOT / "scripts" / name for name in re.findall(r"(?:source|exec bash) scripts/(\S+)", script))
    known = script + "".join(path.read_text(encoding="utf-8") for path in sourced)
    for word in command.words[:at]:
        assert re.search(rf"\b{word.partition('=')[0]}\b", known), f"{command}: {word}"


# ---------------------------------------------------------------- what commands read


class Inputs:
    """Made once, when the first command needs it."""

    def __init__(self, root: Path, games_root: Path) -> None:
        self.root, self.games = root, games_root
        self.policy, self.world_model = write_models(root, games_root)
        self.plain = root / "plain"

    def collected(self) -> Path:
        out = self.root / "collected"
        if not out.exists():
            run("world_model.collect", ["--env_data_root", str(self.games), "--out_dir", str(out), "--max_games", "2"])
        return out

    def transitions(self) -> Path:
        return self.collected() / "transitions.jsonl"

    def dialogues(self) -> Path:
        return self.collected() / "dialogues.json"

    def labelled(self) -> Path:
        out = self.root / "labelled.jsonl"
        if not out.exists():
            run("itp.training.train_adaptive_k label", [
                "--expert_jsonl", str(self.transitions()), "--policy_model", str(self.policy), "--wm_model",
                str(self.world_model), "--out_labeled_jsonl", str(out), "--label_by", "branch", "--env_data_root",
                str(self.games), "--max_k", str(KMAX), "--max_rows", "4", "--branch_steps", "2", "--env_processes",
                "1", "--wm_max_new_tokens", "3", "--max_seq_len", "480"])
        return out

    def results(self) -> Path:
        out = self.root / "results"
        if not out.exists():
            games = make_games(self.root / "result_games", 3)
            write_result(out, [make_episode(game, success=i > 0, imagined=[PLAYED[:1]])
                               for i, game in enumerate(games)])
        return out

    def fidelity(self) -> Path:
        out = self.root / "fidelity.json"
        if not out.exists():
            run("world_model.fidelity", ["--wm_model", str(self.world_model), "--transitions",
                                         str(self.transitions()), "--max_rows", "4", "--out_json", str(out)])
        return out

    def rules(self) -> Path:
        out = self.root / "rules.json"
        out.write_text(json.dumps({"rules": []}))
        return out

    def knowledge(self) -> Path:
        out = self.root / "knowledge.json"
        if not out.exists():
            run("world_model.knowledge", ["--transitions", str(self.transitions()), "--out_json", str(out)])
        return out

    def published(self) -> Path:
        out = self.root / "eto.json"
        out.write_text(json.dumps([eto()] * 2))
        return out


INPUTS: dict[str, Callable[[Inputs], Path]] = {
    "policy_model": lambda made: made.policy, "wm_model": lambda made: made.world_model,
    "model_path": lambda made: made.plain, "env_data_root": lambda made: made.games, "data": lambda made: made.games,
    "transitions": Inputs.transitions, "expert_jsonl": Inputs.transitions, "data_path": Inputs.transitions,
    "train_json": Inputs.dialogues, "train_jsonl": Inputs.labelled, "input": Inputs.published,
    "fidelity": Inputs.fidelity, "folders": Inputs.results, "walle_rules": Inputs.rules, "wkm_base": Inputs.knowledge,
    "critic_model": lambda made: made.policy,
}
"""Flag -> what is put where its value points (each part of a list with commas)."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), games_root)


def place(path: str, made: Path) -> None:
    here = Path(path)
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        if (made / "summary.json").exists():
            shutil.copytree(made, here)  # a report names results by their folders
        else:
            here.symlink_to(made)


def fetched(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """The hub, ETO's repository and alfworld's downloader, which answer with what the tests have."""
    import huggingface_hub

    from itp.envs.alfworld import games

    dialogues = {"data/alfworld_sft.json": 3118, "data/sciworld_sft.json": 1482}

    def download(_: str, name: str, **__: str) -> str:
        Path("hub.json").write_text(json.dumps([eto()] * dialogues[name]))
        return "hub.json"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b'[["boil", 1]]'))
    monkeypatch.setattr(games, "ALFWORLD_GAMES", {"train": 6, "valid_seen": 2, "valid_unseen": 2})
    place("data/alfworld", inputs.games)


# ---------------------------------------------------------------- running them


def run(program: str, arguments: list[str]) -> None:
    """``python -m program`` or ``python program.py`` in this process.  Raises where it ends with another status."""
    before = sys.argv, list(sys.path)
    try:
        module, _, stage = program.partition(" ")
        sys.argv = [module, *stage.split(), *arguments]
        if module.endswith(".py"):
            sys.path.insert(0, str(ROOT / "scripts"))
            runpy.run_path(str(ROOT / module), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{program} {' '.join(arguments)}: status {end.code}"
    finally:
        sys.argv, sys.path[:] = before


def settings_of(program: str) -> type:
    if program in SETTINGS:
        return SETTINGS[program]
    sys.path.insert(0, str(ROOT / "scripts"))
    module = importlib.import_module(Path(program).stem)
    return next(value for name, value in vars(module).items()
                if name.endswith("Settings") and getattr(value, "__module__", "") == module.__name__)


def miniature(program: str, settings: type, arguments: list[str]) -> list[str]:
    """``arguments`` with each flag under its own name, those of :data:`MINIATURE` among them, and what it requires."""
    own_name = canonical_names(settings) | {"config": "config"}
    given: dict[str, list[str]] = {}
    folders = given.setdefault("folders", [])
    values = folders
    for word in arguments:
        if word.startswith("--"):
            values = given.setdefault(own_name[word[2:]], [])
        elif word != "...":
            values.append(word)
    for field in flag_fields(settings):
        whole = field.name == "lora_r" and (given.get("lora_r") == ["0"] or "configs/demo" in str(given.get("config")))
        if field.name in MINIATURE and field.name not in KEPT.get(program, ()) and not whole:
            given[field.name] = [str(MINIATURE[field.name])]
        if field.metadata["flag"].required or (field.name in INPUTS and field.default == "eval_agent/data/alfworld"):
            given.setdefault(field.name, [f"missing/{field.name}"])
    folders = given.pop("folders")
    return folders + [word for name, found in given.items() for word in (f"--{name}", *found)]


def settings_in(command: Command) -> frozenset[tuple[str, str]]:
    """The program and what its flags choose.  Numbers, texts and paths count as given, whatever they are."""
    program, given = module_of(list(command.words))
    settings = settings_of(program)
    fields, own_name = {field.name: field for field in flag_fields(settings)}, canonical_names(settings)
    found = {("", program)}
    for word, after in itertools.pairwise([*given, "--"]):
        if word.startswith("--"):
            name = own_name.get(word[2:], word[2:])
            listed = name in fields and fields[name].metadata["flag"].choices and not name.endswith("dtype")
            found.add((name, after if listed or name == "config" else ""))
    return frozenset(found)


def each_once(commands: list[Command]) -> list[Command]:
    """Without commands all of whose settings another one has."""
    told = {command: settings_in(command) for command in commands}
    return [command for i, command in enumerate(commands)
            if not any(told[command] < told[other] or (told[command] == told[other] and j < i)
                       for j, other in enumerate(commands))]


@pytest.mark.parametrize("command", each_once(HERE), ids=str)
def test_it_runs(command: Command, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "models", "scripts"):
        place(name, ROOT / name)
    program, given = module_of(list(command.words))
    settings = settings_of(program)
    arguments = miniature(program, settings, given)
    if program.endswith(".fetch"):
        fetched(monkeypatch, inputs)
    flag = "folders"
    for word in arguments:
        flag = word[2:] if word.startswith("--") else flag
        if flag in INPUTS and not word.startswith("--"):
            for part in word.split(","):
                place(part, INPUTS[flag](inputs))
    run(program, arguments)
    if program in LAST or program.endswith(".py"):
        return
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: ")
    for line in last.removeprefix("next: ").split(", and "):
        if line.startswith("python"):
            program, given = module_of(line.partition(", ")[0].split())
            flags = {f"--{name}" for name in canonical_names(settings_of(program))}
            assert {word for word in given if word.startswith("--")} <= flags
