"""What stage 2 hands to the fine-tuning core: rows, batches and the loss of eq. 6 (:mod:`itp.training.sft`)."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from itp.lm.chat import asked_as, card_of
from itp.policy.heads import has_heads
from itp.policy.policy_with_heads import PolicyWithHeads, add_control_to_tokenizer, read_heads, save_heads
from itp.policy.shown import shown
from itp.runtime import UserError, bos_ids, load_tokenizer
from itp.text.prompts import CTRL, Turns, action_target, policy_prompt
from itp.text.state import State
from itp.training import fitting
from itp.training.examples import Encoding, Row
from itp.training.finetune import trained_form
from itp.training.hf_trainer import FineTuner, load_base, load_plain_base, lora_config, merge_adapter, save_whole
from itp.training.sft import SftSettings, Step
from itp.training.text_task import TextTask
from itp.training.token_tree import TokenTree, batch

Batch = dict[str, torch.Tensor]
TRAINED = "trained.safetensors"
"""In a checkpoint: the weights that are trained."""


class WarmUp(torch.nn.Module):
    """L_WT = L_π + η·L_K of a batch (:class:`StepCollator`) of T columns with N steps and M supervised tokens."""

    def __init__(self, policy: PolicyWithHeads, beta_k: float) -> None:
        super().__init__()
        self.policy, self.beta_k = policy, beta_k
        self.config = policy.causal_lm.config  # DeepSpeed's "auto" settings look there
        policy.heads.v_head.requires_grad_(False)  # not in eq. 6, and DDP wants a gradient of every weight

    def forward(self, input_ids: torch.Tensor, ctrl_pos: torch.Tensor, k_labels: torch.Tensor,
                target_pos: torch.Tensor, target_ids: torch.Tensor, target_step: torch.Tensor,
                attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
                items: torch.Tensor | None = None) -> Batch:
        """``loss``, and ``sums``: of the losses, what they are means over, and what was right (6,).

        ``items``: numbers of tokens and steps that the losses are divided by, if not this batch's.
        """
        out = self.policy(input_ids, attention_mask, ctrl_pos, position_ids, logits_at=target_pos)
        logits = out.logits.float()  # (M, V)
        nll = functional.cross_entropy(logits, target_ids, reduction="sum")
        k_nll = functional.cross_entropy(out.k_logits, k_labels, reduction="sum")
        tokens, steps = torch.tensor([len(target_ids), len(k_labels)]) if items is None else items
        loss = nll / tokens + self.beta_k * k_nll / steps.clamp(min=1)
        with torch.no_grad():
            missed = torch.zeros(len(k_labels), device=logits.device)
            labelled = target_step >= 0
            missed.index_add_(0, target_step[labelled], (logits.argmax(-1) != target_ids)[labelled].float())
            sums = torch.stack([nll, nll.new_tensor(len(target_ids)), k_nll, nll.new_tensor(len(k_labels)),
                                (out.k_logits.argmax(-1) == k_labels).sum(), (missed == 0).sum()])
        return {"loss": loss, "sums": sums}


@dataclass
class Encoded:
    """A step in tokens: prompt and target, and the index of ``<CTRL>`` in the prompt."""

    step: Step
    prompt: list[int]
    target: list[int]
    control: int

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.target[:-1]]  # nothing is predicted from the last token


class WarmUpTask(TextTask):
    """Stage 2 for the fine-tuning core."""

    def __init__(self, settings: SftSettings, steps: Sequence[Step]) -> None:
        super().__init__(settings, [])
        self.settings: SftSettings = settings
        self.steps = steps

    # ------------------------------------------------------------ rows

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """Sequences of one or several steps of an episode."""
        tokenizer = copy.deepcopy(tokenizer)  # the model's own gets the token together with the model
        add_control_to_tokenizer(tokenizer)
        encoding = Encoding([], [], dict.fromkeys(("examples", "cut", "lost_tokens", "lost_supervised", "too_long",
                                                   "unsupervised"), 0))
        encoded = self._tokens(tokenizer, encoding.counts)
        for episode_id, episode in itertools.groupby(encoded, key=lambda e: e.step.episode_id):
            for steps in self._packed(list(episode)):
                encoding.rows.append(make_row(steps))
                encoding.groups.append(episode_id)
        return encoding

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]) -> Iterator[Encoded]:
        style, turns = self.asked(tokenizer)
        bos, ctrl = bos_ids(tokenizer), tokenizer.convert_tokens_to_ids(CTRL)

        def ids_of(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        def prompt_of(step: Step, state: State) -> str:
            return policy_prompt(state.render(), foresight=step.foresight, control=True, style=style,
                                 env=self.settings.env, turns=turns)

        for start in range(0, len(self.steps), 1000):
            chunk = self.steps[start:start + 1000]
            prompts = ids_of([prompt_of(step, step.state) for step in chunk])
            targets = ids_of([action_target(step.action) for step in chunk])
            for step, prompt, target in zip(chunk, prompts, targets, strict=True):
                counts["examples"] += 1
                room = self.settings.max_seq_len - len(bos) - len(target)
                if len(prompt) > room:
                    try:
                        state = fitting.cut(step.state, lambda s, step=step: prompt_of(step, s),
                                            lambda text, room=room: len(ids_of([text])[0]) <= room)
                    except UserError:  # it doesn't fit even without its history
                        counts["too_long"] += 1
                        continue
                    short = ids_of([prompt_of(step, state)])[0]
                    counts["cut"] += 1
                    counts["lost_tokens"] += len(prompt) - len(short)
                    prompt = short
                prompt = [*bos, *prompt]
                yield Encoded(step, prompt, target, prompt.index(ctrl))

    def asked(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Turns]:
        """(prompt style, turns): as stage 1 asks the base policy, since labels belong to their prompt, or as told."""
        style, turns = asked_as(self.settings.model_path, tokenizer, env=self.settings.env)
        as_it_is = self.settings.prompt_form == "auto" or style == "instruct" and self.settings.prompt_form == "chat"
        return style, turns if as_it_is else trained_form(self.settings, tokenizer)

    def _packed(self, episode: list[Encoded]) -> Iterator[list[Encoded]]:
        """Steps of an episode that share a sequence, which has at most ``max_seq_len`` tokens."""
        most = self.settings.steps_per_sequence or len(episode)
        tree, together = TokenTree(), []
        for step in episode:
            more = len(step.ids) - tree.known(step.ids)
            if together and (len(together) == most or len(tree) + more > self.settings.max_seq_len):
                yield together
                tree, together = TokenTree(), []
            tree.add(step.ids)
            together.append(step)
        yield together

    def collator(self, pad_id: int, multiple: int = 1) -> StepCollator:
        return StepCollator(pad_id, multiple, left=self.settings.padding_side == "left")

    # ------------------------------------------------------------ model and loss

    def load(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> WarmUp:
        options = {"device_map": self.settings.device_map} if self.settings.device_map else {}
        model = load_base(self.settings, dtype, **options)
        policy = self._with_heads(model, tokenizer)
        tokenizer.padding_side = self.settings.padding_side
        if self.settings.lora_r:
            if is_deepspeed_zero3_enabled() and not torch.cuda.is_available():
                raise UserError("--lora_r trains the row of <CTRL> with peft, which under ZeRO-3 needs a GPU; use a "
                                "stage 2 configuration, or --lora_r 0")
            policy.add_lora(lora_config(self.settings, policy.causal_lm), tokenizer.convert_tokens_to_ids(CTRL))
        module = WarmUp(policy, self.settings.beta_k)
        if options:
            module.hf_device_map = model.hf_device_map  # so that the Trainer leaves the layers where they are
        return module

    def _with_heads(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> PolicyWithHeads:
        """The heads that the policy had, or new ones."""
        if has_heads(self.settings.model_path):
            policy = PolicyWithHeads.around(model, tokenizer, self.settings.model_path)
        else:
            policy = PolicyWithHeads.create(model, tokenizer, self.settings.kmax)
        policy.prompt_style, policy.turns = self.asked(tokenizer)
        policy.shown = shown(self.settings)
        return policy

    def items(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([len(batch["target_ids"]), len(batch["k_labels"])])

    def forward(self, model: torch.nn.Module, batch: Batch, items: torch.Tensor | None = None) -> Batch:
        return model(**batch, items=items)

    def held_out(self, sums: list[float]) -> dict[str, float]:
        nll, tokens, k_nll, steps, k_right, matched = sums
        policy_loss, k_loss = nll / tokens, k_nll / steps
        return {"loss": policy_loss + self.settings.beta_k * k_loss, "policy_loss": policy_loss, "k_loss": k_loss,
                "action_match": matched / steps, "k_accuracy": k_right / steps}

    # ------------------------------------------------------------ folders

    def write_checkpoint(self, model: WarmUp, folder: Path, state: dict[str, torch.Tensor] | None) -> bool:
        """What is trained, and only once where embeddings are tied."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = model.state_dict() if state is None else state
        save_file({name: whole[name].contiguous().cpu() for name in _trained(model)}, folder / TRAINED)
        return True

    def read_checkpoint(self, model: WarmUp, folder: Path) -> bool:
        trained, weights = _trained(model), load_file(folder / TRAINED)
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(weights[name])
        return True

    def save_adapter(self, trainer: FineTuner) -> None:
        state = trainer.gathered_state()
        if not trainer.args.should_save:
            return
        policy: PolicyWithHeads = trainer.model.policy
        policy.backbone.save_pretrained(self.settings.out_dir, state_dict=_below(state, "policy.backbone."))
        save_heads(policy.heads, self.settings.out_dir, _below(state, "policy.heads."))

    def save_complete(self, trainer: FineTuner, dtype: torch.dtype) -> None:
        state = trainer.gathered_state()
        if not trainer.args.should_save:
            return
        policy: PolicyWithHeads = trainer.model.policy
        options: dict[str, Any] = {}
        if state is None:
            policy.backbone.to(dtype)
        else:
            options = {"state_dict": _below(state, "policy.backbone."), "heads": _below(state, "policy.heads.")}
        save_whole(policy, trainer.tokenizer, self.settings.merged_path, card_of(policy.turns, policy.prompt_style),
                   **options)

    def merged(self, tokenizer: PreTrainedTokenizerBase) -> PolicyWithHeads:
        policy = self._with_heads(load_plain_base(self.settings), load_tokenizer(self.settings.model_path))
        policy.backbone = merge_adapter(policy.backbone, self.settings.out_dir)
        policy.heads.load_state_dict(read_heads(self.settings.out_dir))
        return policy

    def measure(self, tokenizer: PreTrainedTokenizerBase, held_rows: list[Row], device: torch.device) -> dict[str, Any]:
        """What K accuracy is to be compared with: always giving the label that is the most frequent there."""
        labels = Counter(k for row in held_rows for k in row["k_labels"])
        return {"eval_k_majority": labels.most_common(1)[0][1] / labels.total(), "eval_steps": labels.total()}


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _below(state: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    """The part of a state dict that belongs to a submodule."""
    if state is None:
        return None
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def make_row(steps: Sequence[Encoded]) -> Row:
    """Steps as one row: ``controls`` and ``k_labels`` of the steps that have a label, ``targets`` of all.

    A target is (number of the labelled step or -1, node, token that follows it).
    """
    tree, controls, k_labels, targets = TokenTree(), [], [], []
    for step in steps:
        nodes, number = tree.add(step.ids), -1
        if step.step.k is not None:
            number = len(controls)
            controls.append(nodes[step.control])
            k_labels.append(step.step.k)
        targets += [(number, node, token)
                    for node, token in zip(nodes[len(step.prompt) - 1:], step.target, strict=True)]
    return {"input_ids": tree.ids, "tree": tree, "controls": controls, "k_labels": k_labels, "targets": targets}


class StepCollator:
    """Rows to one batch of :class:`WarmUp`; counts tokens and padding.

    Trees have a mask (B, 1, T, T); plain sequences one of (B, T), or none where nothing stands on their left.
    """

    def __init__(self, pad_id: int, multiple: int = 1, *, left: bool = False) -> None:
        self.pad_id, self.multiple, self.left = pad_id, multiple, left
        self.tokens = self.slots = 0

    def __call__(self, rows: Sequence[Row]) -> Batch:
        trees: list[TokenTree] = [row["tree"] for row in rows]
        longest = max(map(len, trees))
        width = -(-longest // self.multiple) * self.multiple
        chains = all(tree.is_chain for tree in trees)
        ids, mask, positions = batch(trees, self.pad_id, width=width, left=self.left, plain=chains)
        # A causal LM sees nothing on the right, and without a mask its attention is a fused one.
        unmasked = chains and not (self.left and any(len(tree) < width for tree in trees))
        first = [width - len(tree) if self.left else 0 for tree in trees]
        before = list(itertools.accumulate((len(row["controls"]) for row in rows), initial=0))
        targets = torch.tensor([(b, first[b] + node, token, before[b] + i if i >= 0 else -1)
                                for b, row in enumerate(rows) for i, node, token in row["targets"]])
        self.tokens += sum(map(len, trees))
        self.slots += ids.numel()
        return {
            "input_ids": ids, **({} if unmasked else {"attention_mask": mask, "position_ids": positions}),
            "ctrl_pos": torch.tensor([(b, first[b] + node) for b, row in enumerate(rows) for node in row["controls"]],
                                     dtype=torch.long).reshape(-1, 2),
            "k_labels": torch.tensor([k for row in rows for k in row["k_labels"]], dtype=torch.long),
            "target_pos": targets[:, :2], "target_ids": targets[:, 2], "target_step": targets[:, 3],
        }
