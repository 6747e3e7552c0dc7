"""What a new user does wrong at first: each is one line that says what, where and what to do, and exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from itp.files import write_json
from itp.text.state import State

EVALUATE = "-m foresight_eval --out_dir out"
STAGES = "-m itp.training.train_adaptive_k"
PAIR = "--policy_model model --wm_model model"
MISTAKES = [
    ("-m foresight_eval", "missing required --policy_model, --out_dir (see --help)"),
    (f"{EVALUATE} --policy_model runs/policy/merged_full --method sft --env_data_root data",
     "runs/policy/merged_full: no such model folder"),
    (f"{EVALUATE} --policy_model made --method sft --env_data_root data", "made: no config.json in this folder"),
    (f"{EVALUATE} --policy_model model --method sft --env_data_root nowhere", "nowhere"),
    (f"{EVALUATE} --policy_model model --method sft --split tset --env_data_root data", "'tset'"),
    (f"{EVALUATE} --policy_model model --env_data_root data", "--method foresight needs --wm_model"),
    (f"{EVALUATE} --policy_model model --methd sft", "--methd"),
    (f"{EVALUATE} --policy_model model --method itp", "--method"),
    (f"{EVALUATE} --config nowhere.yaml", "nowhere.yaml: no such file"),
    (f"{EVALUATE} --config typo.yaml", "unknown setting 'max_game', did you mean 'max_games'?"),
    (f"{EVALUATE} --policy_model model --wm_model model --env_data_root data --k_policy head", "model has no K-head"),
    (f"{EVALUATE} --policy_model model --wm_model model --env_data_root data --k_policy random --fixed_k 2",
     "--fixed_k 2 contradicts --k_policy random"),
    (f"{EVALUATE} --policy_model model --method sft --env_data_root data --only_ids 99", "--only_ids [99]"),
    (f"{EVALUATE} --policy_model model --method react --action_selection constrained --env_data_root data",
     "use --action_selection generate"),
    (f"{EVALUATE} --policy_model model --wm_backend openai --env_data_root data", "--wm_api_base_url"),
    (f"{EVALUATE} {PAIR} --wm_backend engine --env_data_root data", "--wm_backend engine imagines in the game itself"),
    ("-m foresight_eval.runner_sciworld --out_dir out --method rap --wm_backend engine --wm_model model "
     "--policy_model model", "--wm_backend engine imagines in the game itself"),
    ("-m foresight_eval.runner_sciworld --out_dir out --method statler --statler_writer belief --policy_model model",
     "give --statler_writer lm"),
    *((f"-m foresight_eval.runner_sciworld --out_dir out --method {method} {PAIR}",
       f"--method {method} reads the symbolic state of ALFWorld's rooms only") for method in ("walle", "wkm")),
    (f"{EVALUATE} {PAIR} --method walle --walle_rules broken.json --env_data_root data", "broken.json:2: not JSON"),
    (f"{EVALUATE} {PAIR} --method wkm --wkm_base nowhere.json --env_data_root data", "nowhere.json: no such file"),
    (f"{EVALUATE} {PAIR} --method wkm --wkm_base typo.json --env_data_root data", "typo.json"),
    (f"{EVALUATE} --policy_model model --method sft --env_data_root data --panel nothing", "no such file, nor a panel"),
    (f"{EVALUATE} --policy_model model --method sft --env_data_root data --panel alfworld_made_unseen",
     "204 of its 204 games aren't under data"),
    (f"{EVALUATE} --policy_model model --policy_backend engine --env_data_root data", "invalid choice: 'engine'"),
    ("-m world_model.fidelity --transitions rows.jsonl --wm_backend engine", "unrecognized arguments: --wm_backend"),
    (f"{STAGES} label --expert_jsonl rows.jsonl --policy_model model --wm_backend engine --out_labeled_jsonl out",
     "unrecognized arguments: --wm_backend"),
    (f"{STAGES} rl_k --policy_model model --wm_backend engine --env_data_root data --out_dir out",
     "unrecognized arguments: --wm_backend"),
    (f"{EVALUATE} {PAIR} --env_data_root data --method revise --fixed_k 0", "give --fixed_k 1 or more"),
    (f"{EVALUATE} {PAIR} --env_data_root data --method revise --revise_margin -1",
     "--revise_margin -1.0: must be at least 0"),
    (f"{EVALUATE} --policy_model model --method sft --max_steps 0", "--max_steps 0: must be at least 1"),
    ("-m foresight_eval.report data", "data: not a result folder"),
    ("-m foresight_eval.report model", "model: not a result folder"),
    ("-m world_model.collect --actor policy --out_dir out --env_data_root data", "--actor policy needs --policy_model"),
    ("-m itp.training.base_policy --train_json nowhere.json --model_path model --out_dir out", "nowhere.json: no such"),
    ("-m itp.training.base_policy --train_json broken.json --model_path model --out_dir out",
     "broken.json:2: not JSON"),
    ("-m itp.training.base_policy --train_json raw.json --model_path model --out_dir out",
     "convert the file first: python -m world_model.data_processing.convert --input raw.json"),
    ("-m itp.training.base_lm --transitions rows.jsonl --words_of raw.json --out_dir out",
     "convert the file first: python -m world_model.data_processing.convert --input raw.json"),
    ("-m foresight_eval.runner_sciworld --policy_model model --method sft --out_dir out --pairs broken.json",
     "broken.json:2: not JSON"),
    (f"{EVALUATE} --policy_model model --method sft --config latin.yaml", "latin.yaml: not UTF-8 text"),
    ("-m itp.training.base_policy --train_json rows.jsonl --model_path model --out_dir out",
     "rows.jsonl:1: not a dialogue"),
    (f"{STAGES} labels", "label"),
    (f"{STAGES} label --expert_jsonl rows.jsonl {PAIR} --out_labeled_jsonl out.jsonl --imagination teacher_forced",
     "add --foresight_format last_obs"),
    (f"{STAGES} label --expert_jsonl rows.jsonl {PAIR} --out_labeled_jsonl out.jsonl --label_by branch",
     "give --env_data_root"),
    (f"{STAGES} label --expert_jsonl rows.jsonl {PAIR} --out_labeled_jsonl out.jsonl --branches 4",
     "--branches is for --label_by branch"),
    (f"{STAGES} sft --train_jsonl rows.jsonl --policy_model model --out_dir out --kmax 2 --act_as winner",
     "rows.jsonl:1: no field 'winner'"),
    (f"{STAGES} sft --train_jsonl rows.jsonl --policy_model model --out_dir out --kmax 1",
     "rows.jsonl:1: k_label is 2 and --max_k 1"),
    (f"{STAGES} sft --train_jsonl rows.jsonl --policy_model model --out_dir out --fp16 --bf16",
     "--fp16 and --bf16 exclude each other"),
    (f"{STAGES} rl_k {PAIR} --env_data_root data --out_dir out", "a policy without heads to choose K with; train them"),
    ("-m world_model.base_tuning.finetune --model_path model --data_path nowhere.jsonl --out_dir out", "nowhere.jsonl"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> Path:
    """A folder with a model that is none, games, and files with faults."""
    desk = tmp_path_factory.mktemp("desk")
    write_json(desk / "model" / "config.json", {"model_type": "llama"})
    (desk / "made").mkdir()
    (desk / "data").symlink_to(games_root)
    (desk / "typo.yaml").write_text("max_game: 5\n")
    (desk / "broken.json").write_text("[{\n")
    (desk / "latin.yaml").write_bytes("method: caf\u00e9".encode("latin-1"))
    write_json(desk / "typo.json", {"tasks": {}, "entry": []})
    raw = [("human", "Interact with a household."), ("gpt", "OK"),
           ("human", "You see a desk 1.\nYour task is to: look."),
           ("gpt", "Thought: Well.\nAction: look")]
    write_json(desk / "raw.json", [{"id": "e", "conversations": [{"from": who, "value": text} for who, text in raw]}])
    row = {"episode_id": "e", "step": 0, "state": State("a task", "You are in a room.").render(), "action": "look",
           "next_state": "x", "k_label": 2, "imagined": [["look", "a"], ["look", "b"]]}
    (desk / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return desk


@pytest.mark.parametrize("command, says", MISTAKES)
def test_a_mistake_is_one_line(desk: Path, command: str, says: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run([sys.executable, *command.split()], cwd=desk, env=environment, capture_output=True, text=True,
                         check=False)
    *before, error = ran.stderr.strip().splitlines()
    assert ran.returncode == 2 and "error: " in error and says in error, ran.stderr
    assert "Traceback" not in ran.stderr and not (desk / "out").exists() and ran.stdout == ""
