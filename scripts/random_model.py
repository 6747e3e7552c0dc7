"""Writes a randomly initialized model of a real model's shape, to measure speed with where there are no weights.

    python scripts/random_model.py --tokenizer runs/quickstart/policy/merged_full --size 0.5b --out_dir runs/random

It keeps the tokenizer of a model folder and its prompt format; what it says means nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itp.config import flag, parse_settings
from itp.devices import DTYPES, resolve_dtype
from itp.files import writing
from itp.model_card import MODEL_CARD, ModelCard
from itp.pretrained import load_tokenizer
from itp.program import run_main

SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": False, "vocab_size": 128256},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 2048},
}
"""Qwen2.5's, that of Llama 3.1 with 8 B parameters, and one for tests.

All are written as Llama: Qwen2's biases cost nothing, but AutoTokenizer would read its folder's tokenizer as Qwen2's.
"""


@dataclass
class RandomModelSettings:
    tokenizer: str = flag(help="model folder (or hub name) whose tokenizer it gets")
    out_dir: str = flag(help="the model's folder")
    size: str = flag("0.5b", help="whose shape it has", choices=tuple(SHAPES))
    dtype: str = flag("bf16", help="precision of its weights", choices=DTYPES)
    device: str = flag("cpu", help="where its weights are made; a GPU is faster")
    max_k: int = flag(0, at_least=0, help="give it heads, a K-head for up to this many steps among them (0: none)")
    seed: int = flag(123, help="seed of its weights")


def main() -> None:
    write(parse_settings(RandomModelSettings, prog="python scripts/random_model.py", description=__doc__))


def write(settings: RandomModelSettings) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(settings.tokenizer)
    torch.manual_seed(settings.seed)
    config = LlamaConfig(**SHAPES[settings.size], max_position_embeddings=32768,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, dtype=resolve_dtype(settings.dtype, "cuda"))
    with torch.device(settings.device):
        model = LlamaForCausalLM._from_config(config)
    if settings.max_k:
        from itp.agent.policy_with_heads import PolicyWithHeads

        card = ModelCard.read(settings.tokenizer) or ModelCard()
        with writing(settings.out_dir):
            PolicyWithHeads.create(model, tokenizer, settings.max_k, card).save_pretrained(settings.out_dir, tokenizer)
    else:
        with writing(settings.out_dir):
            _save(settings, model, tokenizer)
    print(f"{settings.out_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million random weights")


def _save(settings: RandomModelSettings, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(settings.out_dir)
    tokenizer.save_pretrained(settings.out_dir)
    card = Path(settings.tokenizer) / MODEL_CARD
    if card.is_file():
        shutil.copy(card, settings.out_dir)


if __name__ == "__main__":
    run_main(main)
