"""The evaluation program end to end on real games: its files, its figures, and going on after a kill."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from foresight_eval import results
from foresight_eval.report.report import overview
from foresight_eval.runner import choose_games, evaluate, open_folder
from foresight_eval.settings import AlfworldSettings
from foresight_eval.summary import write_summary
from itp.config import flag_fields
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.pool import EnvPool
from itp.errors import UserError
from itp.methods.actors import ExpertActor, RandomWalk
from itp.methods.base import Method
from itp.methods.settings import NEED_CRITIC
from itp.plan import make_plan
from itp.rollout import run_episodes
from itp.text.prompts import foresight_text
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
META = {"steps", "reward", "finished", "success", "terminate_reason", "error"}
STEP = {"episode_id", "t", "k", "k_raw_output", "foresight_text", "wm_raw_output", "reflection", "thought", "action",
        "policy_raw_output", "obs_next", "done", "info"}


SERVED = {"policy_backend": "openai", "policy_api_base_url": "http://127.0.0.1:1/v1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    """Two tiny random models on the six train games; four steps, K drawn at random."""
    folder = tmp_path_factory.mktemp("models")
    return AlfworldSettings(
        policy_model=str(write_tiny_model(folder / "policy", seed=0)), out_dir="",
        wm_model=str(write_tiny_model(folder / "wm", seed=1)), env_data_root=str(games_root), split="train",
        max_steps=4, max_k=2, k_policy="random", act_tokens=8, wm_max_new_tokens=12, history_keep_steps=2,
        prompt_style="tuned", wm_prompt_style="tuned", device="cpu", env_processes=1, concurrency=6, temperature=0.7)


def flags(settings: AlfworldSettings) -> list[str]:
    return [part for field in flag_fields(type(settings)) for part in (f"--{field.name}",
            str(getattr(settings, field.name)))]


def start(settings: AlfworldSettings, **options: Any) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "foresight_eval", *flags(settings)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(base: AlfworldSettings, out: Path, **changes: Any) -> dict[int, dict[str, Any]]:
    asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(out), **changes)))
    return results.read_episodes(out)


def timeless(records: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Without what depends on the machine's moment: seconds, what a cache had, last digits of probabilities."""
    records = json.loads(json.dumps(records), object_hook=lambda d: {
        k: v for k, v in d.items() if k not in ("seconds", "cached_tokens", "action_logprob", "margin")})
    return {int(i): record for i, record in records.items()}


@pytest.fixture(scope="module")
def finished(base: AlfworldSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(result folder, what was printed) of an undisturbed run in a process of its own, started elsewhere."""
    cwd = tmp_path_factory.mktemp("cwd")
    process = start(dataclasses.replace(base, out_dir="runs/eval"), cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return cwd / "runs" / "eval", out


def test_result_files(finished: tuple[Path, str], base: AlfworldSettings) -> None:
    folder, _ = finished
    games = list_games("train", base.env_data_root)
    names = {f"{i}.json" for i in range(6)} | {"summary.json", "cost.json", "summary.csv", "log.txt", "config.json",
                                              "timing.jsonl"}
    assert set(os.listdir(folder)) == names
    for i, record in results.read_episodes(folder).items():
        meta, steps = record["meta"], record["foresight_steps"]
        assert META <= set(meta) and meta["error"] == games[i].path and meta["game_id"] == games[i].game_id
        assert set(record) == {"meta", "conversations", "foresight_steps"}
        assert meta["steps"] == len(steps) == 4 and meta["terminate_reason"] == "step_limit"
        assert meta["success"] is False and meta["finished"] is False
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 4 + ["human"]
        assert turns[0]["value"].startswith("Task: ")
        for t, step in enumerate(steps):
            assert STEP <= set(step) and (step["episode_id"], step["t"]) == (i, t)
            assert turns[2 * t + 1]["value"] == f"Action: {step['action']}"
            assert turns[2 * t + 2]["value"] == f"Observation: {step['obs_next']}"
            assert len(step["wm_raw_output"]) == len(step["imagined_actions"]) == step["k"]
            imagined = list(zip(step["imagined_actions"], step["wm_raw_output"], strict=True))
            assert step["foresight_text"] == foresight_text(imagined)
            assert step["invalid"] == (step["obs_next"] == "Nothing happens.")
        # K_t imagined actions and the executed one; K_t predictions.
        ks = [step["k"] for step in steps]
        assert meta["usage"]["policy"]["calls"] == sum(ks) + 4
        assert meta["usage"].get("world_model", {"calls": 0})["calls"] == sum(ks)
    log = (folder / "log.txt").read_text().splitlines()
    assert len(log) == 6
    for i, line in enumerate(log):
        assert re.fullmatch(rf"\[TaskResult\] id={i} success=False steps=4 terminate_reason=step_limit reward=\S+",
                            line)
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["max_k"] == 2 and len(config["config"]["policy_fingerprint"]) == 16
    assert "torch" in config["versions"]


def test_summary_holds_what_the_files_say(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    records = [json.loads((folder / f"{i}.json").read_text()) for i in range(6)]
    summary = json.loads((folder / "summary.json").read_text())
    steps = [step for record in records for step in record["foresight_steps"]]
    # One game of each task type, none solved.
    assert summary["buckets"] == ["Pick", "Look", "Clean", "Heat", "Cool", "Pick2"]
    assert summary["counts"] == dict.fromkeys(summary["buckets"], 1)
    assert summary["success"] == dict.fromkeys(summary["buckets"], 0)
    assert summary["rates"] == dict.fromkeys(summary["buckets"], 0.0)
    overall = summary["overall"]
    assert (overall["n"], overall["success"], overall["rate"]) == (6, 0, 0.0)
    assert overall["interval"] == pytest.approx([0.0, 3.8415 / (6 + 3.8415)], abs=1e-4)  # z² / (n + z²) at 0 of n
    assert summary["invalid_action_rate"] == sum(s["obs_next"] == "Nothing happens." for s in steps) / 24
    assert summary["mean_k"] == sum(s["k"] for s in steps) / 24
    assert summary["k_histogram"] == {str(k): n for k, n in sorted(Counter(s["k"] for s in steps).items())}
    tokens = sum(usage["prompt_tokens"] + usage["completion_tokens"]
                 for record in records for usage in record["meta"]["usage"].values())
    assert summary["cost"]["tokens_per_episode"] == pytest.approx(tokens / 6)
    assert summary["cost"]["policy"]["calls_per_episode"] == (24 + sum(s["k"] for s in steps)) / 6
    with open(folder / "summary.csv", newline="") as file:
        assert list(csv.reader(file)) == [["Pick", "Look", "Clean", "Heat", "Cool", "Pick2", "All"], ["0.00"] * 7]
    assert "eval" in printed and "results: runs/eval" in printed


def test_a_summary_is_a_function_of_the_files(finished: tuple[Path, str], tmp_path: Path) -> None:
    won = json.loads((finished[0] / "1.json").read_text())
    won["meta"] |= {"success": True, "steps": 10}
    lost = json.loads((finished[0] / "2.json").read_text())
    for i, record in enumerate([won, won, lost]):
        (tmp_path / f"{i}.json").write_text(json.dumps(record))
    (tmp_path / "notes.json").write_text("not a result")
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    summary = write_summary(tmp_path)
    assert json.loads(json.dumps(summary)) == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["overall"]["n"], summary["overall"]["success"]) == (3, 2)
    assert summary["rates"][results.bucket(won["meta"]["task_type"])] == 1.0
    assert summary["steps_per_episode"] == (10 + 10 + 4) / 3
    assert (tmp_path / "summary.csv").read_text().splitlines()[1].endswith(",66.67")
    assert overview(results.read_results([tmp_path])).splitlines()[1].split()[0] == tmp_path.name


@pytest.mark.parametrize("task_type, bucket", [
    ("pick_and_place_simple", "Pick"), ("look_at_obj_in_light", "Look"), ("pick_clean_then_place_in_recep", "Clean"),
    ("pick_heat_then_place_in_recep", "Heat"), ("pick_cool_then_place_in_recep", "Cool"),
    ("pick_two_obj_and_place", "Pick2")])
def test_buckets(task_type: str, bucket: str) -> None:
    assert results.bucket(task_type) == bucket


def test_a_killed_run_goes_on_as_if_nothing_had_been(base: AlfworldSettings, finished: tuple[Path, str],
                                                     tmp_path: Path) -> None:
    settings = dataclasses.replace(base, out_dir=str(tmp_path / "eval"), concurrency=1)
    folder, enough = tmp_path / "eval", random.randint(1, 3)
    process = start(settings)
    deadline = time.monotonic() + 200
    while not (len(results.read_episodes(folder)) if folder.is_dir() else 0) >= enough:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {f.name: f.stat().st_mtime_ns for f in folder.glob("[0-9]*.json")}
    assert enough <= len(before) < 6 and not (folder / "summary.json").exists()

    records = run(base, folder)
    assert {f.name: f.stat().st_mtime_ns for f in folder.glob("[0-9]*.json") if f.name in before} == before
    assert timeless(records) == timeless(results.read_episodes(finished[0]))
    for name in ("summary.json", "summary.csv", "log.txt"):
        assert (folder / name).read_text() == (finished[0] / name).read_text()

    # Another configuration on the same folder: one line, and nothing is touched.
    refused = start(dataclasses.replace(settings, max_steps=5, wm_model=base.policy_model))
    out, err = refused.communicate(timeout=120)
    errors = [line for line in err.splitlines() if "error" in line.lower()]
    assert refused.returncode == 2 and out == "" and len(errors) == 1 and "Traceback" not in err
    assert "max_steps: 4 there, 5 now" in errors[0] and "wm_fingerprint" in errors[0] and "concurrency" not in errors[0]
    assert timeless(results.read_episodes(folder)) == timeless(records)

    # The same paths with other weights are another configuration too.
    model = Path(base.wm_model) / "model.safetensors"
    weights = model.read_bytes()
    try:
        model.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        with pytest.raises(UserError, match="wm_fingerprint"):
            run(base, folder)
    finally:
        model.write_bytes(weights)

    # Games that came or went shift the indices: refused as well.
    record = json.loads((folder / "3.json").read_text())
    record["meta"]["game_id"] = "gone/trial_0"
    (folder / "3.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="3.json is a result of gone/trial_0"):
        run(base, folder)
    assert set(run(base, folder, override=True, only_ids="2", max_steps=1)) == {2}


def test_what_was_learned_for_a_method_is_part_of_a_result(base: AlfworldSettings, tmp_path: Path) -> None:
    rules, out = tmp_path / "rules.json", tmp_path / "out"
    rules.write_text('{"rules": []}')

    def opened(**changes: Any) -> Path:
        plan = make_plan(dataclasses.replace(base, out_dir=str(out), **changes))
        return open_folder(plan, None, start_anew=False)

    record = opened(method="walle", walle_rules=str(rules)) / "config.json"
    with pytest.raises(UserError, match="walle_rules_sha256"):
        opened(method="walle")
    record.unlink()
    opened(method="sft", critic_model=base.policy_model)
    opened(method="sft")  # which asks no critic
    written = json.loads(record.read_text())
    for name in ("critic_fingerprint", "walle_rules_sha256", "wkm_base_sha256"):  # a result of before they were there
        assert written["config"].pop(name) == ""
    record.write_text(json.dumps(written))
    opened(method="sft")


def test_some_games_only(base: AlfworldSettings, finished: tuple[Path, str], tmp_path: Path) -> None:
    whole = timeless(results.read_episodes(finished[0]))
    some = timeless(run(base, tmp_path, only_ids="4,1", concurrency=2))
    assert some == {i: whole[i] for i in (1, 4)}
    more = timeless(run(base, tmp_path, only_ids="5", concurrency=1))
    assert more == {i: whole[i] for i in (1, 4, 5)}
    assert json.loads((tmp_path / "summary.json").read_text())["overall"]["n"] == 3


def test_shares_of_the_games(base: AlfworldSettings) -> None:
    def chosen(n: int, **changes: Any) -> list[int]:
        return choose_games(n, dataclasses.replace(base, **changes))

    assert chosen(7) == list(range(7))
    assert chosen(7, debug=True) == [0, 1, 2, 3, 4]
    assert chosen(7, only_ids="6,0,6") == [6, 0]
    assert chosen(7, max_games=3) == [0, 2, 4] and chosen(7, max_games=8) == list(range(7))
    shares = [chosen(7, part_num=3, part_idx=i) for i in range(3)]
    assert sorted(sum(shares, [])) == list(range(7)) and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [chosen(12, max_games=6, part_num=2, part_idx=i) for i in range(2)] == [[0, 4, 8], [2, 6, 10]]
    for changes, says in (({"only_ids": "1,x"}, "--only_ids '1,x'"), ({"only_ids": "7"}, r"\[7\].*0\.\.6"),
                          ({"part_num": 3, "part_idx": 3}, "--part_idx 3")):
        with pytest.raises(UserError, match=says):
            chosen(7, **changes)


@pytest.mark.parametrize("changes, says", [
    ({"wm_model": ""}, "--method foresight needs --wm_model"),
    ({"wm_recall": True, "wm_backend": "engine", "wm_model": ""}, "the game itself answers"),
    ({"wm_backend": "openai", "wm_model": ""}, "--wm_api_base_url"),
    ({"k_policy": "fixed"}, "--fixed_k"),
    ({"k_policy": "prompt", "fixed_k": 2}, "contradicts"),
    ({"method": "react", "action_selection": "score"}, "--action_selection generate"),
    ({"policy_backend": "openai"}, "--policy_backend openai needs --policy_api_base_url"),
    (SERVED | {"action_selection": "constrained"}, "no logits to walk a trie with"),
    (SERVED | {"action_selection": "score", "method": "mpc"}, "--method mpc draws several actions"),
    (SERVED | {"action_selection": "score", "method": "implement", "implement_choice": "gain"},
     "--method implement draws several actions"),
    (SERVED | {"method": "rap"}, "--method rap weighs"),
    (SERVED | {"k_policy": "head"}, "a server has no K-head"),
    (SERVED | {"prompt_style": "instruct"}, "/no/such/model: no such model folder"),
    (SERVED | {"method": "walle", "walle_critic": "judge", "max_k": 0}, "--method walle looks --max_k steps ahead"),
    ({"split": "validation"}, "unknown split"),
    ({"env_data_root": "/nowhere"}, "no such folder"),
])
def test_what_cannot_work_is_refused_before_any_model_is_loaded(base: AlfworldSettings, tmp_path: Path,
                                                                changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):  # with this policy, loading would be another error
        run(base, tmp_path / "out", policy_model="/no/such/model", **changes)
    assert not (tmp_path / "out").exists()


def test_a_policy_without_yes_and_no_is_refused_before_the_folder_is_claimed(base: AlfworldSettings,
                                                                            tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method rap asks the policy for yes or no"):
        run(base, tmp_path / "out", method="rap")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none(base: AlfworldSettings, tmp_path: Path) -> None:
    for name in ("policy_model", "wm_model"):
        with pytest.raises(UserError, match=f"{tmp_path}: no config.json"):
            run(base, tmp_path / "out", **{name: str(tmp_path)})
    assert not (tmp_path / "out").exists()


def test_only_the_k_head_is_bound_to_the_k_it_was_trained_with(base: AlfworldSettings, tmp_path: Path,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "policy_heads.json").write_text('{"kmax": 2, "hidden_size": 32}')
    with_heads = dataclasses.replace(base, policy_model=str(tmp_path), k_policy="auto", max_k=-1)

    def checked(**changes: Any) -> str:
        caplog.clear()
        make_plan(dataclasses.replace(with_heads, **changes))
        return caplog.text

    for k_policy in ("auto", "head"):
        assert checked(k_policy=k_policy) == checked(k_policy=k_policy, max_k=2) == ""
        with pytest.raises(UserError, match="--max_k 3: .* trained with K_max 2"):
            checked(k_policy=k_policy, max_k=3)
    assert "--max_k 3: " in checked(k_policy="random", max_k=3) and checked(k_policy="random") == ""
    assert "--fixed_k 3: " in checked(fixed_k=3) and checked(fixed_k=2, max_k=3) == ""
    assert checked(disable_wm=1, max_k=3) == checked(method="sft", max_k=3) == ""
    for method in NEED_CRITIC:  # heads that a server doesn't ask
        with pytest.raises(UserError, match=f"--method {method} asks a value head"):
            checked(method=method, **SERVED)
    with pytest.raises(UserError, match="--k_policy head: .* no K-head"):
        checked(policy_model=base.policy_model, k_policy="head")


def steps_of(records: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [step for record in records.values() for step in record["foresight_steps"]]


def test_random_k_is_uniform_up_to_max_k(finished: tuple[Path, str]) -> None:
    counts = Counter(step["k"] for step in steps_of(results.read_episodes(finished[0])))
    assert set(counts) == {0, 1, 2} and max(counts.values()) < 18


def test_fixed_k(base: AlfworldSettings, tmp_path: Path) -> None:
    records = run(base, tmp_path / "two", k_policy="auto", fixed_k=2, only_ids="0,1", max_steps=2)
    assert {step["k"] for step in steps_of(records)} == {2}
    none = run(base, tmp_path / "none", k_policy="auto", disable_wm=1, wm_model="", only_ids="0,1", max_steps=2)
    sft = run(base, tmp_path / "sft", method="sft", only_ids="0,1", max_steps=2)
    assert {step["k"] for step in steps_of(none)} == {0}
    # Without imagination, foresight is the policy alone.
    assert [s["action"] for s in steps_of(none)] == [s["action"] for s in steps_of(sft)]
    assert all(set(record["meta"]["usage"]) == {"policy"} for record in none.values())


def test_predictions_that_are_cut_are_counted(base: AlfworldSettings, tmp_path: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    records = run(base, tmp_path, k_policy="auto", fixed_k=1, wm_max_new_tokens=2, max_steps=3)
    spent = [step["usage"]["world_model"] for step in steps_of(records)]
    assert all(usage["calls"] == 1 and usage["cut"] in (0, 1) for usage in spent)
    assert not any(usage["cut"] for usage in spent if usage["completion_tokens"] < 2)
    cut = json.loads((tmp_path / "summary.json").read_text())["cut_predictions"]
    assert 0 < cut == sum(usage["cut"] for usage in spent)
    assert caplog.text.count("cut at 2 tokens, and more may be: raise --wm_max_new_tokens") == 1


def test_a_context_that_holds_no_prompt_ends_episodes_and_says_so(base: AlfworldSettings, tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(base.policy_model, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    records = run(base, tmp_path / "out", policy_model=str(tmp_path / "short"), method="sft", only_ids="0,1")
    assert [record["meta"]["terminate_reason"] for record in records.values()] == ["prompt_too_long"] * 2
    assert steps_of(records) == [] and not any(record["meta"]["success"] for record in records.values())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["endings"] == {"prompt_too_long": 2} and summary["overall"]["n"] == 2
    assert "2 episodes ended because a prompt was longer than the model's context" in caplog.text


def test_prompts_beyond_max_seq_len_lose_history_and_are_counted(base: AlfworldSettings, tmp_path: Path,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    records = run(base, tmp_path, method="sft", history_keep_steps=0, max_seq_len=20, only_ids="0,1")
    spent = [[step["usage"]["policy"]["shortened"] for step in record["foresight_steps"]]
             for record in records.values()]
    assert spent == [[0, 0, 1, 1]] * 2  # with one step of history there is nothing more to leave out
    assert json.loads((tmp_path / "summary.json").read_text())["shortened_prompts"] == 4
    assert "4 prompts lost their oldest steps" in caplog.text


@pytest.mark.parametrize("style", ["tuned", "instruct"])
def test_k_by_prompt(base: AlfworldSettings, tmp_path: Path, style: str) -> None:
    records = run(base, tmp_path, k_policy="prompt", max_k=1, decision_tokens=12, temperature=1.0, only_ids="0,1,2,3",
                  prompt_style=style, max_steps=3)
    steps = steps_of(records)
    assert any(step["k_raw_output"].strip() for step in steps)
    for step in steps:
        digits = re.findall("[0-9]+", step["k_raw_output"])
        assert step["k"] == (min(int(digits[0]), 1) if digits else 0)
        assert not step["reflection"] or style == "instruct" and step["k"]
    reflected = sum(style == "instruct" and step["k"] > 0 for step in steps)
    calls = sum(record["meta"]["usage"]["policy"]["calls"] for record in records.values())
    assert calls == 2 * len(steps) + sum(step["k"] for step in steps) + reflected


def test_thoughts(base: AlfworldSettings, tmp_path: Path) -> None:
    for method in ("react", "cot"):
        records = run(base, tmp_path / method, method=method, wm_model="", only_ids="0", max_steps=2,
                      prompt_style="instruct")
        assert all(step["k"] == 0 and step["policy_raw_output"].startswith("Thought:") for step in steps_of(records))


def test_success_is_what_the_engine_says(base: AlfworldSettings, tmp_path: Path) -> None:
    games = list_games("train", base.env_data_root)

    async def play(method: Method, folder: Path, max_steps: int) -> dict[str, Any]:
        async with EnvPool(functools.partial(AlfworldEnv, want_admissible=True), 1) as pool:
            async for episode in run_episodes(pool, method, games, max_steps=max_steps, seed=1, concurrency=6):
                results.write_episode(folder, games.index(episode.game), episode)
        return write_summary(folder)

    won = asyncio.run(play(ExpertActor(), tmp_path / "expert", 50))
    lost = asyncio.run(play(RandomWalk(), tmp_path / "random", 10))
    assert won["overall"]["rate"] == 1.0 and won["overall"]["n"] == 6 and set(won["rates"].values()) == {1.0}
    assert lost["overall"]["rate"] == 0.0
    for i, record in results.read_episodes(tmp_path / "expert").items():
        meta = record["meta"]
        assert (meta["success"], meta["finished"], meta["terminate_reason"]) == (True, True, "success")
        assert record["foresight_steps"][-1]["done"] and meta["score"] == 100 and meta["error"] == games[i].path
    assert {r["meta"]["finished"] for r in results.read_episodes(tmp_path / "random").values()} == {False}
