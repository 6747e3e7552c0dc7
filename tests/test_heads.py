"""Policies with heads: the control token, what the heads read, LoRA, folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from itp.agent.heads import has_heads, kmax_of
from itp.agent.policy_with_heads import PolicyHeads, PolicyWithHeads
from itp.errors import UserError
from itp.lm.base import GenParams
from itp.models import load_policy
from itp.text.prompt_format import PromptFormat
from itp.text.prompts import CTRL, foresight_text, policy_prompt
from itp.training.token_tree import TokenTree, batch
from tests.tiny import write_tiny_model
from tests.toy import control_prompt

STATE = "Task: put a clean plate in fridge\nObservation: You are in the middle of a room."
LONGER = STATE + "\nAction: go to cabinet 1\nObservation: You arrive at cabinet 1. The cabinet 1 is closed."
FORESIGHT = foresight_text([("open cabinet 1", "You open the cabinet 1.")])
FORM = PromptFormat(control_token=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("plain"))


def load(folder: Path, *, tied: bool = False, padding: int = 0):
    """The tiny model, as it is, with tied embeddings, or with rows that no token uses (Qwen)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        model.tie_weights()
    if padding:
        model.resize_token_embeddings(len(tokenizer) + padding, mean_resizing=False)
    return model, tokenizer


def random_heads(policy: PolicyWithHeads) -> PolicyWithHeads:
    torch.manual_seed(3)
    for parameter in policy.heads.parameters():
        torch.nn.init.normal_(parameter)
    return policy.eval()


def encoded(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


def read(policy: PolicyWithHeads, tokenizer, text: str):
    ids = encoded(tokenizer, text)
    ctrl = (ids[0] == tokenizer.convert_tokens_to_ids(CTRL)).nonzero()[:, 0]
    with torch.no_grad():
        return policy(ids, torch.ones_like(ids), ctrl)


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_control_token_is_added_once_and_never_shrinks_the_vocabulary(plain, tied, padding):
    model, tokenizer = load(plain, tied=tied, padding=padding)
    known, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    before = model.get_input_embeddings().weight.detach().clone()
    PolicyWithHeads.create(model, tokenizer, 2)
    PolicyWithHeads.create(model, tokenizer, 2)
    assert len(tokenizer) == known + 1
    embeddings, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(embeddings) == len(out) == max(rows, known + 1) == model.config.vocab_size
    assert (embeddings is out) == tied
    ctrl = tokenizer.convert_tokens_to_ids(CTRL)
    assert ctrl == known
    torch.testing.assert_close(embeddings[ctrl], before[:known].mean(0))
    torch.testing.assert_close(embeddings[:known], before[:known])
    # One token behind the state, which all prompts of the policy begin with; the others don't have it.
    ids = encoded(tokenizer, policy_prompt(STATE, foresight=FORESIGHT, form=FORM))[0].tolist()
    control = encoded(tokenizer, control_prompt(STATE, FORM))[0].tolist()
    assert control[:-1] == encoded(tokenizer, STATE + "\n")[0].tolist() == ids[:len(control) - 1]
    assert control[-1] == ctrl and ctrl not in ids


def test_heads_start_indifferent_and_compute_in_float32():
    heads = PolicyHeads(8, 3)
    k_logits, values = heads(torch.randn(5, 8))
    assert k_logits.shape == (5, 4) and values.shape == (5,) and not k_logits.any() and not values.any()
    torch.nn.init.normal_(heads.k_head.weight)
    hidden = torch.randn(5, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        k_logits, values = heads(hidden)
    assert k_logits.dtype == values.dtype == torch.float32
    torch.testing.assert_close(k_logits, hidden.float() @ heads.k_head.weight.T + heads.k_head.bias)


def test_one_state_reads_the_same_alone_padded_in_a_tree_and_in_the_engine(plain, tmp_path):
    policy = random_heads(PolicyWithHeads.create(*(loaded := load(plain)), 2))
    tokenizer = loaded[1]
    texts = [control_prompt(STATE, FORM), control_prompt(LONGER, FORM), control_prompt(STATE, FORM) + " look\n"]
    alone = [read(policy, tokenizer, text) for text in texts]
    ctrl = tokenizer.convert_tokens_to_ids(CTRL)
    rows = [encoded(tokenizer, text)[0].tolist() for text in texts]
    columns = [row.index(ctrl) for row in rows]

    width = max(map(len, rows))  # padded on the left
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = policy(ids, mask, torch.tensor([c + width - len(r) for c, r in zip(columns, rows, strict=True)]), positions)

    tree = TokenTree()
    acting = policy_prompt(LONGER, foresight=FORESIGHT, form=FORM) + " open cabinet 1\n"
    acting_nodes = tree.add(encoded(tokenizer, acting)[0].tolist())
    nodes = [tree.add(row) for row in rows]
    at = torch.tensor([(0, path[column]) for path, column in zip(nodes, columns, strict=True)])
    ids, mask, positions = batch([tree], 0)
    tree_out = policy(ids, mask, at, positions)
    boolean = policy(ids, mask == 0, at, positions, logits_at=torch.tensor([[0, 3], [0, 5]]))
    torch.testing.assert_close(boolean.logits, tree_out.logits[0, [3, 5]])
    ids = encoded(tokenizer, acting)
    torch.testing.assert_close(tree_out.logits[0, acting_nodes], policy.causal_lm(ids).logits[0], rtol=0, atol=1e-4)

    policy.save_pretrained(tmp_path / "policy", tokenizer)
    engine = load_policy(str(tmp_path / "policy")).lm.engine
    readings = engine.read_heads([row[:column + 1] for row, column in zip(rows, columns, strict=True)])
    for i, single in enumerate(alone):
        for packed in (left, tree_out, boolean):
            torch.testing.assert_close(packed.k_logits[i], single.k_logits[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(packed.values[i], single.values[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(readings[i].k_logprobs), single.k_logits[0].log_softmax(-1),
                                   rtol=0, atol=1e-5)
        assert readings[i].value == pytest.approx(single.values[0].item(), abs=1e-5)
        torch.testing.assert_close(tree_out.logits[0, nodes[i]], single.logits[0], rtol=0, atol=1e-4)


@pytest.mark.asyncio
async def test_a_loaded_policy_chooses_k_and_generates(plain, tmp_path):
    model, tokenizer = load(plain)
    random_heads(PolicyWithHeads.create(model, tokenizer, 2)).save_pretrained(tmp_path / "p", tokenizer)
    lm = load_policy(str(tmp_path / "p")).lm
    reading, = await lm.read_heads([control_prompt(STATE, FORM)])
    assert len(reading.k_logprobs) == 3 and torch.tensor(reading.k_logprobs).exp().sum().item() == pytest.approx(1)
    reply, = await lm.generate([policy_prompt(STATE, form=FORM)], GenParams(max_new_tokens=3))
    assert reply.cached_tokens == reading.prompt_tokens - 1  # the state's keys and values serve the action
    await lm.close()
    lm = load_policy(str(plain)).lm
    with pytest.raises(UserError, match="no heads"):
        await lm.read_heads([STATE])
    await lm.close()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_control_row_trains_is_merged_and_saved(plain, tmp_path, tied, padding, lora):
    model, tokenizer = load(plain, tied=tied, padding=padding)
    policy = random_heads(PolicyWithHeads.create(model, tokenizer, 2))
    ctrl = tokenizer.convert_tokens_to_ids(CTRL)
    before = model.get_input_embeddings().weight.detach().clone()
    if lora:
        policy.add_lora(peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"), ctrl)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    ids = encoded(tokenizer, control_prompt(STATE, FORM) + " look\n")
    column = torch.tensor([ids[0].tolist().index(ctrl)])
    for _ in range(2):  # LoRA's B is zero at first, and so is the gradient of its A
        optimizer.zero_grad()
        out = policy(ids, torch.ones_like(ids), column)
        loss = torch.nn.functional.cross_entropy(out.logits[0, -3:-1], ids[0, -2:])
        (loss + torch.nn.functional.cross_entropy(out.k_logits, torch.tensor([1])) + out.values.square().sum()
         ).backward()
        optimizer.step()
    trained = policy.eval()(ids, torch.ones_like(ids), column)
    policy.save_pretrained(tmp_path, tokenizer)
    assert (policy.backbone is policy.causal_lm) != lora  # training may go on

    again, tokens = PolicyWithHeads.from_pretrained(tmp_path)
    assert tokens.convert_tokens_to_ids(CTRL) == ctrl and again.kmax == 2 and not again.training
    now = again(ids, torch.ones_like(ids), column)
    for name in ("logits", "k_logits", "values"):
        torch.testing.assert_close(getattr(now, name), getattr(trained, name), rtol=1e-4, atol=1e-3)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(bare(ids).logits, now.logits)
    after = bare.get_input_embeddings().weight
    assert len(after) == len(before) and (after is bare.get_output_embeddings().weight) == tied
    changed = (after - before).abs().amax(1) > 1e-6
    assert changed[ctrl]
    if lora:
        assert changed.sum() == 1


def test_a_folder_with_heads_says_what_it_is(plain, tmp_path):
    model, tokenizer = load(plain)
    PolicyWithHeads.create(model, tokenizer, 4).save_pretrained(tmp_path, tokenizer)
    assert has_heads(tmp_path) and kmax_of(tmp_path) == 4 and not has_heads(plain)
    assert json.loads((tmp_path / "policy_heads.json").read_text()) == {"kmax": 4, "hidden_size": 32}
    assert json.loads((tmp_path / "itp_model.json").read_text()) == {
        "prompt_style": "tuned", "control": True, "control_prompt": "own"}
    weights = load_file(tmp_path / "policy_heads.safetensors")
    assert {n: tuple(w.shape) for n, w in weights.items()} == {
        "k_head.weight": (5, 32), "k_head.bias": (5,), "v_head.weight": (1, 32), "v_head.bias": (1,)}
    (tmp_path / "itp_model.json").write_text('{"prompt_style": "instruct"}')
    again, _ = PolicyWithHeads.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path, tokenizer)
    assert json.loads((tmp_path / "itp_model.json").read_text()) == {
        "prompt_style": "instruct", "control": True, "control_prompt": "own"}
    asked = (f"import sys; from itp.agent.heads import has_heads, kmax_of; print(has_heads({str(tmp_path)!r}), "
             f"kmax_of({str(tmp_path)!r}), 'torch' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "4", "False"]
    (tmp_path / "policy_heads.json").write_text('{"kmax": 2, "hidden_size": 32}')
    with pytest.raises(UserError, match="don't fit kmax 2"):
        PolicyWithHeads.from_pretrained(tmp_path)
    (tmp_path / "policy_heads.safetensors").unlink()
    with pytest.raises(UserError, match="policy_heads.safetensors is not"):
        PolicyWithHeads.from_pretrained(tmp_path)


def test_the_heads_of_the_release_load(plain, tmp_path):
    model, tokenizer = load(plain)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    k_head, v_head = torch.nn.Linear(32, 4), torch.nn.Linear(32, 1)
    torch.save({"kmax": 3, "k_head": k_head.state_dict(), "v_head": v_head.state_dict()},
               tmp_path / "adaptive_heads.pt")
    assert has_heads(tmp_path) and kmax_of(tmp_path) == 3
    policy, tokenizer = PolicyWithHeads.from_pretrained(tmp_path)
    out = read(policy, tokenizer, control_prompt(STATE, FORM))
    ids = encoded(tokenizer, control_prompt(STATE, FORM))
    hidden = policy.causal_lm.model(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(out.k_logits, k_head(hidden))
    torch.testing.assert_close(out.values, v_head(hidden)[:, 0])
    (tmp_path / "adaptive_heads.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not the heads of a policy"):
        kmax_of(tmp_path)
    for content in ([], {"kmax": 3}, {"kmax": 3, "k_head": {"weight": 1}, "v_head": {}}):
        torch.save(content, tmp_path / "adaptive_heads.pt")
        with pytest.raises(UserError, match="not the heads of a policy"):
            kmax_of(tmp_path)


def test_a_broken_model_folder_is_one_line(plain, tmp_path):
    """Each library has its own error for it: safetensors, tokenizers (a bare Exception), transformers, json."""
    model, tokenizer = load(plain)
    PolicyWithHeads.create(model, tokenizer, 2).save_pretrained(tmp_path, tokenizer)
    for name, content in (("policy_heads.safetensors", b"\x00" * 20), ("model.safetensors", b"\x00" * 20),
                          ("tokenizer.json", b'{"version": "1.0", "model": 3}'), ("config.json", b"[]"),
                          ("config.json", b'{"model_type": "llama", "a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
                          ("policy_heads.json", b'{"kmax": 1000000000000}')):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"^{tmp_path}") as error:
            PolicyWithHeads.from_pretrained(tmp_path)
        assert "\n" not in str(error.value), name
        (tmp_path / name).write_bytes(whole)
    PolicyWithHeads.from_pretrained(tmp_path)
