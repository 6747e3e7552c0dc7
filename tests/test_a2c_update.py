"""The update of stage 3: what it computes depends on the episodes alone, not on how they go through the model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from itp.agent.policy_with_heads import PolicyWithHeads
from itp.distributed import Processes
from itp.lm.base import Trace
from itp.pretrained import load_causal_lm
from itp.text.prompts import CTRL
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.a2c_update import Learner, Sample, cheapest_rows, make_rows, operations
from tests.tiny import write_tiny_model

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    model, tokenizer = load_causal_lm(str(write_tiny_model(root / "plain")))
    policy = PolicyWithHeads.create(model, tokenizer, 2)
    for head in (policy.heads.k_head, policy.heads.v_head):
        torch.nn.init.normal_(head.weight, std=0.3)
    policy.save_pretrained(root / "policy", tokenizer)
    return root / "policy"


def learner_of(folder: Path, **changes) -> Learner:
    common = {"policy_model": str(folder), "out_dir": "", "lora_r": 0, "value_updates": 0, "max_grad_norm": 0.0,
              "epochs": 100}
    settings = RlSettings(**(common | changes))
    torch.manual_seed(0)
    policy, tokenizer = PolicyWithHeads.from_pretrained(folder)
    return Learner(policy, tokenizer, settings, torch.float32, Processes())


def episodes_of(learner: Learner, lengths: tuple[int, ...]) -> list[list[Sample]]:
    """Episodes of so many steps: each prompt is the state so far, <CTRL>, and words of its own.

    Where the learner has an observation loss, samples have the five tokens that followed the action, too.
    """
    draw, ctrl = random.Random(1), learner.tokenizer.convert_tokens_to_ids(CTRL)
    episodes = []
    for length in lengths:
        state, samples = [draw.randrange(ctrl) for _ in range(20)], []
        for _ in range(length):
            action = tuple(draw.randrange(ctrl) for _ in range(3))
            trace = Trace(action, (None, (*action[1:2], 3, 4), (action[2],)), TEMPERATURE, 0.0)
            own = [draw.randrange(ctrl) for _ in range(draw.randrange(1, 9))]
            sample = Sample([*state, ctrl, *own], [*state, ctrl], trace, draw.randrange(3), draw.gauss(0, 1),
                            draw.gauss(0, 1))
            before, observation = [*state, *action], [draw.randrange(ctrl) for _ in range(5)]
            if learner.settings.observation_loss:
                sample = replace(sample, before_observation=before, observation=observation)
            samples.append(sample)
            state = [*before, *observation]
        episodes.append(samples)
    return episodes


def updated(learner: Learner, episodes: list[list[Sample]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics of an update on episodes, and the gradients that it was made of."""
    found = learner.update(episodes)
    return found, {name: p.grad.clone() for name, p in learner.policy.named_parameters() if p.requires_grad}


def same(one: tuple[dict, dict], two: tuple[dict, dict], rtol: float = 1e-4) -> None:
    assert one[0] == pytest.approx(two[0], rel=1e-4, abs=1e-5)
    assert one[1].keys() == two[1].keys() and any(g.abs().max() > 1e-3 for g in one[1].values())
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, two[1][name], rtol=rtol, atol=3e-5)


@pytest.mark.parametrize("observation_loss", [0.0, 0.7])
def test_trees_keep_to_the_budget_and_still_share(folder: Path, observation_loss: float) -> None:
    episode, = episodes_of(learner_of(folder, observation_loss=observation_loss), (12,))
    whole, = make_rows(episode, 10 ** 6)
    alone = make_rows(episode, 1)
    assert [row.samples for row in alone] == [[sample] for sample in episode]  # one sample may exceed it
    budget = max(len(row.tree) for row in alone)
    parts = make_rows(episode, budget)
    assert [sample for row in parts for sample in row.samples] == episode and len(parts) > 1
    for more in range(40):
        assert max(len(row.tree) for row in make_rows(episode, budget + more)) <= budget + more
    assert len(whole.tree) < sum(len(row.tree) for row in parts) < sum(len(row.tree) for row in alone)


def test_the_other_history_of_the_heads_counts_too() -> None:
    trace = Trace((1, 2), (None, None), 1.0, 0.0)
    episode = [Sample([*range(n, n + 300)], [*range(n, n + 10), *range(900, 1100)], trace, 0, 1.0, 1.0)
               for n in range(5000, 13000, 1000)]
    one = len(make_rows(episode[:1], 10 ** 6)[0].tree)
    assert one == 301 + 200
    assert [len(row.samples) for row in make_rows(episode, 2 * one)] == [2] * 4
    assert [len(row.samples) for row in make_rows(episode, 2 * one - 1)] == [1] * 8


def step(ids: list[int], state: int) -> Sample:
    """A step with the prompt ``ids``, the first ``state`` of which are its state."""
    return Sample(ids, ids[:state], Trace((1, 2), (None, None), 1.0, 0.0), 0, 1.0, 1.0)


def test_rows_are_those_that_cost_least() -> None:
    imagined = [step([*range(300), *range(1000 * t, 1000 * t + 700)], 300) for t in range(1, 21)]
    whole, = make_rows(imagined, 10 ** 6)
    costs = {size: operations(make_rows(imagined, size), 64) for size in range(1000, len(whole.tree) + 100, 100)}
    rows = cheapest_rows(imagined, 10 ** 6, 64)
    assert operations(rows, 64) <= 1.1 * min(costs.values()) < operations([whole], 64) / 3
    assert [s for row in rows for s in row.samples] == imagined
    assert max(len(row.tree) for row in cheapest_rows(imagined, 1100, 64)) <= 1100
    growing = [step([*range(800 + 5 * t), *range(5000 * (t + 1), 5000 * (t + 1) + 9)], 800 + 5 * t) for t in range(99)]
    assert len(cheapest_rows(growing, 10 ** 6, 1)) == 1 < len(make_rows(growing, 2100))  # a second repeats the state


@pytest.mark.parametrize("lora_r, observation_loss", [(0, 0.0), (4, 0.0), (0, 0.7)])
def test_an_update_is_the_same_within_any_budget(folder: Path, lora_r: int, observation_loss: float) -> None:
    found, passes = {}, {}
    for budget in (1, 90, 10 ** 6):
        learner = learner_of(folder, update_batch_tokens=budget, lora_r=lora_r, lora_dropout=0.0,
                             observation_loss=observation_loss)
        episodes, sizes = episodes_of(learner, (9, 3, 1)), []
        learner.policy.causal_lm.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
        found[budget], passes[budget] = updated(learner, episodes), sizes
    longest = max(len(s.ids) + 2 + len(s.observed_ids[len(s.heads_ids) - 1:]) for e in episodes for s in e)
    assert longest > 90  # a step that no tree of that size holds
    assert (len(passes[1]), len(passes[10 ** 6])) == (13, 1) and 1 < len(passes[90]) < 13
    assert max(passes[90]) < longest + 8
    same(found[1], found[10 ** 6])
    same(found[90], found[10 ** 6])


def test_observations_are_learned_where_the_next_prompt_has_them(folder: Path) -> None:
    """Only those of the last step need nodes of their own; each token's loss is that of its sequence alone."""
    learner, without = learner_of(folder, observation_loss=0.7), learner_of(folder)
    episode, = episodes_of(learner, (4,))
    row, = make_rows(episode, 10 ** 6)
    plain, = make_rows(episodes_of(without, (4,))[0], 10 ** 6)
    assert len(row.tree) == len(plain.tree) + 3 + 4 and not plain.observed
    assert [(row.tree.path(node), token) for node, token in row.observed] == [
        ([*s.before_observation, *s.observation[:j]], s.observation[j]) for s in episode for j in range(5)]
    nll = []
    with torch.no_grad():
        for s in episode:
            logits = learner.policy.causal_lm(torch.tensor([[*s.before_observation, *s.observation]])).logits[0]
            told = logits[len(s.before_observation) - 1:-1].log_softmax(-1)
            nll += [-told[j, token].item() for j, token in enumerate(s.observation)]
    assert learner.read([row]).observation_nll.tolist() == pytest.approx(nll, abs=1e-4) and len(set(nll)) == 20
    found, plainly = learner.update([episode]), without.update(episodes_of(without, (4,)))
    assert found["loss_observation"] == pytest.approx(sum(nll) / 20, abs=1e-4)
    assert found["loss"] == pytest.approx(plainly["loss"] + 0.7 * sum(nll) / 20, abs=1e-4)
    assert found["loss_act"] == pytest.approx(plainly["loss_act"], abs=1e-4) and "loss_observation" not in plainly


def credited(learner: Learner, episodes: list[list[Sample]]) -> list[list[Sample]]:
    """The episodes with advantages of their tokens by chance, and targets within their actions."""
    draw = random.Random(5)
    return [[replace(s, token_advantages=[draw.gauss(0, 1) for _ in s.drawn],
                     token_targets=[draw.gauss(0, 1) for _ in s.drawn[1:]]) for s in episode] for episode in episodes]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_token_credit_is_the_same_within_any_budget(folder: Path, lora_r: int) -> None:
    found = []
    for budget in (1, 90, 10 ** 6):
        learner = learner_of(folder, update_batch_tokens=budget, lora_r=lora_r, lora_dropout=0.0, credit="token")
        found.append(updated(learner, credited(learner, episodes_of(learner, (9, 3, 1)))))
    same(found[0], found[2], rtol=1e-3)  # gradients are several times those of actions
    same(found[1], found[2], rtol=1e-3)


def test_each_token_is_weighed_by_its_own_advantage_and_valued_where_it_is_drawn(folder: Path) -> None:
    """Against one sequence at a time: the first two of three tokens are drawn, the last is forced."""
    learner = learner_of(folder, credit="token", entropy_coef=0.0, value_coef=0.5)
    episode, = episodes_of(learner, (4,))
    within, = learner.token_values([episode])
    policy, values, logprobs, ks, firsts = learner.policy, [], [], [], []
    with torch.no_grad():
        for s in episode:
            ids, read_at = torch.tensor([[*s.ids, *s.trace.token_ids[:2]]]), len(s.ids) - 1
            out = policy(ids, torch.ones_like(ids), torch.tensor([[0, read_at + 1]]))
            values.append(out.values.tolist())
            told = out.logits[0] / TEMPERATURE
            allowed = list(s.trace.allowed[1])
            logprobs.append([told[read_at].log_softmax(-1)[s.trace.token_ids[0]].item(),
                             told[read_at + 1][allowed].log_softmax(-1)[0].item()])
            heads = torch.tensor([s.heads_ids])
            out = policy(heads, torch.ones_like(heads), torch.tensor([[0, len(s.heads_ids) - 1]]))
            ks.append(out.k_logits.log_softmax(-1)[0, s.k].item())
            firsts.append(out.values.item())
    assert within == [pytest.approx(own, abs=1e-4) for own in values]
    episode, = credited(learner, [episode])
    found = learner.update([episode])
    act = [-(s.advantage * k + sum(a * p for a, p in zip(s.token_advantages, own, strict=True)))
           for s, k, own in zip(episode, ks, logprobs, strict=True)]
    errors = [((v - s.target) ** 2 + (inner[0] - s.token_targets[0]) ** 2) / 2
              for s, v, inner in zip(episode, firsts, values, strict=True)]
    assert found["loss_act"] == pytest.approx(sum(act) / 4, abs=1e-4)
    assert found["loss_value"] == pytest.approx(sum(errors) / 4, abs=1e-4)
    assert found["loss"] == pytest.approx((sum(act) + 0.5 * sum(errors)) / 4, abs=1e-4)


def test_where_all_tokens_have_the_actions_advantage_the_policy_learns_the_same(folder: Path) -> None:
    by_token, by_action = learner_of(folder, credit="token", value_coef=0.0), learner_of(folder, value_coef=0.0)
    episodes = episodes_of(by_action, (5, 4))
    alike = [[replace(s, token_advantages=[s.advantage] * 2, token_targets=[0.0]) for s in e] for e in episodes]
    found, wanted = updated(by_token, alike), updated(by_action, episodes)
    same(({**found[0], "loss_value": 0.0}, found[1]), ({**wanted[0], "loss_value": 0.0}, wanted[1]))


def test_without_a_critic_no_value_is_learned(folder: Path) -> None:
    """α is nothing then, and no first updates are the value head's."""
    critic, groups = (learner_of(folder, **changes) for changes in (
        {"value_coef": 0.0}, {"advantage": "group", "group_size": 2, "value_coef": 5.0, "value_updates": 3}))
    found, wanted = (updated(learner, episodes_of(learner, (5, 4))) for learner in (groups, critic))
    heads = {name for name in wanted[1] if name.startswith("heads.v_head")}
    assert len(heads) == 2 and not any(wanted[1][name].any() for name in heads)
    same(found, ({name: value for name, value in wanted[0].items() if name != "loss_value"},
                 {name: gradient for name, gradient in wanted[1].items() if name not in heads}))


@pytest.mark.parametrize("lora_r", [0, 4])
def test_recomputed_activations_change_memory_only(folder: Path, lora_r: int) -> None:
    found, saved = [], []
    for checkpointing in (False, True):
        learner = learner_of(folder, gradient_checkpointing=checkpointing, lora_r=lora_r, lora_dropout=0.0)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            found.append(updated(learner, episodes_of(learner, (6, 2))))
        saved.append(sum(sizes))
        assert not learner.policy.training and not any(m.training for m in learner.policy.modules())
    same(*found)
    assert saved[1] < saved[0] / 2


def test_a_policy_learns_without_its_own_dropout(tmp_path: Path, folder: Path) -> None:
    """GPT-2's configuration has dropout, which didn't act: with it, the update would be another policy's."""
    _, tokenizer = load_causal_lm(str(folder))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5,
                                       embd_pdrop=0.5, attn_pdrop=0.5, bos_token_id=None, eos_token_id=0))
    PolicyWithHeads.create(model, tokenizer, 2).save_pretrained(tmp_path, tokenizer)
    found = []
    for seed in (0, 1):
        learner = learner_of(tmp_path, gradient_checkpointing=True)
        torch.manual_seed(seed)
        found.append(updated(learner, episodes_of(learner, (3,))))
    same(*found)


def test_the_gradient_of_episodes_is_what_an_update_would_take(folder: Path) -> None:
    measured, learner = (learner_of(folder, value_coef=0.0) for _ in range(2))
    measured.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    episodes = episodes_of(learner, (5, 4))
    before = [p.detach().clone() for p in measured.policy.parameters()]
    gradient = measured.gradient(episodes)
    assert all(torch.equal(p, old) and p.grad is None
               for p, old in zip(measured.policy.parameters(), before, strict=True))
    _, taken = updated(learner, episodes)
    taken = torch.cat([g.flatten() for name, g in taken.items() if not name.startswith("heads.v_head")])
    torch.testing.assert_close(gradient, taken, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_updates_of_the_value_head_leave_the_policy_as_it_is(folder: Path, lora_r: int) -> None:
    learner = learner_of(folder, value_updates=1, lora_r=lora_r)
    episodes = episodes_of(learner, (5, 4))

    def changed() -> set[str]:
        before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
        learner.update(episodes)
        return {name for name, p in learner.policy.named_parameters() if not torch.equal(p, before[name])}

    assert changed() == {"heads.v_head.weight", "heads.v_head.bias"}
    assert {name.startswith("heads.v_head") for name in changed()} == {True, False}


def test_a_last_batch_of_fewer_episodes_than_parts(folder: Path) -> None:
    """One episode in two parts is one part: no step on nothing, and no loss halved by it."""
    halves, whole = (learner_of(folder, minibatches=n, episodes_per_update=2) for n in (2, 1))
    halves.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    episode = episodes_of(whole, (4,))
    same(updated(halves, episode), updated(whole, episode))


def test_a_merged_policy_is_what_was_trained_and_its_adapter_lies_beside(folder: Path, tmp_path: Path) -> None:
    import peft

    learner = learner_of(folder, lora_r=4, lr=1e-2)
    learner.update(episodes_of(learner, (5, 2)))
    before = {name: (p.device, p.clone()) for name, p in learner.policy.named_parameters()}
    learner.save(tmp_path)
    after = dict(learner.policy.named_parameters())
    assert all(torch.equal(after[name], weight) for name, (_, weight) in before.items())
    ids = torch.tensor([[5, 6, 7, learner.tokenizer.convert_tokens_to_ids(CTRL), 8]])
    merged, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, folder))
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        trained = learner.policy.backbone(input_ids=ids).logits
        assert (trained - plain(ids).logits).abs().max() > 1e-2
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted(ids).logits, trained, rtol=1e-5, atol=1e-5)
    heads = load_file(tmp_path / "adapter" / "policy_heads.safetensors")
    torch.testing.assert_close(heads["v_head.weight"], learner.policy.heads.v_head.weight.detach())


def test_no_weight_is_copied_where_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(folder, lora_r=4)
    copied: list[torch.Size] = []
    deepcopy = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__",
                        lambda self, memo: copied.append(self.shape) or deepcopy(self, memo))
    learner.save(tmp_path)
    assert not copied
