"""For every kind of tokenizer: what training sees before a target is what the model is prompted with at inference."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from itp.agent.policy_with_heads import add_control_to_tokenizer
from itp.errors import UserError
from itp.lm.base import GenParams
from itp.lm.engine import Engine
from itp.lm.local import LocalLM
from itp.lm.tokenize import Encoder, Growing
from itp.models import load_policy
from itp.text.dialogues import episode_dialogue
from itp.text.prompts import action_target, policy_prompt, world_model_prompt, world_model_target
from itp.text.prompt_format import PromptFormat
from itp.text.segments import dialogue_segments
from itp.text.state import State, parse
from itp.training import base_policy
from itp.training.examples import IGNORED, Example, encode
from itp.training.from_scratch.base_lm import transcript
from itp.training.from_scratch.learned_tokenizer import learn_tokenizer
from itp.training.itp_r.warm_up_data import LabeledStep, SftSettings
from itp.training.itp_r.warm_up_task import WarmUpTask
from itp.training.run import finetune
from itp.transitions import Transition
from tests.families import write_family
from tests.tokenizers_of import KINDS, tokenizer_of
from tests.toy import control_prompt
from world_model.base_tuning.examples import to_examples


def episodes() -> list[list[Transition]]:
    """Three episodes of 13 actions, one of which wasn't the expert's."""
    found = []
    for n, (thing, place) in enumerate([("mug 1", "desk 1"), ("plate 2", "cabinet 3"), ("cup 1", "fridge 1")]):
        played = [(f"go to {place}", f"The {place} is closed."),
                  (f"open {place}", f"You open the {place}.\nIn it, you see a {thing}."),
                  (f"take {thing} from {place}", f"You pick up the {thing}."),
                  ("inventory", f"You are carrying: a {thing}.")]
        state, rows = State(f"find a {thing.split()[0]}.", "You are in the middle of a room."), []
        for t, (action, seen) in enumerate([("look", "You see a fridge 1.")] * (n == 2) + played):
            expert = "go to fridge 1" if action == "look" else action
            rows.append(Transition(f"e{n}", t, state.render(), action, seen, expert))
            state = state.after(action, seen)
        found.append(rows)
    return found


def texts() -> list[str]:
    return [f"{row.state}\nAction: {row.action}\nObservation: {row.next_state}\n"
            for row in itertools.chain(*episodes())]


def targets_of(row: dict) -> list[tuple[list[int], list[int]]]:
    """(ids before it, its labels) of every supervised part of a row."""
    found, labels = [], row["labels"]
    for i, label in enumerate(labels):
        if label != IGNORED and (i == 0 or labels[i - 1] == IGNORED):
            end = next((j for j in range(i, len(labels)) if labels[j] == IGNORED), len(labels))
            found.append((row["input_ids"][:i], labels[i:end]))
    return found


@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_the_policy_are_beginnings_of_training(kind: str, bos: str) -> None:
    tokenizer = tokenizer_of(kind, texts(), bos)
    encoder = Encoder(tokenizer)
    assert bool(encoder.start) == bool(bos)
    for episode in episodes():
        example = Example(dialogue_segments(episode_dialogue(episode)["conversations"]))
        rows = encode([example], tokenizer, 9999).rows
        trained = [pair for row in rows for pair in targets_of(row) if pair[1] != [tokenizer.eos_token_id]]
        assert len(trained) == len(episode)
        for t, (before, learned) in zip(episode, trained, strict=True):
            assert before == [*encoder.start, *encoder(policy_prompt(t.state))]
            whole = encoder.continuation(action_target(t.expert_action))
            assert whole[:len(learned)] == learned and (learned == whole or t.action != t.expert_action)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_the_world_model_are_beginnings_of_training(kind: str) -> None:
    tokenizer = tokenizer_of(kind, texts())
    encoder, rows = Encoder(tokenizer), list(itertools.chain(*episodes()))
    for t, row in zip(rows, encode(list(to_examples(rows)), tokenizer, 9999).rows, strict=True):
        (before, (*learned, stop)), = targets_of(row)
        assert before == encoder(world_model_prompt(t.state, t.action)) and stop == tokenizer.eos_token_id
        shown, target = encoder.decode(learned), world_model_target(t.next_state)
        assert shown == target or kind == "word_level" and shown.split() == target.split()


@pytest.mark.parametrize("kind", KINDS)
def test_stage_2_sees_the_prompts_of_actions_and_heads(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind, [*texts(), "If: look\nThen: You see."])
    add_control_to_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    settings = SftSettings(train_jsonl="", policy_model=str(tmp_path), out_dir="", max_seq_len=2000)
    foresight, form = "\nIf: look\nThen: You see.", PromptFormat("instruct", control_token=True)
    steps = [LabeledStep("", parse(t.state), foresight, t.action, 1) for t in episodes()[0]]
    encoder = Encoder(tokenizer)
    for step, found in zip(steps, WarmUpTask(settings, steps)._tokens(tokenizer, {"examples": 0}), strict=True):
        prompt = policy_prompt(step.state.render(), form=form, foresight=foresight)
        assert found.prompt == encoder(prompt)
        assert found.heads_prompt == encoder(control_prompt(step.state.render(), form))
        assert found.heads_prompt[:-1] == found.prompt[:len(found.heads_prompt) - 1]
        assert encoder.decode(found.target).strip() == step.action


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_are_decoded_as_they_were_written(kind: str) -> None:
    tokenizer = tokenizer_of(kind, texts())
    encoder, draw = Encoder(tokenizer), random.Random(1)
    words = [" ", "\n", "go", "Observation:", "\"", "1", ".", "  ", "mug", "é"]
    for text in [action_target("go to desk 1"), " The desk 1 is closed.\n  It is", "Observation: x\n",
                 *("".join(draw.choices(words, k=4)) for _ in range(200))]:
        ids = encoder.continuation(text)
        assert encoder.continuation(text) == ids  # from memory
        if kind != "word_level" and ("é" not in text or kind.startswith("byte") or kind == "sentencepiece"):
            assert encoder.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_growing_text_are_those_of_the_whole_text(kind: str) -> None:
    encoder, draw = Encoder(tokenizer_of(kind, texts())), random.Random(2)
    words = [" ", "\n", "go", "Observation:", "Action:", "1", ".", "  a\n", "mug 1\n"]
    for _ in range(100):
        growing, text = Growing(encoder), ""
        for part in draw.choices(words, k=12):
            growing.add(part)
            text += part
            if draw.random() < 0.5:
                assert growing.ids() == encoder(text)


def alone(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and labels if every segment is tokenized as a text of its own: right where nothing depends on the context."""
    ids, labels = [], []
    for text, learned in example.segments:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        better = tokenizer(learned, add_special_tokens=False)["input_ids"] if isinstance(learned, str) else own
        differ = next((i for i, (a, b) in enumerate(zip(own, better, strict=False)) if a != b), len(own) - 1)
        shown = min(differ + 1, len(better)) if learned else 0
        ids += own
        labels += better[:shown] + [IGNORED] * (len(own) - shown)
    return ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["byte_level", "word_level", "learned", "qwen2", "llama"])
def test_ids_of_tokenizers_without_a_context_stay_as_they_were(kind: str, tmp_path: Path) -> None:
    if kind == "learned":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=learn_tokenizer(texts()), eos_token="[EOS]")
    elif kind in ("qwen2", "llama"):
        write_family(tmp_path, kind)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, bos_token=None)
        tokenizer.backend_tokenizer.post_processor = None
    else:
        tokenizer = tokenizer_of(kind, texts())
    examples = [make(episode) for episode in episodes() for make in (
        transcript, lambda rows: Example(dialogue_segments(episode_dialogue(rows)["conversations"])))]
    examples += to_examples(list(itertools.chain(*episodes())))
    rows = encode(examples, tokenizer, 9999).rows
    assert [(row["input_ids"], row["labels"]) for row in rows] == [alone(example, tokenizer) for example in examples]


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "sentencepiece_crossing", "metaspace_first",
                                  "metaspace_always", "word_level"])
def test_memorized_dialogues_come_back(kind: str, tmp_path: Path) -> None:
    rows = [[t for t in episode if t.action == t.expert_action] for episode in episodes()]
    (tmp_path / "dialogues.json").write_text(json.dumps([episode_dialogue(episode) for episode in episodes()]))
    settings = base_policy.BasePolicySettings(
        model_path=write_model(tmp_path / "base", tokenizer_of(kind, texts())), out_dir=str(tmp_path / "policy"),
        train_json=str(tmp_path / "dialogues.json"), epochs=100.0, batch_size=16, grad_accum=1, lora_r=0, lr=8e-3,
        eval_share=0.0, max_seq_len=1024)
    finetune(settings, base_policy.read_dialogues(settings.train_json))

    async def play(selection: str) -> list[str]:
        policy = load_policy(str(settings.merged_path), selection=selection)
        names = [t.action for t in itertools.chain(*rows)]
        choices = [await policy.act(parse(t.state), names, 0) for t in itertools.chain(*rows)]
        await policy.lm.close()
        return [choice.action for choice in choices]

    wanted = [t.action for t in itertools.chain(*rows)]
    for selection in ("generate", "constrained", "score"):
        assert asyncio.run(play(selection)) == wanted, selection


@pytest.mark.parametrize("kind", KINDS)
def test_choices_and_scores_are_of_the_ids_that_are_trained(kind: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    generate, score = Engine.generate, Engine.score
    monkeypatch.setattr(Engine, "generate", lambda engine, requests: seen.extend(
        ids for r in requests for ids in r.choices) or generate(engine, requests))
    monkeypatch.setattr(Engine, "score", lambda engine, pairs: seen.extend(ids for _, ids in pairs) or score(
        engine, pairs))
    prompt, choices = policy_prompt(episodes()[0][0].state), (" go to desk 1\n", " inventory\n")
    tokenizer = tokenizer_of(kind, texts())
    rows = encode([Example([(prompt, False), (choice, True)], eos=False) for choice in choices], tokenizer, 999).rows

    async def both() -> None:
        lm = LocalLM.load(write_model(tmp_path, tokenizer))
        await lm.generate([prompt], GenParams(choices=choices))
        await lm.loglikelihood([(prompt, choice) for choice in choices])
        await lm.close()

    asyncio.run(both())
    assert seen == 2 * [learned for row in rows for _, learned in targets_of(row)]


@pytest.mark.parametrize("how", ["no line break", "none at the end"])
def test_tokenizer_without_line_breaks_is_refused_in_one_line(how: str) -> None:
    from tokenizers import normalizers

    tokenizer = tokenizer_of("metaspace_first", texts())
    tokenizer.backend_tokenizer.normalizer = (
        normalizers.Strip() if how == "none at the end" else normalizers.Replace("\n", " "))
    with pytest.raises(UserError, match="its tokenizer writes no line break") as error:
        encode([Example([("a\nAction:", False), (" b\n", True)])], tokenizer, 99)
    assert "\n" not in str(error.value)
