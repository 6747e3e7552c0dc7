"""Stage 2: the loss of eq. 6 however steps are packed, what is cut, what is learned, folders, resumption."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from itp.agent.policy_with_heads import PolicyWithHeads
from itp.errors import UserError
from itp.files import write_json
from itp.lm.base import GenParams
from itp.model_card import MODEL_CARD, style_of
from itp.models import load_policy
from itp.text.prompt_format import PromptFormat
from itp.text.prompts import CTRL, policy_prompt
from itp.text.state import State
from itp.training.checkpoints import whole_checkpoints
from itp.training.itp_r import warm_up
from itp.training.itp_r.warm_up_data import LabeledStep, SftSettings, as_labeled, k_weights, read_labeled
from itp.training.itp_r.warm_up_task import StepCollator, WarmUp, WarmUpTask
from tests.killed import command_of, finish, kill
from tests.tiny import write_tiny_model
from tests.toy import control_prompt

CLOSED, OPEN = "The cabinet 1 is closed.", "The cabinet 1 is open."
FIRST = "You are in the middle of a room."
FORM = PromptFormat(control_token=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    torch.set_num_threads(1)
    words = [FIRST, CLOSED, OPEN, "[1 earlier steps omitted]"]
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), words=words)
    write_json(folder / MODEL_CARD, {"prompt_style": "tuned"})
    return str(folder)


def episode(number: int, steps: int = 4) -> list[dict]:
    """Where the cabinet is closed it pays to look two steps ahead, and the future says what is to be done."""
    rows, state = [], State("put a clean plate in fridge", FIRST)
    for t in range(steps):
        k = 2 * (hash((number, t)) % 2)  # hashes of numbers are the same in every process
        state = state.after("go to cabinet 1" if t % 3 else "look", CLOSED if k else OPEN)
        thing = ("plate 1", "mug 2")[(number + t) % 2]
        imagined = [["open cabinet 1", f"In it, you see a {thing}."],
                    ["take plate 1 from cabinet 1", "Nothing happens."]]
        rows.append({"episode_id": f"e{number}", "step": t, "state": state.render(), "next_state": "x",
                     "action": f"take {thing} from cabinet 1" if k else "open cabinet 1", "k_label": k,
                     "imagined": imagined, "obs_list": [state.observation, imagined[0][1], imagined[1][1]]})
    return rows


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings_for(model_path: str, tmp_path: Path, rows: list[dict], **changes) -> SftSettings:
    options = {"train_jsonl": write(tmp_path / "labelled.jsonl", rows), "policy_model": model_path,
               "out_dir": str(tmp_path / "out"), "max_k": 2, "epochs": 2.0, "batch_size": 4, "grad_accum": 1,
               "lr": 3e-3, "lora_r": 0, "eval_share": 0.2, "max_seq_len": 400} | changes
    return SftSettings(**options)


def task_for(settings: SftSettings) -> WarmUpTask:
    settings = as_labeled(dataclasses.replace(settings, model_path=settings.policy_model))
    return WarmUpTask(settings, read_labeled(settings))


def read(path: str, **changes) -> list[LabeledStep]:
    settings = SftSettings(train_jsonl=path, policy_model="", out_dir="", max_k=2, **changes)
    return read_labeled(as_labeled(settings))


# ---------------------------------------------------------------- the loss


def slow_loss(policy: PolicyWithHeads, tokenizer, rows: list[dict], beta_k: float, act_on: str) -> float:
    """Eq. 6 step by step from prompts as texts and the bare model; with "all", L_π over every k."""
    lm, nll, tokens, k_nll = policy.causal_lm, 0.0, 0, 0.0
    for row in rows:
        text = row["state"]
        hidden = lm.model(torch.tensor([tokenizer.encode(text + "\n<CTRL>")])).last_hidden_state[0, -1]
        k_nll -= (policy.heads.k_head(hidden)).log_softmax(-1)[row["k_label"]].item()
        for k in [row["k_label"]] if act_on == "label" else range(len(row["imagined"]) + 1):
            future = "".join(f"\nIf: {action}\nThen: {observation}" for action, observation in row["imagined"][:k])
            prompt, target = tokenizer.encode(text + future + "\nAction:"), tokenizer.encode(f" {row['action']}\n")
            logprobs = lm(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            nll -= sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
            tokens += len(target)
    return nll / tokens + beta_k * k_nll / len(rows)


def test_flash_attention_is_not_for_steps_that_share_a_sequence(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_up, "check_settings", lambda settings: None)  # a machine that has it
    settings = settings_for(model_path, tmp_path, episode(0), attn_implementation="flash_attention_2",
                            steps_per_sequence=0)
    with pytest.raises(UserError, match="give --steps_per_sequence 1, or take sdpa"):
        warm_up.run(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("act_on", ("label", "all"))
def test_the_loss_is_that_of_eq_6_however_steps_are_packed_and_padded(model_path, tmp_path, act_on):
    rows = [row for i in range(3) for row in episode(i, 2 + 2 * i)]
    settings = settings_for(model_path, tmp_path, rows, beta_k=0.7, act_on=act_on)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    policy = PolicyWithHeads.create(lm, tokenizer, 2)
    torch.nn.init.normal_(policy.heads.k_head.weight)
    expected = slow_loss(policy, tokenizer, rows, 0.7, act_on)

    nodes, gradients = {}, []
    for packed, attention in ((1, "sdpa"), (0, "sdpa"), (3, "sdpa"), (1, "flash_attention_2")):
        for left in (False, True):
            task = task_for(dataclasses.replace(settings, steps_per_sequence=packed, attn_implementation=attention))
            encoded = task.encode(AutoTokenizer.from_pretrained(model_path)).rows
            if attention == "sdpa":
                nodes[packed] = sum(len(row["input_ids"]) for row in encoded)
            else:  # which knows no mask: the prompts of action and heads are sequences of their own
                assert all(tree.is_chain for row in encoded for tree in row["trees"])
            module = WarmUp(policy, 0.7)
            collate = StepCollator(0, 8, left=left)
            assert module(**collate(encoded))["loss"].item() == pytest.approx(expected, abs=1e-4)
            # In pieces, as gradient accumulation does it.
            batches = [collate(encoded[:1]), collate(encoded[1:])]
            total = sum(task.items(batch) for batch in batches)
            module.zero_grad()
            parts = [module(**batch, items=total)["loss"] for batch in batches]
            assert sum(part.item() for part in parts) == pytest.approx(expected, abs=1e-4)
            sum(parts).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-4)
    assert nodes[0] < nodes[3] < nodes[1] and nodes[0] < 0.6 * nodes[1]


def test_rare_labels_weigh_more_where_that_is_wanted(model_path, tmp_path):
    steps = [LabeledStep("e", State("t", "o"), "", "look", k) for k in (0, 0, 0, 0, 0, 0, 0, 0, 1, 1, None)]
    assert k_weights(steps, 0.0, 2) == [1.0, 1.0, 1.0]
    assert k_weights(steps, 1.0, 2) == pytest.approx([0.625, 2.5, 1.0])  # 8 * .625 = 2 * 2.5, and 10 in sum
    assert k_weights(steps, 0.5, 2)[:2] == pytest.approx([5 / 6, 5 / 3])
    rows = [row | {"k_label": int(i == 0)} for i, row in enumerate(episode(0, 4))]
    settings = settings_for(model_path, tmp_path, rows, k_balance=1.0, eval_share=0.0)
    task, tokenizer = task_for(settings), AutoTokenizer.from_pretrained(model_path)
    module = task.load(tokenizer, torch.float32)
    assert module.k_weights.tolist() == pytest.approx([2 / 3, 2.0, 1.0])
    torch.nn.init.normal_(module.policy.heads.k_head.weight)
    batch = StepCollator(0)(task.encode(AutoTokenizer.from_pretrained(model_path)).rows)
    made = module(**batch)
    with torch.no_grad():
        logits = module.policy(batch["input_ids"], batch.get("attention_mask"), batch["ctrl_pos"],
                               batch.get("position_ids")).k_logits
    nll = [-logits.log_softmax(-1)[i, k].item() for i, k in enumerate(batch["k_labels"])]
    weighted = sum(loss * (2.0 if k else 2 / 3) for loss, k in zip(nll, batch["k_labels"], strict=True)) / 4
    sums = made["sums"].tolist()
    assert sums[2] == pytest.approx(sum(nll))  # what is reported is eq. 6's
    assert made["loss"].item() == pytest.approx(sums[0] / sums[1] + settings.beta_k * weighted)


def test_held_out_figures_count_whole_actions(model_path, tmp_path):
    rows = episode(1, 3)
    task = task_for(settings_for(model_path, tmp_path, rows))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    encoded = task.encode(tokenizer).rows
    policy = PolicyWithHeads.create(AutoModelForCausalLM.from_pretrained(model_path), tokenizer, 2)
    policy.heads.k_head.bias.data = torch.tensor([0.0, 0.0, 1.0])  # always 2
    batch = StepCollator(0)(encoded)

    class Parrot(torch.nn.Module):
        """Says what is to be said, but for one token of the last step's action."""

        def forward(self, input_ids, attention_mask, ctrl_pos, position_ids, logits_at):
            out = policy(input_ids, attention_mask, ctrl_pos, position_ids)
            out.logits = torch.zeros_like(out.logits)
            for (b, t), token in zip(batch["target_pos"].tolist(), batch["target_ids"].tolist(), strict=True):
                out.logits[b, t, token] = 1.0
            b, t = batch["target_pos"][-2].tolist()
            out.logits[b, t] = torch.arange(out.logits.shape[-1]) == 0
            out.logits = out.logits[logits_at[:, 0], logits_at[:, 1]]
            return out

    module = WarmUp(policy, 0.5)
    module.policy = Parrot()
    found = task.eval_metrics(module(**batch)["sums"].tolist())
    assert found["action_match"] == pytest.approx(2 / 3)
    assert found["k_accuracy"] == pytest.approx(sum(row["k_label"] == 2 for row in rows) / 3)
    assert found["loss"] == pytest.approx(found["policy_loss"] + 0.5 * found["k_loss"])
    majority = task.measure(tokenizer, encoded, torch.device("cpu"))["eval_k_majority"]
    # Held-out rows that have no action to learn, no label, or neither: what can't be measured is left out.
    assert task.eval_metrics([0, 0, 3, 2, 1, 1]) == {"loss": 1.5 * task.settings.beta_k, "k_loss": 1.5,
                                                     "action_match": 0.5, "k_accuracy": 0.5}
    assert task.eval_metrics([3, 2, 0, 0, 0, 0]) == {"loss": 1.5, "policy_loss": 1.5}
    assert task.measure(tokenizer, [row | {"k_labels": []} for row in encoded], torch.device("cpu")) == {}
    share = sum(row["k_label"] == 2 for row in rows) / 3
    assert majority == pytest.approx(max(share, 1 - share))


def test_long_prompts_lose_their_oldest_steps_and_nothing_else(model_path, tmp_path):
    rows = [dict(episode(1, 8)[-1], k_label=2)]
    settings = settings_for(model_path, tmp_path, rows)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    whole, = task_for(settings).encode(tokenizer).rows
    action = tokenizer(f" {rows[0]['action']}\n", add_special_tokens=False)["input_ids"]
    prompt = len(whole["input_ids"]) - len(action)  # <CTRL> is there, and nothing is predicted from the last token
    need = prompt + 16  # what a prompt leaves for an action, however long that is
    short = task_for(dataclasses.replace(settings, max_seq_len=need - 1))
    cut = short.encode(tokenizer)
    assert cut.counts["cut"] == 1 and cut.counts["lost_tokens"] > 0
    row, = cut.rows
    tokenizer.add_tokens([CTRL], special_tokens=True)
    step, = short._tokens(tokenizer, dict.fromkeys(cut.counts, 0))
    assert len(step.prompt) < prompt and step.ids == [*step.prompt, *action[:-1]]
    # The heads read before anything is imagined: their prompt has all of the history.
    assert len(row["input_ids"]) > len(step.ids) + 10 and tokenizer.decode(step.heads_prompt).count("Action:") == 8
    text = tokenizer.decode(step.ids)
    assert text.startswith(f"Task: put a clean plate in fridge\nObservation: {FIRST}\n[ 1 earlier steps omitted ]\n")
    history, future = text.split("\nIf:", 1)
    assert history.count("Action:") == 7 and history.rstrip().endswith(rows[0]["obs_list"][0])
    assert future.count("If:") == 1 and future.endswith("\nAction: " + rows[0]["action"])
    assert task_for(dataclasses.replace(settings, max_seq_len=need)).encode(tokenizer).counts["cut"] == 0
    none = task_for(dataclasses.replace(settings, max_seq_len=20)).encode(tokenizer)
    assert none.rows == [] and none.counts["too_long"] == 1


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_policy_is_trained_and_saved_with_the_prompts_that_it_is_asked_with(model_path, tmp_path, lora_r):
    foreign = Path(shutil.copytree(model_path, tmp_path / "foreign"))
    (foreign / MODEL_CARD).unlink()
    rows = [dict(episode(1)[0], k_label=0), dict(episode(2)[0], k_label=0)]
    for path, style in ((model_path, "tuned"), (str(foreign), "instruct")):
        settings = settings_for(path, tmp_path, rows, out_dir=str(tmp_path / style), max_seq_len=500, epochs=1.0,
                                lora_r=lora_r)
        tokenizer = AutoTokenizer.from_pretrained(path)
        row = task_for(settings).encode(tokenizer).rows[0]
        tokenizer.add_tokens([CTRL], special_tokens=True)
        prompt = tokenizer.encode(policy_prompt(rows[0]["state"], form=PromptFormat(style, control_token=True)))
        assert row["input_ids"][:len(prompt)] == prompt
        warm_up.run(settings)
        assert style_of(str(tmp_path / style / "merged_full")) == style


# ---------------------------------------------------------------- runs


async def readings(folder: Path, rows: list[dict]) -> tuple[list[int], list[str]]:
    """What the finished policy, loaded as evaluation loads it, chooses for K, and its actions with that future."""
    lm = load_policy(str(folder)).lm
    controls = await lm.read_heads([control_prompt(row["state"], FORM) for row in rows])
    chosen = [max(range(3), key=c.k_logprobs.__getitem__) for c in controls]
    futures = ["".join(f"\nIf: {a}\nThen: {o}" for a, o in row["imagined"][:k])
               for row, k in zip(rows, chosen, strict=True)]
    prompts = [policy_prompt(row["state"], form=FORM, foresight=f) for row, f in zip(rows, futures, strict=True)]
    replies = await lm.generate(prompts, GenParams(max_new_tokens=12, stop=("\n",)))
    await lm.close()
    return chosen, [reply.text.strip() for reply in replies]


@pytest.mark.asyncio
async def test_the_k_head_learns_where_looking_ahead_helps(model_path, tmp_path):
    rows = [row for i in range(60) for row in episode(i)]
    settings = settings_for(model_path, tmp_path, rows, steps_per_sequence=0, epochs=25.0, max_seq_len=600)
    metrics = warm_up.run(settings)
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_k_accuracy"] >= 0.9 > metrics["eval_k_majority"]
    assert metrics["eval_action_match"] >= 0.9 and metrics["eval_steps"] == 48
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_policy_loss"] + 0.5 * metrics["eval_k_loss"])
    assert warm_up.run(settings) is None  # finished

    unseen = [row for i in range(100, 110) for row in episode(i)]
    chosen, actions = await readings(tmp_path / "out" / "merged_full", unseen)
    right = sum(k == row["k_label"] for k, row in zip(chosen, unseen, strict=True))
    matched = sum(a == row["action"] for a, row in zip(actions, unseen, strict=True))
    assert right >= 0.9 * len(unseen) and matched >= 0.9 * len(unseen)
    card = json.loads((tmp_path / "out" / "merged_full" / "itp_model.json").read_text())
    assert card == {"prompt_style": "tuned", "control": True, "control_prompt": "own", "foresight_format": "full",
                    "history_keep_steps": 0,
                    "max_seq_len": settings.max_seq_len}


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_run_cut_off_goes_on_to_the_very_same_weights(model_path, tmp_path, lora_r):
    rows = [row for i in range(10) for row in episode(i)]
    settings = settings_for(model_path, tmp_path, rows, lora_r=lora_r, lora_dropout=0.1, save_every_steps=3)
    metrics = warm_up.run(settings)
    out, again = tmp_path / "out", tmp_path / "again"
    first = whole_checkpoints(out)[0]
    shutil.copytree(first, again / first.name)
    shutil.copy(out / "config.json", again / "config.json")
    resumed = warm_up.run(dataclasses.replace(settings, out_dir=str(again)))
    assert resumed["resumed"] and resumed["steps"] == metrics["steps"]
    assert resumed["train_loss"] == pytest.approx(metrics["train_loss"], abs=1e-6)
    for name in ("model.safetensors", "policy_heads.safetensors"):
        one, two = (load_file(folder / "merged_full" / name) for folder in (out, again))
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(out / "merged_full")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model_path, out / "merged_full"))
    ctrl = tokenizer.convert_tokens_to_ids(CTRL)
    mean = before.get_input_embeddings().weight.mean(0)
    assert (after.get_input_embeddings().weight[ctrl] - mean).abs().max() > 1e-4  # the control row was trained
    if lora_r:
        assert (out / "adapter_model.safetensors").is_file() and (out / "policy_heads.safetensors").is_file()


def test_a_process_that_is_killed_goes_on_with_the_same_command(model_path, tmp_path):
    rows = [row for i in range(10) for row in episode(i)]
    settings = settings_for(model_path, tmp_path, rows, lora_r=4, lora_dropout=0.1, epochs=4.0, save_every_steps=3,
                            save_total_limit=100, logging_steps=1, eval_every_epoch=False)
    out = Path(settings.out_dir)
    command = command_of(["itp.training.train_adaptive_k", "sft"], settings)
    kill(command, (out / "checkpoint-6" / "complete.json").exists, tmp_path / "log")
    there = whole_checkpoints(out)[-1]
    assert not (out / "metrics.json").exists()
    finish(command, tmp_path / "log")
    assert json.loads((out / "metrics.json").read_text())["resumed"]
    whole = dataclasses.replace(settings, out_dir=str(tmp_path / "whole"))
    warm_up.run(whole)
    resumed, expected = (losses(folder) for folder in (out, tmp_path / "whole"))
    assert int(there.name.removeprefix("checkpoint-")) < len(expected)
    assert [step for step, _ in resumed] == [*range(1, len(expected) + 1)]  # every step once
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in expected], abs=1e-5)


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of a whole run, as its log has them."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


@pytest.mark.parametrize("flags, said", [({"q_lora": True}, "--q_lora keeps the base in 4 bits on one GPU"),
                                         ({"deepspeed": "x.json"}, "--device_map spreads the model over the GPUs")])
def test_a_device_map_goes_with_neither(model_path, tmp_path, flags, said, monkeypatch):
    monkeypatch.setattr(warm_up, "check_settings", lambda settings: None)  # bitsandbytes and the file needn't be there
    with pytest.raises(UserError, match=said):
        warm_up.run(settings_for(model_path, tmp_path, episode(0), lora_r=4, device_map="auto", **flags))


def test_lora_on_a_bfloat16_base_trains_in_float32_and_goes_on_with_its_heads(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr("itp.training.models.choose_dtype",
                        lambda settings: torch.bfloat16 if settings.bf16 else torch.float32)  # as on a GPU
    rows = [row for i in range(6) for row in episode(i)]
    settings = settings_for(model_path, tmp_path, rows, lora_r=4, bf16=True, epochs=1.0, gradient_checkpointing=True)
    task = task_for(settings)
    module = task.load(AutoTokenizer.from_pretrained(model_path), torch.bfloat16)
    trained = {name: p.dtype for name, p in module.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and any("trainable_tokens" in name for name in trained)
    assert module.policy.causal_lm.dtype == torch.bfloat16
    metrics = warm_up.run(settings)
    assert metrics["dtype"] == "bfloat16"
    merged = tmp_path / "out" / "merged_full"
    second = dataclasses.replace(settings, policy_model=str(merged), out_dir=str(tmp_path / "second"), bf16=False,
                                 lr=1e-8)
    warm_up.run(second)
    one, two = (load_file(f / "policy_heads.safetensors") for f in (merged, tmp_path / "second" / "merged_full"))
    torch.testing.assert_close(one["k_head.weight"], two["k_head.weight"], rtol=0, atol=1e-5)
    assert one["k_head.weight"].abs().max() > 1e-4
    with pytest.raises(UserError, match="K-head for kmax 2, and --max_k is 5"):
        warm_up.run(dataclasses.replace(second, max_k=5, out_dir=str(tmp_path / "third")))


def test_poisoned_weights_stop_the_run(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "poisoned")
    with pytest.raises(UserError, match="the loss is nan in step 1"):
        warm_up.run(settings_for(str(tmp_path / "poisoned"), tmp_path, episode(1)))
    assert not (tmp_path / "out" / "metrics.json").exists()


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("change, said", [
    ({"k_label": 3}, "k_label is 3 and --max_k 2"),
    ({"k_label": True}, "'k_label' is True"),
    ({"state": "nonsense"}, "isn't a state"),
    ({"state": None}, "'state' is None"),
    ({"imagined": [["look"]]}, "2 pairs"),
    ({"imagined": None}, "--foresight_format last_obs"),
    ({"imagined": 1, "k_label": 0}, "'imagined' isn't a list"),
    ({"shown": 1}, "shown: a JSON number"),
    ({"shown": {"history_keep_steps": [6]}}, "shown: field 'history_keep_steps' is of the wrong type"),
    ({"shown": {"foresight_format": "whole"}}, "shown is {'foresight_format': 'whole'}"),
    ({"shown": {"history_keep_steps": -1}}, "shown is {'history_keep_steps': -1}"),
])
def test_a_bad_line_is_named(tmp_path, change, said):
    good = dict(episode(0)[0], k_label=2)
    path = write(tmp_path / "x.jsonl", [good, good | change])
    with pytest.raises(UserError, match=said) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_what_the_policy_reads_and_does(tmp_path):
    row = dict(episode(0)[0], k_label=2, expert_action="look")
    released = {name: value for name, value in row.items() if name != "imagined"}
    full, = read(write(tmp_path / "a.jsonl", [row]))
    last, old = read(write(tmp_path / "b.jsonl", [row, released]), foresight_format="last_obs")
    assert full.foresight.startswith("\nIf: open cabinet 1\nThen: In it") and full.foresight.count("Then:") == 2
    assert last.foresight == old.foresight == "\nThen: Nothing happens."
    assert full.action == "look" and full.k == 2
    path = write(tmp_path / "d.jsonl", [row | {"expert_action": ""}, row])
    assert read(path) == [full] and len(read(path, act_on="all")) == 3
    with pytest.raises(UserError, match="d.jsonl:1: field 'expert_action' is None"):
        read(write(tmp_path / "d.jsonl", [row | {"expert_action": None}]))
    zero, = read(write(tmp_path / "c.jsonl", [released | {"k_label": 0}]), foresight_format="last_obs")
    assert zero.foresight == ""
