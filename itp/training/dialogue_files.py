"""Files of dialogues, as the programs that train on them read them: in the form of :mod:`itp.text.dialogues`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from itp.errors import UserError
from itp.files import read_rows
from itp.text.dialogues import check_form
from itp.text.turns import NotADialogue, Turn, read_turns


def read_dialogue_file(path: str) -> Iterator[tuple[str, dict[str, Any], list[Turn]]]:
    """(where, row, turns) of each dialogue.

    Raises UserError for a row that isn't a dialogue, that has nothing to learn, or whose text isn't that of this
    project's prompts: a model would learn to answer other prompts than it gets.
    """
    for where, row in read_rows(path):
        try:
            turns = read_turns(row)
        except NotADialogue as error:
            raise UserError(f"{where}: not a dialogue ({error.located}); a row needs 'conversations' (from, value) or "
                            "'messages' (role, content)") from error
        if not any(turn.who == "gpt" and (turn.learned or turn.correction is not None) for turn in turns):
            raise UserError(f"{where}: no turn of gpt (assistant) to learn from; remove the row")
        try:
            check_form(turns)
        except ValueError as error:
            raise UserError(f"{where}: not in the form of this project's prompts ({error}); convert the file first: "
                            f"python -m world_model.data_processing.convert --input {path} --out_dir DIR, "
                            "and give DIR/dialogues.json") from error
        yield where, row, turns
