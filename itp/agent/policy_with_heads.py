"""π_θ with a K-head and a value head (what stage 2 trains, stage 3 goes on with and evaluation uses).

Both heads are linear on the backbone's last hidden state at ``<CTRL>``: P_θ(K|s_t) over 0..K_max and
V_θ(s_t).  The heads read the hidden state that predicts the next token.  The action's prompt begins with the same
state, whose keys and values serve both.

A folder of :meth:`PolicyWithHeads.save_pretrained` is an ordinary model folder, which
``AutoModelForCausalLM`` loads, with ``policy_heads.safetensors`` and ``policy_heads.json`` beside it.  The
``adaptive_heads.pt`` of the authors' release loads as well.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from itp.agent.heads import COPY_AGAIN, HEADS_CONFIG, HEADS_WEIGHTS, kmax_of, read_release
from itp.errors import UserError, first_line
from itp.files import write_json
from itp.model_card import ModelCard
from itp.pretrained import load_causal_lm, model_folder
from itp.text.prompts import CTRL

if TYPE_CHECKING:
    import peft


class PolicyHeads(nn.Module):
    """K-head and value head.  They start at zero: every K equally likely, every state worth nothing."""

    def __init__(self, hidden_size: int, kmax: int) -> None:
        super().__init__()
        self.k_head = nn.Linear(hidden_size, kmax + 1, dtype=torch.float32)
        self.v_head = nn.Linear(hidden_size, 1, dtype=torch.float32)
        for head in (self.k_head, self.v_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From hidden states (N, H) to K logits (N, K_max + 1) and values (N,), in float32 whatever is around."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.k_head.weight.device, torch.float32)
            k_logits, values = (functional.linear(hidden, head.weight.float(), head.bias.float())
                                for head in (self.k_head, self.v_head))
        return k_logits, values[:, 0]


@dataclass
class PolicyOutput:
    """Logits (B, T, V), or of the M wanted places (M, V); K logits (N, K_max + 1) and values (N,)."""

    logits: torch.Tensor
    k_logits: torch.Tensor
    values: torch.Tensor


class PolicyWithHeads(nn.Module):
    """``backbone``: any Hugging Face causal LM, with PEFT's layers or without; ``heads``: :class:`PolicyHeads`.

    ``card``: how it is prompted, which is saved with it.
    """

    def __init__(self, backbone: nn.Module, heads: PolicyHeads, card: ModelCard = ModelCard()) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads
        self.card = replace(card, control_token=True)

    @property
    def kmax(self) -> int:
        """K_max: the K-head chooses among 0..kmax."""
        return self.heads.k_head.out_features - 1

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The backbone without PEFT's wrapping, its layers still in it: the module that generates."""
        return self.backbone if isinstance(self.backbone, PreTrainedModel) else self.backbone.get_base_model()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, ctrl_pos: torch.Tensor,
                position_ids: torch.Tensor | None = None, logits_at: torch.Tensor | None = None) -> PolicyOutput:
        """Logits everywhere, K and V at the control tokens.

        ``input_ids`` (B, T).  ``attention_mask``: (B, T), 1 where a token is, or (B, 1, T, T), boolean or
        additive, of who sees whom; None: each token sees those on its left.  ``ctrl_pos``: (B,) column of
        ``<CTRL>`` in each row, or (N, 2) rows and columns.  ``logits_at``: (M, 2), the only places to compute
        logits of.
        """
        options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        only = contextlib.nullcontext() if logits_at is None else logits_only_at(self.causal_lm, logits_at)
        with self._last_hidden() as kept, only:
            mask = additive_mask(attention_mask, self.causal_lm.dtype)
            out = self.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False, **options)
        hidden = kept.pop()  # (B, T, H)
        logits = out.logits if logits_at is None else out.logits[0]
        if ctrl_pos.dim() == 1:
            ctrl_pos = torch.stack([torch.arange(len(ctrl_pos), device=ctrl_pos.device), ctrl_pos], dim=1)
        return PolicyOutput(logits, *self.heads(hidden[ctrl_pos[:, 0], ctrl_pos[:, 1]]))

    @contextlib.contextmanager
    def _last_hidden(self) -> Iterator[list[torch.Tensor]]:
        """Catches what the decoder hands to the language-model head.

        Calling the decoder and then the head ourselves would lose what some families do to their logits.
        """
        kept: list[torch.Tensor] = []
        hook = self.causal_lm.base_model.register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state))
        try:
            yield kept
        finally:
            hook.remove()

    def add_lora(self, config: peft.LoraConfig, ctrl: int) -> None:
        """Freeze the backbone and put LoRA's layers into it; the row of the control token learns with them."""
        import peft

        config.trainable_token_indices = [ctrl]
        self.backbone = peft.get_peft_model(self.backbone, config)

    # ------------------------------------------------------------ making, loading, saving

    @classmethod
    def create(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kmax: int,
               card: ModelCard = ModelCard()) -> PolicyWithHeads:
        """A policy with new heads; ``model`` and ``tokenizer`` get the control token."""
        add_control_token(model, tokenizer)
        heads = PolicyHeads(model.config.get_text_config().hidden_size, kmax).to(model.device)
        return cls(model, heads, card)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: str = "fp32", device: str = "cpu",
                        attn_implementation: str = "sdpa") -> tuple[PolicyWithHeads, PreTrainedTokenizerBase]:
        """(policy, tokenizer) of a folder with heads, in evaluation mode, as :func:`itp.pretrained.load_causal_lm`."""
        model, tokenizer = load_causal_lm(str(folder), device=device, dtype=dtype,
                                          attn_implementation=attn_implementation)
        return cls.around(model, tokenizer, folder), tokenizer

    @classmethod
    def around(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> PolicyWithHeads:
        """The heads of ``folder`` on ``model``, which was loaded from there."""
        kmax, weights = kmax_of(folder), read_heads(folder)
        hidden = model.config.get_text_config().hidden_size
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        wanted = {"k_head.weight": (kmax + 1, hidden), "k_head.bias": (kmax + 1,),
                  "v_head.weight": (1, hidden), "v_head.bias": (1,)}
        if shapes != wanted:  # before the heads are made: a wrong kmax may be of any size
            raise UserError(f"{folder}: heads of shapes {shapes} don't fit kmax {kmax} and this model, which needs "
                            f"{wanted}; train them again (train_adaptive_k sft)")
        policy = cls.create(model, tokenizer, kmax, ModelCard.read(folder) or ModelCard(style="instruct"))
        policy.heads.load_state_dict(weights)
        policy.train(model.training)
        return policy

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *,
                        heads: dict[str, torch.Tensor] | None = None, **options: Any) -> None:
        """Write a model folder.  PEFT's layers are merged into a copy on the CPU, so that training may go on.

        ``heads`` and ``state_dict``, one of the backbone's ``options``: weights that the module doesn't hold (ZeRO-3).
        """
        folder = Path(folder)
        model = self.backbone
        if model is not self.causal_lm:
            # A weight that deepcopy finds in its memo is not copied: none is on the GPU a second time.
            memo: dict[int, Any] = {id(w): nn.Parameter(w.detach().to("cpu", copy=True), requires_grad=False)
                                    for w in self.backbone.parameters()}
            memo |= {id(b): b.to("cpu", copy=True) for b in self.backbone.buffers()}
            model = copy.deepcopy(self.backbone, memo).merge_and_unload(safe_merge=True)
        model.save_pretrained(folder, **options)
        save_heads(self.heads, folder, heads)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        self.card.write(folder)


def causal_lm_of(module: nn.Module) -> PreTrainedModel:
    """The causal LM in whatever wrapping."""
    return next(inner for inner in module.modules() if isinstance(inner, PreTrainedModel))


@contextlib.contextmanager
def logits_only_at(model: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Within this context, ``model`` computes logits (1, M, V) at ``places`` only.

    ``model``: a causal LM in whatever wrapping.  ``places``: (M, 2), rows and columns.  Logits of all positions would
    be the largest tensor of a training step, and the loss uses few of them.
    """
    causal_lm = causal_lm_of(model)

    def gather(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = inputs  # (B, T, H)
        return hidden[places[:, 0], places[:, 1]][None], *others

    hook = causal_lm.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask (B, 1, T, T), boolean or additive, of who sees whom as ``dtype`` needs it; others as they are."""
    if mask is None or mask.dim() == 2:
        return mask
    hidden = ~mask if mask.dtype == torch.bool else mask < 0
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(hidden, torch.finfo(dtype).min)


def add_control_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make ``<CTRL>`` a token of both, once; its id.

    The embedding matrix grows only where it has no row left: many have more rows than their tokenizer has
    tokens (Qwen), and fitting the one to the other would shrink it.  The new row is the mean of the others.
    """
    rows, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    there = CTRL in tokenizer.get_vocab()
    ctrl = add_control_to_tokenizer(tokenizer)
    if there and ctrl < rows:
        return ctrl
    if ctrl >= rows:
        model.resize_token_embeddings(ctrl + 1, mean_resizing=False)
    weights = [model.get_input_embeddings().weight]
    if (head := model.get_output_embeddings()) is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    with torch.no_grad(), _gathered(weights):
        for weight in weights:
            weight[ctrl] = weight[:min(known, ctrl)].float().mean(0).to(weight.dtype)
    return ctrl


def add_control_to_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """``<CTRL>`` as one token, which nothing around it can become a part of; its id."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(CTRL, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(CTRL)


def _gathered(weights: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Under ZeRO-3 a process has only its share of a weight."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)


def save_heads(heads: PolicyHeads, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the heads beside a model.  ``state``: their weights, where the module doesn't hold them (ZeRO-3)."""
    from safetensors.torch import save_file

    weights = heads.state_dict() if state is None else state
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()},
              str(Path(folder) / HEADS_WEIGHTS))
    write_json(Path(folder) / HEADS_CONFIG, {"kmax": heads.k_head.out_features - 1,
                                             "hidden_size": heads.k_head.in_features})


def read_heads(folder: str | Path) -> dict[str, torch.Tensor]:
    """The heads' weights, ours or the release's, by their names in :class:`PolicyHeads`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(folder)
    if not (folder / HEADS_CONFIG).is_file():
        release = read_release(folder)
        return {f"{head}.{name}": weight.float() for head in ("k_head", "v_head")
                for name, weight in release[head].items()}
    if not (folder / HEADS_WEIGHTS).is_file():
        raise UserError(f"{folder}: {HEADS_CONFIG} is there but {HEADS_WEIGHTS} is not; {COPY_AGAIN}")
    try:
        return load_file(folder / HEADS_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / HEADS_WEIGHTS}: not readable ({first_line(error)}); {COPY_AGAIN}") from error
