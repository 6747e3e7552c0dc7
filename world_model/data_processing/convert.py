r"""Published data -> the files that every program here trains on.

    python -m world_model.data_processing.convert --input alfworld_sft.json --out_dir runs/eto --env alfworld
    python -m world_model.data_processing.convert --input rows.jsonl --out_dir runs/rows --format transitions

Reads ETO's dialogues, AgentGym's, chat ``messages`` (:mod:`world_model.data_processing.recorded`) and
transitions (:mod:`itp.transitions`), as JSON or JSONL.  ``OUT_DIR`` then holds

``transitions.jsonl``  world-model data and expert file in one: state, action, next_state, ...
``dialogues.json``     for ``itp.training.base_policy``
``report.json``        how many rows were kept, how many dropped and why

The state text is :mod:`itp.text.state`'s, the one that RL and evaluation use.  A row that can't be read is
dropped and counted with its reason; a file that isn't JSON is an error that names the line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import check_output_folder, read_rows, write_json
from itp.games import ENVIRONMENTS
from itp.program import run_main, say_next
from itp.text import dialogues
from itp.text.state import parse
from itp.training.dialogue_files import in_form
from itp.transitions import REQUIRED, Transition, to_transition, write_transitions
from world_model.data_processing.first_observations import FirstObservations
from world_model.data_processing.recorded import Recorded, Unreadable, env_of, episode_id, read_turns, recorded

log = logging.getLogger(__name__)
WITHOUT_FIRST = ("dialogues without a first observation (their states lack what every episode of RL and evaluation "
                 "begins with)")
FOUND = "first observations taken from the simulator"
NOTHING_TO_IMITATE = "episodes with nothing to imitate (no dialogue)"
OWN_FORM = "already in the form of this project's prompts"
NAMED = 10
"""So many dropped rows are named; report.json counts all."""
FORMATS = ("auto", "dialogues", "transitions")


@dataclass
class ConvertSettings:
    input: str = flag(help="JSON or JSONL file; several, separated by commas, are read one after the other")
    out_dir: str = flag(help="folder for transitions.jsonl, dialogues.json, report.json")
    format: str = flag("auto", choices=FORMATS, help="auto: a row with conversations or messages is a dialogue")
    env: str = flag("auto", choices=("auto", *ENVIRONMENTS),
                    help="environment of the dialogues; auto: by what they say")
    put_to_move: bool = flag(False, help="write older ALFWorld data as alfworld 0.4 and later say it: `move X to Y` "
                                         "for `put X in/on Y`, and `You arrive at X.` after `go to X`")
    first_from_simulator: bool = flag(False, help="ScienceWorld's dialogues without a first observation: take it from "
                                                  "the simulator where their ids are ETO's (needs Java)")
    max_dropped: float = flag(0.5, help="fail if a larger share of the rows is dropped: then the format is another one")


@dataclass
class Converted:
    """What became of the rows.  ``rows`` = ``kept`` + the sum of ``dropped``, always."""

    transitions: list[Transition] = field(default_factory=list)
    talks: list[dialogues.Dialogue] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out of rows that were kept."""

    def report(self) -> dict[str, Any]:
        return {"rows": self.rows, "kept": self.kept, "dropped": sum(self.dropped.values()),
                "why": dict(self.dropped.most_common()), "notes": dict(self.notes.most_common()),
                "transitions": len(self.transitions), "dialogues": len(self.talks)}


def convert(paths: Sequence[str], settings: ConvertSettings) -> Converted:
    """All rows of the files.  Raises UserError for a file that can't be read at all."""
    out = Converted()
    single: list[Transition] = []
    ids: Counter[str] = Counter()
    simulator = contextlib.closing(FirstObservations()) if settings.first_from_simulator else contextlib.nullcontext()
    with simulator as firsts:
        for path in paths:
            for where, row in read_rows(path):
                out.rows += 1
                try:
                    if _is_dialogue(row, settings.format):
                        _add_dialogue(row, Path(path).stem, settings, firsts, ids, out)
                    else:
                        single.append(_own_transition(row, where))
                    out.kept += 1
                except Unreadable as reason:
                    out.dropped[str(reason)] += 1
                    if sum(out.dropped.values()) <= NAMED:
                        log.info("dropped: %s: %s", where, reason)
    if sum(out.dropped.values()) > NAMED:
        log.info("dropped: %d more rows; report.json counts them by reason", sum(out.dropped.values()) - NAMED)
    if not out.rows:
        raise UserError(f"{', '.join(paths)}: no rows; give dialogues or transitions as JSON or JSONL")
    out.transitions += single
    _add_episodes(single, out)
    return out


def _is_dialogue(row: Any, wanted: str) -> bool:
    if wanted != "auto":
        return wanted == "dialogues"
    return not isinstance(row, dict) or "conversations" in row or "messages" in row


def _add_dialogue(row: Any, source: str, settings: ConvertSettings, firsts: FirstObservations | None, ids: Counter[str],
                  out: Converted) -> None:
    if in_form(row):  # what was tried in the mind would become what the environment said
        raise Unreadable(OWN_FORM)
    turns = read_turns(row)
    env = env_of(turns) if settings.env == "auto" else settings.env
    episode = recorded(turns, env, settings.put_to_move)
    name = f"{env}/{episode_id(row, out.rows)}"
    if not episode.first:
        if firsts:
            episode = dataclasses.replace(episode, first=firsts.find(name, episode.task))
        out.notes[FOUND if episode.first else WITHOUT_FIRST] += 1
    ids[name] += 1
    if ids[name] > 1:
        out.notes["ids given twice, made different"] += 1
        name += f"#{ids[name]}"
    out.notes += episode.notes
    out.transitions += transitions_of(episode, name, source)
    if any(episode.learned):
        out.talks.append(dialogue_of(episode, name))
    else:
        out.notes[NOTHING_TO_IMITATE] += 1


def transitions_of(episode: Recorded, name: str, source: str) -> list[Transition]:
    """The answered steps.  ``done`` is set on none: where the environment ended the episode isn't recorded."""
    return [Transition(name, t, state.render(), action, observation, expert_action=action if learned else "",
                       source=source)
            for t, (state, (action, observation), learned) in
            enumerate(zip(episode.states(), episode.steps, episode.learned, strict=False))]


def dialogue_of(episode: Recorded, name: str) -> dialogues.Dialogue:
    """The dialogue that :mod:`itp.training.base_policy` learns from, with the last action even if unanswered."""
    steps = [*episode.steps, *([(episode.final, "")] if episode.final else [])]
    first = episode.states()[0].render()
    rows = [Transition(name, t, first if t == 0 else "", action, observation, action if learned else "")
            for t, ((action, observation), learned) in enumerate(zip(steps, episode.learned, strict=True))]
    talk = dialogues.episode_dialogue(rows)
    if episode.final:
        talk["conversations"].pop()  # there is no answer
    return talk


def _own_transition(row: Any, where: str) -> Transition:
    """A row of the schema, its state in this project's form."""
    try:
        transition = to_transition(row, where, REQUIRED)
    except UserError as error:
        raise Unreadable(str(error).removeprefix(f"{where}: ").split("; ")[0]) from error
    for text in (transition.state, transition.action, transition.next_state):
        if not text.strip():
            raise Unreadable("an empty state, action or next_state")
    try:
        "".join(str(v) for v in dataclasses.astuple(transition)).encode()
        parse(transition.state)
    except UnicodeEncodeError as error:
        raise Unreadable("text that isn't valid Unicode") from error
    except ValueError as error:
        raise Unreadable("a state that isn't in the form of itp/text/state.py") from error
    return transition


def _add_episodes(rows: Sequence[Transition], out: Converted) -> None:
    """Dialogues of the episodes whose steps are all there and follow from one another."""
    for name, group in itertools.groupby(rows, key=lambda t: t.episode_id):
        episode = list(group)
        states = [parse(t.state) for t in episode]
        follows = all(state.after(t.action, t.next_state) == after
                      for state, t, after in zip(states, episode, states[1:], strict=False))
        if not name or not follows or states[0].history or states[0].omitted:
            out.notes["episodes whose steps aren't all there, in order (no dialogue)"] += 1
        elif not any(t.expert_action for t in episode):
            out.notes[NOTHING_TO_IMITATE] += 1
        else:
            out.talks.append(dialogues.episode_dialogue(episode))


def main() -> None:
    settings = parse_settings(ConvertSettings, prog="python -m world_model.data_processing.convert",
                              description=__doc__)
    check_output_folder(settings.out_dir)
    out = convert(settings.input.split(","), settings)
    report = out.report()
    folder = Path(settings.out_dir)
    write_json(folder / "report.json", {"settings": dataclasses.asdict(settings)} | report)
    said = "; ".join(f"{count} {reason}" for reason, count in (out.dropped + out.notes).most_common())
    if not out.kept or report["dropped"] > settings.max_dropped * out.rows:
        if 2 * out.dropped[OWN_FORM] > out.rows:
            raise UserError(f"{settings.input}: {out.dropped[OWN_FORM]} of {out.rows} rows are {OWN_FORM}; use the "
                            "file as it is (its transitions are in the transitions.jsonl written with it)")
        raise UserError(f"{settings.input}: {report['dropped']} of {out.rows} rows can't be used ({said}); is it the "
                        "right file and --format? --max_dropped 1 takes what is left")
    write_transitions(folder / "transitions.jsonl", out.transitions)
    write_json(folder / "dialogues.json", out.talks)
    print(f"{out.rows} rows: {out.kept} kept, {report['dropped']} dropped{f' ({said})' if said else ''}; "
          f"{len(out.transitions)} transitions, {len(out.talks)} dialogues in {folder}")
    say_next(f"python -m itp.training.base_policy --train_json {folder / 'dialogues.json'} --model_path BASE "
             "--out_dir DIR")


if __name__ == "__main__":
    run_main(main)
