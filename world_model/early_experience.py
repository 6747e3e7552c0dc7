r"""Early experience: what a policy's own actions lead to at the states of an expert, as training data of the policy.

    python -m world_model.early_experience --expert_jsonl runs/d_exp/transitions.jsonl --env_data_root data \
        --policy_model runs/policy/merged_full --out_dir runs/early
    python -m itp.training.base_policy --train_json runs/d_exp/dialogues.json,runs/early/outcomes.json ...

After *Agent Learning via Early Experience* (Zhang et al. 2025, arXiv 2510.08558).  At each state s_i of the expert's
path K actions are sampled from the policy.  Those that differ from the expert's a_i are executed, each in a copy of
the game that was moved to s_i.  No reward is used.  Two kinds of data come from the observations:

- ``outcomes.json``, implicit world modeling (IWM): −log p_θ(s_i^j | s_i, a_i^j).  The policy's own weights learn what
  its actions lead to.  Only the observation is learned, and no action.
- ``reflections.json``, self-reflection (SR): −log p_θ(c_i, a_i | s_i).  The thought c_i says why a_i is better than the
  alternatives, from what they really led to, and a_i follows.  ``--reflections template`` writes c_i from the
  observations by a fixed form; ``policy`` has a chat model write it (the paper's way).

``transitions.jsonl`` has the same executed actions for the world model's training, and ``tried.jsonl`` a line a state,
as they end: a restart goes on from there.

The paper's K: more is better for IWM, 2 to 4 for SR.  Departures: the policy that acts is usually one that has learned
from the expert, so it proposes few other actions where it is sure; ``--random_alternatives`` adds admissible actions by
chance.  A thought compares a_i with all alternatives of its state, and leaves out those whose observation is that of
a_i.  The paper trains on IWM first and then on the expert, with as many updates as the expert's training alone has;
``base_policy`` can do this, by two runs, and it can train on a mixture.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from itp.agent.policy import SELECTIONS, Policy
from itp.config import flag, parse_settings
from itp.devices import DTYPES
from itp.envs.base import EnvDied, Observation
from itp.envs.pool import EnvHandle, EnvPool, processes_for
from itp.envs.replay import reach
from itp.errors import PromptTooLong, UnplayableGame, UserError
from itp.files import check_output_folder, read_appended, write_json, writing
from itp.games import ENVIRONMENTS, Game
from itp.lm.memory_budget import EngineFlags
from itp.lm.scheduler import BatchBarrier
from itp.lm.server import PolicyServerFlags, Server, server_of
from itp.methods.no_repeat import states
from itp.models import load_policy
from itp.pretrained import check_model_path, model_fingerprint
from itp.program import progress_bar, run_main, say_next
from itp.rollout import LeftOut, MAX_RESTARTS, run_workers
from itp.run_dir import TIMING, alone_in, open_run_dir, timed
from itp.seeding import derive_seed
from itp.text import dialogues
from itp.text.prompts import foresight_text
from itp.text.state import State
from itp.training.itp_r.branches import engine, find_games
from itp.training.itp_r.expert_steps import ExpertStep, read_expert
from itp.transitions import Transition, write_transitions

log = logging.getLogger(__name__)
TRIED = "tried.jsonl"
ROW = {"row": int, "expert": str, "alternatives": list, "thought": str, "env_steps": dict}
"""The fields of a line of TRIED: the index of a step, what its expert's action led to, [action, observation, who chose
it] of each alternative, the thought, and the engine's steps."""
Answer = TypeVar("Answer")


@dataclass
class EarlySettings(PolicyServerFlags, EngineFlags):
    """What is tried, and where."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "expert_jsonl", "out_dir", "policy_model", "env", "env_data_root",
        "alternatives", "random_alternatives", "max_states", "reflections", "action_selection")
    expert_jsonl: str = flag(help="the expert's transitions: rows of episode_id, step, state, action, next_state",
                             affects_result=False, holds="path", aliases=("transitions",))
    out_dir: str = flag(help="where to write tried.jsonl, transitions.jsonl, outcomes.json, reflections.json; the same "
                             "command again goes on", affects_result=False, holds="path")
    policy_model: str = flag("", help="the policy whose actions are tried (with a server: what it runs, read only for "
                                      "how to ask it)", affects_result=False, holds="path",
                             aliases=("policy_model_path",))
    env: str = flag("alfworld", help="environment of the transitions", choices=ENVIRONMENTS)
    env_data_root: str = flag("", help="ALFWorld: folder that holds json_2.1.1, with the games of the transitions",
                              affects_result=False, holds="path", aliases=("env_data_path",))
    env_split: str = flag("train", help="split of those games")
    alternatives: int = flag(3, at_least=0, help="K: actions sampled from the policy in a state; the different ones "
                                                 "other than the expert's are executed")
    random_alternatives: int = flag(0, at_least=0, help="so many other admissible actions, drawn by chance, too")
    max_states: int = flag(0, at_least=0, help="try actions in so many of the states, drawn by chance (0: all)")
    max_env_steps: int = flag(0, at_least=0, help="and in so many that the engine executes no more steps than this, "
                                                  "those that lead to the states included (0: no limit)")
    reflections: str = flag("template", choices=("none", "template", "policy"),
                            help="who writes why the expert's action is better: nobody, a fixed form, or the policy, "
                                 "which must be a chat model")
    temperature: float = flag(1.0, above=0, help="sampling temperature of the policy")
    top_p: float = flag(1.0, help="nucleus of the policy's sampling")
    action_selection: str = flag("generate", choices=[name for name in SELECTIONS if name != "score"],
                                 help="actions are written freely, or sampled among the admissible ones")
    policy_dtype: str = flag("fp16", help="precision of the policy on a GPU", choices=DTYPES)
    policy_device: str = flag("cuda", help="device of the policy", affects_result=False)
    concurrency: int = flag(16, at_least=1, help="states at a time", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the games", affects_result=False)
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left in out_dir", affects_result=False)

    @property
    def needs_admissible(self) -> bool:
        return self.action_selection != "generate" or self.random_alternatives > 0


def main() -> None:
    settings = parse_settings(EarlySettings, prog="python -m world_model.early_experience", description=__doc__)
    server = check(settings)
    check_output_folder(settings.out_dir)
    rows = choose(settings, read_expert(settings.expert_jsonl, None))
    games, left_out = find_games(settings, rows), LeftOut()
    with alone_in(settings.out_dir):
        out = open_folder(settings, server)
        done = finished(out)
        todo = [row for row in rows if row.index not in done]
        log.info("%d states to try actions in, %d done before", len(todo), len(rows) - len(todo))
        if todo:
            with timed(out):
                asyncio.run(try_all(settings, server, todo, games, out / TRIED, left_out))
        print(write(out, rows, finished(out)))
    left_out.check_none_broken()
    say_next(f"python -m itp.training.base_policy --train_json DIALOGUES,{out / 'outcomes.json'} --model_path DIR "
             "--out_dir DIR")


def check(settings: EarlySettings) -> Server | None:
    """The policy's server, where it runs on one.  Raises UserError for what can't work."""
    server = server_of(settings, "policy")
    if not settings.alternatives and not settings.random_alternatives:
        raise UserError("--alternatives 0: nothing is tried; give 1 or more, or --random_alternatives")
    if settings.env == "alfworld" and not settings.env_data_root:
        raise UserError("--env_data_root is missing: the folder that holds json_2.1.1, with the games of "
                        f"{settings.expert_jsonl}")
    if server:
        server.check_selection(settings.action_selection)
    elif not settings.policy_model:
        raise UserError("--policy_model is missing: the policy whose actions are tried")
    if server is None or server.needs_template(settings.policy_model, "auto"):
        check_model_path(settings.policy_model)
    return server


def choose(settings: EarlySettings, rows: list[ExpertStep]) -> list[ExpertStep]:
    """The rows whose states are used, in the order of the file.  Raises UserError where the limits leave none."""
    drawn = sorted(rows, key=lambda row: derive_seed(settings.seed, "state", row.transition.episode_id, row.index))
    if settings.max_states:
        drawn = drawn[:settings.max_states]
    if settings.max_env_steps:
        costs = itertools.accumulate(map(lambda row: most_steps(settings, row), drawn))
        drawn = [row for row, cost in zip(drawn, costs, strict=True) if cost <= settings.max_env_steps]
    if not drawn:
        raise UserError(f"--max_env_steps {settings.max_env_steps}: not enough for one state; give more")
    return sorted(drawn, key=lambda row: row.index)


def most_steps(settings: EarlySettings, row: ExpertStep) -> int:
    """The steps that the engine executes for a state, if all alternatives are different."""
    off_path = row.transition.action != row.transition.expert_action
    executed = settings.alternatives + settings.random_alternatives + off_path
    return executed * (len(row.state.history) + 1) + settings.needs_admissible * len(row.state.history)


def open_folder(settings: EarlySettings, server: Server | None) -> Path:
    """The output folder, with this configuration, its data and its policy on record."""
    out = Path(settings.out_dir)
    if settings.override:  # first: a run killed in between must not leave old rows under a new configuration
        for name in (TRIED, TIMING):
            (out / name).unlink(missing_ok=True)
    facts = {"expert_sha256": hashlib.sha256(Path(settings.expert_jsonl).read_bytes()).hexdigest(),
             "policy_fingerprint": server.identity if server else model_fingerprint(settings.policy_model)}
    return open_run_dir(out, settings, facts=facts, override=settings.override)


def finished(out: Path) -> dict[int, dict[str, Any]]:
    """Index of the step -> its line in TRIED."""
    return {row["row"]: row for row in read_appended(out / TRIED, ROW)}


# ---------------------------------------------------------------- trying actions


@dataclass(frozen=True)
class Trier:
    """Tries a policy's actions in the games of an expert's states."""

    settings: EarlySettings
    policy: Policy
    games: Mapping[str, Game]
    pool: EnvPool
    barrier: BatchBarrier
    seats: asyncio.Semaphore = field(repr=False)

    async def row(self, row: ExpertStep) -> dict[str, Any]:
        """The line of a state.  Raises PromptTooLong, UnplayableGame, and UserError where the game isn't the
        episode's."""
        steps = {"replayed": 0, "tried": 0}
        chosen = await self.choose(row, steps)
        t, state = row.transition, row.state
        expert = t.next_state if t.action == t.expert_action else await self.outcome(row, t.expert_action, steps)
        alternatives = [[action, await self.outcome(row, action, steps), who] for action, who in chosen.items()]
        thought = await self.thought(state, t.expert_action, expert, [(a, o) for a, o, _ in alternatives])
        return {"row": row.index, "expert": expert, "alternatives": alternatives, "thought": thought,
                "env_steps": steps}

    async def choose(self, row: ExpertStep, steps: dict[str, int]) -> dict[str, str]:
        """Different actions other than the expert's -> who chose them."""
        settings, expert, admissible = self.settings, row.transition.expert_action, None
        if settings.needs_admissible:
            admissible = await self._in_game(row, self._admissible, steps)
        seed = derive_seed(settings.seed, row.transition.episode_id, row.transition.step)
        sampled = await self.policy.sample(row.state, admissible, settings.alternatives, seed) \
            if settings.alternatives else []
        chosen = {choice.action: "policy" for choice in sampled if choice.action and choice.action != expert}
        others = [action for action in admissible or () if action != expert and action not in chosen]
        drawn = random.Random(derive_seed(seed, "random")).sample(
            others, min(settings.random_alternatives, len(others)))
        return chosen | dict.fromkeys(drawn, "random")

    async def outcome(self, row: ExpertStep, action: str, steps: dict[str, int]) -> str:
        """What the game answers to ``action`` in the row's state."""
        async def act(env: EnvHandle, _: Observation) -> str:
            steps["tried"] += 1
            return (await env.step(action)).obs.text

        return await self._in_game(row, act, steps)

    @staticmethod
    async def _admissible(_: EnvHandle, observation: Observation) -> tuple[str, ...] | None:
        return observation.admissible

    async def _in_game(self, row: ExpertStep, what: Callable[[EnvHandle, Observation], Awaitable[Answer]],
                       steps: dict[str, int]) -> Answer:
        """The result of ``what`` in a copy of the game that is in the row's state."""
        async with self.barrier.away(), self.seats, self.pool.session() as env:
            for _ in range(MAX_RESTARTS + 1):
                try:
                    observation = await reach(env, self.games[row.transition.episode_id], row.state)
                    steps["replayed"] += len(row.state.history)
                    return await what(env, observation)
                except EnvDied as died:
                    log.warning("%s: %s; moving to its state again", row.where, died)
        raise UserError("the environment's process was lost again and again; start the same command again")

    async def close(self) -> None:
        await self.policy.lm.close()
        await self.pool.close()

    async def thought(self, state: State, action: str, outcome: str, tried: Sequence[tuple[str, str]]) -> str:
        """Why the expert's ``action`` is better than what else was ``tried``; empty where all led to the same."""
        others = [(other, seen) for other, seen in tried if seen != outcome]
        if self.settings.reflections == "none" or not others:
            return ""
        if self.settings.reflections == "template":
            return compared(state, action, outcome, others, self.settings.env)
        seed = derive_seed(self.settings.seed, "thought", state.render())
        return await self.policy.reflect(state, foresight_text([(action, outcome), *others]), seed, "Comparison")


def compared(state: State, action: str, outcome: str, others: Sequence[tuple[str, str]], env: str) -> str:
    """One line: what each of the ``others`` (action, observation) led to in ``state``, and what ``action`` did."""
    *_, before = states(state, env)

    def said(other: str, seen: str) -> str:
        *_, after = states(state.after(other, seen), env)
        return f"{other} changes nothing." if after == before else f"{other} leads to: {one_line(seen)}"

    return " ".join([*(said(*other) for other in others), f"{action} is better, it leads to: {one_line(outcome)}"])


def one_line(text: str) -> str:
    return " ".join(text.split())


async def try_all(settings: EarlySettings, server: Server | None, rows: Sequence[ExpertStep],
                  games: Mapping[str, Game], path: Path, left_out: LeftOut) -> None:
    """Append a line for every row to ``path``, ``concurrency`` at a time."""
    barrier = BatchBarrier()
    trier, todo = load_trier(settings, server, games, barrier), iter(rows)
    with writing(path), open(path, "a", encoding="utf-8") as file, progress_bar(len(rows), "state") as bar:

        async def worker() -> None:
            barrier.add(live=1)
            try:
                for row in todo:
                    await one(row)
            finally:
                barrier.add(live=-1)

        async def one(row: ExpertStep) -> None:
            try:
                line = await trier.row(row)
            except PromptTooLong as error:
                log.warning("left out: %s: %s", row.where, error)
                return
            except UnplayableGame as error:
                left_out.broken.append(str(error))
                return
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from error
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        try:
            await run_workers(worker, settings.concurrency)
        finally:
            await trier.close()


def load_trier(settings: EarlySettings, server: Server | None, games: Mapping[str, Game],
               barrier: BatchBarrier) -> Trier:
    """The policy and the games.  Raises UserError where the policy is to explain, and can't."""
    policy = load_policy(
        settings.policy_model, env=settings.env, server=server, device=settings.policy_device,
        dtype=settings.policy_dtype, barrier=barrier, engine=settings.engine, concurrency=settings.concurrency,
        selection=settings.action_selection, temperature=settings.temperature, top_p=settings.top_p)
    if settings.reflections == "policy" and policy.form.style == "tuned":
        raise UserError(f"--reflections policy: {settings.policy_model} was trained by this project and explains "
                        "nothing; give --reflections template, or a chat model")
    pool = EnvPool(engine(settings.env, want_admissible=settings.needs_admissible),
                   processes_for(settings.env_processes, settings.concurrency))
    return Trier(settings, policy, games, pool, barrier, asyncio.Semaphore(settings.concurrency))


# ---------------------------------------------------------------- what is written


def write(out: Path, rows: Sequence[ExpertStep], done: Mapping[int, dict[str, Any]]) -> str:
    """Write the training data, and return what is to be said of them.  Raises UserError where there are none."""
    made = [(row, done[row.index]) for row in rows if row.index in done]
    outcomes, reflections, transitions = [], [], []
    for row, line in made:
        t, episode = row.transition, episode_to(row)
        for number, (action, seen, who) in enumerate(line["alternatives"]):
            outcomes.append(dialogues.outcome_dialogue(episode, len(episode) - 1, number, action, seen))
            transitions.append(dataclasses.replace(t, action=action, next_state=seen, expert_action="", reward=0.0,
                                                   done=False, success=False, source=who))
        if line["thought"]:
            reflections.append(dialogues.thought_dialogue(episode, len(episode) - 1, line["thought"]))
    if not outcomes:
        raise UserError(f"{out}: the policy did as the expert in all {len(made)} states, so nothing was tried; give a "
                        "higher --temperature, more --alternatives, or --random_alternatives")
    write_transitions(out / "transitions.jsonl", transitions)
    write_json(out / "outcomes.json", outcomes)
    write_json(out / "reflections.json", reflections)
    steps = {name: sum(line["env_steps"][name] for _, line in made) for name in ("tried", "replayed")}
    write_json(out / "summary.json", {"states": len(made), "outcomes": len(outcomes), "reflections": len(reflections),
                                      "env_steps": steps})
    return (f"{len(made)} states, {len(outcomes)} outcomes of other actions, {len(reflections)} reflections in {out}\n"
            f"engine steps: {steps['tried']} of actions that were tried, {steps['replayed']} to reach their states")


def episode_to(row: ExpertStep) -> list[Transition]:
    """The episode up to the row, made from its state."""
    begin = State(row.state.task, row.state.first).render()
    return [*(Transition(row.transition.episode_id, step, begin, action, seen)
              for step, (action, seen) in enumerate(row.state.history)),
            dataclasses.replace(row.transition, state=row.state.render() if row.state.history else begin)]


if __name__ == "__main__":
    run_main(main)
