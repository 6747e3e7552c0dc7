"""Files of dialogues, as the programs that train on them read them: in the form of :mod:`itp.text.dialogues`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from itp.errors import UserError
from itp.files import read_rows
from itp.text.dialogues import as_written, check_form
from itp.text.turns import NotADialogue, Turn, read_turns

_MORE = 20
"""So many rows behind one in another form tell whether the whole file is in another form."""


def read_dialogue_file(path: str) -> Iterator[tuple[str, dict[str, Any], list[Turn]]]:
    """(where, row, turns) of each dialogue.

    Raises UserError for a row that isn't a dialogue, that has nothing to learn, or whose text isn't that of this
    project's prompts: a model would learn to answer other prompts than it gets.
    """
    rows = read_rows(path)
    for number, (where, row) in enumerate(rows):
        try:
            turns = list(map(as_written, read_turns(row)))
        except NotADialogue as error:
            raise UserError(f"{where}: not a dialogue ({error.located}); a row needs 'conversations' (from, value) or "
                            "'messages' (role, content)") from error
        if not any(turn.who == "gpt" and (turn.learned or turn.correction is not None) for turn in turns):
            raise UserError(f"{where}: no turn of gpt (assistant) to learn from; remove the row")
        try:
            check_form(turns)
        except ValueError as error:
            advice = ("other rows of the file are, so this one is damaged: mend or remove it"
                      if number or _mostly_in_form(row for _, row in itertools.islice(rows, _MORE)) else
                      f"convert the file first: python -m world_model.data_processing.convert --input {path} "
                      "--out_dir DIR, and give DIR/dialogues.json")
            raise UserError(f"{where}: not in the form of this project's prompts ({error}); {advice}") from error
        yield where, row, turns


def _mostly_in_form(rows: Iterable[Any]) -> bool:
    found = list(map(in_form, rows))
    return 2 * sum(found) > len(found)


def in_form(row: Any) -> bool:
    """Whether a row is a dialogue as this project writes it."""
    try:
        check_form(list(map(as_written, read_turns(row))))
    except ValueError:
        return False
    return True
