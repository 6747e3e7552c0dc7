"""configs/: every section is accepted by its program.  The scripts of the reproductions: their commands, and what they
refuse."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from foresight_eval.settings import AlfworldSettings, SciworldSettings
from itp.agent.policy import IMAGINED_ACTION_TOKENS
from itp.config import add_flags, flag, flag_fields, from_args, parse_settings
from itp.errors import UserError
from itp.training.base_policy import BasePolicySettings
from itp.training.itp_r.a2c_settings import RlSettings, data_root
from itp.training.itp_r.label import LabelSettings
from itp.training.itp_r.warm_up_data import SftSettings
from world_model import collect
from world_model.base_tuning.examples import WorldModelSettings
from world_model.data_processing import convert, fetch

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"convert": convert.ConvertSettings, "base_policy": BasePolicySettings, "collect": collect.CollectSettings,
            "world_model": WorldModelSettings, "label": LabelSettings, "sft": SftSettings, "rl_k": RlSettings}
EVALUATIONS = {"alfworld": AlfworldSettings, "scienceworld": SciworldSettings}
RECIPES = sorted(recipe for env in EVALUATIONS for recipe in (ROOT / "configs" / env).glob("*.yaml"))


def settings_of(program: type, arguments: list[str]):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, program)
    return from_args(program, parser.parse_args(arguments))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipes_are_what_the_programs_take(recipe: Path) -> None:
    env, sections = recipe.parent.name, yaml.safe_load(recipe.read_text())
    programs = PROGRAMS | {"evaluate": EVALUATIONS[env]}
    assert set(sections) == {"run", *programs}
    assert set(sections["run"]) == {"env", "policy_base", "world_model_base", "data", "out"}
    assert (sections["run"]["env"], sections["run"]["out"]) == (env, f"runs/{env}/{recipe.stem}")
    found = {}
    for name, program in programs.items():
        required = [f"--{f.name}=x" for f in flag_fields(program) if f.metadata["flag"].required]
        found[name] = settings_of(program, [f"--config={recipe}:{name}", *required])
    assert {found[name].env for name in ("convert", "collect", "label", "sft", "rl_k", "evaluate")} == {env}
    # Table 9 of the paper.
    for name in ("base_policy", "world_model", "sft"):
        s = found[name]
        tokens = getattr(s, "max_packed_len", 0) or s.max_seq_len
        assert (tokens, s.epochs, s.batch_size * s.grad_accum, s.lr, s.warmup_ratio, s.lr_scheduler_type,
                s.lora_r, s.lora_alpha, s.lora_dropout) == (2048, 3.0, 16, 2e-5, 0.03, "cosine", 8, 16, 0.05)
    rl, label = found["rl_k"], found["label"]
    assert (rl.gamma, rl.lr, rl.lambda_k, rl.step_cost, rl.success_bonus, rl.invalid_action_penalty, rl.value_coef,
            rl.entropy_coef, rl.max_grad_norm) == (0.99, 5e-6, 0.2, 0.01, 0.01, -0.1, 1.0, 0.01, 1.0)
    assert (rl.action_temperature, rl.action_top_p, rl.wm_max_new_tokens) == (0.7, 0.9, 192)
    kmax, tokens = {"alfworld": (5, (16, 12)), "scienceworld": (8, (48, 48))}[env]  # Table 9: 16 and 12 for both
    assert (rl.action_max_new_tokens, rl.imagine_action_max_new_tokens) == tokens
    assert (found["sft"].max_k, label.max_k, found["evaluate"].max_k) == (kmax, kmax, kmax)
    assert (found["sft"].beta_k, label.lambda_k) == (0.5, 0.2)
    # All that may be imagined fits beside two observations of a thousand tokens together.
    longest = kmax * (IMAGINED_ACTION_TOKENS[env] + rl.wm_max_new_tokens) + rl.action_max_new_tokens
    assert min(rl.max_seq_len, label.max_seq_len) - longest >= 1000
    assert found["evaluate"].max_steps == {"alfworld": 40, "scienceworld": 0}[env]  # 0: each game has its own


@pytest.mark.parametrize("name", ["base_policy", "world_model", "sft", "rl_k"])
def test_sections_of_the_real_language_model(name: str) -> None:
    program, recipe = PROGRAMS[name], ROOT / "configs/demo/real_lm.yaml"
    required = [f"--{f.name}=x" for f in flag_fields(program) if f.metadata["flag"].required]
    assert settings_of(program, [f"--config={recipe}:{name}", *required]).lora_r == 16
    assert f'"$config:{name}"' in (ROOT / "scripts/real_lm.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("env", EVALUATIONS)
def test_recipes_of_an_environment_differ_in_their_model_alone(env: str) -> None:
    texts = {recipe.stem: recipe.read_text() for recipe in RECIPES if recipe.parent.name == env}
    models = {name: yaml.safe_load(text)["run"]["policy_base"] for name, text in texts.items()}
    assert models == {"qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct", "qwen3-8b": "Qwen/Qwen3-8B",
                      "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct"}
    assert len({text[text.index("\nrun:"):].replace(models[name], "MODEL").replace(name, "NAME")
                for name, text in texts.items()}) == 1


@dataclass
class Small:
    rate: float = flag(0.1, help="a rate")
    name: str = flag("", help="a name")


@pytest.mark.parametrize("text, where, said", [
    ("a: {rate: 1.0}", "", "holds sections; name one of a"),
    ("alpha: {rate: 1.0}", ":alhpa", "no section 'alhpa', did you mean 'alpha'"),
    ("rate: 1.0", ":a", "no section 'a'; it has none"),
    ("a: {rato: 1.0}", ":a", "unknown setting 'rato', did you mean 'rate'"),
    ("rate: fast", "", "rate must be float, not 'fast'"),
])
def test_sections(text: str, where: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        parse_settings(Small, ["--config", f"{tmp_path}/c.yaml{where}"])


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: {rate: 2e-5}\nb: {rate: 1}")
    assert parse_settings(Small, ["--config", f"{tmp_path}/c.yaml:a"]).rate == 2e-5
    assert parse_settings(Small, ["--config", f"{tmp_path}/c.yaml:b"]).rate == 1.0
    assert parse_settings(Small, ["--config", f"{tmp_path}/c.yaml:b", "--rate", "3"]).rate == 3.0


# ---------------------------------------------------------------- the scripts

FETCHES = {"eto": ["eto/alfworld_sft.json", "eto/sciworld_sft.json"],
           "games": ["alfworld/json_2.1.1/train/x/game.tw-pddl"],
           "lists": [f"eto/{split}_indices.json" for split in ("train", "dev", "test")]}
LEAVES = {
    "world_model.data_processing.convert": ["transitions.jsonl", "dialogues.json"],
    "itp.training.base_policy": ["metrics.json", "merged_full/config.json"],
    "world_model.collect": ["transitions.jsonl"],
    "world_model.base_tuning.finetune": ["metrics.json", "merged_full/config.json"],
    "itp.training.train_adaptive_k label": [""],
    "itp.training.train_adaptive_k sft": ["metrics.json", "merged_full/policy_heads.json"],
    "itp.training.train_adaptive_k rl_k": ["metrics.json", "last/policy_heads.json"],
    "foresight_eval": ["summary.json"], "foresight_eval.runner_sciworld": ["summary.json"],
}
"""What each program leaves in its folder, as far as the scripts look."""
PYTHON = """#!{python}
import json, os, pathlib, sys
if sys.argv[1] == "-":  # the script reads its YAML
    os.execv(sys.executable, sys.argv)
program, *words = sys.argv[2:]
if not words[0].startswith("--") and program != "foresight_eval.report":
    program += " " + words.pop(0)
if processes := os.environ.get("PROCESSES"):
    words += ["--processes", processes]
with open({log!r}, "a") as log:
    log.write(json.dumps([program, *words]) + "\\n")
flags = dict(zip(words, words[1:]))
names = {fetches!r}[flags["--what"]] if program.endswith("fetch") else {leaves!r}.get(program, [])
for name in names:
    folder = next(flags[f] for f in ("--out_dir", "--output_path", "--out_labeled_jsonl") if f in flags)
    path = pathlib.Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("here")
"""
"""A python that says how it was called, and leaves what the program would."""
TORCHRUN = """#!/usr/bin/env bash
export PROCESSES=$3
shift 3
exec python3 "$@"
"""
"""A launcher that starts one of the processes."""
SERIES = {"cot": "cot", "react": "react", "itp-i": "foresight", "sft": "sft", "itp-r-warm-up": "foresight",
          "itp-r": "foresight"}


class Reproduction:
    """The script of an environment with such a python, on its recipe for Qwen3."""

    def __init__(self, env: str, folder: Path) -> None:
        self.env, self.data, self.out, self.log = env, folder / "data", folder / "out put", folder / "log"
        recipe = yaml.safe_load((ROOT / "configs" / env / "qwen3-8b.yaml").read_text())
        recipe["run"] |= {"data": str(self.data), "out": str(self.out)}
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe))
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.leave(LEAVES)
        launcher = self.bin / "torchrun"
        launcher.write_text(TORCHRUN)
        launcher.chmod(0o755)
        self.modules = folder / "modules"
        self.modules.mkdir()
        self.gpus(0)

    def gpus(self, visible: int) -> None:
        """So many are visible to torch."""
        (self.modules / "torch.py").write_text(f"class cuda:\n    device_count = staticmethod(lambda: {visible})\n")

    def leave(self, leaves: dict[str, list[str]]) -> None:
        python = self.bin / "python3"
        python.write_text(PYTHON.format(python=sys.executable, log=str(self.log), fetches=FETCHES, leaves=leaves))
        python.chmod(0o755)

    def run(self, *stages: str) -> tuple[int, str, list[list[str]]]:
        """Exit status, what it said on stderr, and the commands."""
        self.log.write_text("")
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(self.modules)}
        run = subprocess.run(["bash", str(ROOT / f"scripts/reproduce_{self.env}.sh"), str(self.recipe), *stages],
                             capture_output=True, text=True, timeout=60, check=False, env=environment)
        self.stdout = run.stdout
        return run.returncode, run.stderr, [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.mark.parametrize("env", EVALUATIONS)
def test_commands_of_a_whole_reproduction(env: str, tmp_path: Path) -> None:
    """Each is what its program takes, and reads what the one before it wrote."""
    made = Reproduction(env, tmp_path)
    status, said, commands = made.run()
    assert status == 0, said
    assert "== rl_k (the paper, on two A100 80 GB: 9.6 GPU-hours; policy and world model" in made.stdout
    science = env == "scienceworld"
    splits = ("dev", "test") if science else ("dev",)
    evaluation = "foresight_eval.runner_sciworld" if science else "foresight_eval"
    stages = [("convert", "world_model.data_processing.convert"), ("base_policy", "itp.training.base_policy"),
              ("collect", "world_model.collect"), ("world_model", "world_model.base_tuning.finetune"),
              *((stage, f"itp.training.train_adaptive_k {stage}") for stage in ("label", "sft", "rl_k"))]
    fetches = ["world_model.data_processing.fetch"] * 2
    assert [program for program, *_ in commands] == [
        *fetches, *(program for _, program in stages), *[evaluation] * len(SERIES) * len(splits),
        *["foresight_eval.report"] * len(splits)]
    assert [settings_of(fetch.FetchSettings, words).what for _, *words in commands[:2]] == [
        "eto", "lists" if science else "games"]
    found = {name: settings_of(PROGRAMS[name], words)
             for (name, _), (_, *words) in zip(stages, commands[2:], strict=False)}

    assert found["convert"].input == str(made.data / f"eto/{'sciworld' if science else 'alfworld'}_sft.json")
    assert (found["convert"].env, found["convert"].put_to_move) == (env, not science)
    assert found["base_policy"].train_json == str(made.out / "expert/dialogues.json")
    assert found["base_policy"].model_path == found["world_model"].model_path == "Qwen/Qwen3-8B"
    policy, world_model = (str(made.out / name / "merged_full") for name in ("policy", "world_model"))
    assert found["collect"].policy_model == policy
    collect.check(found["collect"])
    assert Path(found["world_model"].data_path).read_text() == "herehere"  # the expert's transitions and the policy's
    assert found["label"].expert_jsonl == str(made.out / "expert/transitions.jsonl")
    assert found["sft"].train_jsonl == found["label"].out_labeled_jsonl
    assert found["label"].policy_model == found["sft"].policy_model == policy
    assert found["label"].wm_model == found["rl_k"].wm_model == world_model
    assert found["rl_k"].policy_model == str(made.out / "warm_up/merged_full")
    games = "" if science else str(made.data / "alfworld")
    pairs = str(made.data / "eto/train_indices.json") if science else ""
    assert (found["collect"].env_data_root, found["collect"].pairs) == (games, pairs)
    assert (data_root(found["rl_k"]), found["rl_k"].pairs) == (games, pairs)
    assert found["collect"].split == found["rl_k"].env_split == "train"

    played = [settings_of(EVALUATIONS[env], words) for program, *words in commands if program == evaluation]
    assert [(s.split, s.method, s.out_dir) for s in played] == [
        (split, method, str(made.out / "eval" / split / name)) for split in splits for name, method in SERIES.items()]
    assert [s.policy_model for s in played[:len(SERIES)]] == [
        *["Qwen/Qwen3-8B"] * 3, policy, str(made.out / "warm_up/merged_full"), str(made.out / "itp_r/last")]
    for s in played:
        assert s.wm_model == world_model
        if science:
            assert s.pairs == str(made.data / f"eto/{s.split}_indices.json")
        else:
            assert s.env_data_root == games
    assert [words for _, *words in commands[-len(splits):]] == [
        [str(made.out / "eval" / split / name) for name in SERIES] for split in splits]

    status, said, commands = made.run("data", "sft")  # what is there isn't fetched again
    assert [program for program, *_ in commands] == [stages[0][1], "itp.training.train_adaptive_k sft"]


@pytest.mark.parametrize("gpus, processes, said", [
    (0, 1, ""), (1, 1, ""), (2, 2, ""), (8, 8, ""),
    (6, 4, "training on 4 of 6 GPUs: grad_accum 16 isn't divisible by 6"),
])
def test_several_gpus_share_the_batch(gpus: int, processes: int, said: str, tmp_path: Path) -> None:
    """Table 9's batch of 16, on however many."""
    made = Reproduction("alfworld", tmp_path)
    made.gpus(gpus)
    (made.out / "expert").mkdir(parents=True)
    (made.out / "expert/dialogues.json").write_text("here")
    status, stderr, ((program, *words),) = made.run("policy")
    assert (status, program) == (0, "itp.training.base_policy") and said in stderr and bool(said) == bool(stderr)
    if processes > 1:
        assert words[-2:] == ["--processes", str(processes)]
        del words[-2:]
    found = settings_of(BasePolicySettings, words)
    assert found.batch_size * found.grad_accum * processes == 16 and found.bf16


def test_games_that_a_download_left_halfway_are_fetched(tmp_path: Path) -> None:
    made = Reproduction("alfworld", tmp_path)
    made.run("data")
    made.data.joinpath("alfworld/json_2.1.2_tw-pddl.zip").write_text("unpacked when it was interrupted")
    assert [words[-1] for program, *words in made.run("data")[2] if program.endswith("fetch")] == ["games"]


def test_a_stage_that_leaves_nothing_is_the_last(tmp_path: Path) -> None:
    made = Reproduction("scienceworld", tmp_path)
    made.leave(LEAVES | {"world_model.collect": []})
    status, said, commands = made.run()
    assert (status, commands[-1][0]) == (2, "world_model.collect")
    assert f"stage rollouts: it left no {made.out}/rollouts/transitions.jsonl" in said


@pytest.mark.parametrize("env", EVALUATIONS)
@pytest.mark.parametrize("arguments, said", [
    ([], "no configuration given; one looks like configs/{env}/qwen2.5-7b.yaml"),
    (["none.yaml"], "none.yaml: no such file; choose one of configs/{env}/llama-3.1-8b.yaml"),
    (["{config}", "labels"], "unknown stage labels"), (["{config}", "sft"], "stage sft needs {out}/labelled.jsonl"),
    (["{empty}"], "the section `run` needs env"),
    (["{other}"], "is about {not_env}; start scripts/reproduce_{not_env}.sh"),
])
def test_scripts_refuse(env: str, arguments: list[str], said: str, tmp_path: Path) -> None:
    other, = set(EVALUATIONS) - {env}
    names = {"env": env, "not_env": other, "out": str(tmp_path / "out"),
             **{name: str(tmp_path / f"{name}.yaml") for name in ("config", "empty", "other")}}
    run = {"env": env, "policy_base": "a", "world_model_base": "b", "data": "d", "out": names["out"]}
    for name, section in (("config", run), ("empty", {}), ("other", run | {"env": other})):
        Path(names[name]).write_text(yaml.safe_dump({"run": section}))
    script = ROOT / f"scripts/reproduce_{env}.sh"
    done = subprocess.run(["bash", str(script), *(a.format(**names) for a in arguments)],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and said.format(**names) in done.stderr and "Traceback" not in done.stderr
