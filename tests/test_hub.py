"""What a trained model brings along, and uploading it with the hub stubbed at its edge."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from itp.errors import UserError
from itp.pretrained import model_fingerprint
from itp.training.base_policy import BasePolicySettings, read_dialogues
from itp.training.run import finetune, open_run
from itp.training.settings import check_settings
from tests.tiny import write_tiny_model

TALKS = """[{"id": "a", "conversations": [{"from": "human", "value": "Task: x\\nObservation: y"},
                                         {"from": "gpt", "value": "Action: look"}]}]"""


@pytest.fixture
def settings(tmp_path: Path) -> BasePolicySettings:
    (tmp_path / "talks.json").write_text(TALKS)
    return BasePolicySettings(model_path=str(write_tiny_model(tmp_path / "base")), out_dir=str(tmp_path / "out"),
                              train_json=str(tmp_path / "talks.json"), epochs=1.0, grad_accum=1, eval_share=0.0)


def test_card_and_upload(settings: BasePolicySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: sent.append((name, options["private"])))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: sent.append(
        sorted(p.name for p in Path(options["folder_path"]).iterdir())))
    settings = dataclasses.replace(settings, push_to_hub="me/policy", report_to="tensorboard")
    metrics = finetune(settings, read_dialogues(settings.train_json))
    assert sent[0] == ("me/policy", True)
    assert {"README.md", "itp_model.json", "model.safetensors"} <= set(sent[1])
    assert not [name for name in sent[1] if name.endswith((".bin", ".pt"))]  # safetensors only
    text = (settings.merged_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "pipeline_tag": "text-generation",
                                     "tags": ["imagine-then-plan"]}
    weights = model_fingerprint(settings.model_path)
    assert f"Fine-tuned from `base` (weights {weights}) on talks.json." in body
    assert f"- train_loss: {metrics['train_loss']}" in body
    assert '"lora_r": 8' in body and "- torch: " in body
    assert str(Path(settings.out_dir).parent) not in text  # no path of this machine
    assert list(Path(settings.out_dir).rglob("events.out.tfevents*"))


def test_upload_that_fails_is_one_line(settings: BasePolicySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: str, **options: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    settings = dataclasses.replace(settings, push_to_hub="me/policy")
    assert not open_run(settings, [settings.train_json])
    with pytest.raises(UserError, match="--push_to_hub me/policy: OSError; log in"):
        finetune(settings, read_dialogues(settings.train_json))
    assert (settings.merged_path / "config.json").is_file()
    with pytest.raises(UserError, match="--push_to_hub me/policy: OSError; log in"):
        open_run(settings, [settings.train_json])  # the same command tries again, and trains no second time
    sent = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: sent.append(options["folder_path"]))
    assert open_run(settings, [settings.train_json]) and sent == [settings.merged_path]


def test_no_network_is_one_line(settings: BasePolicySettings, tmp_path: Path) -> None:
    """The real client, and an address at which nobody answers; a process, because it reads the address when loaded."""
    push = ("import pathlib, sys; from itp.training.hub import push; from itp.program import run_main; "
            "run_main(lambda: push(pathlib.Path(sys.argv[1]), 'me/policy'))")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", push, str(tmp_path)], capture_output=True, text=True, timeout=100,
                         check=False, env=environment)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "error: --push_to_hub me/policy: ConnectError; log in" in run.stderr


def test_a_finished_run_is_uploaded_once(settings: BasePolicySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: sent.append(name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: sent.append(options["folder_path"]))
    assert not open_run(settings, [settings.train_json])
    finetune(settings, read_dialogues(settings.train_json))
    for name in ("", "me/policy", "me/policy", "me/other"):
        assert open_run(dataclasses.replace(settings, push_to_hub=name), [settings.train_json])
    assert sent == ["me/policy", settings.merged_path, "me/other", settings.merged_path]


@pytest.mark.parametrize("changes, said", [
    ({"report_to": "wandb"}, "--report_to wandb: it isn't installed"),
    ({"push_to_hub": "me/x", "merge": False}, "--push_to_hub uploads the merged model"),
])
def test_refused_at_once(settings: BasePolicySettings, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_settings(dataclasses.replace(settings, **changes))
