r"""A base LM from nothing: a tokenizer and a small causal LM trained on transcripts of an engine.

    python -m itp.training.base_lm --transitions runs/d_exp/transitions.jsonl,runs/walks/transitions.jsonl \
        --out_dir runs/base_lm

It stands in for a downloaded model where there is none: the result, ``OUT_DIR/merged_full``, is an ordinary
Hugging Face folder (Llama architecture, ``tokenizer.json``) that every later step treats like any other.

The tokenizer is made for small models and short sequences.  ``--env scienceworld`` learns one from the transcripts
(:mod:`itp.training.from_scratch.learned_tokenizer`).  ALFWorld's is made by hand.  Its vocabulary is the words of the
transcripts; a thing or place with its number (``cabinet 1``) is one token, which starts out as the sum of the
two words' embeddings, and so is what the engine says in fixed words (``You arrive at``, ``, you see``).  The
articles and commas of a list ("a mug 1, a cup 2, and a pan 3") are dropped on the way in and put back on the
way out, so that what the model writes is what the engine would.
All engine text survives the round trip (``help`` excepted).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import writing
from itp.games import ENVIRONMENTS
from itp.program import run_main
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import FIXED_PHRASES
from itp.text.dialogues import episode_dialogue
from itp.text.episodes import episodes_of, read_steps
from itp.text.prompts import NO, YES
from itp.text.segments import dialogue_segments
from itp.training.dialogue_files import read_dialogue_file
from itp.training.examples import Example
from itp.training.from_scratch.exercises import exercises
from itp.training.from_scratch.learned_tokenizer import learn_tokenizer
from itp.training.run import finetune, open_run
from itp.training.settings import FinetuneSettings, check_options
from itp.transitions import Transition

MANY = ("cabinet", "drawer", "shelf")
"""Places that a room may have dozens of."""

LABELS = ("Task:", "Observation:", "Action:", "If:", "Then:", "Horizon:", "Thought:", "Reflection:", "Helps:")


@dataclass
class BaseLMSettings(FinetuneSettings):
    env: str = flag("alfworld", help="environment of the transcripts", choices=ENVIRONMENTS)
    transitions: str = flag(help="transitions.jsonl of the transcripts to learn; several, separated by commas",
                            affects_result=False, holds="data")
    words_of: str = flag("", help="dialogues.json whose words the tokenizer is to know too", affects_result=False,
                         holds="data")
    hidden_size: int = flag(128, help="width of the model")
    num_layers: int = flag(3, help="layers")
    num_heads: int = flag(8, help="attention heads")
    drills: int = flag(0, at_least=0, help="ALFWorld: before the transcripts, so many short exercises in finding the "
                                           "object of a task in what is seen, and half as many that "
                                           "end with the engine's answer (20000 are enough)")
    drill_lr: float = flag(0.006, above=0, help="their learning rate")
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
    files = settings.transitions.split(",")
    episodes = [episode for path in files for episode in _episodes(path)]
    initial = Path(settings.out_dir) / "initial"
    settings = dataclasses.replace(settings, model_path=str(initial))
    words_of = [settings.words_of] if settings.words_of else []
    words = {turn.text for path in words_of for _, _, turns in read_dialogue_file(path) for turn in turns}
    if open_run(settings, [*files, *words_of], own_base=True):
        return
    if not (initial / "config.json").exists():
        write_initial(settings, episodes, initial, words)
    finetune(drilled(settings, episodes), [transcript(episode) for episode in episodes])


def drilled(settings: BaseLMSettings, episodes: Sequence[Sequence[Transition]]) -> BaseLMSettings:
    """The settings to go on with after ``--drills``: two runs in OUT_DIR, the second half as long with answers."""
    if not settings.drills:
        return settings
    for folder, count, answers in (("drills", settings.drills, 0.0), ("answers", -(-settings.drills // 2), 0.5)):
        run = dataclasses.replace(settings, out_dir=str(Path(settings.out_dir) / folder), merged_dir="",
                                  push_to_hub="", epochs=1.0, batch_size=32, lr=settings.drill_lr,
                                  lr_scheduler_type="constant")
        if not run.merged_path.exists():
            made = list(exercises(episodes, count, derive_seed(settings.seed, folder), answers))
            if not made:
                raise UserError(f"--drills {settings.drills}: {settings.transitions} has no sights of ALFWorld to make "
                                "them of; leave it out")
            finetune(run, made)
        settings = dataclasses.replace(settings, model_path=str(run.merged_path))
    return settings


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

    texts = sorted({YES, NO, *words, *(text for episode in episodes for text, _ in transcript(episode).segments)})
    made = learn_tokenizer(texts) if settings.env == "scienceworld" else build_tokenizer(texts)
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
        _prepare_matching(model)
        words = model.get_input_embeddings().weight
        for token, index in tokenizer.get_vocab().items():
            if match := re.fullmatch(r"([a-z]+) (\d+)", token):
                kind, number = tokenizer.convert_tokens_to_ids(list(match.groups()))
                words[index] = words[kind] + words[number]
        model.get_output_embeddings().weight.copy_(words)
    beside = folder.with_name(f".{folder.name}.tmp")  # the next start takes what is in ``folder`` for whole
    with writing(folder, unfinished=beside):
        tokenizer.save_pretrained(beside)
        model.save_pretrained(beside)
        os.replace(beside, folder)


def _prepare_matching(model) -> None:
    """Start out with attention to the same word, however far above, which a policy looks for its task's object with.

    Keys like queries, embeddings that outweigh what the first layers add to them; and (in the configuration) rotary
    frequencies so low that distance hardly matters.
    """
    model.get_input_embeddings().weight.mul_(5)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(3)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _alfworld_names() -> Iterator[str]:
    """All things and places of ALFWorld: an unseen room has some that no transcript mentions."""
    from alfworld.gen import constants

    for receptacle, objects in constants.VAL_RECEPTACLE_OBJECTS.items():
        yield receptacle
        yield from objects
    yield from constants.OBJECTS


def build_tokenizer(texts: Iterable[str]):
    """A word-level ``tokenizers.Tokenizer`` whose vocabulary is the words of ``texts``."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace(Regex(r"(?:, and|,) a (?=[a-z]+ \d)"), " "),
        normalizers.Replace(Regex(r"(?<=see|ying:) a (?=[a-z]+ \d)"), " "),
    ])
    phrases = "|".join(p.replace(".", r"\.") for p in FIXED_PHRASES)
    names = sorted({name.lower() for name in _alfworld_names()} - set(MANY), key=lambda name: (-len(name), name))
    # Numbers that games have; a name with another one is two tokens.
    numbered = rf"(?:(?:{'|'.join(names)}) [1-6]|(?:{'|'.join(MANY)}) (?:[1-9]|[1-4]\d))(?!\d)"
    words = rf"(?:{'|'.join(LABELS)})|(?:{phrases})(?!\w)|{numbered}|\w+|\n|[^\w\s]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "removed", invert=True)
    found = {word for text in texts for word, _ in
             tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))}
    numbers = {str(n) for n in range(1, 51)}
    found |= {*names, *MANY, *(f"{name} {n}" for name in names for n in range(1, 7)),
              *(f"{name} {n}" for name in MANY for n in range(1, 50))}
    special = ["[PAD]", "[UNK]", "[EOS]"]
    vocabulary = [*special, *sorted(found | numbers | {"\n"} | set(LABELS) | set(FIXED_PHRASES))]
    tokenizer.model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)

    def put(pattern: str, text: str):
        return decoders.Replace(Regex(pattern), text)

    tokenizer.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="\x01", cleanup=False),  # a space before each token ...
        decoders.Fuse(),
        put(r" (?=[.,'])", ""),  # ... but not before punctuation
        put(r" ?\n ?", "\n"),
        put(r"(?<=') (?=s )", ""),  # There's
        # Two things in a row are a list; its last one stands before a full stop.
        put(r"(?<=\d) (?=[a-z]+ \d+(?: |\.|$))", ", a "),
        put(r", a (?=[a-z]+ \d+\.)", ", and a "),
        put(r"(?<=see )(?=[a-z]+ \d)", "a "),
        put(r"(?<=carrying: )(?=[a-z]+ \d)", "a "),
    ])
    return tokenizer


if __name__ == "__main__":
    run_main(main)
