"""One update of online A2C (eq. 8): from whole episodes to new weights.

The prompts of an episode grow out of one another, so an episode is one row in which every shared beginning
is computed once (:mod:`itp.training.token_tree`), or several where it would be too long for the GPU;
P_θ(K|s_t), V_θ(s_t) and π_θ(a_t|·) of its steps are read from there.  The module that is trained is the one
that acts: there is no copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from itp.agent.policy_with_heads import save_heads
from itp.distributed import Processes
from itp.errors import UserError
from itp.lm.base import Trace
from itp.text.prompts import CTRL
from itp.training.itp_r.losses import ByToken, a2c_loss, k_entropy, token_logprobs
from itp.training.token_tree import TokenTree, batch
from itp.training.models import lora_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from itp.agent.policy_with_heads import PolicyWithHeads
    from itp.training.itp_r.a2c_settings import RlSettings

ALIGNED = 8
"""Widths of batches are multiples of this."""
MAX_SKIPPED = 20
"""So many updates in a row without a usable gradient: loss scaling doesn't find its scale, the run diverged."""


@dataclass(frozen=True)
class Sample:
    """One step of an episode, as the update needs it.

    ``ids``: token ids of the prompt that the action answers.  ``heads_ids``: those of the prompt up to ``<CTRL>`` at
    which the heads were read.  Both begin with the state, unless the imagined trajectory left the first less history.
    ``k`` is -1 where the K-head didn't choose K: then neither log P_θ(K|s) nor its entropy is in the loss.
    ``before_observation``, ``observation``: token ids of the state with the executed action, and of the observation
    that followed, where it is to be learned.
    ``token_advantages``, ``token_targets``: with ``--credit token`` the advantages of the tokens that were drawn, and V̂
    before each of them but the first (:func:`itp.training.itp_r.advantages.token_credit`).
    """

    ids: list[int]
    heads_ids: list[int]
    trace: Trace
    k: int
    advantage: float
    target: float
    before_observation: list[int] = field(default_factory=list)
    observation: list[int] = field(default_factory=list)
    token_advantages: list[float] = field(default_factory=list)
    token_targets: list[float] = field(default_factory=list)

    @property
    def drawn(self) -> list[int]:
        """Indices of the action's tokens that weren't forced."""
        return [j for j, ids in enumerate(self.trace.allowed) if ids is None or len(ids) > 1]

    @property
    def observed_ids(self) -> list[int]:
        """The sequence that leads to the last token of the observation; empty where none is learned."""
        return [*self.before_observation, *self.observation[:-1]] if self.observation else []


@dataclass
class PackedSteps:
    """Steps of an episode as a token tree, and where in it things are read."""

    tree: TokenTree = field(default_factory=TokenTree)
    samples: list[Sample] = field(default_factory=list)
    controls: list[int] = field(default_factory=list)
    """Node of ``<CTRL>``, by sample."""
    predicted: list[tuple[int, int, int]] = field(default_factory=list)
    """(sample, index in its trace, node whose logits predict that token) of every token that was drawn."""
    observed: list[tuple[int, int]] = field(default_factory=list)
    """(node whose logits predict it, token) of every token of an observation that is learned."""

    @property
    def within(self) -> list[tuple[int, int]]:
        """(sample, node) of every state within an action: before each of its drawn tokens but the first."""
        return [(i, node) for (before, *_), (i, _, node) in itertools.pairwise(self.predicted) if i == before]


def make_rows(samples: Sequence[Sample], budget: int) -> list[PackedSteps]:
    """Pack an episode, in order, into trees of at most ``budget`` tokens; a step that has more is alone in one.

    Tokens that were forced cost nothing: only what leads to a drawn one is in a tree.
    """
    rows: list[PackedSteps] = []
    for sample in samples:
        drawn = sample.drawn
        if drawn:
            ids = [*sample.ids, *sample.trace.token_ids[:drawn[-1]]]
        else:
            ids = sample.heads_ids
        sequences = ids, sample.heads_ids, sample.observed_ids
        if not rows or len(rows[-1].tree) + rows[-1].tree.new(*sequences) > budget:
            rows.append(PackedSteps())
        row = rows[-1]
        nodes = row.tree.add(ids)
        row.controls.append(row.tree.add(sample.heads_ids)[-1])
        row.predicted += [(len(row.samples), j, nodes[len(sample.ids) - 1 + j]) for j in drawn]
        nodes = row.tree.add(sample.observed_ids)
        row.observed += zip(nodes[len(sample.before_observation) - 1:], sample.observation, strict=True)
        row.samples.append(sample)
    return rows


def cheapest_rows(samples: Sequence[Sample], budget: int, hidden: int) -> list[PackedSteps]:
    """Pack an episode within ``budget`` as it takes the fewest operations of a model of width ``hidden``.

    Long imagined trajectories make a long tree, and attention costs its tokens squared, so that several rows may be
    cheaper although each repeats the state that its steps grow out of, P tokens: :func:`operations` for a new token,
    S (6h + S) / (S − P), are least at S = P (1 + √(1 + 6h / P)).
    """
    whole = make_rows(samples, budget)
    state = sum(len(sample.heads_ids) for sample in samples) / len(samples)
    best = int(state * (1 + math.sqrt(1 + 6 * hidden / state)))
    if max(len(row.tree) for row in whole) <= best:
        return whole
    # Without imagination the state is nearly all of the tree, and to repeat it would be waste.
    return min(whole, make_rows(samples, min(budget, best)), key=lambda rows: operations(rows, hidden))


def operations(rows: Sequence[PackedSteps], hidden: int) -> int:
    """What a pass costs up to a factor: a layer takes S·24h² in its linear maps, S²·4h in attention to S tokens."""
    return sum(len(row.tree) * (6 * hidden + len(row.tree)) for row in rows)


class Learner:
    """The policy's weights with their optimizer."""

    def __init__(self, policy: PolicyWithHeads, tokenizer: PreTrainedTokenizerBase, settings: RlSettings,
                 dtype: torch.dtype, processes: Processes) -> None:
        self.settings, self.processes, self.tokenizer = settings, processes, tokenizer
        self.lora = settings.lora_r > 0
        if self.lora:
            policy.add_lora(lora_config(settings, policy.causal_lm), tokenizer.convert_tokens_to_ids(CTRL))
        if settings.gradient_checkpointing:
            policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = policy
        self.value_updates = min(settings.value_updates, settings.total_updates // 4) if settings.has_critic else 0
        policy.heads.v_head.requires_grad_(settings.has_critic)
        self.updates = self.skipped = 0
        value_head = list(policy.heads.v_head.parameters())
        self.acting = [p for p in policy.parameters() if p.requires_grad and all(p is not v for v in value_head)]
        groups = [{"params": self.acting, "lr": settings.lr},
                  {"params": value_head, "lr": settings.value_lr or settings.lr}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, settings.adam_beta2), weight_decay=settings.wd)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._decay)
        self.device = next(policy.parameters()).device
        self.dtype = dtype
        self.losses = ["loss", "loss_act", *["loss_value"] * settings.has_critic, "loss_ent",
                       *["loss_observation"] * (settings.observation_loss > 0)]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # a process without an episode needs its scale, too

    def _decay(self, update: int) -> float:
        """Factor of the learning rate."""
        left = max(0.0, 1 - update / self.settings.total_updates)
        kind = self.settings.lr_scheduler_type
        return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left)) if kind == "cosine" else 1.0

    # ------------------------------------------------------------ the update

    def update(self, episodes: Sequence[Sequence[Sample]]) -> dict[str, float]:
        """Learn from a batch of episodes.  Returns means over its optimizer steps."""
        value_only = self.updates < self.value_updates
        lr = self.scheduler.get_last_lr()[0]
        # The last batch of a run may have fewer episodes than parts; all processes take equally many steps.
        pieces = min(self.settings.minibatches, max(self.processes.gather([len(episodes)])))
        self._to_training()
        for p in self.acting:  # V_θ must not move the policy, whose loss isn't there to hold it
            p.requires_grad_(not value_only)
        parts = [self._step([row for e in episodes[i::pieces] for row in self._rows(e)], value_only)
                 for i in range(pieces)]
        for p in self.acting:
            p.requires_grad_(True)
        self.policy.eval()
        self.scheduler.step()
        self.updates += 1
        means = {name: sum(part[name] for part in parts) / pieces for name in parts[0]}
        return means | {"entropy": 0.0 - means["loss_ent"], "lr": lr}

    def _rows(self, episode: Sequence[Sample]) -> list[PackedSteps]:
        hidden = self.policy.causal_lm.config.get_text_config().hidden_size
        return cheapest_rows(episode, self.settings.update_batch_tokens, hidden)

    def _to_training(self) -> None:
        """Training mode for dropout in front of LoRA and for layers that are to be recomputed, and nothing else.

        Other dropout would make the policy that learns another one than the policy that acted.
        """
        for name, module in self.policy.named_modules():
            module.training = "lora_dropout" in name or hasattr(module, "gradient_checkpointing")

    def _step(self, rows: Sequence[PackedSteps], value_only: bool) -> dict[str, float]:
        """One optimizer step on some episodes, together with those of the other processes."""
        self.optimizer.zero_grad()
        sums = self._backward(rows, value_only)
        norm = self._apply()
        totals = [sum(values) for values in zip(*self.processes.gather([list(sums.values())]), strict=True)]
        return dict(zip(sums, totals, strict=True)) | {"grad_norm": norm}

    def token_values(self, episodes: Sequence[Sequence[Sample]]) -> list[list[list[float]]]:
        """By episode and step, V_θ(s_t, w_{<i}) before the second to the last token of the action that was drawn."""
        found: dict[int, list[float]] = {}
        with torch.no_grad():
            for group in self._groups([row for episode in episodes if episode for row in self._rows(episode)]):
                samples = [sample for row in group for sample in row.samples]
                found |= {id(sample): [] for sample in samples}
                read = self.read(group)
                for i, value in zip(read.within_step.tolist(), read.within_values.tolist(), strict=True):
                    found[id(samples[i])].append(value)
        return [[found[id(sample)] for sample in episode] for episode in episodes]

    def gradient(self, episodes: Sequence[Sequence[Sample]]) -> torch.Tensor:
        """What eq. 8 says of all weights that act and are trained, as one vector; nothing is changed by it."""
        self._to_training()
        self.optimizer.zero_grad()
        self._backward([row for episode in episodes for row in self._rows(episode)], value_only=False)
        self.policy.eval()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.acting]
        self.optimizer.zero_grad()
        return torch.cat([part.flatten() for part in found]).float() / self.scaler.get_scale()

    def _backward(self, rows: Sequence[PackedSteps], value_only: bool) -> dict[str, float]:
        """Add the gradients of some episodes; this process's share of the losses."""
        count = sum(self.processes.gather([len(row.samples) for row in rows]))
        tokens = sum(self.processes.gather([len(row.observed) for row in rows]))
        sums = dict.fromkeys(self.losses, 0.0)
        for group in self._groups(rows):
            loss, parts = self._loss(group, count, tokens, value_only)
            parts["loss"] = loss.item()
            for name in sums:
                sums[name] += parts[name]
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} in update {self.updates + 1}: the training diverged; "
                                "lower --lr or use --bf16 (the last checkpoint is kept)")
            self.scaler.scale(loss).backward()
        return sums

    def _apply(self) -> float:
        """Clip and apply the gradients; their norm."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        if self.processes.count > 1:
            for p in weights:  # a process without an episode has none
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.processes.add_up(p.grad for p in weights)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(weights, self.settings.max_grad_norm or math.inf))
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (MAX_SKIPPED if self.scaler.is_enabled() else 0):
            raise UserError(f"the gradients are not finite in update {self.updates + 1}: the training diverged; "
                            "lower --lr or use --bf16 (the last checkpoint is kept)")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _groups(self, rows: Sequence[PackedSteps]) -> Iterator[list[PackedSteps]]:
        """Rows of similar size, within the budget of tokens."""
        group: list[PackedSteps] = []
        for row in sorted(rows, key=lambda row: len(row.tree)):
            if group and len(row.tree) * (len(group) + 1) > self.settings.update_batch_tokens:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _loss(self, rows: Sequence[PackedSteps], count: int, tokens: int,
              value_only: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """Eq. 8 on the N steps of some episodes, as their share of a batch of ``count`` steps.

        With ``--observation_loss`` W there is W times the cross-entropy of the observations, a mean over the batch's
        ``tokens``.
        """
        read = self.read(rows)
        samples = [sample for row in rows for sample in row.samples]
        advantages = torch.tensor([s.advantage for s in samples], device=self.device)
        targets = torch.tensor([s.target for s in samples], device=self.device)
        actions = read.action_logprobs
        if self.settings.logprob_norm == "mean":
            actions = actions / torch.tensor([len(s.trace.token_ids) for s in samples], device=self.device)
        value_coef = self.settings.value_coef if self.settings.has_critic else 0.0
        by_token = self._by_token(read, samples) if self.settings.credit == "token" else None
        total, parts = a2c_loss(actions, read.k_logprobs, read.entropies, read.values, advantages, targets,
                                value_coef=value_coef, entropy_coef=self.settings.entropy_coef, count=count,
                                by_token=by_token)
        if self.settings.observation_loss:
            observation = read.observation_nll.sum() / max(tokens, 1)
            total = total + self.settings.observation_loss * observation
            parts["loss_observation"] = observation.item()
        if value_only:
            errors = (read.values - targets).square() if by_token is None else by_token.errors(read.values, targets)
            total = self.settings.value_coef * errors.sum() / count
        return total, parts

    def _by_token(self, read: Reading, samples: Sequence[Sample]) -> ByToken:
        """The tokens of ``samples`` with their own advantages."""
        advantages = torch.tensor([a for s in samples for a in s.token_advantages], device=self.device)
        targets = torch.tensor([v for s in samples for v in s.token_targets], device=self.device)
        if self.settings.logprob_norm == "mean":
            lengths = torch.tensor([len(s.trace.token_ids) for s in samples], device=self.device)
            advantages = advantages / lengths[read.token_step]
        acting = torch.zeros(len(samples), device=self.device).index_add(
            0, read.token_step, advantages * read.token_logprobs)
        return ByToken(acting, (read.within_values - targets).square(), read.within_step)

    def read(self, rows: Sequence[PackedSteps]) -> Reading:
        """What the policy says of every step of some episodes, with gradients."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        # Attention in CUDA wants rows of a mask aligned, and would keep an aligned copy of it for every layer.
        width = -(-max(len(row.tree) for row in rows) // ALIGNED) * ALIGNED
        ids, mask, positions = batch([row.tree for row in rows], pad, width=width)
        controls = torch.tensor([(b, node) for b, row in enumerate(rows) for node in row.controls])
        offsets = [sum(len(row.samples) for row in rows[:b]) for b in range(len(rows))]
        drawn = [(b, node, offsets[b] + i, j) for b, row in enumerate(rows) for i, j, node in row.predicted]
        observed = [(b, node, token) for b, row in enumerate(rows) for node, token in row.observed]
        within = [(b, node, offsets[b] + i) for b, row in enumerate(rows) for i, node in row.within] \
            if self.settings.credit == "token" else []
        values_at = torch.cat([controls, torch.tensor([place[:2] for place in within])]) if within else controls
        wanted = [(b, node) for b, node, *_ in (*drawn, *observed)]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.policy(ids.to(self.device), mask.to(self.device), values_at.to(self.device),
                              position_ids=positions.to(self.device), logits_at=self._long(wanted, 2))
        samples = [sample for row in rows for sample in row.samples]
        actions = torch.zeros(len(samples), device=self.device)
        token_step, logprobs = self._long(drawn, 4)[:, 2], actions[:0]
        if drawn:
            traces = [samples[i].trace for _, _, i, _ in drawn]
            logprobs = token_logprobs(
                out.logits[:len(drawn)], [trace.token_ids[j] for trace, (*_, j) in zip(traces, drawn, strict=True)],
                [trace.allowed[j] for trace, (*_, j) in zip(traces, drawn, strict=True)], traces[0].temperature)
            actions = actions.index_add(0, token_step, logprobs)
        chose = torch.tensor([s.k >= 0 for s in samples], device=self.device)
        picked = torch.tensor([max(s.k, 0) for s in samples], device=self.device)
        k_logits, values, within_values = out.k_logits[:len(samples)], *out.values.split([len(samples), len(within)])
        k_logprobs = k_logits.float().log_softmax(-1).gather(1, picked[:, None])[:, 0]
        observation_nll = functional.cross_entropy(out.logits[len(drawn):].float(), self._long(observed, 3)[:, 2],
                                                   reduction="none")
        return Reading(actions, k_logprobs * chose, k_entropy(k_logits) * chose, values, observation_nll, logprobs,
                       token_step, within_values, self._long(within, 3)[:, 2])

    def _long(self, rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
        """(len(rows), ``width``) on the policy's device."""
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(-1, width)

    # ------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """The policy as a model folder; with LoRA merged, and what was trained in ``adapter``."""
        self.check_finite()
        self.policy.save_pretrained(folder, self.tokenizer)
        if self.lora:
            self.policy.backbone.save_pretrained(folder / "adapter")
            save_heads(self.policy.heads, folder / "adapter")

    def check_finite(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.policy.parameters() if p.requires_grad):
            raise UserError(f"the weights are not finite after update {self.updates}: the training diverged; "
                            "lower --lr (the last checkpoint is kept)")

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly here, together with the model that the run started from."""
        weights = {name: p.detach() for name, p in self.policy.named_parameters() if p.requires_grad}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(), "updates": self.updates, "rng": torch.get_rng_state(),
                "cuda_rng": cuda}

    def load_state(self, state: dict[str, Any]) -> None:
        own = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                own[name].copy_(weight)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


@dataclass
class Reading:
    """Of N steps: log π_θ(a|·), log P_θ(K|s), H(P_θ(K|s)) and V_θ(s), each (N,) float32.

    ``observation_nll``: −log π_θ of each token of the observations that are learned, (M,) float32.
    ``token_logprobs``: of each token that was drawn, (D,), of the step with the number in ``token_step``, (D,).
    ``within_values``: with ``--credit token`` V_θ within the actions, (W,), of the steps ``within_step``, (W,).
    """

    action_logprobs: torch.Tensor
    k_logprobs: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor
    observation_nll: torch.Tensor
    token_logprobs: torch.Tensor
    token_step: torch.Tensor
    within_values: torch.Tensor
    within_step: torch.Tensor
