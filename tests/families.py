"""Tiny random models of the families that people use, each with its own layout of the vocabulary and chat template.

=======  ===================  =====  ========================  ==============================================
family   begins a text with   pads   rows of the embedding     its template
=======  ===================  =====  ========================  ==============================================
qwen2    nothing              yes    more than there are       puts in a system turn where none is given
                                     tokens; tied to the head
qwen3    nothing              yes    more than there are       closes an empty block of thought unless it thinks
llama    <|begin_of_text|>    no     one a token               writes that token and a date, trims what is said
mistral  <s>, then a space    no     one a token               writes that token, refuses a system turn
smollm2  nothing              yes    one a token; tied         puts in a system turn where none is given
=======  ===================  =====  ========================  ==============================================

SmolLM2's vocabulary has its real size and no spare rows, so the control token makes the embedding, which is the head
too, one row larger.  Its stop token also pads, and its ``bos_token`` begins every turn but no text.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny import TEXTS
from tests.tokenizers_of import tokenizer_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILIES = ("qwen2", "qwen3", "llama", "smollm2")
"""Those with tokenizers on bytes.  Mistral's is SentencePiece, which puts a space before every text."""
ROWS = 64
"""The Qwen vocabularies are padded to a multiple of this."""
TOKENS = 49152
"""Those of SmolLM2."""

_QWEN = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "qwen2": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
             "{% endif %}" + _QWEN,
    "smollm2": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
               "trained by Hugging Face<|im_end|>\n{% endif %}" + _QWEN,
    "qwen3": _QWEN + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
                     "<think>\n\n</think>\n\n{% endif %}",
    "llama": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
             "{% set messages = messages[1:] %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
             "Today Date: {{ date_string or 'unknown' }}\n\n{{ system }}<|eot_id|>{% for m in messages %}"
             "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
             "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
               "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}"
               "{% endif %}{% endfor %}",
}
SPECIAL = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
_PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
"""How these families cut a text before byte-pair encoding: words keep the space before them, line breaks gather."""


def write_family(folder: Path, family: str, *, seed: int = 0, words: Iterable[str] = ()) -> Path:
    """A random two-layer model of ``family`` with its tokenizer, as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    tokenizer = _tokenizer(family, [*TEXTS, *words])
    qwen = family in ("qwen2", "qwen3")  # the others have Llama's architecture
    rows = -(-len(tokenizer) // ROWS) * ROWS if qwen else len(tokenizer)
    assert rows > len(tokenizer) if qwen else family != "smollm2" or rows == TOKENS
    torch.manual_seed(seed)
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}.get(family, LlamaConfig)(
        vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=4096, tie_word_embeddings=family in ("qwen2", "smollm2"),
        initializer_range=0.3, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, **({"head_dim": 8} if family == "qwen3" else {}))
    model = AutoModelForCausalLM.from_config(config)
    if family == "llama":
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _tokenizer(family: str, texts: list[str]):
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if family == "mistral":
        tokenizer = tokenizer_of("sentencepiece", texts, bos="<s>")
        tokenizer.chat_template = TEMPLATES[family]
        return tokenizer
    if family == "smollm2":
        bpe = Tokenizer.from_str(_many_tokens(tuple(texts)))
    else:
        bpe = _byte_pairs(texts, 460, pre_tokenizers.Split(Regex(_PIECES), "isolated"),
                          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    bpe.add_special_tokens(SPECIAL[family])
    if family == "qwen3":  # ordinary text for the decoder, which keeps them
        bpe.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if family == "smollm2":
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    if family == "llama":
        bos = "<|begin_of_text|>"
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
        names = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def _byte_pairs(texts: Iterable[str], size: int, *cut: Any) -> Tokenizer:
    """A byte-level BPE of ``size`` tokens, learned from texts that ``cut`` divides."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(list(cut)), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return bpe


@functools.cache
def _many_tokens(texts: tuple[str, ...]) -> str:
    """SmolLM2's kind of tokenizer with as many tokens, as JSON: of ``texts``, and of words that are made up."""
    from tokenizers import pre_tokenizers

    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    made_up = " ".join("".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(60000))
    return _byte_pairs([*texts * 2, made_up], TOKENS - len(SPECIAL["smollm2"]),
                       pre_tokenizers.Digits(individual_digits=True),
                       pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str()
