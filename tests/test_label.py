"""Pseudo-labels (eq. 5): the formula by hand, scores against plain forward passes, costs, restarts, refusals."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from itp.agent.prompt_budget import PromptBudget, prompt_tokens
from itp.errors import UserError
from itp.lm.base import metered
from itp.text.prompt_format import PromptFormat
from itp.text.prompts import action_target, foresight_text, policy_prompt
from itp.text.state import State, parse
from itp.training.itp_r import label
from itp.training.itp_r.expert_steps import read_expert
from itp.training.itp_r.label_settings import LabelSettings, parse_candidates
from itp.training.itp_r.pseudo_labels import Policy, best_k, penalized
from itp.transitions import Transition, write_transitions
from tests.killed import command_of, finish, kill
from tests.tiny import write_tiny_model

FIRST = ("You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a fridge 1, and a desk 2.")
PLAY = [("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
        ("open cabinet 1", "You open the cabinet 1. In it, you see a plate 1, and a mug 2."),
        ("take plate 1 from cabinet 1", "You pick up the plate 1 from the cabinet 1."),
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")]
NOISY = 1
"""The step of episode b at which something else than the expert's action was executed."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root, paths = tmp_path_factory.mktemp("models"), []
    for seed, name in enumerate(("policy", "world_model")):
        folder = write_tiny_model(root / name, seed=seed)
        (folder / "itp_model.json").write_text('{"prompt_style": "tuned"}')
        paths.append(str(folder))
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for episode in "ab":
        state = State(f"put a clean plate in {'fridge' if episode == 'a' else 'cabinet'}", FIRST)
        for step, (action, observation) in enumerate(PLAY):
            noisy = episode == "b" and step == NOISY
            executed, seen = ("look", "Nothing happens.") if noisy else (action, observation)
            rows.append(Transition(episode, step, state.render(), executed, seen, expert_action=action))
            state = state.after(executed, seen)
    path = tmp_path_factory.mktemp("expert") / "transitions.jsonl"
    write_transitions(path, rows)
    return path


@pytest.fixture
def make(models: tuple[str, str], expert: Path, tmp_path: Path):
    """Settings of a small run on the CPU."""

    def settings(**other: Any) -> LabelSettings:
        given = {"expert_jsonl": str(expert), "policy_model": models[0], "wm_model": models[1],
                 "out_labeled_jsonl": str(tmp_path / "labeled.jsonl"), "max_k": 3, "wm_max_new_tokens": 8,
                 "max_seq_len": 500, "policy_device": "cpu", "wm_device": "cpu", "cache_gb": 0.2}
        return LabelSettings(**{**given, **other})

    return settings


def labelled(settings: LabelSettings) -> list[dict[str, Any]]:
    label.run(settings)
    return [json.loads(line) for line in Path(settings.out_labeled_jsonl).read_text().splitlines()]


def assert_same(rows: list[dict], others: list[dict]) -> None:
    """Equal but for rounding, and for what the caches saved."""
    for a, b in zip(rows, others, strict=True):
        for name in a:
            if name in ("scores", "logprobs"):
                assert a[name] == pytest.approx(b[name], abs=1e-4)
            elif name != "tokens":
                assert a[name] == b[name]


def test_the_label_maximises_the_penalised_score_and_ties_go_to_the_smaller_k() -> None:
    logprobs = {0: -2.0, 1: -1.5, 2: -1.25, 3: -1.25}
    assert penalized(logprobs, 0.25) == {0: -2.0, 1: -1.75, 2: -1.75, 3: -2.0}
    assert best_k(penalized(logprobs, 0.25)) == 1
    assert best_k(penalized(logprobs, 0.0)) == 2
    assert best_k(penalized(logprobs, 0.5)) == 0
    assert best_k(penalized({0: -3.0, 5: -0.5}, 0.25)) == 5


@functools.cache
def loaded(folder: str):
    from itp.pretrained import load_causal_lm

    return load_causal_lm(folder)


def slow_logprobs(folder: str, context: str, completion: str) -> list[float]:
    """Token log-probabilities by one plain forward pass on concatenated ids."""
    import torch

    model, tokenizer = loaded(folder)
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in (context, completion))
    with torch.no_grad():
        logits = model(torch.tensor([a + b])).logits[0].log_softmax(-1)
    return [float(logits[len(a) + i - 1, token]) for i, token in enumerate(b)]


@pytest.mark.parametrize(("norm", "keep"), [("sum", "full"), ("mean", "last_obs")])
def test_scores_equal_plain_forward_passes(make, models: tuple[str, str], norm: str, keep: str) -> None:
    settings = make(logprob_norm=norm, foresight_format=keep, lambda_k=0.3)
    rows = labelled(settings)
    assert [(r["episode_id"], r["step"]) for r in rows] == [(e, t) for e in "ab" for t in range(len(PLAY))]
    for row in rows[2:6]:
        expected = {}
        for k in range(4):
            prompt = policy_prompt(row["state"], foresight=foresight_text(row["imagined"][:k], keep))
            tokens = slow_logprobs(models[0], prompt, action_target(row["expert_action"]))
            assert row["logprobs"][str(k)] == pytest.approx(sum(tokens), abs=1e-4)
            expected[k] = sum(tokens) / (len(tokens) if norm == "mean" else 1) - 0.3 * k
        assert row["scores"] == pytest.approx({str(k): v for k, v in expected.items()}, abs=1e-4)
        assert row["k_label"] == max(expected, key=expected.__getitem__)
        assert row["obs_list"] == [parse(row["state"]).observation, *(o for _, o in row["imagined"])]
    noisy = rows[len(PLAY) + NOISY]
    assert noisy["action"] == "look" and noisy["expert_action"] == PLAY[NOISY][0]  # the expert's was scored, see above


def test_candidates_share_one_trajectory_and_its_prefixes(make, models: tuple[str, str], monkeypatch) -> None:
    """All k cost what the largest costs, and for each other its own label and action only."""
    encode = loaded(models[0])[1].encode
    prompted: list[str] = []
    propose = Policy.propose

    async def counting(self, state: State, seed: int) -> str:
        prompted.append(state.render())
        return await propose(self, state, seed)

    monkeypatch.setattr(Policy, "propose", counting)
    rows = labelled(make(max_k=5))
    assert len(prompted) == 5 * len(rows)
    for row in rows:
        ids = [encode(policy_prompt(row["state"], foresight=foresight_text(row["imagined"][:k]))
                      + action_target(row["expert_action"])) for k in range(6)]
        shared = [next(i for i, (a, b) in enumerate(zip(one, ids[5])) if a != b) for one in ids[:5]]
        others = sum(len(one) - n for one, n in zip(ids[:5], shared, strict=True))
        assert row["tokens"]["score"] - row["tokens"]["largest_alone"] <= others
        assert row["tokens"]["largest_alone"] <= len(ids[5])
    total = {name: sum(row["tokens"][name] for row in rows) for name in ("score", "largest_alone")}
    assert total["score"] <= 1.5 * total["largest_alone"]


def test_some_candidates_only_and_none_at_all(make) -> None:
    rows = labelled(make(k_candidates="2"))
    assert all(set(row["scores"]) == {"0", "2"} and len(row["imagined"]) == 2 for row in rows)
    assert all(len(row["obs_list"]) == 4 and row["obs_list"][3] == row["obs_list"][2] for row in rows)
    assert {row["k_label"] for row in labelled(make(max_k=0, override=True))} == {0}
    assert parse_candidates("5,2", 5) == (0, 2, 5) and parse_candidates("", 2) == (0, 1, 2)
    for wrong in ("0,6", "-1", "a"):
        with pytest.raises(UserError, match="--k_candidates"):
            parse_candidates(wrong, 5)


def test_teacher_forcing_follows_the_expert_as_long_as_it_was_followed(make, expert: Path) -> None:
    settings = make(imagination="teacher_forced", foresight_format="last_obs")
    rows = {(r["episode_id"], r["step"]): r for r in labelled(settings)}
    actions = [action for action, _ in PLAY]
    for (episode, step), row in rows.items():
        end = NOISY + 1 if episode == "b" and step <= NOISY else len(PLAY)
        forced = [action for action, _ in row["imagined"]]
        assert forced == actions[step:end][:3]
        assert set(row["scores"]) == {str(k) for k in range(len(forced) + 1)} and len(row["obs_list"]) == 4
    with pytest.raises(UserError, match="last_obs"):
        label.run(dataclasses.replace(settings, foresight_format="full"))


def test_a_wrong_path_is_said_before_anything_is_written(make) -> None:
    for name in ("policy_model", "wm_model"):
        with pytest.raises(UserError, match="./modle: no such model folder"):
            label.run(make(**{name: "./modle"}))
    assert not Path(make().out_labeled_jsonl + ".run").exists()


def test_neither_concurrency_nor_batches_change_a_label(make, tmp_path: Path) -> None:
    together = labelled(make(concurrency=8, wm_batch_size=2, score_batch_size=3))
    alone = labelled(make(concurrency=1, out_labeled_jsonl=str(tmp_path / "alone.jsonl")))
    assert_same(together, alone)


def test_the_seed_changes_what_is_imagined_by_sampling(make, tmp_path: Path) -> None:
    one, other = (labelled(make(temperature=1.0, seed=seed, k_candidates="1",
                                out_labeled_jsonl=str(tmp_path / f"{seed}.jsonl"))) for seed in (1, 2))
    assert all(a["imagined"] != b["imagined"] for a, b in zip(one, other, strict=True))


def test_batch_sizes_bound_the_rows_of_a_forward_pass(make, monkeypatch: pytest.MonkeyPatch) -> None:
    from itp.lm import engine

    rows_of: dict[int, list[int]] = {}

    class Spy(engine.KVBatch):
        def __init__(self, model, memory, rows, *others: Any) -> None:
            rows_of.setdefault(id(model), []).append(len(rows))
            super().__init__(model, memory, rows, *others)

    monkeypatch.setattr(engine, "KVBatch", Spy)
    labelled(make(concurrency=3, wm_batch_size=2, score_batch_size=4))
    assert sorted(max(sizes) for sizes in rows_of.values()) == [2, 4]


def test_a_run_that_was_killed_goes_on(make, tmp_path: Path) -> None:
    settings = make()
    undisturbed = labelled(settings)
    progress = Path(settings.out_labeled_jsonl + ".run") / "rows.jsonl"
    assert labelled(settings) == undisturbed  # nothing is labelled twice
    content = progress.read_bytes()
    progress.write_bytes(content[:len(content) // 2])  # in the middle of a line
    Path(settings.out_labeled_jsonl).unlink()
    assert_same(labelled(settings), undisturbed)
    assert len(progress.read_text().splitlines()) == len(undisturbed)
    with pytest.raises(UserError, match="lambda_k: 0.2 there, 0.5 now"):
        label.run(make(lambda_k=0.5))
    cheap = labelled(make(lambda_k=0.0, override=True))
    assert all(row["scores"] == row["logprobs"] for row in cheap)


def test_a_process_that_is_killed_goes_on_with_the_same_command(make, expert: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in expert.read_text().splitlines()]
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(row | {"episode_id": f"{row['episode_id']}{i}"}) + "\n"
                            for i in range(8) for row in rows))
    settings = make(expert_jsonl=str(many), max_k=1, wm_max_new_tokens=4, concurrency=2)
    progress, out = Path(settings.out_labeled_jsonl + ".run/rows.jsonl"), Path(settings.out_labeled_jsonl)
    command = command_of(["itp.training.train_adaptive_k", "label"], settings)
    kill(command, lambda: progress.exists() and progress.read_bytes().count(b"\n") >= 6, tmp_path / "log")
    before = progress.read_bytes()
    assert not out.exists() and before.count(b"\n") < 8 * len(rows)
    finish(command, tmp_path / "log")
    assert progress.read_bytes().startswith(before[:before.rfind(b"\n") + 1])  # what was finished stays as it was
    numbers = [json.loads(line)["row"] for line in progress.read_text().splitlines()]
    assert sorted(numbers) == list(range(8 * len(rows)))  # every row once
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert_same(found, labelled(dataclasses.replace(settings, out_labeled_jsonl=str(tmp_path / "undisturbed.jsonl"))))


def test_a_bad_line_is_named_or_skipped_and_counted(make, expert: Path, tmp_path: Path) -> None:
    lines = expert.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    for bad, why in (('{"episode_id": ', "not JSON"), ('{"episode_id": "x"}', "field 'step' is missing"),
                     (lines[4].replace("Task: ", "Tusk: "), "isn't a state")):
        broken.write_text("\n".join([*lines[:4], bad, *lines[5:]]) + "\n")
        if why.startswith("field"):
            why = "broken.jsonl:5: field"
        with pytest.raises(UserError, match=why) as raised:
            label.run(make(expert_jsonl=str(broken)))
        assert "broken.jsonl:5" in str(raised.value) and "\n" not in str(raised.value)
        skipped: list[str] = []
        assert len(read_expert(str(broken), skipped)) == len(lines) - 1 and len(skipped) == 1
    settings = make(expert_jsonl=str(broken), skip_bad_rows=True)
    assert len(labelled(settings)) == len(lines) - 1
    assert json.loads(Path(settings.out_labeled_jsonl + ".run/summary.json").read_text())["skipped"] == 1


def test_what_is_not_to_be_imitated_has_no_label(make, expert: Path, tmp_path: Path) -> None:
    """An empty expert_action: nothing to imitate.  Without the field the action is the expert's."""
    rows = [json.loads(line) for line in expert.read_text().splitlines()][:len(PLAY)]
    rows[1]["expert_action"] = ""
    del rows[2]["expert_action"]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(row.index, row.forced) for row in read_expert(str(path), None)] == [
        (0, (PLAY[0][0],)), (2, (PLAY[2][0], PLAY[3][0])), (3, (PLAY[3][0],))]
    found = labelled(make(expert_jsonl=str(path), max_k=0))
    assert [(row["step"], row["expert_action"]) for row in found] == [(t, PLAY[t][0]) for t in (0, 2, 3)]
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(UserError, match="'expert_action' is empty in every row"):
        read_expert(str(path), None)


def test_the_experts_next_actions_are_those_of_its_own_episode(tmp_path: Path) -> None:
    """In files that were joined, two episodes of one game have one id."""
    rows = []
    for actions in (("x", "y", "z"), ("u", "v")):
        state = State("t", "o")
        for step, action in enumerate(actions):
            rows.append(Transition("game#0", step, state.render(), action, "seen", action))
            state = state.after(action, "seen")
    write_transitions(tmp_path / "joined.jsonl", rows)
    assert [row.forced for row in read_expert(str(tmp_path / "joined.jsonl"), None)] == [
        ("x", "y", "z"), ("y", "z"), ("z",), ("u", "v"), ("v",)]
    # A step that is missing ends what follows; a state that has lost its oldest steps doesn't.
    state = State("t", "o").after("x", "seen").after("y", "seen").last(1)
    rows = [*rows[:2], dataclasses.replace(rows[2], state=state.render())]
    write_transitions(tmp_path / "short.jsonl", rows)
    assert [row.forced for row in read_expert(str(tmp_path / "short.jsonl"), None)][0] == ("x", "y", "z")
    write_transitions(tmp_path / "short.jsonl", [rows[0], rows[2]])
    assert [row.forced for row in read_expert(str(tmp_path / "short.jsonl"), None)] == [("x",), ("z",)]


def test_history_is_dropped_oldest_first_until_it_fits() -> None:
    state = State("t", "o", tuple((f"a{i}", f"o{i}") for i in range(9)))
    for room in range(5, 60):  # in words: four before the history, four a step, four to say what was left out
        kept = state if room >= 4 + 9 * 4 else state.last(max(1, (room - 8) // 4))  # the last step always stays
        for budget in (PromptBudget(room, count=lambda text: len(text.split())),
                       PromptBudget(99, room + 7, lambda text: len(text.split()))):
            with metered() as usage:
                assert budget.prompt(state, State.render, new_tokens=7) == kept.render()
            assert sum(spent.shortened for spent in usage.values()) == (kept != state)
    assert PromptBudget().prompt(state, State.render, new_tokens=7) == state.render()


@pytest.fixture
def sizes(models: tuple[str, str]):
    """Tokens of a labelled row's prompt with its last steps, and of its action."""
    _, tokenizer = loaded(models[0])

    def size(row: dict[str, Any], keep: int) -> tuple[int, int]:
        prompt = policy_prompt(parse(row["state"]).last(keep).render())
        return len(tokenizer.encode(prompt)), len(tokenizer.encode(action_target(row["expert_action"])))

    return size


def assert_scored_with(row: dict[str, Any], keep: int, policy: str) -> int:
    """That the row's action was scored after its last ``keep`` steps; how many were left out."""
    state = parse(row["state"]).last(keep)
    tokens = slow_logprobs(policy, policy_prompt(state.render()), action_target(row["expert_action"]))
    assert row["logprobs"]["0"] == pytest.approx(sum(tokens), abs=1e-4)
    assert row["shortened"] == (state.omitted > 0)
    return state.omitted


def summary_of(settings: LabelSettings) -> dict[str, Any]:
    return json.loads(Path(settings.out_labeled_jsonl + ".run/summary.json").read_text())


def test_rows_beyond_max_seq_len_lose_history_no_more_than_they_must(make, models: tuple[str, str], sizes) -> None:
    least = max(sizes(row, 1)[0] for row in labelled(make(max_k=0))) + 5
    budget = next(n for n in range(999) if prompt_tokens(n, "action", "alfworld") >= least)
    room, omitted = prompt_tokens(budget, "action", "alfworld"), []
    settings = make(max_k=0, max_seq_len=budget, override=True)
    for row in labelled(settings):
        keep = max(n for n in range(1, len(PLAY) + 1) if sizes(row, n)[0] <= room)
        omitted.append(assert_scored_with(row, keep, models[0]))
    assert len(set(omitted)) > 1
    assert summary_of(settings)["shortened_prompts"] == sum(n > 0 for n in omitted)
    settings = make(max_k=0, max_seq_len=30, override=True)  # too little for any: the last step and the rest stay
    rows = labelled(settings)
    assert [assert_scored_with(row, 1, models[0]) for row in rows] == [max(0, row["step"] - 1) for row in rows]
    assert (summary_of(settings)["rows"], summary_of(settings)["skipped"]) == (2 * len(PLAY), 0)


def test_rows_beyond_the_models_context_are_left_out_and_counted(make, models: tuple[str, str], sizes,
                                                                 tmp_path: Path) -> None:
    every = labelled(make(max_k=0))
    context = max(sum(sizes(row, 1)) for row in every) - 1
    policy = tmp_path / "short"
    shutil.copytree(models[0], policy)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    settings = make(max_k=0, policy_model=str(policy), override=True)
    found = {(row["episode_id"], row["step"]): row for row in labelled(settings)}
    fitting = {(row["episode_id"], row["step"]) for row in every if sum(sizes(row, 1)) <= context}
    assert set(found) == fitting and 0 < len(found) < len(every)
    for row in found.values():
        fits = [n for n in range(1, len(PLAY) + 1) if sizes(row, n)[0] <= context - 16]  # room for any action
        assert_scored_with(row, max(fits, default=1), models[0])
    assert summary_of(settings)["skipped"] == len(every) - len(found)


def test_a_random_choice_of_rows_takes_whole_episodes(make, tmp_path: Path) -> None:
    firsts = set()
    for seed in range(4):
        rows = labelled(make(max_rows=len(PLAY), seed=seed, out_labeled_jsonl=str(tmp_path / f"{seed}.jsonl")))
        assert len({row["episode_id"] for row in rows}) == 1
        assert [row["step"] for row in rows] == list(range(len(PLAY)))
        firsts.add(rows[0]["episode_id"])
    assert len(firsts) == 2


def test_a_policy_with_heads_is_asked_with_its_control_token(make, models: tuple[str, str], tmp_path: Path) -> None:
    from itp.agent.policy_with_heads import PolicyWithHeads
    model, tokenizer = copy.deepcopy(loaded(models[0]))
    folder = tmp_path / "heads"
    PolicyWithHeads.create(model, tokenizer, 3).save_pretrained(str(folder), tokenizer)
    row = labelled(make(policy_model=str(folder)))[2]
    for k in (0, 3):
        prompt = policy_prompt(row["state"], form=PromptFormat(control_token=True),
                               foresight=foresight_text(row["imagined"][:k]))
        tokens = slow_logprobs(str(folder), prompt, action_target(row["expert_action"]))
        assert row["logprobs"][str(k)] == pytest.approx(sum(tokens), abs=1e-4)
    with pytest.raises(UserError, match="--max_k 2 contradicts .*kmax 3"):
        label.run(make(policy_model=str(folder), max_k=2))


def test_the_command_line() -> None:
    program = [sys.executable, "-m", "itp.training.train_adaptive_k"]
    said = subprocess.run([*program, "label", "--help-all"], capture_output=True, text=True, check=True).stdout
    assert "--teacher_forced" not in said and "--imagination" in said and "train_adaptive_k label" in said
    assert "{label,sft,rl_k}" in subprocess.run([*program, "-h"], capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([*program, "labels"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "invalid choice: 'labels'" in wrong.stderr
    missing = subprocess.run([*program, "label", "--kmax", "2"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and missing.stderr.startswith("error: missing required --expert_jsonl")
