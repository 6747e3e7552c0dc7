"""The models of this repository and the demo that plays them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itp.agent.heads import kmax_of
from itp.errors import UserError
from itp.pretrained import check_model_path, load_causal_lm
from scripts import release_model
from scripts.release_model import ReleaseSettings, release
from tests.tiny import write_tiny_model

REPO = Path(__file__).parents[1]
MODELS = REPO / "models" / "alfworld"


def test_the_released_models_are_small_and_load() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 12e6
    assert kmax_of(MODELS / "policy") == 2
    for name in ("policy", "world_model"):
        model, tokenizer = load_causal_lm(str(MODELS / name))
        assert model.dtype == torch.float32 and len(tokenizer) == model.config.vocab_size


def test_the_demo_plays_and_writes_its_page(tmp_path: Path) -> None:
    env = os.environ | {"ITP_VENV": "active", "GAMES": "4"}
    run = subprocess.run(["bash", str(REPO / "scripts" / "demo.sh"), str(tmp_path)], env=env, capture_output=True,
                         text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    overall = {name: json.loads((tmp_path / "eval" / name / "summary.json").read_text())["overall"]
               for name in ("acts-at-once", "imagines-1", "plans")}
    assert all(one["n"] == 4 and one["rate"] >= 0.5 for one in overall.values()), overall
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    assert str(tmp_path / "report" / "index.html") in run.stdout


def test_a_released_model_is_the_trained_one_in_half_precision(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "trained")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("---\ntags: [x]\n---\n# trained\n\nFine-tuned.\n")
    (tmp_path / "about.md").write_text("Plays well.\n")
    for _ in range(2):  # the second time over the first
        subprocess.run([sys.executable, REPO / "scripts" / "release_model.py", "--model", source, "--out_dir",
                        tmp_path / "policy", "--about", tmp_path / "about.md"], check=True, cwd=REPO)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "policy"))
    assert set(before) == set(after)
    assert all(torch.equal(weight.to(torch.bfloat16), after[name]) for name, weight in before.items())
    assert (tmp_path / "policy" / "README.md").read_text() == (
        "---\ntags: [x]\n---\n# policy\n\nPlays well.\n\nFine-tuned.\n")
    assert load_causal_lm(str(tmp_path / "policy"))[0].dtype == torch.float32
    assert (tmp_path / "policy" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_release_that_is_stopped_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_tiny_model(tmp_path / "trained"), tmp_path / "out"
    release(ReleaseSettings(model=str(source), out_dir=str(out)))
    check_model_path(str(out))

    def stop(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(release_model, "_halve", stop)
    with pytest.raises(KeyboardInterrupt):
        release(ReleaseSettings(model=str(source), out_dir=str(out)))
    with pytest.raises(UserError, match="config.json"):
        check_model_path(str(out))


def test_a_release_mixes_with_no_other_files(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "trained"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="the trained model itself"):
        release(ReleaseSettings(model=str(source), out_dir=str(source)))
    with pytest.raises(UserError, match="nothing.md"):
        release(ReleaseSettings(model=str(source), out_dir=str(out), about=str(tmp_path / "nothing.md")))
    assert not list(out.iterdir())
    (out / "policy_heads.json").write_text("{}")
    with pytest.raises(UserError, match="holds policy_heads.json"):
        release(ReleaseSettings(model=str(source), out_dir=str(out)))
