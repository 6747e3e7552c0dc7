"""Writes a trained model as it is released: weights in half precision, and a card that says what was measured.

    python scripts/release_model.py --model runs/released/itp_r/merged_full --about models/alfworld/policy.md \
        --out_dir models/alfworld/policy

The card is the README that training wrote, with the text of --about below its title.  ``config.json`` comes last, so
that a folder in which the script was stopped is no model; start it again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import check_output_folder, read_object, read_text, write_atomic, write_json, writing
from itp.pretrained import check_model_path
from itp.program import run_main

WEIGHTS = "model.safetensors"
CARD = "README.md"
CONFIG = "config.json"


@dataclass
class ReleaseSettings:
    model: str = flag(help="folder of the trained model, its weights in one file")
    out_dir: str = flag(help="folder of the released model")
    about: str = flag("", help="text of the card: what the model is, how it was made, what was measured")


def main() -> None:
    release(parse_settings(ReleaseSettings, prog="python scripts/release_model.py", description=__doc__))


def release(settings: ReleaseSettings) -> None:
    check_model_path(settings.model)
    model, out = Path(settings.model), Path(settings.out_dir)
    if not (model / WEIGHTS).is_file():
        raise UserError(f"{model} has no {WEIGHTS}: a model in several files isn't released by this script")
    files = {file.name for file in model.iterdir() if file.is_file()}
    _check_output(model, out, files | {CARD})
    card, config = _card(model, settings), read_object(model / CONFIG) | {"dtype": "bfloat16"}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).unlink(missing_ok=True)
        for name in sorted(files - {WEIGHTS, CARD, CONFIG}):
            shutil.copy(model / name, out)
        _halve(model / WEIGHTS, out / WEIGHTS)
        write_atomic(out / CARD, card)
        write_json(out / CONFIG, config)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


def _check_output(model: Path, out: Path, written: set[str]) -> None:
    """Refuse to overwrite the trained model, and a folder with other files, which would count as the released one's."""
    check_output_folder(out)
    if out.resolve() == model.resolve():
        raise UserError(f"--out_dir {out}: the trained model itself; choose another folder")
    if out.is_dir() and (others := sorted({file.name for file in out.iterdir()} - written)):
        raise UserError(f"--out_dir {out}: holds {others[0]}, which {model} hasn't; choose another folder, or delete "
                        "that")


def _halve(source: Path, target: Path) -> None:
    """Heads stay in float32, in a file of their own: they are small, and are computed so."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: weight.to(torch.bfloat16) if weight.is_floating_point() else weight
               for name, weight in load_file(source).items()}
    save_file(weights, target, metadata={"format": "pt"})


def _card(model: Path, settings: ReleaseSettings) -> str:
    """The training's README under the released name, with the text of ``about`` below the title."""
    own = read_text(model / CARD) if (model / CARD).is_file() else "# model\n"
    front, _, rest = f"\n{own}".partition("\n# ")
    about = f"\n{read_text(settings.about).strip()}\n" if settings.about else ""
    return f"{front}\n# {Path(settings.out_dir).name}\n{about}{rest.partition(chr(10))[2]}".lstrip("\n")


if __name__ == "__main__":
    run_main(main)
