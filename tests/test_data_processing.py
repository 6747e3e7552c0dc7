"""Published formats -> transitions and dialogues: exact counts, every dropped row with its reason, no traceback."""

from __future__ import annotations

import functools
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from itp.envs.scienceworld.env import ScienceworldEnv
from itp.errors import UserError
from itp.games import Game
from itp.text.prompts import action_target, policy_prompt
from itp.text.segments import dialogue_segments
from itp.text.state import parse
from itp.transitions import REQUIRED, read_transitions
from world_model.data_processing import fetch
from world_model.data_processing.convert import NOTHING_TO_IMITATE, OWN_FORM, ConvertSettings, convert, main
from world_model.data_processing.recorded import Unreadable, read_turns, recorded

INSTRUCTION = "Interact with a household to solve a task. ... strictly follow \"Thought: ...\\nAction: ...\"."
OPENING = ("You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a fridge 1, and a desk 2."
           "\n\nYour task is to: put a clean plate in fridge.")
CLOSED = "The cabinet 1 is closed."
OPENED = "You open the cabinet 1. The cabinet 1 is open. In it, you see a plate 1."


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str, **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **more}


def eto(number: int = 0) -> dict[str, Any]:
    return {"id": f"alfworld_{number}", "conversations": [
        human(INSTRUCTION), gpt("OK"), human(OPENING),
        gpt("Thought: First look.\nAction: go to cabinet 1"), human(f"Observation: {CLOSED}"),
        gpt("Thought: Open it.\nAction: open cabinet 1"), human(f"Observation: {OPENED}"),
        gpt("Thought: Now.\nAction: put plate 1 in/on fridge 1")]}


def science() -> dict[str, Any]:
    return {"id": 7, "conversations": [
        human("You are a helpful assistant to do some scientific experiment in an environment. ..."), gpt("OK"),
        human("Your task is to find a(n) plant. First, focus on the thing.\nThis room is called the hallway."),
        gpt("Thought: Look.\nAction: look around"), human("Observation: In it, you see:\n\tthe agent\n\ta door"),
        gpt("Action: task"), human("Observation: Task Description:\nYour task is to find a(n) plant."),
        gpt("Action: focus on plant")]}


def settings(tmp_path: Path, rows: Any, **options: Any) -> ConvertSettings:
    file = tmp_path / "in.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return ConvertSettings(input=str(file), out_dir=str(tmp_path / "out"), **options)


def converted(tmp_path: Path, rows: Any, **options: Any):
    given = settings(tmp_path, rows, **options)
    return convert([given.input], given)


def test_eto_alfworld(tmp_path: Path) -> None:
    out = converted(tmp_path, [eto()])
    first, second = out.transitions
    opening = ("Task: put a clean plate in fridge\nObservation: You are in the middle of a room. Looking quickly "
               "around you, you see a cabinet 1, a fridge 1, and a desk 2.")
    assert first.state == opening
    assert (first.action, first.next_state) == ("go to cabinet 1", CLOSED)
    assert second.state == f"{opening}\nAction: go to cabinet 1\nObservation: {CLOSED}"
    assert (second.action, second.next_state) == ("open cabinet 1", OPENED)
    # The last action was never answered: the policy learns it, the world model doesn't.
    talk, = out.talks
    assert [t["value"] for t in talk["conversations"]] == [
        opening, "Action: go to cabinet 1", f"Observation: {CLOSED}", "Action: open cabinet 1",
        f"Observation: {OPENED}", "Action: put plate 1 in/on fridge 1"]
    assert out.report() == {
        "rows": 1, "kept": 1, "dropped": 0, "why": {}, "transitions": 2, "dialogues": 1,
        "notes": {"thoughts left out": 3, "opening turns left out": 2,
                  "last actions without an answer (imitated, no transition)": 1}}


def test_dialogue_text_is_what_evaluation_asks_with(tmp_path: Path) -> None:
    out = converted(tmp_path, [eto()])
    text = "".join(segment for segment, _ in dialogue_segments(out.talks[0]["conversations"]))
    for t in out.transitions:
        assert text.startswith(policy_prompt(t.state) + action_target(t.action))


def test_eto_scienceworld(tmp_path: Path) -> None:
    out = converted(tmp_path, [science()])
    state = parse(out.transitions[1].state)
    assert (state.task, state.first) == ("Your task is to find a(n) plant. First, focus on the thing.",
                                         "This room is called the hallway.")
    assert [t.action for t in out.transitions] == ["look around", "task"]
    assert out.transitions[0].next_state == "In it, you see:\n\tthe agent\n\ta door"
    assert out.transitions[0].episode_id == "scienceworld/7"


def test_first_observations_that_dialogues_lack_come_from_the_simulator(tmp_path: Path) -> None:
    """ETO's dialogues begin with the task alone; the id names the game, and its task must be the dialogue's."""
    env = ScienceworldEnv()
    seen = env.reset(Game("scienceworld", "train", "x", "lifespan-longest-lived-then-shortest-lived/3/easy", "x"))
    posed = env._call("freeActionTaskDesc").removeprefix("Task Description:").strip()
    env.close()
    assert "  " in posed and "  " not in seen.task  # the environment's text has no double spaces

    def dialogue(name: str, task: str) -> dict[str, Any]:
        turns = science()["conversations"]
        turns[2] = human(task)
        return {"id": name, "conversations": turns}

    rows = [dialogue("21_3", posed), dialogue("21_3", "Your task is to sing."), dialogue("99_3", posed),
            dialogue("21_99999", posed), dialogue("x", posed), science()]
    plain = converted(tmp_path, rows)
    lacking = next(count for note, count in plain.notes.items() if note.startswith("dialogues without a first obs"))
    assert lacking == 5 and parse(plain.transitions[0].state).first == ""
    filled = converted(tmp_path, rows, first_from_simulator=True)
    assert filled.notes["first observations taken from the simulator"] == 1
    states = [parse(t.state) for t in filled.transitions if t.step == 0]
    assert [(states[0].task, states[0].first)] == [(seen.task, seen.text)]
    assert [bool(state.first) for state in states] == [True, False, False, False, False, True]


def test_agentgym_and_chat_messages_say_the_same(tmp_path: Path) -> None:
    turns = eto()["conversations"]
    gym = {"item_id": "pick_12", "conversations": [
        human(INSTRUCTION) | {"loss": None}, gpt("OK. I'll follow your instructions.", loss=False),
        human(OPENING + "\nAVAILABLE ACTIONS: go to cabinet 1,look"),
        gpt("Thought:\nFirst look.\n\nAction:\ngo to cabinet 1", loss=True),
        human(f"{CLOSED}\nAVAILABLE ACTIONS: open cabinet 1"), gpt("Action:\nopen cabinet 1", loss=False),
        human(OPENED), gpt("Action:\nput plate 1 in/on fridge 1", loss=True)]}
    roles = {"human": "user", "gpt": "assistant"}
    example = "\nHere is an example.\nYou are in the middle of a room. Your task is to: look.\n> look\nNow:\n"
    chat = {"id": "c", "messages": [
        {"role": "system", "content": INSTRUCTION}, {"role": "user", "content": example + OPENING},
        *({"role": roles[t["from"]], "content": t["value"]} for t in turns[3:])]}
    expected = [(t.state, t.action, t.next_state) for t in converted(tmp_path, [eto()]).transitions]
    gym_out, chat_out = converted(tmp_path, [gym]), converted(tmp_path, [chat])
    for out in (gym_out, chat_out):
        assert [(t.state, t.action, t.next_state) for t in out.transitions] == expected
    assert [t.expert_action for t in gym_out.transitions] == ["go to cabinet 1", ""]  # `loss` false: not to imitate
    gym["conversations"][5]["loss"] = None
    assert [t.expert_action for t in converted(tmp_path, [gym]).transitions] == ["go to cabinet 1", ""]
    assert [t.get("weight", 1) for t in gym_out.talks[0]["conversations"] if t["from"] == "gpt"] == [1, 0, 1]


def test_example_episode_and_thoughts_as_turns(tmp_path: Path) -> None:
    row = eto()
    example = [human("You are in the middle of a room. You see a bed 1.\nYour task is to: look at it."),
               gpt("Action: look"), human("You see nothing."), gpt("Action: examine bed 1")]
    row["conversations"][2:2] = example
    row["conversations"][9:9] = [gpt("Thought: I wonder."), human("OK.")]
    out = converted(tmp_path, [row])
    assert [t.action for t in out.transitions] == ["go to cabinet 1", "open cabinet 1"]
    assert out.notes["opening turns left out"] == 6 and out.notes["turns of thought alone left out"] == 1


def test_put_to_move(tmp_path: Path) -> None:
    row = eto()
    row["conversations"].append(human("Observation: You put the plate 1 in/on the fridge 1."))
    assert converted(tmp_path, [row]).transitions[-1].action == "put plate 1 in/on fridge 1"
    last = converted(tmp_path, [row], put_to_move=True).transitions[-1]
    assert (last.action, last.next_state) == ("move plate 1 to fridge 1", "You move the plate 1 to the fridge 1.")


@pytest.mark.parametrize("change, reason", [
    (lambda turns: turns.pop(4), "two turns of gpt in a row"),
    (lambda turns: turns[3].update(value="Thought: hm"), "a turn of the agent without an action"),
    (lambda turns: turns[4].update(value="Observation: "), "an empty observation"),
    (lambda turns: turns[2].update(value="Hello."), "no human turn that poses a task"),
    (lambda turns: turns[2].update(value="Your task is to: x"), "no first observation before the task"),
    (lambda turns: turns.__delitem__(slice(3, None)), "no action at all"),
    (lambda turns: turns[5].pop("value"), "a turn without a text 'value'"),
    (lambda turns: turns[5].update({"from": "tool"}), "a turn whose 'from' isn't one of"),
    (lambda turns: turns[4].update(value="half \ud800"), "a turn that isn't valid Unicode text"),
    (lambda turns: turns.clear(), "no human turn at the beginning"),
])
def test_reasons(change, reason: str) -> None:
    row = eto()
    change(row["conversations"])
    with pytest.raises(Unreadable, match=reason):
        recorded(read_turns(row), "alfworld")


def test_report_of_a_mixed_file(tmp_path: Path) -> None:
    cut, nameless = eto(1), eto(2)
    del cut["conversations"][5:]  # truncated, but what is there is right
    del nameless["conversations"][4]
    out = converted(tmp_path, [eto(), cut, nameless, 7, {"id": 1}, eto()])
    assert out.rows == 6 and out.kept == 3
    assert dict(out.dropped) == {"two turns of gpt in a row": 1, "not a row of named fields": 1,
                                 "field 'state' is missing": 1}
    assert [t.episode_id for t in out.transitions] == [
        *["alfworld/alfworld_0"] * 2, "alfworld/alfworld_1", *["alfworld/alfworld_0#2"] * 2]


def test_transitions_file(tmp_path: Path) -> None:
    rows = [{"episode_id": t.episode_id, "step": t.step, "state": t.state, "action": t.action,
             "next_state": t.next_state} for t in converted(tmp_path, [eto()]).transitions]
    rows += [{**rows[1], "episode_id": "half"}, {"state": "Goal: x", "action": "look", "next_state": "y"}, {"state": 3}]
    out = converted(tmp_path, "\n".join(map(json.dumps, rows)))
    assert out.kept == 3 and sum(out.dropped.values()) == 2 and len(out.transitions) == 3
    # The half episode teaches the world model, but it isn't a dialogue.
    assert [t["id"] for t in out.talks] == ["alfworld/alfworld_0"]


def test_what_is_not_to_be_imitated_makes_no_dialogue(tmp_path: Path) -> None:
    rows = [{"episode_id": t.episode_id, "step": t.step, "state": t.state, "action": t.action, "next_state":
             t.next_state} for t in converted(tmp_path, [eto()]).transitions]
    walk = [row | {"expert_action": ""} for row in rows]
    out = converted(tmp_path, walk)
    assert out.talks == [] and out.notes["episodes with nothing to imitate (no dialogue)"] == 1
    out = converted(tmp_path, [rows[0], walk[1]])
    assert [t.get("weight", 1) for t in out.talks[0]["conversations"] if t["from"] == "gpt"] == [1, 0]
    assert [t.expert_action for t in out.transitions] == ["go to cabinet 1", ""]


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path, [eto(i) for i in range(3)] + [{"id": 1, "conversations": []}])
    monkeypatch.setattr(sys, "argv", ["convert", "--input", given.input, "--out_dir", given.out_dir])
    main()
    assert "4 rows: 3 kept, 1 dropped (9 thoughts" in capsys.readouterr().out
    out = Path(given.out_dir)
    assert len(read_transitions(out / "transitions.jsonl", required=(*REQUIRED, "episode_id", "step"))) == 6
    from itp.training.base_policy import read_dialogues

    assert len(read_dialogues(str(out / "dialogues.json"))) == 3
    assert json.loads((out / "report.json").read_text())["why"] == {"no task of ALFWorld or ScienceWorld in it": 1}
    monkeypatch.setattr(sys, "argv", ["convert", "--input", given.input, "--out_dir", given.out_dir, "--env",
                                      "scienceworld"])
    with pytest.raises(UserError, match="4 of 4 rows can't be used"):
        main()


def test_the_projects_own_dialogues_are_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their imagined steps would become observations."""
    own = converted(tmp_path, [eto(i) for i in range(3)]).talks
    out = converted(tmp_path, own)
    assert (out.kept, dict(out.dropped)) == (0, {OWN_FORM: 3})
    given = settings(tmp_path, own)
    monkeypatch.setattr(sys, "argv", ["convert", "--input", given.input, "--out_dir", given.out_dir])
    with pytest.raises(UserError, match=OWN_FORM):
        main()


def test_ten_dropped_rows_are_named_and_the_others_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    converted(tmp_path, [*[eto(i) for i in range(30)], *[{"id": i, "conversations": []} for i in range(25)]])
    said = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(said) == 11 and said[-1] == "dropped: 15 more rows; report.json counts them by reason"


def mutate(text: str, draw: random.Random) -> bytes:
    """One of many ways in which a file can be wrong: bytes, cuts, fields, types, turns."""
    way = draw.randrange(8)
    if way == 0:
        return text.encode()[:draw.randrange(len(text))]
    if way == 1:
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    rows = json.loads(text)
    row = draw.choice(rows)
    turns = row.get("conversations") or row.get("messages")
    junk = [None, 0, -1.5, True, "", " ", [], {}, "\ud83d", "Action:", "OK", "x" * 5000, [[[]]], 10**400, float("nan")]
    for _ in range(draw.randint(1, 3)):
        turn = draw.choice(turns) if turns else {}
        place = draw.randrange(6)
        if way == 2:
            turn[draw.choice(["from", "value", "role", "content", "loss", "weight"])] = draw.choice(junk)
        elif way == 3 and turns:
            del turns[draw.randrange(len(turns))]
        elif way == 4 and turns:
            turns.insert(draw.randrange(len(turns)), draw.choice([*turns, *junk]))
        elif way == 5:
            row[draw.choice(["id", "conversations", "messages", "state"])] = draw.choice(junk)
        elif way == 6 and isinstance(turn, dict) and isinstance(turn.get("value"), str):
            at = draw.randrange(len(turn["value"]) + 1)
            turn["value"] = turn["value"][:at] + draw.choice(["\n", "Action: ", "\n  ", "Your task is to: ", "\x00",
                                                              "\nObservation: "]) + turn["value"][at + place:]
        elif way == 7:
            rows.insert(draw.randrange(len(rows)), draw.choice(junk))
        turns = turns if isinstance(turns, list) and all(isinstance(t, dict) for t in turns) else []
    return json.dumps(rows).encode()


def test_thousand_mutations(tmp_path: Path) -> None:
    """A result whose counts add up and whose states follow from one another, or one clear error."""
    good = json.dumps([eto(0), science(), eto(1)])
    file = tmp_path / "m.json"
    errors = dropped = whole = 0
    for seed in range(1000):
        file.write_bytes(mutate(good, random.Random(seed)))
        try:
            out = convert([str(file)], ConvertSettings(input=str(file), out_dir=""))
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            errors += 1
            continue
        report = out.report()
        assert report["rows"] == report["kept"] + report["dropped"] == report["kept"] + sum(report["why"].values())
        assert report["kept"] == report["dialogues"] + report["notes"].get(NOTHING_TO_IMITATE, 0)
        dropped += report["dropped"]
        whole += not report["dropped"]
        source = json.loads(file.read_bytes())
        for talk in out.talks:
            steps = [t for t in out.transitions if t.episode_id == talk["id"]]
            states = [parse(t.state) for t in steps]
            for state, t, after in zip(states, steps, states[1:], strict=False):
                assert state.after(t.action, t.next_state) == after
            said = [turn["value"] for turn in talk["conversations"] if turn["from"] == "gpt"]
            assert len(said) - len(steps) in (0, 1)
            text = " ".join(json.dumps(source, ensure_ascii=False).split())
            assert all(" ".join(json.dumps(value.removeprefix("Action: "), ensure_ascii=False)[1:-1].split()) in text
                       for value in said)
        json.dumps([t.__dict__ for t in out.transitions], ensure_ascii=False).encode()
    assert errors > 100 and dropped > 100 and whole > 100  # the mutations reach all three ends


def test_fetch_keeps_what_is_whole_and_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, revision: str, path: Path) -> str:
        asked.append(name)
        if name.startswith("sciworld"):
            raise UserError("no network")
        (tmp_path / "blob").write_text(json.dumps([{}] * 3118))
        return str(tmp_path / "blob")

    monkeypatch.setattr(fetch, "_download", hub)
    for _ in range(2):
        with pytest.raises(UserError, match="no network"):
            fetch.fetch_dialogues(tmp_path / "eto", "main")
    assert asked == ["alfworld_sft.json", "sciworld_sft.json", "sciworld_sft.json"]
    (tmp_path / "eto/sciworld_sft.json").write_text("[{}]")
    with pytest.raises(UserError, match="1 dialogues, not the 1482"):
        fetch.fetch_dialogues(tmp_path / "eto", "main")


def test_fetch_offline_is_one_line(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "world_model.data_processing.fetch", "--out_dir", str(tmp_path),
                          "--what", "eto"], capture_output=True, text=True, timeout=120, check=False,
                         env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert run.returncode == 2 and "put data/alfworld_sft.json of the data set agent-eto/eto-sft-trajectory there" in \
        run.stderr and "Traceback" not in run.stderr


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_fetch_lists_over_http(tmp_path: Path) -> None:
    """A real server: what is there is kept, what is missing or broken is one line that names the file and its place."""
    site, folder = tmp_path / "site", tmp_path / "eto"
    site.mkdir()
    (site / "train_indices.json").write_text('[["task-1-boil", 0], ["task-3-find-plant", 7]]')
    (site / "dev_indices.json").write_text('[["task-1-boil", 0], ["task-3-fi')  # cut short
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=f"eto/dev_indices.json: can't be downloaded .* put {url}/dev_indices.json"):
            fetch.fetch_lists(folder, url)
        assert [file.name for file in folder.iterdir()] == ["train_indices.json"]
        (folder / "train_indices.json").write_text('[["task-1-boil", 3]]')  # the user's own
        (site / "dev_indices.json").write_text('[["task-1-boil", 14]]')
        with pytest.raises(UserError, match="test_indices.json: can't be downloaded .HTTPError"):
            fetch.fetch_lists(folder, url)
        (site / "test_indices.json").write_text('[["task-1-boil", "21"]]')
        with pytest.raises(UserError, match=r"not a list of \[task, variation\]"):
            fetch.fetch_lists(folder, url)
        (folder / "test_indices.json").write_text('[["task-1-boil", 21]]')
        server.shutdown()
    fetch.fetch_lists(folder, url)  # nothing is asked for any more
    assert json.loads((folder / "train_indices.json").read_text()) == [["task-1-boil", 3]]
    assert json.loads((folder / "dev_indices.json").read_text()) == [["task-1-boil", 14]]


TOOL = """#!{python}
import json, pathlib, shutil, sys
assert sys.argv[1] == "--data-dir" and "--force" in sys.argv  # else it keeps files that a kill cut short
root = pathlib.Path(sys.argv[2])
for game in json.loads(pathlib.Path({leaves!r}).read_text()):
    shutil.copytree(pathlib.Path({source!r}) / game, root / game, dirs_exist_ok=True)
"""
"""An alfworld-download that unpacks some games."""


def test_fetch_completes_a_set_of_games_and_insists(games_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [str(file.parent.relative_to(games_root)) for file in sorted(games_root.rglob("game.tw-pddl"))]
    root, leaves, tool = tmp_path / "alfworld", tmp_path / "leaves.json", tmp_path / "alfworld-download"
    tool.write_text(TOOL.format(python=sys.executable, leaves=str(leaves), source=str(games_root)))
    tool.chmod(0o755)
    monkeypatch.setattr(fetch.shutil, "which", lambda *_, **__: str(tool))
    monkeypatch.setattr(fetch, "ALFWORLD_GAMES", {"train": 6, "valid_seen": 2, "valid_unseen": 2})
    leaves.write_text(json.dumps(trials[:-1]))
    with pytest.raises(UserError, match="alfworld-download left 1 of 2 games of valid_unseen"):
        fetch.fetch_games(root)
    # All folders are there, and a game that a kill cut short.
    cut = root / trials[0] / "game.tw-pddl"
    cut.write_bytes(cut.read_bytes()[:100])
    leaves.write_text(json.dumps(trials))
    with caplog.at_level("INFO"):
        fetch.fetch_games(root)
    assert "6 games of train" in caplog.text
    tool.unlink()
    fetch.fetch_games(root)  # whole: the tool isn't called
