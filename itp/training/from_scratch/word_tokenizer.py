"""ALFWorld's tokenizer for small models and short sequences, made by hand: a vocabulary of words.

The words are those of the transcripts.  A thing or place with its number (``cabinet 1``) is one token, and so is what
the engine says in fixed words (``You arrive at``, ``, you see``).  The articles and commas of a list ("a mug 1, a
cup 2, and a pan 3") are dropped on the way in and put back on the way out, so that what a model writes is what the
engine would.  All engine text survives the round trip (``help`` excepted).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from itp.envs.alfworld.vocabulary import place_types
from itp.text.alfworld_phrases import FIXED_PHRASES
from itp.training.from_scratch import state_words

MANY = ("cabinet", "drawer", "shelf")
"""Places that a room may have dozens of."""

LABELS = ("Task:", "Observation:", "Action:", "If:", "Then:", "Horizon:", "Thought:", "Reflection:", "Helps:")

LIST_FOLLOWS = {", you see": ", you see", " is open. In it, you see": "In it, you see"}
"""The words between a place and the list of what is there, and the phrase that says the same by itself."""


def _alfworld_names() -> Iterator[str]:
    """All things and places of ALFWorld: an unseen room has some that no transcript mentions."""
    from alfworld.gen import constants

    for receptacle, objects in constants.VAL_RECEPTACLE_OBJECTS.items():
        yield receptacle
        yield from objects
    yield from constants.OBJECTS


def build_tokenizer(texts: Iterable[str], *, joined: bool = False, states: bool = False):
    """A word-level ``tokenizers.Tokenizer`` whose vocabulary is the words of ``texts``.

    ``joined``: a place whose contents follow is one token with the words between (``cabinet 1, you see``).  What is
    copied from an earlier sight then stands directly behind this token, and a small model learns to copy it, which it
    doesn't if a token stands between.  ``states``: it reads and writes symbolic states
    (:mod:`itp.training.from_scratch.state_words`).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    def dropped(pattern: str, left: str):
        return normalizers.Replace(Regex(pattern), left)

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([
        dropped(r"(?:, and|,) a (?=[a-z]+ \d)", " "), dropped(r"(?<=see|ying:) a (?=[a-z]+ \d)", " "),
        *(dropped(*one) for one in state_words.DROPPED if states),
    ])
    phrases = "|".join(p.replace(".", r"\.") for p in FIXED_PHRASES)
    names = sorted({name.lower() for name in _alfworld_names()} - set(MANY), key=lambda name: (-len(name), name))
    # Numbers that games have; a name with another one is two tokens.
    numbered = rf"(?:(?:{'|'.join(names)}) [1-6]|(?:{'|'.join(MANY)}) (?:[1-9]|[1-4]\d))(?!\d)"
    if joined:
        numbered += rf"(?:{'|'.join(words.replace('.', '[.]') for words in LIST_FOLLOWS)})?"
    words = rf"(?:{'|'.join(LABELS)})|(?:{phrases})(?!\w)|{numbered}|\w+|\n|[^\w\s]"
    if states:
        heads, whole = ("|".join(map(re.escape, these)) for these in (state_words.HEADS, state_words.PHRASES))
        words = rf'"(?:{numbered})": (?:{heads}|\[)|{heads}|{whole}|{words}'
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "removed", invert=True)
    found = {word for text in texts for word, _ in
             tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))}
    numbers = {str(n) for n in range(1, 51)}
    counts = {**dict.fromkeys(names, 7), **dict.fromkeys(MANY, 50)}
    found |= {*counts, *(f"{name} {n}" for name, end in counts.items() for n in range(1, end))}
    if joined:
        on, inside = LIST_FOLLOWS
        found |= {f"{name} {n}{inside if opens else on}" for name, opens in place_types().items()
                  for n in range(1, counts[name])}
    if states:
        found |= {*state_words.HEADS, *state_words.PHRASES, state_words.LIST,
                  *state_words.heads(place_types(), counts)}
    special = ["[PAD]", "[UNK]", "[EOS]"]
    vocabulary = [*special, *sorted(found | numbers | {"\n"} | set(LABELS) | set(FIXED_PHRASES))]
    tokenizer.model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)

    def put(pattern: str, text: str):
        return decoders.Replace(Regex(pattern), text)

    if states:
        tokenizer.decoder = decoders.Sequence([
            decoders.WordPiece(prefix="\x01", cleanup=False), decoders.Fuse(),
            *(put(*one) for one in state_words.PUT_BACK)])
        return tokenizer
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
