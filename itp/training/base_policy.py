r"""Train the base policy π_θ0: supervised fine-tuning on expert dialogues.

    python -m itp.training.base_policy --train_json dialogues.json --model_path MODEL --out_dir OUT
    torchrun --nproc_per_node 2 -m itp.training.base_policy ...
    deepspeed --no_local_rank --module itp.training.base_policy ... --deepspeed DEEPSPEED_CONFIG.json

A dialogue is ``{"id": ..., "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}`` as ETO
publishes them, or ``{"messages": [{"role": "user" | "assistant", "content": ...}, ...]}``.  What gpt
says is learned, except turns with ``"weight": 0`` (explored, not the expert's); a ``"correction"`` is learned in
their place, up to where it parts from what was said, which the dialogue goes on from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import read_rows
from itp.pretrained import load_tokenizer
from itp.program import run_main
from itp.text.prompt_format import PLAIN, PromptTemplate
from itp.text.segments import dialogue_examples
from itp.training.examples import Example
from itp.training.run import finetune, open_run
from itp.training.settings import FinetuneSettings, check_settings, trained_card

SPEAKERS = {"human": "human", "gpt": "gpt", "user": "human", "system": "human", "assistant": "gpt"}


@dataclass
class BasePolicySettings(FinetuneSettings):
    train_json: str = flag(help="dialogues: a JSON list, or JSONL; several files, separated by commas",
                           affects_result=False, holds="data")


def read_dialogues(path: str, template: PromptTemplate = PLAIN) -> list[Example]:
    """The examples of all dialogues, prompted in ``template``.  Raises UserError naming the row that isn't one."""
    examples = []
    for where, row in read_rows(path):
        turns = _turns(row, where)
        plain, group = template == PLAIN, str(row.get("id", ""))
        examples += [Example(segments, eos=plain, keep_first=plain, group=group)
                     for segments in dialogue_examples(turns, template)]
    if not examples:
        raise UserError(f"{path}: holds no dialogues; each row needs conversations or messages")
    return examples


def _turns(row: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(row, dict) or not ("conversations" in row or "messages" in row):
        raise UserError(f"{where}: not a dialogue; a row needs 'conversations' (from, value) "
                        "or 'messages' (role, content)")
    name, who, what = ("conversations", "from", "value") if "conversations" in row else ("messages", "role", "content")
    if not isinstance(row[name], list):
        raise UserError(f"{where}: {name!r} must be a list of turns")
    turns = []
    for number, turn in enumerate(row[name]):
        if not isinstance(turn, dict) or turn.get(who) not in SPEAKERS or not isinstance(turn.get(what), str):
            raise UserError(f"{where}: turn {number} needs {who!r} (one of {', '.join(SPEAKERS)}) and a text {what!r}")
        learned, correction = turn.get("weight", 1) != 0, turn.get("correction")
        if not isinstance(correction, str | None):
            raise UserError(f"{where}: turn {number}: 'correction' must be a text")
        turns.append({"from": SPEAKERS[turn[who]], "value": turn[what], "weight": int(learned)}
                     | ({} if correction is None else {"correction": correction}))
    if not any(turn["from"] == "gpt" and (turn["weight"] or "correction" in turn) for turn in turns):
        raise UserError(f"{where}: no turn of gpt (assistant) to learn from")
    return turns


def main() -> None:
    settings = parse_settings(BasePolicySettings, prog="python -m itp.training.base_policy", description=__doc__)
    files = settings.train_json.split(",")
    for path in files:
        read_dialogues(path)  # refused before a tokenizer is loaded
    check_settings(settings)
    if not open_run(settings, files):
        template = trained_card(settings, load_tokenizer(settings.model_path)).template
        finetune(settings, [example for path in files for example in read_dialogues(path, template)])


if __name__ == "__main__":
    run_main(main)
