"""Writes a randomly initialised model of a real model's shape, to measure speed with where there are no weights.

    python scripts/random_model.py --tokenizer runs/quickstart/policy/merged_full --size 0.5b --out_dir runs/random

It keeps the tokenizer of a model folder and its prompt format; what it says means nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from itp.config import flag, parse_settings
from itp.devices import DTYPES, resolve_dtype
from itp.model_card import MODEL_CARD
from itp.pretrained import load_tokenizer
from itp.program import run_main

SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 1024},
}
"""Qwen2.5's, and one for tests."""


@dataclass
class RandomModelSettings:
    tokenizer: str = flag(help="model folder (or hub name) whose tokenizer it gets")
    out_dir: str = flag(help="the model's folder")
    size: str = flag("0.5b", help="whose shape it has: Qwen2.5's of this size", choices=tuple(SHAPES))
    dtype: str = flag("bf16", help="precision of its weights", choices=DTYPES)
    seed: int = flag(123, help="seed of its weights")


def main() -> None:
    write(parse_settings(RandomModelSettings, prog="python scripts/random_model.py", description=__doc__))


def write(settings: RandomModelSettings) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(settings.tokenizer)
    torch.manual_seed(settings.seed)
    config = Qwen2Config(**SHAPES[settings.size], max_position_embeddings=32768, rope_theta=1e6,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config).to(resolve_dtype(settings.dtype, "cuda"))
    with writing(settings.out_dir):
        model.save_pretrained(settings.out_dir)
        tokenizer.save_pretrained(settings.out_dir)
        card = Path(settings.tokenizer) / MODEL_CARD
        if card.is_file():
            shutil.copy(card, settings.out_dir)
    print(f"{settings.out_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million random weights")


if __name__ == "__main__":
    run_main(main)
