"""The settings of world-model training, and its examples: the prompt of a transition, and s' as the target."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from itp.agent.prompt_budget import PromptBudget, prompt_tokens
from itp.config import flag
from itp.errors import UserError
from itp.lm.tokenize import Encoder
from itp.text.prompt_format import TUNED, PromptFormat
from itp.text.prompts import PERCEIVE, PREDICT, world_model_prompt, world_model_target
from itp.text.state import State, parse
from itp.training.examples import Example
from itp.training.settings import FinetuneSettings, PackingFlags, trained_card
from itp.transitions import Transition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class WorldModelSettings(PackingFlags, FinetuneSettings):
    """What the world model learns from."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "data_path", "model_path", "out_dir", "epochs", "lr",
        "lora_r", "max_seq_len", "bf16", "gradient_checkpointing", "max_rows")
    data_path: str = flag(help="transitions: JSON or JSONL with state, action, next_state", affects_result=False,
                          holds="data")
    max_seq_len: int = flag(2048, at_least=1,
                            help="tokens per transition; longer ones lose their oldest steps, never s'")
    steps_per_sequence: int = flag(0, at_least=0, before=1,
                                   help="transitions of one episode in a sequence, which share their common "
                                        "beginning; 0: as many as fit into max_packed_len")
    max_rows: int = flag(0, at_least=0, help="train on a random sample of so many transitions, in whole episodes where "
                                             "they share sequences; 0: all")
    eval_rows: int = flag(200, at_least=0,
                          help="how many held-out transitions are predicted for the exact match; 0: none",
                          affects_result=False)
    check_only: bool = flag(False, help="check data, model and out_dir, and train nothing",
                            affects_result=False)


def sample(settings: WorldModelSettings, transitions: Sequence[Transition]) -> list[Transition]:
    """``max_rows`` of the transitions: whole episodes, the last one in part, where they share sequences."""
    draw, wanted = random.Random(settings.seed), settings.max_rows
    if settings.steps_per_sequence == 1:
        return draw.sample(transitions, wanted)
    episodes: dict[str, list[Transition]] = {}
    for number, t in enumerate(transitions):
        episodes.setdefault(t.episode_id or f"row {number}", []).append(t)
    order = list(episodes.values())
    draw.shuffle(order)
    return list(itertools.islice(itertools.chain.from_iterable(order), wanted))


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
        yield Example([(prompt, False), (target, True)], group=t.episode_id, image=t.image)


def _state(text: str) -> State | None:
    try:
        return parse(text)
    except ValueError:
        return None


def predicts(transitions: Sequence[Transition], path: str) -> str:
    """What a model of these rows predicts, as its card says it.  Raises UserError where it would be both."""
    symbolic = sum(t.state.startswith((PERCEIVE, PREDICT)) for t in transitions)
    if 0 < symbolic < len(transitions):
        raise UserError(f"{path}: {symbolic} of {len(transitions)} rows are of symbolic states (metaicl) and the "
                        "others of observations; train a model on each")
    return "state" if symbolic else "observation"


def examples_for(settings: WorldModelSettings, tokenizer: PreTrainedTokenizerBase,
                 transitions: Sequence[Transition]) -> list[Example]:
    """The examples of a run: prompted as its model will be, within ``max_seq_len``."""
    encode = Encoder(tokenizer)
    budget = PromptBudget(prompt_tokens(settings.max_seq_len, "observation", TUNED.env), settings.max_seq_len,
                          encode.count, "world_model")
    form = PromptFormat(template=trained_card(settings, tokenizer).template)
    return list(to_examples(transitions, form, budget, encode))
