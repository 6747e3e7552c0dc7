"""What a critic learns: the value at the end of a text, by regression or by pairs (a task of the fine-tuning core).

regression   L = mean (V − target)²
pairs        L = mean −log σ(V(better) − V(worse)), after Bradley and Terry: only differences of V mean something
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from itp.agent.policy import VALUE_TOKENS
from itp.agent.policy_with_heads import PolicyWithHeads, add_control_to_tokenizer
from itp.agent.prompt_budget import PromptBudget, prompt_tokens
from itp.lm.tokenize import Encoder
from itp.model_card import ModelCard
from itp.text.prompts import CTRL, value_prompt
from itp.text.state import State
from itp.training import token_tree
from itp.training.critic_data import CriticSettings, Preferred, Scored
from itp.training.examples import COUNTS, Encoding, TrainingRow
from itp.training.heads_task import HeadsTask
from itp.training.models import load_base, lora_config
from itp.training.settings import trained_card
from itp.training.token_tree import TokenTree

TensorBatch = dict[str, torch.Tensor]


class Critic(torch.nn.Module):
    """The loss of a batch of N values: of their ``targets`` (N,), or of pairs where there are none."""

    def __init__(self, policy: PolicyWithHeads) -> None:
        super().__init__()
        self.policy = policy
        self.config = policy.causal_lm.config  # DeepSpeed's "auto" settings look there
        policy.heads.k_head.requires_grad_(False)  # a critic chooses no K, and DDP wants a gradient of every weight

    def forward(self, input_ids: torch.Tensor, ends: torch.Tensor, targets: torch.Tensor | None = None,
                attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
                items: torch.Tensor | None = None) -> TensorBatch:
        """``loss``, and ``sums`` (3,): of the losses, their number, and how many were right.

        ``ends`` (N, 2): rows and columns where the values are read; without ``targets`` (N,) each even one is to be
        more than the odd one behind it.  ``items``: what the loss is divided by, if not this batch's.
        """
        values = self.policy(input_ids, attention_mask, ends, position_ids, logits_at=ends[:1]).values
        if targets is None:
            margins = values[0::2] - values[1::2]
            losses, right = -functional.logsigmoid(margins), margins > 0
        else:
            losses, right = (values - targets) ** 2, (values - targets).abs() < 0.5
        total = losses.sum()
        with torch.no_grad():
            sums = torch.stack([total, total.new_tensor(len(losses)), right.sum().to(total)])
        return {"loss": total / (len(losses) if items is None else items), "sums": sums}


@dataclass
class Judged:
    """Texts of one group in tokens, ended by the control token, with their targets; of pairs without."""

    group: str
    texts: list[list[int]] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)


class CriticTask(HeadsTask):
    def __init__(self, settings: CriticSettings, examples: Sequence[Scored | Preferred]) -> None:
        super().__init__(settings, [])
        self.settings: CriticSettings = settings
        self.examples = examples

    def kmax(self) -> int:
        return 1

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """A row for the examples of a group that fit into ``max_packed_len`` tokens, what they share computed once."""
        tokenizer = copy.deepcopy(tokenizer)  # the model's own gets the control token together with the model
        add_control_to_tokenizer(tokenizer)
        encoding, branches = Encoding([], [], dict.fromkeys(COUNTS, 0)), self._may_branch()
        judged = list(self._tokens(tokenizer, encoding.counts))
        for group, some in itertools.groupby(judged, key=lambda one: one.group):
            for together in self._packed(list(some)):
                encoding.rows.append(make_row(together, branches))
                encoding.groups.append(group)
        return encoding

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]) -> Iterator[Judged]:
        settings, form = self.settings, self.prompt_format(tokenizer)
        encode = Encoder(tokenizer)
        budget = PromptBudget(prompt_tokens(settings.max_seq_len, "action", settings.env), settings.max_seq_len,
                              encode.count)

        def ids(state: State, action: str = "") -> list[int]:
            def render(shown: State) -> str:
                return value_prompt(shown.render(), form, action)

            text = budget.prompt(state, render, VALUE_TOKENS)
            counts["cut"] += text != render(state)
            return [*encode.start, *encode(text)]

        for one in self.examples:
            counts["examples"] += 1
            if isinstance(one, Scored):
                found = Judged(one.group, [ids(one.state, one.action)], [one.target])
            else:
                found = Judged(one.group, [ids(one.better), ids(one.worse)])
            if max(map(len, found.texts)) <= settings.max_seq_len:
                yield found
            else:  # it doesn't fit even without its history
                counts["too_long"] += 1

    def _packed(self, judged: list[Judged]) -> Iterator[list[Judged]]:
        """Examples of a group that share a row."""
        most = self.settings.steps_per_sequence or len(judged)
        longest = self.settings.max_packed_len or self.settings.max_seq_len
        tree, together = TokenTree(), []
        for one in judged:
            if together and (len(together) == most or len(tree) + tree.new(*one.texts) > longest):
                yield together
                tree, together = TokenTree(), []
            for ids in one.texts:
                tree.add(ids)
            together.append(one)
        yield together

    def collator(self, pad_id: int, multiple: int = 1) -> CriticCollator:
        return CriticCollator(pad_id, multiple)

    def load(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Critic:
        policy = self.with_heads(load_base(self.settings, dtype), tokenizer)
        if self.settings.lora_r:
            policy.add_lora(lora_config(self.settings, policy.causal_lm, self.settings.lora_targets),
                            tokenizer.convert_tokens_to_ids(CTRL))
        else:  # a critic writes nothing: only where it is tied, the output embedding gets a gradient
            embeddings = policy.causal_lm.get_input_embeddings().weight
            for weight in policy.causal_lm.get_output_embeddings().parameters():
                weight.requires_grad_(weight is embeddings and weight.requires_grad)
        return Critic(policy)

    def card(self, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
        return trained_card(self.settings, tokenizer).with_format(self.prompt_format(tokenizer))

    def items(self, batch: TensorBatch) -> torch.Tensor:
        return torch.tensor(len(batch["ends"]) // (1 if "targets" in batch else 2))

    def forward(self, model: torch.nn.Module, batch: TensorBatch, items: torch.Tensor | None = None) -> TensorBatch:
        return model(**batch, items=items)

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        total, n, right = sums
        name = "within_half" if self.settings.learn == "q" else "pairs_right"
        return {"loss": total / n, name: right / n}

    def measure(self, tokenizer: PreTrainedTokenizerBase, eval_rows: list[TrainingRow],
                device: torch.device) -> dict[str, Any]:
        """What the loss of a regression is to be compared with: that of always giving the mean."""
        targets = torch.tensor([t for row in eval_rows for t in row["targets"]])
        return {"eval_variance": float(targets.var(unbiased=False))} if len(targets) else {}


def make_row(judged: Sequence[Judged], branches: bool) -> TrainingRow:
    """``ends``: (tree, node) of each value; ``targets`` of each, of pairs none.  Without ``branches`` a tree each."""
    trees: list[TokenTree] = [TokenTree()]
    ends = []
    for ids in (ids for one in judged for ids in one.texts):
        if not branches and len(trees[-1]):
            trees.append(TokenTree())
        ends.append((len(trees) - 1, trees[-1].add(ids)[-1]))
    return {"input_ids": [token for tree in trees for token in tree.ids], "trees": trees, "ends": ends,
            "targets": [target for one in judged for target in one.targets]}


class CriticCollator:
    """Rows to one batch of :class:`Critic`, padded on the right; counts tokens and padding."""

    def __init__(self, pad_id: int, multiple: int = 1) -> None:
        self.pad_id, self.multiple = pad_id, multiple
        self.tokens = self.slots = 0

    def __call__(self, rows: Sequence[TrainingRow]) -> TensorBatch:
        trees: list[TokenTree] = [tree for row in rows for tree in row["trees"]]
        width = -(-max(map(len, trees)) // self.multiple) * self.multiple
        chains = all(tree.is_chain for tree in trees)
        ids, mask, positions = token_tree.batch(trees, self.pad_id, width=width, plain=chains)
        first = list(itertools.accumulate((len(row["trees"]) for row in rows), initial=0))
        self.tokens += sum(map(len, trees))
        self.slots += ids.numel()
        batch = {"input_ids": ids, "ends": torch.tensor(
            [(first[b] + tree, node) for b, row in enumerate(rows) for tree, node in row["ends"]])}
        if not chains:  # a causal LM sees nothing on the right, where chains are padded
            batch |= {"attention_mask": mask, "position_ids": positions}
        if targets := [target for row in rows for target in row["targets"]]:
            batch["targets"] = torch.tensor(targets)
        return batch
