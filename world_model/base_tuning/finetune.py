r"""Train the world model M_φ: p_φ(s'|s, a) on transitions, loss on s' only (eq. 1 of the paper).

Usually started by ``run_worldmodel_tuning.sh``.  The prompt is the one of
:func:`itp.text.prompts.world_model_prompt`, the same that inference uses.  Besides the held-out loss,
``metrics.json`` has the share of held-out transitions whose s' is predicted exactly (greedy).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itp.agent.prompt_budget import PromptBudget, prompt_tokens
from itp.config import flag, parse_settings
from itp.lm.tokenize import Encoder
from itp.pretrained import load_tokenizer
from itp.program import run_main
from itp.text.prompt_format import TUNED, PromptFormat
from itp.text.prompts import world_model_prompt, world_model_target
from itp.text.state import State, parse
from itp.training.examples import IGNORED, Example, TrainingRow
from itp.training.run import finetune, open_run
from itp.training.settings import FinetuneSettings, check_settings, trained_card
from itp.transitions import Transition, read_transitions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DONE = "already done"
"""What ``--check_only`` prints where nothing is left to do; the shell script then stops."""


@dataclass
class WorldModelSettings(FinetuneSettings):
    data_path: str = flag(help="transitions: JSON or JSONL with state, action, next_state", affects_result=False,
                          holds="data")
    max_seq_len: int = flag(2048, at_least=1,
                            help="tokens per transition; longer ones lose their oldest steps, never s'")
    max_rows: int = flag(0, at_least=0, help="train on a random sample of so many transitions; 0: all")
    eval_rows: int = flag(200, at_least=0,
                          help="how many held-out transitions are predicted for the exact match; 0: none",
                          affects_result=False)
    check_only: bool = flag(False, help="check data, model and out_dir, and train nothing",
                            affects_result=False)


def to_examples(transitions: Sequence[Transition], form: PromptFormat = TUNED,
                budget: PromptBudget | None = None, encode: Encoder | None = None) -> Iterator[Example]:
    """An example of each transition: the prompt, cut to ``budget`` as inference cuts it, and s'.

    A state that isn't in this project's form stays as it is; the core then cuts its tokens on the left.
    """
    for t in transitions:
        target = world_model_target(t.next_state)
        prompt = world_model_prompt(t.state, t.action, form)
        if budget is not None and (state := _state(t.state)) is not None:
            def render(shown: State, action: str = t.action) -> str:
                return world_model_prompt(shown.render(), action, form)

            prompt = budget.prompt(state, render, len(encode.continuation(target)) + 1)  # and the end-of-sequence token
        yield Example([(prompt, False), (target, True)], group=t.episode_id)


def _state(text: str) -> State | None:
    try:
        return parse(text)
    except ValueError:
        return None


def examples_for(settings: WorldModelSettings, tokenizer: PreTrainedTokenizerBase,
                 transitions: Sequence[Transition]) -> list[Example]:
    """The examples of a run: prompted as its model will be, within ``max_seq_len``."""
    encode = Encoder(tokenizer)
    budget = PromptBudget(prompt_tokens(settings.max_seq_len, "observation", TUNED.env), settings.max_seq_len,
                          encode.count, "world_model")
    form = PromptFormat(template=trained_card(settings, tokenizer).template)
    return list(to_examples(transitions, form, budget, encode))


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[TrainingRow]) -> dict[str, Any]:
    """How many of ``rows`` the model completes exactly, decoding greedily to its stop token."""
    from itp.lm.base import GenParams
    from itp.lm.engine import Engine, Request

    engine, requests, targets = Engine(model, tokenizer), [], []
    for row in rows:
        cut = sum(label == IGNORED for label in row["labels"])  # the prompt is what has no label
        prompt, target = row["input_ids"][:cut], row["input_ids"][cut:]
        # One token more than the target, so that a longer prediction can't pass for it.
        requests.append(Request(prompt, GenParams(max_new_tokens=len(target) + 1), 0, []))
        targets.append(engine.encode.decode(target))
    answers = engine.generate(requests)
    right = sum(a.text == target and a.finish_reason == "stop" for a, target in zip(answers, targets, strict=True))
    return {"exact_match": round(right / len(rows), 4), "exact_match_rows": len(rows)}


def main() -> None:
    settings = parse_settings(WorldModelSettings, prog="finetune.py", description=__doc__)
    transitions = read_transitions(settings.data_path)
    check_settings(settings)
    if 0 < settings.max_rows < len(transitions):
        transitions = random.Random(settings.seed).sample(transitions, settings.max_rows)
    done = open_run(settings, [settings.data_path])
    if done and settings.check_only:
        print(DONE)
    if done or settings.check_only:
        return

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                eval_rows: list[TrainingRow]) -> dict[str, Any]:
        rows = random.Random(settings.seed).sample(eval_rows, min(settings.eval_rows, len(eval_rows)))
        return exact_match(model, tokenizer, rows)

    tokenizer = load_tokenizer(settings.model_path)
    finetune(settings, examples_for(settings, tokenizer, transitions), measure if settings.eval_rows else None)


if __name__ == "__main__":
    run_main(main)
