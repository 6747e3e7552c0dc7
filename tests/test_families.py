"""Qwen2, Qwen3, Llama, Mistral and SmolLM2, in miniature, through everything: training shows them what inference shows.

Nothing is compared by reading flags.  Every prompt that reaches an engine is caught as token ids; the same state
goes through the training code, and its prompt ids must be among those caught.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.agent.policy import Policy
from itp.agent.policy_with_heads import add_control_to_tokenizer
from itp.agent.world_model import WorldModel
from itp.chat_template import end_of_turn, template_of
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.lm.engine import Engine
from itp.methods.base import View
from itp.methods.registry import build
from itp.methods.registry import METHODS
from itp.methods.settings import NEED_WORLD_MODEL, MethodSettings
from itp.model_card import ModelCard, format_for
from itp.plan import make_plan
from itp.pretrained import TRUST_REMOTE_CODE, bos_ids, load_causal_lm, load_tokenizer
from itp.text.parsing import without_thinking
from itp.text.prompt_format import PLAIN, TUNED, PromptFormat, PromptTemplate
from itp.text.prompts import policy_prompt
from itp.text.segments import dialogue_examples
from itp.text.state import State
from itp.training import base_policy
from itp.training.examples import IGNORED, Example, encode, split_off_eval
from itp.training.itp_r import a2c, label, warm_up
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.label_settings import LabelSettings
from itp.training.itp_r.warm_up_data import LabeledStep, SftSettings
from itp.training.itp_r.warm_up_task import WarmUpTask
from itp.training.run import finetune, train
from itp.training.settings import trained_card
from itp.training.text_task import Collator
from itp.transitions import Transition, write_transitions
from tests.families import FAMILIES, write_family
from tests.toy import ToyLM
from world_model.base_tuning.examples import WorldModelSettings, examples_for, to_examples
from world_model.base_tuning.task import WorldModelTask

KMAX = 1
STEPS = [("go to cabinet 1", "The cabinet 1 is closed."), ("open cabinet 1", "You open the cabinet 1."),
         ("take plate 1 from cabinet 1", "You pick up the plate 1.")]


def transitions() -> list[Transition]:
    rows = []
    for episode in "abc":
        state = State(f"put a clean plate in fridge {episode}", "You are in the middle of a room.")
        for t, (action, seen) in enumerate(STEPS):
            rows.append(Transition(episode, t, state.render(), action, seen, expert_action=action))
            state = state.after(action, seen)
    return rows


def dialogue(state: State, foresight: str, label: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": state.render() + foresight}, {"from": "gpt", "value": f"{label}: {answer}"}]


def prompt_of(row: dict) -> tuple[int, ...]:
    """What stands before the supervised tokens of a row."""
    return tuple(row["input_ids"][:sum(label == IGNORED for label in row["labels"])])


class Seen:
    """What was asked, as text in parts and as token ids."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ids: set[tuple[int, ...]] = set()
        self.heads: set[tuple[int, ...]] = set()
        self.policy: list[tuple[Policy, State, str, dict]] = []
        self.world: list[tuple[WorldModel, State, str]] = []
        for name, ids_of in (("generate", lambda r: r.ids), ("read_heads", lambda ids: ids), ("score", lambda p: p[0])):
            self._catch(patch, name, ids_of)
        ask, imagine = Policy.prompt, WorldModel.prompt

        def prompt(policy: Policy, state: State, name: str, new_tokens: int, **parts: str) -> str:
            self.policy.append((policy, policy._shown(state), name, parts))
            return ask(policy, state, name, new_tokens, **parts)

        def world_prompt(model: WorldModel, state: State, action: str) -> str:
            self.world.append((model, state.last(model.history_keep_steps), action))
            return imagine(model, state, action)

        patch.setattr(Policy, "prompt", prompt)
        patch.setattr(WorldModel, "prompt", world_prompt)

    def _catch(self, patch: pytest.MonkeyPatch, name: str, ids_of: Callable) -> None:
        call = getattr(Engine, name)

        def caught(engine: Engine, requests: list) -> list:
            into = self.heads if name == "read_heads" else self.ids
            into.update(tuple(ids_of(request)) for request in requests)
            return call(engine, requests)

        patch.setattr(Engine, name, caught)

    def check(self, form: str, base: str, base_policy_path: str) -> int:
        """Every prompt, made by the training code of its model, is among the caught ids.  How many were compared."""
        compared, controls = set(), set()
        for model, state, action in self.world:
            settings = WorldModelSettings(model_path=base, out_dir="", data_path="", prompt_form=form)
            tokenizer = model.lm.tokenizer
            examples = examples_for(settings, tokenizer, [Transition("", 0, state.render(), action, "x")])
            compared.add(prompt_of(encode(examples, tokenizer, 9999).rows[0]))
        for policy, state, name, parts in self.policy:
            foresight, tokenizer = parts.get("foresight", ""), policy.lm.tokenizer
            if policy.form.control_token:
                settings = SftSettings(train_jsonl="", policy_model="", out_dir="", max_seq_len=9999,
                                       model_path=base_policy_path)
                task = WarmUpTask(settings, [LabeledStep("", state, foresight, "look", 0)])
                step, = task._tokens(tokenizer, {"examples": 0})
                controls.add(tuple(step.heads_prompt))
                compared.add(tuple(step.prompt))
            else:
                settings = base_policy.BasePolicySettings(model_path=base, out_dir="", train_json="", prompt_form=form)
                talk, template = dialogue(state, foresight, name, "look"), trained_card(settings, tokenizer).template
                row, = encode([Example(dialogue_examples(talk, template)[0], eos=False)], tokenizer, 9999).rows
                compared.add(prompt_of(row))
        assert compared <= self.ids and self.heads and self.heads <= controls
        return len(compared)


FOUR_BITS = pytest.param("qwen3", "chat", True, marks=pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed"))


@pytest.mark.parametrize("family, form, q_lora", [
    ("qwen2", "chat", False), ("qwen3", "chat", False), ("llama", "chat", False), ("llama", "plain", False),
    ("mistral", "chat", False), ("mistral", "plain", False), ("smollm2", "chat", False), FOUR_BITS])
def test_one_family_through_everything(family: str, form: str, q_lora: bool, tmp_path: Path, games_root: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(write_family(tmp_path / "base", family))
    write_transitions(tmp_path / "expert.jsonl", transitions())
    run = {"epochs": 1.0, "batch_size": 3, "grad_accum": 1, "eval_share": 0.0, "prompt_form": form, "lr": 1e-3,
           "q_lora": q_lora}

    wm = WorldModelSettings(model_path=base, out_dir=str(tmp_path / "wm"), data_path="", **run)
    tokenizer = load_tokenizer(base)
    train(wm, WorldModelTask(wm, examples_for(wm, tokenizer, transitions())))
    talks = [{"id": str(i), "conversations": dialogue(State("look", "You see."), "", "Action", a)}
             for i, (a, _) in enumerate(STEPS)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    policy = base_policy.BasePolicySettings(model_path=base, out_dir=str(tmp_path / "policy"),
                                            train_json=str(tmp_path / "talks.json"), **run)
    finetune(policy, base_policy.read_dialogues(policy.train_json, trained_card(policy, tokenizer).template))
    policy_path, wm_path = str(policy.merged_path), str(wm.merged_path)
    assert all((ModelCard.read(path).template == PLAIN) == (form == "plain") for path in (wm_path, policy_path))

    seen = Seen(monkeypatch)
    devices = {"policy_device": "cpu", "wm_device": "cpu"}
    labels = LabelSettings(expert_jsonl=str(tmp_path / "expert.jsonl"), policy_model=policy_path,
                                 wm_model=wm_path, out_labeled_jsonl=str(tmp_path / "labelled.jsonl"), max_k=KMAX,
                                 wm_max_new_tokens=4, **devices)
    label.run(labels)
    stage_2 = SftSettings(train_jsonl=labels.out_labeled_jsonl, policy_model=policy_path, max_k=KMAX,
                          out_dir=str(tmp_path / "warm_up"), **(run | {"prompt_form": "auto"}))
    warm_up.run(stage_2)
    with_heads = str(tmp_path / "warm_up/merged_full")
    a2c.run(RlSettings(
        policy_model=with_heads, wm_model=wm_path, out_dir=str(tmp_path / "rl"),
        env_data_root=str(games_root), episodes_per_epoch=1, episodes_per_update=1, num_envs=1, env_processes=1,
        max_steps=2, wm_max_new_tokens=4, eval_every=0, action_selection="constrained", max_seq_len=4000, **devices))
    learned = str(tmp_path / "rl/last")
    assert ModelCard.read(learned).template == ModelCard.read(policy_path).template
    for model, method, fixed_k in ((learned, "foresight", 1), (policy_path, "mpc", -1)):
        asyncio.run(evaluate(AlfworldSettings(
            policy_model=model, wm_model=wm_path, out_dir=str(tmp_path / method), only_ids="0", method=method,
            env_data_root=str(games_root), split="train", max_steps=2, fixed_k=fixed_k, max_k=KMAX, candidates=2,
            temperature=1.0, act_tokens=4, wm_max_new_tokens=4, device="cpu", env_processes=1, concurrency=1)))
    assert seen.check(form, base, policy_path) > 20
    assert {p.form.control_token for p, *_ in seen.policy} == {True, False}
    assert {"Action", "Helps"} <= {name for _, _, name, _ in seen.policy}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_in_4_bits_is_what_is_saved(family: str, tmp_path: Path) -> None:
    """The merged model is a plain one; its held-out loss is the one of training, and not that of other weights."""
    pytest.importorskip("bitsandbytes", reason="4 bits need it")
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = str(write_family(tmp_path / "base", family))
    wm = WorldModelSettings(model_path=base, out_dir=str(tmp_path / "wm"), data_path="", epochs=10.0, batch_size=3,
                            grad_accum=1, eval_share=0.3, lr=1e-2, lora_dropout=0.0, q_lora=True)
    tokenizer = load_tokenizer(base)
    examples = examples_for(wm, tokenizer, transitions())
    task = WorldModelTask(wm, examples)
    metrics = train(wm, task)
    encoding = task.encode(tokenizer)
    held = [encoding.rows[i] for i in split_off_eval(encoding.groups, wm.eval_share, wm.seed)[1]]

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        return task.forward(model.eval(), Collator(tokenizer.eos_token_id)(held))["loss"].item()

    start = AutoModelForCausalLM.from_pretrained(base)
    assert metrics["eval_loss"] < loss(start) - 1
    merged = AutoModelForCausalLM.from_pretrained(wm.merged_path)
    assert {type(m) for m in merged.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert merged.dtype == start.dtype and not hasattr(merged.config, "quantization_config")
    assert loss(merged) == pytest.approx(metrics["eval_loss"], abs=1e-4)
    assert abs(loss(peft.PeftModel.from_pretrained(start, wm.out_dir)) - metrics["eval_loss"]) > 0.01


MODELLING = """from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_model_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs only where the user asks for it, and what is trained from it carries the code along."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = write_family(tmp_path / "base", "llama")
    (base / "modelling.py").write_text(MODELLING, encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"],
               "auto_map": {"AutoConfig": "modelling.OwnConfig", "AutoModelForCausalLM": "modelling.OwnForCausalLM"}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = WorldModelSettings(model_path=str(base), out_dir=str(tmp_path / "wm"), data_path="", epochs=1.0,
                                  eval_share=0.0)
    examples = list(to_examples(transitions()))
    for start in (lambda: finetune(settings, examples), lambda: load_causal_lm(str(base))):
        with pytest.raises(UserError, match="code of its own; .* ITP_TRUST_REMOTE_CODE=1"):
            start()
    monkeypatch.setenv(TRUST_REMOTE_CODE, "1")
    finetune(settings, examples)
    model, _ = load_causal_lm(str(settings.merged_path))
    assert type(model).__name__ == "OwnForCausalLM"
    assert (settings.merged_path / "modelling.py").is_file()


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_the_template(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_family(tmp_path, family)))
    template = template_of(tokenizer, "Be brief.")
    told = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A state.\nIt is."}], tokenize=False,
        add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024")
    if bos_ids(tokenizer):  # every sequence begins with it anyway
        told = told.removeprefix(tokenizer.bos_token)
    assert told == f"{template.head}A state.\nIt is.{template.tail}"
    prompt = policy_prompt("Task: t\nObservation: o", form=PromptFormat("instruct", template=template))
    assert prompt.startswith(template.head) and prompt.endswith(f"{template.tail}Action:")
    assert prompt.count("Be brief.") == 1
    assert template.tail.endswith("<think>\n\n</think>\n\n") == (family == "qwen3")
    end = "<|eot_id|>" if family == "llama" else "<|im_end|>"
    assert end_of_turn(tokenizer) == {tokenizer.convert_tokens_to_ids(end)}


def test_base_model_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """Qwen's base models name another end-of-sequence token than their template ends turns with."""
    from itp.pretrained import load_causal_lm

    folder = write_family(tmp_path, "qwen2")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_causal_lm(str(folder))
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == sorted(Engine(model, tokenizer).eos)


class Refusing:
    """A tokenizer whose template takes no system turn, or drops it."""

    bos_token = bos_token_id = None
    name_or_path = "refusing"

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages, **options):
        from jinja2 import Environment
        from jinja2.exceptions import TemplateError

        def refuse(text: str) -> None:
            raise TemplateError(text)

        template = Environment().from_string(self.chat_template)
        return template.render(messages=messages, raise_exception=refuse, **options)


@pytest.mark.parametrize("template", [
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"])
def test_system_turn_that_a_template_refuses(template: str) -> None:
    assert template_of(Refusing(template), "Be brief.") == PromptTemplate("[Be brief.\n\n", "]")


def test_open_block_of_thought_is_closed() -> None:
    template = "{% for m in messages %}U {{ m.content }}\n{% endfor %}A <think>\n"
    assert template_of(Refusing(template)).tail == "\nA <think>\n\n</think>\n\n"
    assert template_of(Refusing(template), thinking=True) == PromptTemplate("U ", "\nA <think>", True)


@pytest.mark.parametrize("template", ["nothing", "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"])
def test_unusable_template(template: str) -> None:
    with pytest.raises(UserError, match="refusing: its chat template can't be used"):
        template_of(Refusing(template))


def test_format_of_a_model_from_elsewhere(tmp_path: Path) -> None:
    folder = str(write_family(tmp_path, "qwen3"))
    tokenizer = load_tokenizer(folder)
    chat, plain = format_for(folder, tokenizer), PromptFormat("instruct")
    assert chat.style == "instruct" and "You act in a household" in chat.template.head and not chat.template.thinks
    assert format_for(folder, tokenizer, chat=False) == plain
    assert format_for(folder) == plain  # a server puts its own template around
    assert format_for(folder, tokenizer, thinking=True).template.thinks
    with pytest.raises(UserError, match="--thinking"):
        format_for(folder, tokenizer, chat=False, thinking=True)
    assert format_for(folder, tokenizer, style="tuned") == TUNED
    for env, acts, simulates in (("alfworld", "You act in a household", "a household text game"),
                                 ("scienceworld", "You do science experiments", "a science laboratory text game")):
        assert acts in format_for(folder, tokenizer, env=env).template.head
        assert simulates in format_for(folder, tokenizer, role="world_model", env=env).template.head


def test_stage_2_on_scienceworld_learns_what_inference_asks(tmp_path: Path) -> None:
    """From an instruct model, whose prompts hold the environment's instruction, in turns and as plain text."""
    folder, state = str(write_family(tmp_path, "qwen2")), State("find a plant", "This room is called the hallway.")
    settings = SftSettings(train_jsonl="", policy_model=folder, out_dir="", model_path=folder,
                           env="scienceworld", max_seq_len=9999)
    for form in ("auto", "plain"):
        settings = dataclasses.replace(settings, prompt_form=form)
        tokenizer = load_tokenizer(folder)
        add_control_to_tokenizer(tokenizer)
        task = WarmUpTask(settings, [LabeledStep("", state, "\nIf: look\nThen: o", "look", 0)])
        step, = task._tokens(tokenizer, {"examples": 0})
        policy = Policy(None, task.prompt_format(tokenizer))
        asked = policy.action_prompt(state, foresight="\nIf: look\nThen: o")
        assert (policy.form.style, policy.form.template == PLAIN) == ("instruct", form == "plain")
        assert asked.count("You do science experiments") == 1
        assert step.prompt == tokenizer(asked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("style", ["tuned", "instruct"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_ask_in_turns(name: str, style: str) -> None:
    """Every question of every method, to the policy and to the world model, is a turn of the chat."""
    asked: dict[str, list[str]] = {"policy": [], "world_model": []}

    class Listening(ToyLM):
        async def generate(self, prompts, params):
            asked[self.role] += prompts
            # The toy knows labels on lines of their own.
            return await super().generate([p.replace("<a>", "\n") for p in prompts], params)

    policy = Policy(Listening("policy"), PromptFormat(style, template=PromptTemplate("<u>", "<a>")))
    world_model = WorldModel(Listening("world_model"), PromptFormat(style, template=PromptTemplate("<w>", "<a>")))
    state = State("put a clean plate in fridge", "you see 7")
    view = View(Game("alfworld", "train", "g", "g", "look_at_obj_in_light"), 0, state,
                Observation(state.observation, state.task), 5)
    method = build(name, policy, world_model, MethodSettings(candidates=3, k_policy="fixed", fixed_k=2))
    assert asyncio.run(method.act(view)).action
    ends = "|".join(("Action", "Thought", "Reflection", "Helps", "Plan", "Belief", "Choice", "World state"))
    assert asked["policy"] and all(re.fullmatch(rf"<u>[^<>]*<a>({ends}):", prompt) for prompt in asked["policy"])
    assert bool(asked["world_model"]) == (name in NEED_WORLD_MODEL)
    assert all(re.fullmatch(r"<w>[^<>]*<a>Observation:", prompt) for prompt in asked["world_model"])


# ---------------------------------------------------------------- thinking


class Replies:
    """An LM that says what it is told to."""

    def __init__(self, text: str) -> None:
        self.text, self.prompts, self.params = text, [], []

    async def generate(self, prompts, params):
        from itp.lm.base import Generation

        self.prompts += prompts
        self.params.append(params)
        return [Generation(self.text, 1, 1, 0, "stop") for _ in prompts]


THINKS = PromptFormat("instruct", template=PromptTemplate("<user>", "<assistant>", thinks=True))


@pytest.mark.parametrize("reply, action, parsed", [
    ("<think>\nAction: eat the plate\n</think>\n\nAction: look\n", "look", True),
    ("I could say Action: eat\nbut no</think>\nlook", "look", True),  # the block was opened by the prompt
    ("<think>\nAction: eat the plate\n", "", False),  # never closed
    ("<think>x</think>\n\n", "", False),
])
def test_thoughts_are_no_action(reply: str, action: str, parsed: bool) -> None:
    lm = Replies(reply)
    policy = Policy(lm, THINKS, action_tokens=10, thinking_tokens=100)
    state = State("t", "o")
    choice = asyncio.run(policy.act(state, None, 0))
    assert (choice.action, choice.parsed) == (action, parsed)
    assert lm.prompts[0].endswith("<assistant>")  # no label: it thinks first
    assert lm.params[0].max_new_tokens == 110 and lm.params[0].stop == ()
    assert asyncio.run(policy.propose(state, 0)) == action
    assert asyncio.run(policy.think_and_act(state, 0)).action == action
    for imagined in (False, True):
        assert [c.action for c in asyncio.run(policy.sample(state, None, 3, 0, imagined=imagined))] == [action] * 3


@pytest.mark.parametrize("flags, message", [
    ({"method": "rap"}, "--thinking: --method rap reads how sure"),
    ({"method": "sft", "action_selection": "score"}, "--action_selection generate")])
def test_thinking_needs_a_free_answer(flags: dict, message: str) -> None:
    settings = AlfworldSettings(policy_model="p", wm_model="w", out_dir="", max_k=1, thinking=True, **flags)
    with pytest.raises(UserError, match=message):
        make_plan(settings)


def test_horizon_and_reflection_after_thinking() -> None:
    policy = Policy(Replies("<think>9 steps?</think>\n\nHorizon: 2"), THINKS)
    assert asyncio.run(policy.horizon(State("t", "o"), 5, 0))[0] == 2
    policy = dataclasses.replace(policy, lm=Replies("<think>hm</think>\nReflection: it fails.\nMore"))
    assert asyncio.run(policy.reflect(State("t", "o"), "", 0)) == "it fails."


def test_world_model_on_a_server_may_think() -> None:
    model = WorldModel(Replies("<think>Let me see.</think>\n\nYou see a mug."), PromptFormat("instruct"))
    assert asyncio.run(model.step([State("t", "o")], ["look"])) == ["You see a mug."]
    assert asyncio.run(model.sample(State("t", "o"), "look", 2, 0)) == ["You see a mug."] * 2
    assert without_thinking("plain") == "plain"


# ---------------------------------------------------------------- dialogues as questions


def test_dialogue_in_turns() -> None:
    talk = [{"from": "human", "value": "Task: t\nObservation: o"}, {"from": "gpt", "value": "Action: a"},
            {"from": "human", "value": "Observation: p"}, {"from": "gpt", "value": "Action: b", "weight": 0},
            {"from": "human", "value": "Observation: q"}, {"from": "gpt", "value": "Action: c"}]
    form, state = PromptFormat(template=PromptTemplate("<u>", "<a>")), State("t", "o")
    assert dialogue_examples(talk, form.template) == [
        [(policy_prompt(state.render(), form=form), False), (" a\n", True)],
        [(policy_prompt(state.after("a", "p").after("b", "q").render(), form=form), False), (" c\n", True)]]


def test_sliding_window_is_a_limit(tmp_path: Path) -> None:
    """Within the window sliding attention is full attention; beyond it the engine's would differ from the model's."""
    from itp.lm.local import LocalLM

    folder = write_family(tmp_path, "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert LocalLM.load(str(folder)).context_length == 64
