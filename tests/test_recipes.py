"""configs/: every section is accepted by its program; the reproduction's script refuses what can't work."""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from foresight_eval.settings import AlfworldSettings
from itp.config import add_flags, flag, flag_fields, from_args, parse_settings
from itp.runtime import UserError
from itp.training.base_policy import BasePolicySettings
from itp.training.label import LabelSettings
from itp.training.rl_k import RlSettings
from itp.training.sft import SftSettings
from world_model.base_tuning.finetune import WorldModelSettings
from world_model.collect import Settings as CollectSettings
from world_model.data_processing.convert import Settings as ConvertSettings

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"convert": ConvertSettings, "base_policy": BasePolicySettings, "collect": CollectSettings,
            "world_model": WorldModelSettings, "label": LabelSettings, "sft": SftSettings, "rl_k": RlSettings,
            "evaluate": AlfworldSettings}
RECIPES = sorted((ROOT / "configs/alfworld").glob("*.yaml"))


def settings_of(recipe: Path, section: str):
    parser = argparse.ArgumentParser()
    add_flags(parser, PROGRAMS[section])
    required = [f"--{f.name}=x" for f in flag_fields(PROGRAMS[section]) if f.metadata["required"]]
    return from_args(PROGRAMS[section], parser.parse_args([f"--config={recipe}:{section}", *required]))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_what_the_programs_take(recipe: Path) -> None:
    sections = yaml.safe_load(recipe.read_text())
    assert set(sections) == {"run", *PROGRAMS}
    assert set(sections["run"]) == {"policy_base", "world_model_base", "data", "out"}
    found = {name: settings_of(recipe, name) for name in PROGRAMS}
    # Table 9 of the paper.
    for name in ("base_policy", "world_model", "sft"):
        s = found[name]
        assert (s.max_seq_len, s.epochs, s.batch_size * s.grad_accum, s.lr, s.warmup_ratio, s.lr_scheduler_type,
                s.lora_r, s.lora_alpha, s.lora_dropout) == (2048, 3.0, 16, 2e-5, 0.03, "cosine", 8, 16, 0.05)
    rl, label = found["rl_k"], found["label"]
    assert (rl.gamma, rl.lr, rl.lambda_k, rl.step_cost, rl.success_bonus, rl.invalid_action_penalty, rl.value_coef,
            rl.entropy_coef, rl.max_grad_norm) == (0.99, 5e-6, 0.2, 0.01, 0.01, -0.1, 1.0, 0.01, 1.0)
    assert (rl.action_temperature, rl.action_top_p, rl.action_max_new_tokens, rl.imagine_action_max_new_tokens,
            rl.wm_max_new_tokens) == (0.7, 0.9, 16, 12, 192)
    assert (found["sft"].kmax, found["sft"].beta_k, label.kmax, label.lambda_k) == (5, 0.5, 5, 0.2)
    assert (found["evaluate"].split, found["evaluate"].max_k, found["evaluate"].max_steps) == ("dev", 5, 40)


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


@pytest.mark.parametrize("arguments, said", [
    ([], "no configuration given"), (["none.yaml"], "none.yaml: no such file"),
    (["{config}", "labels"], "unknown stage labels"), (["{config}", "sft"], "stage sft needs {out}/labelled.jsonl"),
    (["{empty}"], "the section `run` needs policy_base"),
])
def test_script_refuses(arguments: list[str], said: str, tmp_path: Path) -> None:
    names = {"config": str(tmp_path / "c.yaml"), "empty": str(tmp_path / "e.yaml"), "out": str(tmp_path / "out")}
    Path(names["config"]).write_text(yaml.safe_dump(
        {"run": {"policy_base": "a", "world_model_base": "b", "data": "d", "out": names["out"]}}))
    Path(names["empty"]).write_text("run: {}\n")
    run = subprocess.run(["bash", str(ROOT / "scripts/reproduce_alfworld.sh"), *(a.format(**names) for a in arguments)],
                         capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2 and said.format(**names) in run.stderr and "Traceback" not in run.stderr
