"""What a trained model brings to the Hugging Face hub: a README with base, data, settings, metrics and versions."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itp.runtime import MODEL_CARD, UserError, model_fingerprint, read_json, versions, write_atomic

if TYPE_CHECKING:
    from itp.training.finetune import FinetuneSettings
    from itp.training.rl_k import RlSettings

log = logging.getLogger("itp.finetune")
DATA_FLAGS = ("data_path", "train_json", "train_jsonl", "transitions")
"""The flags of the programs that name training data."""
OTHER_PATHS = ("out_dir", "merged_dir", "model_path", "policy_model_path", "wm_model_path", "env_data_path",
               "alfworld_config", "pairs", "jar_path")
"""Other flags that lead to places of this machine."""


def write_readme(folder: Path, settings: FinetuneSettings | RlSettings, metrics: Mapping[str, Any]) -> None:
    """The model card of ``folder``, as the hub shows it."""
    config = dataclasses.asdict(settings)
    data = ", ".join(Path(config[name]).name for name in DATA_FLAGS if config.get(name))
    if "env_split" in config:  # stage 3
        data = f"games of {config['env']} (split {config['env_split']})"
    base = config.get("model_path") or config["policy_model_path"]
    # The hub links a base model by its name there; a folder of this machine means nothing to others.
    front = [f"base_model: {base}"] if not Path(base).exists() else []
    # Of a hub's model the fingerprint is its name with the revision, of a folder what its files hold.
    fingerprint = model_fingerprint(base)
    source = f"`{Path(base).name}` (weights {fingerprint})" if Path(base).exists() else f"`{fingerprint}`"
    card = read_json(folder / MODEL_CARD)
    told = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    warning = [f"**{card['warning']}**", ""] if "warning" in card else []
    write_atomic(folder / "README.md", "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", *front,
        "tags: [imagine-then-plan]", "---",
        f"# {Path(settings.out_dir).name}", "",
        f"Fine-tuned from {source} on {data or 'text'}.",
        f"`{MODEL_CARD}` says how it is to be asked"
        f"{' (turns of a chat)' if 'turns' in card else ' (plain text)'}.", "",
        *warning, "## Metrics", "", *(f"- {name}: {value}" for name, value in told.items()), "",
        "## Settings", "", "```json",
        json.dumps({k: v for k, v in config.items() if k not in (*OTHER_PATHS, *DATA_FLAGS)}, indent=2), "```", "",
        "## Versions", "", *(f"- {name}: {version}" for name, version in versions().items()), ""]))


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
