r"""A base LM from nothing: a tokenizer and a small causal LM trained on transcripts of an engine.

    python -m itp.training.base_lm --transitions runs/d_exp/transitions.jsonl,runs/walks/transitions.jsonl \
        --out_dir runs/base_lm

It stands in for a downloaded model where there is none: the result, ``OUT_DIR/merged_full``, is an ordinary
Hugging Face folder (Llama architecture, ``tokenizer.json``) that every later step treats like any other.

Its tokenizer keeps sequences short.  ``--env scienceworld`` learns one from the transcripts
(:mod:`itp.training.from_scratch.learned_tokenizer`), ALFWorld's is made by hand (``word_tokenizer``).
A token of several words (``cabinet 1``) starts out as the sum of their embeddings.

``--copying`` is for a model that must say again what it saw (a world model).  It changes the tokenizer, what attention
starts out with (``initial_weights``), and adds episodes in invented rooms (``invented_rooms``).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from itp.config import flag, parse_settings
from itp.distributed import is_first_process
from itp.errors import UserError
from itp.files import writing
from itp.games import ENVIRONMENTS
from itp.program import run_main, say_next
from itp.seeding import derive_seed
from itp.text.dialogues import episode_dialogue
from itp.text.episodes import episodes_of, read_steps
from itp.text.prompts import NO, YES, world_model_prompt
from itp.text.segments import dialogue_segments
from itp.training.dialogue_files import read_dialogue_file
from itp.training.examples import Example
from itp.training.from_scratch import state_words
from itp.training.from_scratch.exercises import exercises
from itp.training.from_scratch.invented_rooms import memory_exercises
from itp.training.from_scratch.learned_tokenizer import learn_tokenizer
from itp.training.from_scratch.word_tokenizer import LIST_FOLLOWS, build_tokenizer
from itp.training.run import finetune, open_run
from itp.training.settings import FinetuneSettings, check_options
from itp.transitions import Transition, read_transitions


@dataclass
class BaseLMSettings(FinetuneSettings):
    """The model that is made, and what it learns from."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "transitions", "out_dir", "env", "hidden_size", "num_layers",
        "num_heads", "drills", "copying", "epochs", "lr")
    env: str = flag("alfworld", help="environment of the transcripts", choices=ENVIRONMENTS)
    transitions: str = flag(help="transitions.jsonl of the transcripts to learn; several, separated by commas",
                            affects_result=False, holds="data")
    words_of: str = flag("", help="dialogues.json whose words the tokenizer is to know too; or rows of symbolic states "
                                  "(transitions.jsonl of world_model.data_processing.metaicl), which it then reads and "
                                  "writes", affects_result=False, holds="data")
    hidden_size: int = flag(128, help="width of the model")
    num_layers: int = flag(3, help="layers")
    num_heads: int = flag(8, help="attention heads")
    drills: int = flag(0, at_least=0, help="ALFWorld: before the transcripts, so many short exercises in finding the "
                                           "object of a task in what is seen, and half as many that "
                                           "end with the engine's answer (20000 are enough)")
    drill_lr: float = flag(0.006, above=0, help="their learning rate")
    copying: int = flag(0, at_least=0, help="ALFWorld: beside the exercises so many episodes in invented rooms, whose "
                                            "contents must be copied when they are seen again, and half as many "
                                            "among the answers and the transcripts, with changes")
    intermediate_size: int = flag(320, help="width of the feed-forward layers")
    # Not for users: every weight of a model made here is trained.
    model_path: str = ""
    lora_r: int = 0
    lora_alpha: int = 0
    lora_dropout: float = 0.0
    lora_targets: str = ""
    q_lora: bool = False


def main() -> None:
    settings = parse_settings(BaseLMSettings, prog="python -m itp.training.base_lm", description=__doc__)
    check_options(settings)
    if settings.copying and settings.env != "alfworld":
        raise UserError("--copying: invented rooms are ALFWorld's; leave it out")
    if settings.copying and (settings.num_layers < 2 or settings.hidden_size < 4 * settings.num_heads):
        raise UserError("--copying: an induction head needs --num_layers 2 or more, and --hidden_size of at least 4 "
                        "times --num_heads")
    files = settings.transitions.split(",")
    episodes = [episode for path in files for episode in _episodes(path)]
    initial = Path(settings.out_dir) / "initial"
    settings = dataclasses.replace(settings, model_path=str(initial))
    words_of = [settings.words_of] if settings.words_of else []
    words = {text for path in words_of for text in _texts(path)}
    if not open_run(settings, [*files, *words_of], own_base=True):
        if not (initial / "config.json").exists():
            write_initial(settings, episodes, initial, words)
        among = memory_exercises(episodes, settings.copying // 2, derive_seed(settings.seed, "among"), change=0.5)
        finetune(prepared(settings, episodes), [*map(transcript, episodes), *among])
    if is_first_process():
        say_next(f"python -m itp.training.base_policy --model_path {settings.merged_path} --train_json DIALOGUES "
                 "--out_dir DIR")


def prepared(settings: BaseLMSettings, episodes: Sequence[Sequence[Transition]]) -> BaseLMSettings:
    """The settings to go on with after the exercises: two runs in OUT_DIR, the second half as long with answers."""
    if not settings.drills and not settings.copying:
        return settings
    for folder, one_in, answers, change in (("drills", 1, 0.0, 0.0), ("answers", 2, 0.5, 0.5)):
        run = dataclasses.replace(settings, out_dir=str(Path(settings.out_dir) / folder), merged_dir="",
                                  push_to_hub="", epochs=1.0, batch_size=32, lr=settings.drill_lr,
                                  lr_scheduler_type="constant")
        if not run.merged_path.exists():
            seed = derive_seed(settings.seed, folder)
            made = [*exercises(episodes, -(-settings.drills // one_in), seed, answers),
                    *memory_exercises(episodes, -(-settings.copying // one_in), seed, change)]
            if not made:
                raise UserError(f"--drills, --copying: {settings.transitions} has no sights of ALFWorld to make "
                                "exercises of; leave them out")
            finetune(run, made)
        settings = dataclasses.replace(settings, model_path=str(run.merged_path))
    return settings


def _texts(path: str) -> Iterator[str]:
    """The texts of a file of dialogues, or of rows of symbolic states, as world-model training writes them."""
    if Path(path).suffix != ".jsonl":
        yield from (turn.text for _, _, turns in read_dialogue_file(path) for turn in turns)
        return
    for row in read_transitions(path):
        yield from (world_model_prompt(row.state, row.action), row.next_state)


def _episodes(path: str) -> Iterator[list[Transition]]:
    steps = read_steps(path, required=("episode_id", "step", "state", "action", "next_state"))
    for episode in episodes_of(steps):
        yield [steps[i][0] for i in episode]


def transcript(episode: Sequence[Transition]) -> Example:
    """All that the engine said and all that the expert did are learned; explorations are just history."""
    segments = [(text, learned or not text.startswith(" "))
                for text, learned in dialogue_segments(episode_dialogue(episode)["conversations"])]
    return Example(segments, keep_first=True, group=episode[0].episode_id)


def write_initial(settings: BaseLMSettings, episodes: Iterable[Sequence[Transition]], folder: Path,
                  words: Iterable[str] = ()) -> None:
    """Tokenizer and random weights, as a model folder.  ``words``: more texts whose words the tokenizer knows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from itp.training.from_scratch import initial_weights

    words = set(words)
    texts = sorted({YES, NO, *words, *(text for episode in episodes for text, _ in transcript(episode).segments)})
    copying = settings.copying > 0
    states = any(text.startswith(state_words.MARKS) for text in words)
    made = (learn_tokenizer(texts) if settings.env == "scienceworld" else
            build_tokenizer(texts, joined=copying, states=states))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        clean_up_tokenization_spaces=False)
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size, num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads, intermediate_size=settings.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=16384, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        initial_weights.prepare_matching(model)
        embeddings = model.get_input_embeddings().weight
        if copying:
            initial_weights.leave_room(embeddings, settings.hidden_size // settings.num_heads)
        ids = tokenizer.convert_tokens_to_ids
        for token, parts in _compounds(tokenizer.get_vocab()):
            embeddings[ids(token)] = embeddings[ids(parts)].sum(0)
        if copying:
            initial_weights.make_alike(embeddings)
        model.get_output_embeddings().weight.copy_(embeddings)
        if copying:
            initial_weights.prepare_copying(model)
    beside = folder.with_name(f".{folder.name}.tmp")  # the next start takes what is in ``folder`` for whole
    with writing(folder, unfinished=beside):
        tokenizer.save_pretrained(beside)
        model.save_pretrained(beside)
        os.replace(beside, folder)


def _compounds(vocabulary: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The tokens of several words, and the tokens that these words are: ``cabinet 1``, ``cabinet 1, you see``."""
    follows = {"": "", **LIST_FOLLOWS, **{f'": {head}': head for head in (state_words.LIST, *state_words.HEADS)}}
    for token in vocabulary:
        match = re.fullmatch(r'"?([a-z]+) (\d+)(.*)', token)
        if match and match[3] in follows:
            yield token, [part for part in (match[1], match[2], follows[match[3]]) if part]


if __name__ == "__main__":
    run_main(main)
