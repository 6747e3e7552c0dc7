"""Tokenizers of the kinds that people use, learned from a few texts."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[EOS]"]
KINDS = ("byte_level", "byte_level_crossing", "byte_level_prefix", "sentencepiece", "sentencepiece_crossing",
         "metaspace_first", "metaspace_always", "metaspace_never", "metaspace_unsplit", "unigram", "word_level")
"""``crossing`` and ``unsplit``: their tokens may hold line breaks and what stands on both sides of them."""


def tokenizer_of(kind: str, texts: Iterable[str], bos: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of one of KINDS.  ``bos``: a token that it puts before every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from itp.training.from_scratch.word_tokenizer import build_tokenizer

    texts, size = list(texts), 400
    if kind == "word_level":
        made = build_tokenizer(texts)
    else:
        made = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="[UNK]", fuse_unk=True))
        alphabet = ["\n", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
        if kind.startswith("byte_level"):
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte_level_prefix",
                                                          use_regex=kind != "byte_level_crossing")
            made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        elif kind.startswith("sentencepiece"):
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                              decoders.Strip(" ", 1, 0)])
            if kind == "sentencepiece":  # its tokens are learned in words, and applied to whole texts
                made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁?[^▁\n]+|▁"), "isolated")
        else:
            scheme = kind.removeprefix("metaspace_")
            scheme, split = (scheme, True) if scheme in ("first", "always", "never") else ("always", kind == "unigram")
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
            made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
        common = {"vocab_size": size, "special_tokens": SPECIAL, "show_progress": False, "initial_alphabet": alphabet}
        made.train_from_iterator(texts, trainers.UnigramTrainer(unk_token="[UNK]", **common) if kind == "unigram"
                                 else trainers.BpeTrainer(**common))
        if kind == "sentencepiece":
            made.pre_tokenizer = None
            made = _with_bytes(made)
    if bos:
        made.add_special_tokens([bos])
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A",
                                                            special_tokens=[(bos, made.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos or None, pad_token="[PAD]",
                                   unk_token="[UNK]", eos_token="[EOS]", clean_up_tokenization_spaces=False)


def _with_bytes(made):
    """As in Llama-2's vocabulary, line breaks and unknown characters are tokens of a byte each."""
    from tokenizers import Tokenizer

    whole = json.loads(made.to_str())
    vocabulary = whole["model"]["vocab"]
    vocabulary["<0x0A>"] = vocabulary.pop("\n")
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    whole["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(whole))
