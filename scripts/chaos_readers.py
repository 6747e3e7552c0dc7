"""The readers that scripts/chaos.py gives mutated files: what each is given, and the function that a program calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from chaos_runs import REPO
from foresight_eval.report.report import ReportSettings, overview, read_fidelity
from foresight_eval.results import read_config, read_results
from foresight_eval.settings import AlfworldSettings
from foresight_eval.summary import write_summary
from itp.config import parse_settings
from itp.envs.alfworld.games import golden_steps, list_games, with_alternative_goals
from itp.envs.scienceworld.games import parse_pairs
from itp.model_card import ModelCard, card_digest, format_for, resolve_by_card
from itp.run_dir import open_run_dir
from itp.training.base_policy import read_dialogues
from itp.training.itp_r.expert_steps import read_expert
from itp.training.itp_r.label import read_finished
from itp.training.itp_r.warm_up_data import SftSettings, as_labeled, read_labeled
from itp.transitions import read_transitions
from world_model.base_tuning.examples import WorldModelSettings
from world_model.collect import _finished
from world_model.data_processing.convert import ConvertSettings, convert
from world_model.fidelity import read_measured

ROWS = 6
"""Rows of a valid file; short, so that a random change often meets what matters."""
RUN = WorldModelSettings(model_path="m", data_path="d", out_dir="o")
MODEL_FILES = ("config.json", "itp_model.json", "policy_heads.json", "policy_heads.safetensors", "model.safetensors",
               "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Reader:
    """``prepare(runs, folder)`` makes the valid folder.  ``mutated``: which of its files are.  ``read(folder)``."""

    prepare: Callable[[Path, Path], None]
    mutated: str
    read: Callable[[Path], None]


# ---------------------------------------------------------------- valid folders


def _copy(folder: Path, files: Iterable[Path]) -> None:
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder)


def _first_rows(source: Path, target: Path) -> None:
    """The first few rows of a JSON list or a JSONL file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".jsonl":
        target.write_text("".join(text.splitlines(keepends=True)[:ROWS]), encoding="utf-8")
    else:
        target.write_text(json.dumps(json.loads(text)[:ROWS], indent=1), encoding="utf-8")


def _rows(source: str) -> Callable[[Path, Path], None]:
    return lambda runs, folder: _first_rows(runs / source, folder / Path(source).name)


def _pair_files(runs: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "pairs.json").write_text(json.dumps([["boil", 0], ["task-1-melt", 2], "find-plant:1"]))
    (folder / "pairs.txt").write_text("boil:0 melt:1,find-plant:2\nfind-plant:0\n")


def _one_game(runs: Path, folder: Path) -> None:
    game = list_games("train", runs / "games")[0]
    trial = Path(game.path).parent
    shutil.copytree(trial, folder / "json_2.1.1" / "train" / game.game_id)


def _configurations(runs: Path, folder: Path) -> None:
    _copy(folder, (REPO / "configs").glob("demo/*.yaml"))
    shutil.copy(REPO / "configs" / "alfworld" / "qwen2.5-7b.yaml", folder / "paper.yaml")


def _results(runs: Path, folder: Path) -> None:
    source = runs / "evaluate"
    _copy(folder, [*sorted(source.glob("[0-9]*.json"))[:2], *(source / name for name in (
        "config.json", "summary.json", "cost.json", "timing.jsonl"))])


def _records(runs: Path, folder: Path) -> None:
    _copy(folder, [runs / "label" / "labeled.jsonl.run" / "rows.jsonl"])
    open_run_dir(folder, RUN)
    _first_rows(runs / "collect" / "episodes.jsonl", folder / "episodes.jsonl")


def _model(runs: Path, folder: Path) -> None:
    source = runs / "sft" / "merged_full"
    _copy(folder, [source / name for name in MODEL_FILES if (source / name).exists()])


# ---------------------------------------------------------------- what programs call


def _transitions(folder: Path) -> None:
    """World-model training, and stage 1 and fidelity, whose rows need more."""
    from itp.text.state import parse

    for t in read_transitions(folder / "transitions.jsonl"):
        assert isinstance(t.state, str) and isinstance(t.step, int)
    for row in read_expert(str(folder / "transitions.jsonl"), None):
        assert row.state == parse(row.transition.state)


def _labeled(folder: Path) -> None:
    settings = as_labeled(SftSettings(train_jsonl=str(folder / "labeled.jsonl"), policy_model="", out_dir="", max_k=2,
                                      act_on="all"))
    read_labeled(settings)


def _convert(folder: Path) -> None:
    convert([str(folder / "dialogues.json")], ConvertSettings(input="", out_dir=""))


def _pairs(folder: Path) -> None:
    known = {"boil": {"train": [0, 1, 2]}, "melt": {"train": [0, 1, 2]}, "find-plant": {"train": [0, 1, 2]}}
    for name in ("pairs.json", "pairs.txt"):
        assert list(parse_pairs(str(folder / name), known))


def _games(folder: Path) -> None:
    """Load the game and its other goals as collection does, and play two steps of each."""
    from itp.envs.alfworld.goals import GoalEnv

    env = GoalEnv(True)
    for game in list_games("train", folder):
        golden_steps(game)
        for goal in with_alternative_goals(game, 3):
            env.reset(goal)
            env.step("look")
            env.step("inventory")


def _settings(folder: Path) -> None:
    """Each file as the program's that it is for."""
    for name, settings, given in (
            ("world_model", WorldModelSettings, ["--model_path", "m", "--data_path", "d", "--out_dir", "o"]),
            ("warm_up", SftSettings, ["--train_jsonl", "t", "--policy_model", "p", "--out_dir", "o"])):
        parse_settings(settings, ["--config", str(folder / f"{name}.yaml"), *given])
    parse_settings(AlfworldSettings, ["--config", f"{folder / 'paper.yaml'}:evaluate", "--policy_model", "p",
                                      "--out_dir", "o"])


def _cards(folder: Path) -> None:
    card_digest(folder)
    card = ModelCard.read(folder)
    format_for(folder)
    resolve_by_card(AlfworldSettings(policy_model="p", out_dir="o"), str(folder))
    if card is not None:
        card.write(folder)


def _heads(folder: Path) -> None:
    from itp.agent.heads import has_heads, kmax_of
    from itp.agent.policy_with_heads import PolicyWithHeads

    if has_heads(folder):
        kmax_of(folder)
        PolicyWithHeads.from_pretrained(folder)


def _loaded_model(folder: Path) -> None:
    from itp.pretrained import check_model_path, load_causal_lm, model_fingerprint

    check_model_path(str(folder))
    model_fingerprint(str(folder))
    load_causal_lm(str(folder))


def _report(folder: Path) -> None:
    """What reports and experiments read.  They make summary.json and cost.json again."""
    from foresight_eval.report import page, tables

    read_config(folder)
    write_summary(folder)
    results = read_results([folder])
    overview(results)
    page.render(results, tables.all_tables(results, results[0]), [])


def _fidelity(folder: Path) -> None:
    """As the report reads it, and as the program itself does that goes on."""
    from foresight_eval.report import plots

    path = str(folder / "fidelity.json")
    plots.draw([], read_fidelity(ReportSettings(fidelity=path, out_dir="o")))
    read_measured(path, {"config": {}})


def _goes_on(folder: Path) -> None:
    """The records of runs that are to go on."""
    open_run_dir(folder, RUN)
    _finished(folder / "episodes.jsonl")
    read_finished(folder / "rows.jsonl")


READERS = {
    "dialogues": Reader(_rows("collect/dialogues.json"), "*", lambda folder: read_dialogues(
        str(folder / "dialogues.json")) and None),
    "foreign dialogues": Reader(_rows("collect/dialogues.json"), "*", _convert),
    "transitions": Reader(_rows("collect/transitions.jsonl"), "*", _transitions),
    "labeled rows": Reader(_rows("label/labeled.jsonl"), "*", _labeled),
    "pairs": Reader(_pair_files, "*", _pairs),
    "games": Reader(_one_game, "json_2.1.1/train/*/*/*.*", _games),
    "configurations": Reader(_configurations, "*", _settings),
    "model cards": Reader(_model, "itp_model.json", _cards),
    "heads": Reader(_model, "policy_heads.*", _heads),
    "models": Reader(_model, "[!pi]*", _loaded_model),
    "results": Reader(_results, "*", _report),
    "fidelity": Reader(lambda runs, folder: _copy(folder, [runs / "fidelity" / "fidelity.json"]), "*", _fidelity),
    "records": Reader(_records, "*", _goes_on),
}
"""Name -> reader."""
