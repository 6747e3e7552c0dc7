"""Rows with pictures: a tiny vision-language model learns them, and reads them again."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.errors import UserError
from itp.files import write_json
from itp.lm.base import Generation, GenParams
from itp.lm.vision import VisionLM, chat_prompt, inputs_of, load_processor, sees
from itp.model_card import ModelCard
from itp.models import load_state_model, load_world_model
from itp.text.belief import Belief
from itp.text.prompts import world_model_prompt
from itp.text.state import State
from itp.transitions import Transition, read_transitions, write_transitions
from tests.tiny import TEXTS, write_tiny_model
from world_model.base_tuning import finetune
from world_model.base_tuning.examples import WorldModelSettings, to_examples
from world_model.base_tuning.vision_task import VisionTask
from world_model.data_processing.metaicl import Counter, scenes_of, to_rows, usable

FIRST = "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, and a desk 2."
STATE = State("put a clean plate in fridge", FIRST)
COLORS = {"red": "You arrive at desk 2. On the desk 2, you see a mug 2.",
          "blue": "You arrive at desk 2. On the desk 2, you see a plate 1."}
CHAT = ("{% for m in messages %}User: {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{{ '\n' }}{% endfor %}")
PATCHES = 4
"""Tokens of a picture of 16 x 16 pixels in patches of 8."""


def write_tiny_vlm(folder: Path) -> Path:
    """A random LLaVA with a CLIP of 16 x 16 pixels, and its processor."""
    import torch
    from transformers import (
        CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from itp.training.from_scratch.word_tokenizer import build_tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer([*TEXTS, *COLORS.values(), "User:"]),
                                        pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
                                        clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=16, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512,
                                pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                                eos_token_id=tokenizer.eos_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="default",
        vision_feature_layer=-1))
    model.save_pretrained(folder)
    eyes = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(eyes, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
                   num_additional_image_tokens=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_vlm(tmp_path_factory.mktemp("vlm") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answer depends on their picture alone, and some without one."""
    folder = tmp_path_factory.mktemp("data")
    for color in COLORS:
        Image.new("RGB", (20, 24), color).save(folder / f"{color}.png")
    rows = [Transition(f"e{i}", 0, STATE.render(), "go to desk 2", said, image=f"{color}.png")
            for i in range(8) for color, said in COLORS.items()]
    rows += [Transition(f"n{i}", 0, STATE.render(), "open cabinet 1", "Nothing happens.") for i in range(2)]
    write_transitions(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def settings_of(vlm: str, data: Path, out: Path, **more: Any) -> WorldModelSettings:
    return WorldModelSettings(model_path=vlm, data_path=str(data), out_dir=str(out), eval_share=0.0, lora_r=0, **more)


def test_files_of_rows_name_pictures_from_their_own_folder(data: Path) -> None:
    written = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert written[0]["image"] == "red.png" and "image" not in written[-1]
    assert read_transitions(data)[0].image == str(data.parent / "red.png")
    (per, pre), *_ = zip(*[iter(to_rows(scenes_of(usable([(t, STATE) for t in read_transitions(data)][:1], Counter())),
                                        0, Counter()))] * 2, strict=True)
    assert (per.source, per.image) == ("perception", str(data.parent / "red.png")) and pre.image == ""


def test_a_rows_message_holds_its_picture_and_its_text(vlm: str, data: Path, tmp_path: Path) -> None:
    """By hand: four picture tokens, the text, the label, the target; the pixels of the right picture."""
    task = VisionTask(settings_of(vlm, data, tmp_path), list(to_examples(read_transitions(data))))
    tokenizer = task.processor.tokenizer
    rows = task.encode(tokenizer).rows
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert [row["input_ids"].count(image) for row in (rows[0], rows[-1])] == [PATCHES, 0]
    learned = [label for label in rows[0]["labels"] if label != -100]
    assert tokenizer.decode(learned).strip() == f"{COLORS['red']} [EOS]"
    assert rows[0]["chat"] == f"User: <image> {STATE.render()}\nAction: go to desk 2\nObservation:"
    batch = task.collator(tokenizer.pad_token_id)([rows[0], rows[-1], rows[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    red, blue = batch["pixel_values"].mean((2, 3))
    assert red.argmax() == 0 and blue.argmax() == 2
    assert (batch["input_ids"] == image).sum(1).tolist() == [PATCHES, 0, PATCHES]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_model_learns_to_say_what_a_picture_shows(vlm: str, data: Path, tmp_path: Path, lora_r: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of all rows is the same, so only the pixels can tell the answers apart."""
    monkeypatch.setattr("sys.argv", ["finetune", "--model_path", vlm, "--data_path", str(data), "--out_dir",
                                     str(tmp_path / "wm"), "--batch_size", "6", "--grad_accum", "1", "--lr", "0.003",
                                     "--epochs", "50" if lora_r == 0 else "1", "--lora_r", str(lora_r),
                                     "--lr_scheduler_type", "constant", "--save_every_steps", "1000"])
    finetune.main()
    metrics = json.loads((tmp_path / "wm" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["exact_match_rows"] >= 1
    folder = tmp_path / "wm" / "merged_full"
    assert sees(folder) and not sees(tmp_path)
    lm = load_world_model(str(folder)).lm
    assert isinstance(lm, VisionLM)
    if lora_r:
        return
    prompt, params = world_model_prompt(STATE.render(), "go to desk 2"), GenParams(max_new_tokens=24)
    files = [str(data.parent / f"{color}.png") for color in COLORS]
    said = asyncio.run(lm.generate([prompt, prompt], params, files))
    assert [answer.text.strip() for answer in said] == list(COLORS.values())
    assert [answer.finish_reason for answer in said] == ["stop", "stop"]
    again, = asyncio.run(lm.generate([world_model_prompt(STATE.render(), "open cabinet 1")], params))
    assert again.text.strip() == "Nothing happens."


def test_another_picture_under_the_same_name_is_another_run(vlm: str, data: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "wm"
    shutil.copy(data, rows)
    for color in COLORS:
        shutil.copy(data.parent / f"{color}.png", tmp_path)
    monkeypatch.setattr("sys.argv", ["finetune", "--model_path", vlm, "--data_path", str(rows), "--out_dir", str(out),
                                     "--check_only"])
    finetune.main()
    write_json(out / "metrics.json", {})  # finished
    finetune.main()
    shutil.copy(tmp_path / "red.png", tmp_path / "blue.png")
    with pytest.raises(UserError, match="pictures_sha256"):
        finetune.main()
    (tmp_path / "blue.png").unlink()
    with pytest.raises(UserError, match="image .*blue.png: can't be read"):
        finetune.main()


def test_what_cannot_be_seen_is_one_line(vlm: str, data: Path, tmp_path: Path) -> None:
    tiny = str(write_tiny_model(tmp_path / "tiny"))
    with pytest.raises(UserError, match=r"image .*missing.png: can't be read"):
        inputs_of(load_processor(vlm), ["<image>"], [str(tmp_path / "missing.png")])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image .*broken.png: can't be read"):
        inputs_of(load_processor(vlm), ["<image>"], [str(tmp_path / "broken.png")])
    with pytest.raises(UserError, match="need a vision-language model"):
        load_processor(tiny)
    ModelCard(predicts="state").write(tiny)
    blind = load_state_model(tiny)
    assert isinstance(blind, StateModel)
    with pytest.raises(UserError, match="sees no pictures"):
        asyncio.run(blind.perceive(Belief.of(STATE), "look", "", True, str(data.parent / "red.png")))


def test_a_state_model_perceives_with_its_picture(vlm: str, data: Path) -> None:
    """The prompt that it is given is that of the training row, with the picture."""
    lm, asked = VisionLM.load(vlm), []
    after = Belief.of(STATE).after("go to desk 2", COLORS["red"])

    def complete(prompt: str, image: str, params: GenParams, number: int) -> Any:
        asked.append(inputs_of(lm.processor, [chat_prompt(lm.processor, prompt, bool(image))], [image]))
        return Generation(json.dumps(after.to_json()), 1, 1, 0, "stop")

    lm._complete = complete
    model = StateModel(WorldModel(lm))
    file = str(data.parent / "red.png")
    assert asyncio.run(model.perceive(Belief.of(STATE), "go to desk 2", COLORS["red"], True, file)) == after
    row = next(to_rows(scenes_of([(read_transitions(data)[0], STATE)]), 0, Counter()))
    example, = to_examples([row])
    trained = inputs_of(lm.processor, [chat_prompt(lm.processor, example.segments[0][0], True)], [example.image])
    assert asked[0]["input_ids"].tolist() == trained["input_ids"].tolist()
    assert (asked[0]["pixel_values"] == trained["pixel_values"]).all()
