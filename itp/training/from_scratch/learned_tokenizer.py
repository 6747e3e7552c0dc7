"""A tokenizer learned from transcripts of any engine, without loss: byte-level BPE on words, and whole lines.

Small models learn from short sequences.  Simulators say some lines again and again ("\\tA door to the kitchen (that
is open)"): those that save most are one token each.  All other text is words with the space before them, merged
from bytes, so that a word of an unseen game is several tokens and never an unknown one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

VOCABULARY = 3000
"""Tokens that are learned, besides the lines."""
LINES = 400
MIN_WORDS = 4
"""A shorter line names one thing, which the agent may have to name too: better in words."""
MIN_COUNT = 8

WORDS = r"\n[ \t]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"
"""A line break with the indentation after it; a word, digit or sign with the space before it."""


def frequent_lines(texts: Iterable[str]) -> list[str]:
    """The indented lines whose repetition costs most words, as they stand in a state, without the line break."""
    counts = Counter(line.strip(" ") for text in texts for line in text.split("\n")[1:] if line.startswith(" "))
    words = {line: len(line.split()) for line in counts}
    worth = [line for line, n in counts.items() if n >= MIN_COUNT and words[line] >= MIN_WORDS]
    return sorted(worth, key=lambda line: (-counts[line] * words[line], line))[:LINES]


def learn_tokenizer(texts: list[str]):
    """A ``tokenizers.Tokenizer`` for ``texts``; the same for the same texts in any order."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sorted(texts), trainer)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in frequent_lines(texts)])
    return tokenizer
