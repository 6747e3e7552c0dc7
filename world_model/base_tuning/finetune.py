r"""Train the world model M_φ: p_φ(s'|s, a) on transitions, loss on s' only (eq. 1 of the paper).

Usually started by ``run_worldmodel_tuning.sh``.  The prompt is the one of
:func:`itp.text.prompts.world_model_prompt`, the same that inference uses.  Besides the held-out loss,
``metrics.json`` has the share of held-out transitions whose s' is predicted to the letter (greedy).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The script also runs from a checkout that isn't installed, started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from itp.config import flag, parse_settings  # noqa: E402
from itp.runtime import load_tokenizer, run_main  # noqa: E402
from itp.text.prompts import PLAIN, Turns, world_model_prompt, world_model_target  # noqa: E402
from itp.text.state import State, parse  # noqa: E402
from itp.training.examples import IGNORED, Example, Row  # noqa: E402
from itp.training.finetune import (  # noqa: E402
    FinetuneSettings, check_settings, claim_run, finetune, trained_form,
)
from itp.training.fitting import steps_that_fit  # noqa: E402
from itp.transitions import Transition, read_transitions  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALREADY_DONE = 3
"""Exit status of ``--check_only`` where nothing is left to do; the shell script then stops."""


@dataclass
class WorldModelSettings(FinetuneSettings):
    data_path: str = flag(help="transitions: JSON or JSONL with state, action, next_state")
    max_seq_len: int = flag(2048, at_least=1,
                            help="tokens per transition; longer ones lose their oldest steps, never s'")
    max_rows: int = flag(0, at_least=0, help="train on a random sample of so many transitions; 0: all")
    eval_rows: int = flag(200, at_least=0,
                          help="how many held-out transitions are predicted for the exact match; 0: none")
    check_only: bool = flag(False, help="check data, model and out_dir, train nothing; status 3: already done")


def to_examples(transitions: Sequence[Transition], turns: Turns = PLAIN) -> list[Example]:
    return [Example([(world_model_prompt(t.state, t.action, turns=turns), False),
                     (world_model_target(t.next_state), True)], group=t.episode_id) for t in transitions]


def shorten(example: Example, transition: Transition, room: int, tokenizer: PreTrainedTokenizerBase,
            turns: Turns = PLAIN) -> Example:
    """``example`` with the oldest steps of its state left out until its prompt has at most ``room`` tokens.

    Task, first observation and last step stay, as they do when a long state is cut at inference.  A state
    that isn't in this project's form stays as it is; the core then cuts its tokens on the left.
    """
    try:
        state = parse(transition.state)
    except ValueError:
        return example

    def prompt(state: State) -> str:
        return world_model_prompt(state.render(), transition.action, turns=turns)

    def fits(text: str) -> bool:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= room

    kept = max(1, steps_that_fit(state, prompt, fits))
    return Example([(prompt(state.last(kept)), False), example.segments[1]], group=example.group)


def fit(transitions: Sequence[Transition], tokenizer: PreTrainedTokenizerBase, max_len: int,
        turns: Turns = PLAIN) -> list[Example]:
    """Examples of at most ``max_len`` tokens, where leaving out old steps can do that."""
    examples = to_examples(transitions, turns)
    for start in range(0, len(examples), 1000):
        texts = [text for example in examples[start:start + 1000] for text, _ in example.segments]
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for i in range(0, len(lengths), 2):
            index, room = start + i // 2, max_len - lengths[i + 1] - 2  # 2: bos and eos
            if lengths[i] > room:
                examples[index] = shorten(examples[index], transitions[index], room, tokenizer, turns)
    return examples


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> dict[str, Any]:
    """How many of ``rows`` the model completes to the letter, decoding greedily to its stop token."""
    from itp.lm.base import GenParams
    from itp.lm.decoding import Engine, Request

    requests, targets = [], []
    for row in rows:
        cut = sum(label == IGNORED for label in row["labels"])  # the prompt is what has no label
        prompt, target = row["input_ids"][:cut], row["input_ids"][cut:]
        # One token more than the target, so that a longer prediction can't pass for it.
        requests.append(Request(prompt, GenParams(max_new_tokens=len(target) + 1), 0, []))
        targets.append(tokenizer.decode(target, skip_special_tokens=True))
    answers = Engine(model, tokenizer).generate(requests)
    right = sum(a.text == target and a.finish_reason == "stop" for a, target in zip(answers, targets, strict=True))
    return {"exact_match": round(right / len(rows), 4), "exact_match_rows": len(rows)}


def main() -> None:
    settings = parse_settings(WorldModelSettings, prog="finetune.py", description=__doc__)
    transitions = read_transitions(settings.data_path)
    check_settings(settings)
    ignore = ("data_path", "check_only", "eval_rows")
    if 0 < settings.max_rows < len(transitions):
        transitions = random.Random(settings.seed).sample(transitions, settings.max_rows)
    done = claim_run(settings, [settings.data_path], ignore)
    if settings.check_only:
        sys.exit(ALREADY_DONE if done else 0)
    if done:
        return

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_rows: list[Row]) -> dict[str, Any]:
        rows = random.Random(settings.seed).sample(held_rows, min(settings.eval_rows, len(held_rows)))
        return exact_match(model, tokenizer, rows)

    tokenizer = load_tokenizer(settings.model_path)
    examples = fit(transitions, tokenizer, settings.max_seq_len, trained_form(settings, tokenizer))
    finetune(settings, examples, measure if settings.eval_rows else None)


if __name__ == "__main__":
    run_main(main)
