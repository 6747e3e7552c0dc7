"""What the tests of stage 3 share: random models, settings of short runs, and what those leave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from itp.envs.alfworld.games import list_games
from itp.training.itp_r.a2c_settings import RlSettings
from tests.tiny import write_tiny_model

KMAX = 2


def write_models(root: Path, games_root: Path) -> tuple[Path, Path]:
    """A random policy with heads and a random world model that know the names of all things in the games."""
    import torch

    from itp.agent.policy_with_heads import PolicyWithHeads
    from itp.pretrained import load_causal_lm

    games = [g for split in ("train", "valid_seen") for g in list_games(split, games_root)]
    things = {name.lower() for game in games for name in re.findall(r"([A-Za-z]+)_bar_", Path(game.path).read_text())}
    words = sorted(name + part for name in things for part in ("", "basin"))
    plain, world_model = (write_tiny_model(root / name, seed=seed, words=words)
                          for seed, name in enumerate(("plain", "world_model")))
    model, tokenizer = load_causal_lm(str(plain))
    policy = PolicyWithHeads.create(model, tokenizer, KMAX)
    for head in (policy.heads.k_head, policy.heads.v_head):
        torch.nn.init.normal_(head.weight, std=0.1)
    policy.save_pretrained(root / "policy", tokenizer)
    return root / "policy", world_model


def settings(models: tuple[Path, Path], games_root: Path, out: Path, **changes) -> RlSettings:
    policy, world_model = models
    common = {
        "policy_model": str(policy), "wm_model": str(world_model), "out_dir": str(out),
        "env_data_root": str(games_root), "policy_device": "cpu", "wm_device": "cpu", "wm_max_new_tokens": 3,
        "episodes_per_epoch": 8, "episodes_per_update": 2, "num_envs": 2, "env_processes": 1, "max_steps": 4,
        "max_seq_len": 480, "history_keep_steps": 6, "foresight_format": "full",
        "action_selection": "constrained", "action_temperature": 1.3, "lr": 1e-3, "lora_r": 0, "eval_games": 1,
        "eval_every": 2, "save_every": 2, "value_updates": 1}
    return RlSettings(**(common | changes))


def metrics(out: Path) -> list[dict]:
    """The rows of a run without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def approx(rows: list[dict], rel: float = 1e-4) -> list[dict]:
    return [{k: pytest.approx(v, rel=rel, abs=rel / 10) for k, v in row.items()} for row in rows]
