"""What a trained model brings to the Hugging Face hub: a README with base, data, settings, metrics and versions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itp.config import flags_that
from itp.errors import UserError
from itp.files import write_atomic
from itp.model_card import MODEL_CARD, ModelCard
from itp.pretrained import model_fingerprint
from itp.run_dir import versions
from itp.text.prompt_format import PLAIN

log = logging.getLogger(__name__)


def write_readme(folder: Path, settings: Any, metrics: Mapping[str, Any]) -> None:
    """Write the README of the model in ``folder``, which the hub shows as its card.

    ``settings``: the dataclass of flags that it was trained with.  Paths of this machine stay out: of training data the
    README has the files' names, of other paths nothing.  ``metrics``: only numbers are told.
    """
    import huggingface_hub

    base = _base_model(settings)
    # The hub links a base model by its name there; a folder of this machine means nothing to others.
    about = huggingface_hub.ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["imagine-then-plan"],
        base_model=None if Path(base).exists() else base)
    text = _text(ModelCard.read(folder) or ModelCard(), base, settings, metrics)
    write_atomic(folder / "README.md", str(huggingface_hub.ModelCard(f"---\n{about.to_yaml()}\n---\n{text}")))


def _text(card: ModelCard, base: str, settings: Any, metrics: Mapping[str, Any]) -> str:
    """The README below its front matter, in Markdown."""
    # Of a hub's model the fingerprint is its name with the revision, of a folder what its files hold.
    fingerprint = model_fingerprint(base)
    source = f"`{Path(base).name}` (weights {fingerprint})" if Path(base).exists() else f"`{fingerprint}`"
    turns = "plain text" if card.template == PLAIN else "turns of a chat"
    warning = [f"**{card.warning}**", ""] if card.warning else []
    told = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    shown = {name: vars(settings)[name] for name in flags_that(type(settings), lambda about: not about.holds)}
    return "\n".join([
        f"# {Path(settings.out_dir).name}", "",
        f"Fine-tuned from {source} on {_training_data(settings) or 'text'}.",
        f"`{MODEL_CARD}` holds its prompt format ({turns}).", "",
        *warning, "## Metrics", "", *(f"- {name}: {value}" for name, value in told.items()), "",
        "## Settings", "", "```json", json.dumps(shown, indent=2), "```", "",
        "## Versions", "", *(f"- {name}: {version}" for name, version in versions().items()), ""])


def _base_model(settings: Any) -> str:
    """What the training started from: stage 3 has no ``model_path``, and the other programs all set theirs."""
    return vars(settings).get("model_path") or settings.policy_model


def _training_data(settings: Any) -> str:
    """The names of the files that were learned from, or of the games that were played in stage 3."""
    if "env_split" in vars(settings):
        return f"games of {settings.env} (split {settings.env_split})"
    paths = [vars(settings)[name] for name in flags_that(type(settings), lambda about: about.holds == "data")]
    return ", ".join(Path(path).name for given in paths if given for path in given.split(","))


def push(folder: Path, repository: str) -> None:
    """Upload a model folder to ``repository`` (user/name), private unless it is there.  Raises UserError.

    What a run keeps there to go on from (``.pt``) stays.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # the client's own, which it also raises without a network

    try:
        huggingface_hub.create_repo(repository, private=True, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["*.pt"])
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"--push_to_hub {repository}: {type(error).__name__}; log in with `hf auth login`, check name "
                        f"and network, and start the same command again (the model is whole in {folder})") from error
    log.info("%s is on the hub as %s", folder, repository)
