"""Stage 2 as a task of the fine-tuning core: rows, batches and the loss of eq. 6."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from itp.agent.policy_with_heads import PolicyWithHeads, add_control_to_tokenizer
from itp.agent.prompt_budget import PromptBudget, prompt_tokens
from itp.errors import UserError
from itp.lm.tokenize import Encoder
from itp.model_card import ModelCard, prompt_settings
from itp.text.prompts import CTRL, action_target, control_prompt, policy_prompt
from itp.text.state import State
from itp.training.examples import COUNTS, Encoding, TrainingRow
from itp.training import token_tree
from itp.training.token_tree import TokenTree
from itp.training.itp_r.warm_up_data import LabeledStep, SftSettings, k_weights
from itp.training.models import load_base, lora_config
from itp.training.settings import trained_card
from itp.training.heads_task import HeadsTask

TensorBatch = dict[str, torch.Tensor]


class WarmUp(torch.nn.Module):
    """L_WT = L_π + η·L_K of a batch (:class:`StepCollator`) of T columns with N steps and M supervised tokens.

    ``k_weights``: of each label K in L_K; all 1 where none are given.
    """

    def __init__(self, policy: PolicyWithHeads, beta_k: float, k_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.policy, self.beta_k = policy, beta_k
        self.register_buffer("k_weights", torch.tensor(k_weights or [1.0] * (policy.kmax + 1)), persistent=False)
        self.config = policy.causal_lm.config  # DeepSpeed's "auto" settings look there
        policy.heads.v_head.requires_grad_(False)  # not in eq. 6, and DDP wants a gradient of every weight

    def forward(self, input_ids: torch.Tensor, ctrl_pos: torch.Tensor, k_labels: torch.Tensor,
                target_pos: torch.Tensor, target_ids: torch.Tensor, target_step: torch.Tensor,
                attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
                items: torch.Tensor | None = None) -> TensorBatch:
        """``loss``, and ``sums``: of the losses, unweighted, what they are means over, and what was right (6,).

        ``items``: numbers of tokens and steps that the losses are divided by, if not this batch's.
        """
        out = self.policy(input_ids, attention_mask, ctrl_pos, position_ids, logits_at=target_pos)
        logits = out.logits.float()  # (M, V)
        nll = functional.cross_entropy(logits, target_ids, reduction="sum")
        k_nll = functional.cross_entropy(out.k_logits, k_labels, reduction="none")
        k_loss = (k_nll * self.k_weights.to(k_nll)[k_labels]).sum()
        tokens, steps = torch.tensor([len(target_ids), len(k_labels)]) if items is None else items
        loss = nll / tokens + self.beta_k * k_loss / steps.clamp(min=1)
        with torch.no_grad():
            missed = torch.zeros(len(k_labels), device=logits.device)
            labeled = target_step >= 0
            missed.index_add_(0, target_step[labeled], (logits.argmax(-1) != target_ids)[labeled].float())
            sums = torch.stack([nll, nll.new_tensor(len(target_ids)), k_nll.sum(), nll.new_tensor(len(k_labels)),
                                (out.k_logits.argmax(-1) == k_labels).sum(), (missed == 0).sum()])
        return {"loss": loss, "sums": sums}


@dataclass
class Encoded:
    """A step in tokens: the prompt of its action, the action, and the prompt up to ``<CTRL>`` at which K is learned.

    Both prompts begin with the state, unless the imagined trajectory takes so much of the budget that the action's
    prompt holds less history.  At inference the heads read before anything is imagined.
    """

    step: LabeledStep
    prompt: list[int]
    target: list[int]
    heads_prompt: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.target[:-1]]  # nothing is predicted from the last token


class WarmUpTask(HeadsTask):
    """Stage 2 for the fine-tuning core."""

    def __init__(self, settings: SftSettings, steps: Sequence[LabeledStep]) -> None:
        super().__init__(settings, [])
        self.settings: SftSettings = settings
        self.steps = steps

    # ------------------------------------------------------------ rows

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """Sequences of one or several steps of an episode."""
        tokenizer = copy.deepcopy(tokenizer)  # the model's own gets the token together with the model
        add_control_to_tokenizer(tokenizer)
        encoding, chains = Encoding([], [], dict.fromkeys(COUNTS, 0)), not self._may_branch()
        encoded = self._tokens(tokenizer, encoding.counts)
        for episode_id, episode in itertools.groupby(encoded, key=lambda e: e.step.episode_id):
            for steps in self._packed(list(episode)):
                encoding.rows.append(make_row(steps, chains=chains))
                encoding.groups.append(episode_id)
        return encoding

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]) -> Iterator[Encoded]:
        """The steps whose prompts fit, cut as inference cuts them."""
        settings, form = self.settings, self.prompt_format(tokenizer)
        encode = Encoder(tokenizer)
        budget = PromptBudget(prompt_tokens(settings.max_seq_len, "action", settings.env), settings.max_seq_len,
                              encode.count)
        encode.check_line_breaks()
        for step in self.steps:
            counts["examples"] += 1
            target = encode.continuation(action_target(step.action))

            def render(state: State, foresight: str = step.foresight) -> str:
                return policy_prompt(state.render(), form=form, foresight=foresight)

            text = budget.prompt(step.state, render, len(target))
            prompt, whole = [*encode.start, *encode(text)], render(step.state)
            if len(prompt) + len(target) > settings.max_seq_len:  # it doesn't fit even without its history
                counts["too_long"] += 1
                continue
            if text != whole:
                counts["cut"] += 1
                counts["lost_tokens"] += encode.count(whole) - len(prompt)
            unimagined = budget.prompt(step.state, functools.partial(render, foresight=""), len(target))
            yield Encoded(step, prompt, target, [*encode.start, *encode(control_prompt(unimagined, form))])

    def _packed(self, episode: list[Encoded]) -> Iterator[list[Encoded]]:
        """Steps of an episode that share a sequence, which has at most ``max_packed_len`` tokens."""
        most = self.settings.steps_per_sequence or len(episode)
        longest = self.settings.max_packed_len or self.settings.max_seq_len
        tree, together = TokenTree(), []
        for step in episode:
            more = tree.new(step.ids, step.heads_prompt)
            if together and (len(together) == most or len(tree) + more > longest):
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
        policy = self.with_heads(model, tokenizer)
        tokenizer.padding_side = self.settings.padding_side
        if self.settings.lora_r:
            if is_deepspeed_zero3_enabled() and not torch.cuda.is_available():
                raise UserError("--lora_r trains the row of <CTRL> with peft, which under ZeRO-3 needs a GPU; use a "
                                "stage 2 configuration, or --lora_r 0")
            policy.add_lora(lora_config(self.settings, policy.causal_lm, self.settings.lora_targets),
                            tokenizer.convert_tokens_to_ids(CTRL))
        module = WarmUp(policy, self.settings.beta_k,
                        k_weights(self.steps, self.settings.k_balance, self.settings.max_k))
        if options:
            module.hf_device_map = model.hf_device_map  # so that the Trainer leaves the layers where they are
        return module

    def kmax(self) -> int:
        return self.settings.max_k

    def card(self, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
        card = trained_card(self.settings, tokenizer).with_format(self.prompt_format(tokenizer))
        return replace(card, **prompt_settings(self.settings))

    def items(self, batch: TensorBatch) -> torch.Tensor:
        return torch.tensor([len(batch["target_ids"]), len(batch["k_labels"])])

    def forward(self, model: torch.nn.Module, batch: TensorBatch, items: torch.Tensor | None = None) -> TensorBatch:
        return model(**batch, items=items)

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        """Means over tokens and over labeled steps.  Few held-out rows may have none of one kind: it is left out."""
        nll, tokens, k_nll, steps, k_right, matched = sums
        policy = {"policy_loss": nll / tokens} if tokens else {}
        control = {"k_loss": k_nll, "action_match": matched, "k_accuracy": k_right}
        control = {name: total / steps for name, total in control.items()} if steps else {}
        loss = policy.get("policy_loss", 0.0) + self.settings.beta_k * control.get("k_loss", 0.0)
        return {"loss": loss, **policy, **control}

    def measure(self, tokenizer: PreTrainedTokenizerBase, eval_rows: list[TrainingRow],
                device: torch.device) -> dict[str, Any]:
        """What K accuracy is to be compared with: always giving the label that is the most frequent there."""
        labels = Counter(k for row in eval_rows for k in row["k_labels"])
        if not labels:
            return {}
        return {"eval_k_majority": labels.most_common(1)[0][1] / labels.total(), "eval_steps": labels.total()}


def make_row(steps: Sequence[Encoded], *, chains: bool = False) -> TrainingRow:
    """Steps as one row: ``controls`` and ``k_labels`` of the steps that have a label, ``targets`` of all.

    A row has one tree, or with ``chains`` a tree for each prompt, none of which branches.  A control is (tree, node), a
    target (number of the labeled step or -1, tree, node, token that follows it).
    """
    trees, controls, k_labels, targets = [TokenTree()], [], [], []

    def add(ids: Sequence[int]) -> list[tuple[int, int]]:
        if chains and len(trees[-1]):
            trees.append(TokenTree())
        return [(len(trees) - 1, node) for node in trees[-1].add(ids)]

    for step in steps:
        places, number = add(step.ids), -1
        if step.step.k is not None:
            number = len(controls)
            controls.append(add(step.heads_prompt)[-1])
            k_labels.append(step.step.k)
        targets += [(number, *place, token)
                    for place, token in zip(places[len(step.prompt) - 1:], step.target, strict=True)]
    ids = [token for tree in trees for token in tree.ids]
    return {"input_ids": ids, "trees": trees, "controls": controls, "k_labels": k_labels, "targets": targets}


class StepCollator:
    """Rows to one batch of :class:`WarmUp`; counts tokens and padding.

    Trees have a mask (B, 1, T, T); plain sequences one of (B, T), or none where nothing stands on their left.
    """

    def __init__(self, pad_id: int, multiple: int = 1, *, left: bool = False) -> None:
        self.pad_id, self.multiple, self.left = pad_id, multiple, left
        self.tokens = self.slots = 0

    def __call__(self, rows: Sequence[TrainingRow]) -> TensorBatch:
        trees: list[TokenTree] = [tree for row in rows for tree in row["trees"]]
        longest = max(map(len, trees))
        width = -(-longest // self.multiple) * self.multiple
        chains = all(tree.is_chain for tree in trees)
        ids, mask, positions = token_tree.batch(trees, self.pad_id, width=width, left=self.left, plain=chains)
        # A causal LM sees nothing on the right, and without a mask its attention is a fused one.
        unmasked = chains and not (self.left and any(len(tree) < width for tree in trees))
        first = [width - len(tree) if self.left else 0 for tree in trees]
        trees_before, steps_before = (list(itertools.accumulate((len(row[what]) for row in rows), initial=0))
                                      for what in ("trees", "controls"))

        def place(b: int, tree: int, node: int) -> tuple[int, int]:
            row = trees_before[b] + tree
            return row, first[row] + node

        targets = torch.tensor([(*place(b, tree, node), token, steps_before[b] + i if i >= 0 else -1)
                                for b, row in enumerate(rows) for i, tree, node, token in row["targets"]])
        self.tokens += sum(map(len, trees))
        self.slots += ids.numel()
        return {
            "input_ids": ids, **({} if unmasked else {"attention_mask": mask, "position_ids": positions}),
            "ctrl_pos": torch.tensor([place(b, *control) for b, row in enumerate(rows) for control in row["controls"]],
                                     dtype=torch.long).reshape(-1, 2),
            "k_labels": torch.tensor([k for row in rows for k in row["k_labels"]], dtype=torch.long),
            "target_pos": targets[:, :2], "target_ids": targets[:, 2], "target_step": targets[:, 3],
        }
