"""Language models that see: prompts with a picture, through a vision-language model's own processor.

A prompt is the plain text that a model without eyes is given.  Here it becomes a chat message of the processor: the
picture, if there is one, and the text up to its last line are the user's turn, and the last line, a label, begins the
reply.  Training (:mod:`world_model.base_tuning.vision_task`) and :class:`VisionLM` share this.

:class:`VisionLM` completes one prompt after the other by transformers' ``generate``.  It doesn't score, and its
requests don't become batches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itp.devices import resolve_device, resolve_dtype
from itp.errors import UserError
from itp.lm.base import GenParams, Generation, asking
from itp.pretrained import loading, model_folder, remote_code

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin


def sees(path: str | Path) -> bool:
    """Whether the model at ``path`` (a folder or hub name) sees pictures and has a processor for them."""
    folder = model_folder(path)
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*processor_config.json")):
        return False
    return "vision_config" in json.loads(config.read_text(encoding="utf-8"))


def load_processor(path: str) -> ProcessorMixin:
    """The processor of a vision-language model.  Raises UserError where there is none, or none for chats."""
    from transformers import AutoProcessor, ProcessorMixin

    with loading(path, "no processor of a vision-language model there"):
        processor = AutoProcessor.from_pretrained(path, **remote_code())
    if not isinstance(processor, ProcessorMixin) or not processor.chat_template:
        raise UserError(f"{path}: rows with images need a vision-language model with a processor and its chat "
                        "template, such as Qwen2.5-VL; give one, or leave the images out")
    return processor


def chat_prompt(processor: ProcessorMixin, prompt: str, seen: bool) -> str:
    """``prompt`` as a chat message of the processor, with a picture in it where ``seen``, and the reply's label."""
    text, _, label = prompt.rpartition("\n")
    content = [*([{"type": "image"}] if seen else []), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + label


def open_image(file: str) -> Image:
    """Raises UserError for a file that is no picture."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:  # not there, or no picture
        raise UserError(f"image {file}: can't be read ({error}); mend the row that names it") from error


def inputs_of(processor: ProcessorMixin, chats: Sequence[str], images: Sequence[str]) -> dict[str, Any]:
    """What a model is given: tensors by name.  ``images``: a file for each of ``chats``, or "" in all of them."""
    seen = [[open_image(file)] for file in images if file]
    return dict(processor(text=list(chats), images=seen or None, padding=True, padding_side="right",
                          return_tensors="pt"))


class VisionLM:
    """A vision-language model in this process."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str, role: str = "world_model") -> None:
        from itp.lm.local import context_of

        self.model, self.processor, self.name, self.role = model, processor, name, role
        self.tokenizer, self.context_length = processor.tokenizer, context_of(model.config)
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    def load(cls, path: str, *, device: str = "cpu", dtype: str = "fp32", role: str = "world_model") -> VisionLM:
        """Raises UserError for what is no vision-language model."""
        from transformers import AutoModelForImageTextToText

        processor, device = load_processor(path), resolve_device(device)
        with loading(path, "not a vision-language model"):
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=resolve_dtype(dtype, device),
                                                                **remote_code())
        return cls(model.to(device).eval(), processor, Path(path).name, role)

    async def generate(self, prompts: Sequence[str], params: GenParams, images: Sequence[str] = ()) -> list[Generation]:
        """Complete every prompt.  ``images``: the file of the picture of each prompt ("" for none), or nothing."""
        if params.choices:
            raise UserError(f"{self.name}: a vision-language model writes freely; use --action_selection generate")
        with asking(self.role) as answers:
            async with self._one_at_a_time:
                for number, (prompt, image) in enumerate(zip(prompts, images or [""] * len(prompts), strict=True)):
                    answers.append(await asyncio.to_thread(self._complete, prompt, image, params, number))
            return list(answers)

    def _complete(self, prompt: str, image: str, params: GenParams, number: int) -> Generation:
        import torch

        inputs = inputs_of(self.processor, [chat_prompt(self.processor, prompt, bool(image))], [image])
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        begin = inputs["input_ids"].shape[1]
        sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed((params.seed + number) % (1 << 63))
            ids = self.model.generate(**inputs, max_new_tokens=params.max_new_tokens,
                                      eos_token_id=self.tokenizer.eos_token_id,
                                      pad_token_id=self.tokenizer.pad_token_id,
                                      **(sampling if params.temperature else {"do_sample": False}))[0, begin:]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [at for stop in params.stop if (at := text.find(stop)) >= 0]
        stopped = bool(ends) or self.tokenizer.eos_token_id in ids.tolist()
        return Generation(text[:min(ends)] if ends else text, begin, len(ids), 0, "stop" if stopped else "length")

    async def close(self) -> None:
        pass
