"""Training of a policy with heads (:mod:`itp.agent.policy_with_heads`) by the fine-tuning core: its folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from itp.agent.heads import has_heads
from itp.agent.policy_with_heads import PolicyWithHeads, read_heads, save_heads
from itp.model_card import format_for
from itp.pretrained import load_tokenizer
from itp.text.prompt_format import PromptFormat
from itp.training.models import load_plain_base, merge_adapter, save_whole
from itp.training.settings import trained_card
from itp.training.task import TrainedModule
from itp.training.text_task import TextTask

TRAINED = "trained.safetensors"
"""In a checkpoint: the weights that are trained."""


class HeadsTask(TextTask):
    """A task whose module has the policy as ``policy``."""

    def kmax(self) -> int:
        """K_max of new heads."""
        raise NotImplementedError

    def with_heads(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> PolicyWithHeads:
        """The heads that the policy had, or new ones."""
        if has_heads(self.settings.model_path):
            policy = PolicyWithHeads.around(model, tokenizer, self.settings.model_path)
        else:
            policy = PolicyWithHeads.create(model, tokenizer, self.kmax())
        policy.card = self.card(tokenizer)
        return policy

    def prompt_format(self, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """As the model was prompted before, since labels belong to their prompt, or as ``--prompt_form`` says."""
        settings = self.settings
        form = format_for(settings.model_path, tokenizer, env=settings.env)
        as_it_is = settings.prompt_form == "auto" or form.style == "instruct" and settings.prompt_form == "chat"
        template = form.template if as_it_is else trained_card(settings, tokenizer).template
        return replace(form, template=template, control_token=True)

    def write_checkpoint(self, model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None) -> bool:
        """What is trained, and only once where embeddings are tied."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = model.state_dict() if state is None else state
        save_file({name: whole[name].contiguous().cpu() for name in _trained(model)}, folder / TRAINED)
        return True

    def read_checkpoint(self, model: torch.nn.Module, folder: Path) -> bool:
        trained, weights = _trained(model), load_file(folder / TRAINED)
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(weights[name])
        return True

    def save_adapter(self, trained: TrainedModule) -> None:
        state = trained.gathered_state()
        if not trained.args.should_save:
            return
        policy: PolicyWithHeads = trained.model.policy
        policy.backbone.save_pretrained(self.settings.out_dir, state_dict=_below(state, "policy.backbone."))
        save_heads(policy.heads, self.settings.out_dir, _below(state, "policy.heads."))

    def save_complete(self, trained: TrainedModule, dtype: torch.dtype) -> None:
        state = trained.gathered_state()
        if not trained.args.should_save:
            return
        policy: PolicyWithHeads = trained.model.policy
        options: dict[str, Any] = {}
        if state is None:
            policy.backbone.to(dtype)
        else:
            options = {"state_dict": _below(state, "policy.backbone."), "heads": _below(state, "policy.heads.")}
        save_whole(policy, trained.tokenizer, self.settings.merged_path, policy.card, **options)

    def save_merged(self, tokenizer: PreTrainedTokenizerBase) -> None:
        policy = self.merged(tokenizer)
        save_whole(policy, tokenizer, self.settings.merged_path, policy.card)

    def merged(self, tokenizer: PreTrainedTokenizerBase) -> PolicyWithHeads:
        policy = self.with_heads(load_plain_base(self.settings), load_tokenizer(self.settings.model_path))
        policy.backbone = merge_adapter(policy.backbone, self.settings.out_dir)
        policy.heads.load_state_dict(read_heads(self.settings.out_dir))
        return policy


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _below(state: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    """The part of a state dict that belongs to a submodule."""
    if state is None:
        return None
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
