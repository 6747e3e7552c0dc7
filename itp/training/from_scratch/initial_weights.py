"""What attention of a small base LM starts out with: matching words, and an induction head that copies.

Both would form by themselves, in a time that a CPU doesn't have.  Training then changes them like any other weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREVIOUS, MATCH, COPIED = 8.3, 20.0, 0.5
"""Of the induction head: how sharp attention to the token before starts out (in each pair of dimensions), and attention
to an equal token; and how much of a copied word is written.  With much more of it, finding the task's object isn't
learned: the held-out loss of these exercises was .44 for 1, .18 for .3 and .07 for .1, as without an induction head."""
LENGTH, CONSTANT = 1.3, 0.3
"""Of every embedding: its length, and its dimension 0."""


def prepare_matching(model: PreTrainedModel) -> None:
    """Start out with attention to the same word, however far above, which a policy looks for its task's object with.

    Keys like queries, embeddings that outweigh what the first layers add to them; and (in the configuration) rotary
    frequencies so low that distance hardly matters.
    """
    model.get_input_embeddings().weight.mul_(5)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(3)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def leave_room(words: torch.Tensor, size: int) -> None:
    """Leave dimension 0 and the last ``size`` of the embeddings (V, H) free for an induction head."""
    words[:, 0] = words[:, -size:] = 0


def make_alike(words: torch.Tensor) -> None:
    """Give all embeddings (V, H) one length, which norms then treat alike; padding has none."""
    words.mul_(LENGTH / words.norm(dim=1, keepdim=True).clamp(min=1e-9))


def prepare_copying(model: PreTrainedModel) -> None:
    """Start out with an induction head (Olsson et al., 2022): it finds a token's last place, and copies what followed.

    Training takes hundreds of steps to form one in a model of this size, in which the loss of copying doesn't move.
    A head of the first layer writes the token before into the last dimensions, which words leave free.  It finds it by
    a constant in dimension 0 of all embeddings, whose rotations agree one step apart.  A head of the second layer looks
    for a token that is preceded by the current one, and copies it.  All other heads match words, and nothing else.
    """
    import torch

    config, words = model.config, model.get_input_embeddings().weight
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    previous, copying = (model.model.layers[i].self_attn for i in (0, 1))
    words[:, 0] = CONSTANT
    # What the norm before a layer multiplies a state with: the embedding alone, and with the word before.
    first, second = ((hidden / (CONSTANT ** 2 + n * LENGTH ** 2)) ** 0.5 for n in (1, 2))
    for layer in model.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
            weight[:, 0] = weight[:, -size:] = 0
    for layer, factor in ((previous, first), (copying, second)):
        layer.q_proj.weight[:size] = layer.k_proj.weight[:size] = 0
        layer.o_proj.weight[:, :size] = 0
        layer.v_proj.weight[:size] = 0
        layer.v_proj.weight[:size, :size] = torch.eye(size) / factor
        layer.v_proj.weight[0, 0] = 0  # the constant is no part of a word

    angles = config.rope_parameters["rope_theta"] ** (-2 * torch.arange(size // 2) / size)  # of one step
    fast = torch.arange(5 * size // 32 + 1)
    sharp = PREVIOUS / (CONSTANT * first)
    previous.q_proj.weight[fast, 0] = sharp
    previous.k_proj.weight[fast, 0] = sharp * angles[fast].cos()
    previous.k_proj.weight[fast + size // 2, 0] = sharp * angles[fast].sin()
    previous.o_proj.weight[-size:, :size] = torch.eye(size)

    still = [i for i in range(size) if angles[i % (size // 2)] < 0.006]  # hardly rotated within an episode
    project = torch.randn(len(still), size) * ((hidden - size) / size / len(still)) ** 0.5
    project[:, 0] = 0
    project *= (MATCH * size ** 0.5) ** 0.5 / (LENGTH * second)
    copying.q_proj.weight[still, :size] = project
    copying.k_proj.weight[still, -size:] = project
    copying.o_proj.weight[:size, :size] = torch.eye(size) * COPIED
