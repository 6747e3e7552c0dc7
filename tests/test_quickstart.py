"""The quickstart in miniature: every step of the real pipeline, on real games, with models that learn nothing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

REPO = Path(__file__).parents[1]
MINIATURE = {
    "ITP_VENV": "active", "TRAIN_GAMES": "6", "SEEN_GAMES": "1", "UNSEEN_GAMES": "6", "MISSIONS": "2",
    "MIXED_MISSIONS": "1", "DRILLS": "128", "LM_EPOCHS": "1", "POLICY_EPOCHS": "1", "WM_ROWS": "40", "WM_EPOCHS": "1",
    "MAX_K": "1", "MAX_STEPS": "4", "LABEL_ROWS": "12", "RL_EPISODES": "4", "ROUNDS": "1",
    "SAMPLES": "1",
}


def read_steps(results: Path) -> list[dict]:
    return json.loads((results / "0.json").read_text())["foresight_steps"]


def test_quickstart_in_miniature(tmp_path: Path) -> None:
    command = ["bash", str(REPO / "scripts" / "quickstart.sh"), str(tmp_path)]
    first = subprocess.run(command, env=os.environ | MINIATURE, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for name in ("sft", "sft-free", "foresight", "implement", "warm-up", "itp-r", "itp-r-k0", "itp-r-k1"):
        summary = json.loads((tmp_path / "eval" / name / "summary.json").read_text())
        assert summary["overall"]["n"] == 6
        assert name in first.stdout
    assert all(step["k"] <= 1 for step in read_steps(tmp_path / "eval" / "foresight"))
    assert all(len(step["k_logprobs"]) == 2 for step in read_steps(tmp_path / "eval" / "itp-r"))
    assert all(step["k"] == 1 for step in read_steps(tmp_path / "eval" / "itp-r-k1"))
    fidelity = json.loads((tmp_path / "held_out" / "fidelity.json").read_text())
    assert {source: rows["all"]["n"] > 0 for source, rows in fidelity["models"]["world_model"]["one_step"].items()} \
        == {"expert": True, "random": True}
    weights = tmp_path / "policy" / "merged_full" / "model.safetensors"
    trained = weights.stat().st_mtime_ns

    again = subprocess.run(command, env=os.environ | MINIATURE, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert weights.stat().st_mtime_ns == trained  # nothing is trained twice
    assert "6 finished before" in again.stderr
