"""A tiny random model with the demo's own kind of tokenizer, for tests of logic."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEXTS = [
    "Task: put a clean plate in fridge\nObservation: You are in the middle of a room. Looking quickly around you, "
    "you see a cabinet 1, a fridge 1, and a desk 2.\nAction: go to cabinet 1\nObservation: You arrive at cabinet 1. "
    "The cabinet 1 is closed.\nAction: open cabinet 1\nObservation: You open the cabinet 1. The cabinet 1 is open. "
    "In it, you see a plate 1, and a mug 2.\nAction: take plate 1 from cabinet 1\nObservation: You pick up the plate "
    "1 from the cabinet 1.\nAction: move plate 1 to fridge 1\nObservation: Nothing happens.\nHorizon: 2\n"
    "If: look\nThen: inventory heat cool clean use examine with close off on\n",
]


def write_tiny_model(folder: Path, *, seed: int = 0, words: Iterable[str] = (), made: Any = None) -> Path:
    """A random two-layer Llama whose outputs are far from uniform, as an ordinary model folder.

    ``words``: what its vocabulary knows besides the words of TEXTS.  ``made``: another ``tokenizers.Tokenizer``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from itp.training.from_scratch.word_tokenizer import build_tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made or build_tokenizer([*TEXTS, *words]), pad_token="[PAD]",
                                        unk_token="[UNK]", eos_token="[EOS]", clean_up_tokenization_spaces=False)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
