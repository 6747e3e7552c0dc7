"""Sequences packed by their common beginnings: the same logits as alone, each shared token once."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from itp.training.token_tree import TokenTree, batch


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, intermediate_size=64, initializer_range=0.3)).eval()


def test_shared_beginnings_become_the_same_nodes():
    tree = TokenTree()
    assert tree.add([5, 6, 7]) == [0, 1, 2]
    assert tree.add([5, 6, 8, 9]) == [0, 1, 3, 4]
    assert tree.is_chain is False
    assert tree.add([5, 6, 7, 8]) == [0, 1, 2, 5]  # an 8 behind 7 is another one than behind 6
    assert tree.add([6]) == [6]
    assert tree.add([5, 6]) == [0, 1]
    assert (tree.ids, tree.positions) == ([5, 6, 7, 8, 9, 8, 6], [0, 1, 2, 2, 3, 3, 0])
    assert [tree.known(ids) for ids in ([], [4], [5, 6, 8, 1], [6, 5], [5, 6, 7])] == [0, 0, 3, 1, 3]
    assert [tree.new(*each) for each in (([5, 6],), ([5, 9],), ([5, 9, 1], [5, 9, 2, 3]), ([4], [], [4, 4, 5], [4, 4]))
            ] == [0, 1, 4, 3]
    ancestors = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 3, 4}, {0, 1, 2, 5}, {6}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in tree.visible()] == ancestors
    chain = TokenTree()
    chain.add([1, 1, 1])
    assert chain.is_chain and len(chain) == 3


def test_logits_in_padded_trees_are_those_of_the_plain_sequences(model):
    torch.manual_seed(1)
    trunk = torch.randint(0, 50, (20,)).tolist()
    forests = [[trunk[:n] + torch.randint(0, 50, (1 + n % 5,)).tolist() for n in cuts]
               for cuts in ([3, 8, 8, 20], [20, 2, 11], [1])]
    trees, paths = [], []
    for sequences in forests:
        trees.append(TokenTree())
        paths.append([trees[-1].add(ids) for ids in sequences])
    assert len(trees[0]) < sum(map(len, forests[0]))
    ids, mask, positions = batch(trees, pad_id=0)
    longest = max(map(len, trees))
    assert ids.shape == positions.shape == (3, longest) and mask.shape == (3, 1, longest, longest)
    with torch.no_grad():
        packed = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, (sequences, nodes) in enumerate(zip(forests, paths, strict=True)):
            for sequence, path in zip(sequences, nodes, strict=True):
                plain = model(input_ids=torch.tensor([sequence])).logits[0]
                torch.testing.assert_close(packed[row, path], plain, rtol=0, atol=1e-5)
