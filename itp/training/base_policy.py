r"""Train the base policy π_θ0: supervised fine-tuning on expert dialogues.

    python -m itp.training.base_policy --train_json dialogues.json --model_path MODEL --out_dir OUT
    torchrun --nproc_per_node 2 -m itp.training.base_policy ...
    deepspeed --no_local_rank --module itp.training.base_policy ... --deepspeed DEEPSPEED_CONFIG.json

A dialogue is ``{"id": ..., "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}`` or ``{"messages":
[{"role": "user" | "assistant", "content": ...}, ...]}``, in the form that ``world_model.collect`` and
``world_model.data_processing.convert`` write.  Published files in another form are refused: convert them first.

What gpt says is learned, except turns with ``"weight": 0`` (explored, not the expert's) or ``"loss": false``.  A
``"correction"`` of a turn of weight 0 is learned in its place, up to where it parts from what was said, which the
dialogue goes on from.

In plain text a dialogue is one sequence.  In chat turns each reply is an example of its own; ``--steps_per_sequence 0``
packs those of an episode into one sequence, with the same losses for a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from itp.config import flag, parse_settings
from itp.distributed import is_first_process
from itp.errors import UserError
from itp.pretrained import load_tokenizer
from itp.program import run_main, say_next
from itp.text.dialogues import episode_of
from itp.text.prompt_format import PLAIN, PromptTemplate
from itp.text.segments import dialogue_examples
from itp.text.turns import Turn
from itp.training.dialogue_files import read_dialogue_file
from itp.training.examples import Example
from itp.training.run import finetune, open_run
from itp.training.settings import FinetuneSettings, PackingFlags, check_settings, trained_card

Dialogue = tuple[str, list[Turn]]
"""The id of a row's episode, empty where the row has none, and the row's turns."""


@dataclass
class BasePolicySettings(PackingFlags, FinetuneSettings):
    """What the base policy learns from."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "train_json", "model_path", "out_dir", "epochs", "lr",
        "lora_r", "max_seq_len", "bf16", "gradient_checkpointing", "prompt_form")
    train_json: str = flag(help="dialogues: a JSON list, or JSONL; several files, separated by commas",
                           affects_result=False, holds="data")


def read_dialogues(path: str, template: PromptTemplate = PLAIN) -> list[Example]:
    """The examples of all dialogues, prompted in ``template``.  Raises UserError naming the row that isn't one."""
    return _examples(_read(path), template)


def _read(path: str) -> Iterator[Dialogue]:
    row = None
    for _, row, turns in read_dialogue_file(path):
        yield "" if row.get("id") is None else episode_of(str(row["id"])), turns
    if row is None:
        raise UserError(f"{path}: holds no dialogues; each row needs conversations or messages")


def _examples(rows: Iterable[Dialogue], template: PromptTemplate) -> list[Example]:
    """Those of an episode are held out together: its foresight dialogues, say, repeat the text of the whole."""
    plain = template == PLAIN
    return [Example(segments, eos=plain, keep_first=plain, group=episode or f"dialogue {number}")
            for number, (episode, turns) in enumerate(rows)
            for segments in dialogue_examples(list(map(_plain_turn, turns)), template)]


def _plain_turn(turn: Turn) -> dict[str, Any]:
    """A turn under the names of :mod:`itp.text.dialogues`."""
    return ({"from": turn.who, "value": turn.text, "weight": int(turn.learned)}
            | ({} if turn.correction is None else {"correction": turn.correction}))


def main() -> None:
    settings = parse_settings(BasePolicySettings, prog="python -m itp.training.base_policy", description=__doc__)
    files = settings.train_json.split(",")
    rows = [row for path in files for row in _read(path)]  # refused before a tokenizer is loaded
    check_settings(settings)
    if not open_run(settings, files):
        template = trained_card(settings, load_tokenizer(settings.model_path)).template
        finetune(settings, _examples(rows, template))
    if is_first_process():
        say_next(f"python -m foresight_eval --method sft --policy_model {settings.merged_path} --env_data_root DATA "
                 "--out_dir DIR")


if __name__ == "__main__":
    run_main(main)
