"""Tiny random models of the families that people use, each with its own layout of the vocabulary and chat template.

=======  ===================  =====  ========================  ==============================================
family   begins a text with   pads   rows of the embedding     its template
=======  ===================  =====  ========================  ==============================================
qwen2    nothing              yes    more than there are       puts in a system turn where none is given
                                     tokens; tied to the head
qwen3    nothing              yes    more than there are       closes an empty block of thought unless it thinks
llama    <|begin_of_text|>    no     one a token               writes that token and a date, trims what is said
mistral  <s>, then a space    no     one a token               writes that token, refuses a system turn
=======  ===================  =====  ========================  ==============================================
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.tiny import TEXTS
from tests.tokenizers_of import tokenizer_of

FAMILIES = ("qwen2", "qwen3", "llama")
"""Those with tokenizers on bytes.  Mistral's is SentencePiece, which puts a space before every text."""
ROWS = 64
"""The Qwen vocabularies are padded to a multiple of this."""

_QWEN = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "qwen2": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
             "{% endif %}" + _QWEN,
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
    llama = family in ("llama", "mistral")  # an architecture of both
    rows = len(tokenizer) if llama else -(-len(tokenizer) // ROWS) * ROWS
    assert llama or rows > len(tokenizer)
    torch.manual_seed(seed)
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}.get(family, LlamaConfig)(
        vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=4096, tie_word_embeddings=family == "qwen2",
        initializer_range=0.3, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, **({"head_dim": 8} if family == "qwen3" else {}))
    model = AutoModelForCausalLM.from_config(config)
    if family == "llama":
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _tokenizer(family: str, texts: list[str]):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if family == "mistral":
        tokenizer = tokenizer_of("sentencepiece", texts, bos="<s>")
        tokenizer.chat_template = TEMPLATES[family]
        return tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                                   use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=460, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(SPECIAL[family])
    if family == "qwen3":  # ordinary text for the decoder, which keeps them
        bpe.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if family == "llama":
        bos = "<|begin_of_text|>"
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
        names = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer
