"""Trajectories for training: D_exp of an expert, D_roll of a policy, random walks.

    python -m world_model.collect --actor expert --env_data_root data --out_dir runs/d_exp

writes ``episodes.jsonl`` (a line an episode, as they end: what a restart goes on from) and, at the end,
``transitions.jsonl`` (:mod:`itp.transitions`) and ``dialogues.json`` (:mod:`itp.text.dialogues`).

``--noise`` is the share of steps at which a random admissible action is executed instead of the
actor's; of a comma-separated list each episode draws one.  The actor's own choice is kept as
``expert_action``, so such steps show what to do after a mistake without teaching the mistake.
``--noise_policy`` executes a policy's action instead: the expert then shows what to do where that policy's own
mistakes lead (imitation with a mixture of expert and learner, DAgger: Ross et al., 2011), and what the policy gets
wrong is in the data of the world model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from itp.config import flag, parse_settings
from itp.envs.alfworld_expert import Expert
from itp.envs.pool import EnvPool, processes_for
from itp.envs.which import EnvFlags, engine_of, games_of, missions_of
from itp.games import Game, task_params
from itp.lm.base import LM
from itp.lm.chat import asked_as
from itp.lm.local import Quorum
from itp.lm.room import EngineFlags
from itp.lm.server import PolicyServerFlags, Server, server_of
from itp.policy.agent import SELECTIONS, Policy
from itp.policy.heads import has_heads, load_policy_lm
from itp.policy.shown import history_of
from itp.policy.method import Decision, Direct, Method, View
from itp.rollout import Episode, run_episodes
from itp.runtime import (
    DTYPES, TIMING, UserError, check_model_path, claim_output, derive_seed, model_fingerprint, progress_bar, run_main,
    timed, write_json,
)
from itp.text import dialogues
from itp.transitions import Transition, read_appended, write_transitions
from world_model.reasoning import reasoning_dialogues

log = logging.getLogger(__name__)

ACTORS = ("expert", "handcoded", "planner", "random", "policy")
LONGEST_PATH = 400
"""Steps that ScienceWorld's gold paths may have: those of growing plants are longer than the protocol's limits."""


@dataclass
class Settings(EnvFlags, PolicyServerFlags, EngineFlags):
    env_data_root: str = flag("", help="ALFWorld: folder that holds json_2.1.1")
    out_dir: str = flag(help="where to write episodes.jsonl, transitions.jsonl, dialogues.json")
    actor: str = flag("expert", help="who acts: our expert from observations only (ScienceWorld: the simulator's gold "
                                     "path), alfworld's handcoded expert or its planner, a random walk, a policy",
                      choices=ACTORS)
    split: str = flag("train", help="split of the games")
    max_games: int = flag(0, at_least=0, help="a random choice of so many games (0: all)")
    episodes_per_game: int = flag(1, at_least=1, help="episodes of each mission")
    max_steps: int = flag(50, at_least=1, help="ALFWorld: steps of an episode at most")
    noise: str = flag("0", help="share of random actions; an episode draws one of a list such as 0,0.15,0.4")
    noise_policy: str = flag("", help="model folder: the share --noise of the actions is this policy's, not random")
    foresight_k: int = flag(0, at_least=0, help="also write foresight and horizon dialogues up to this depth (0: none)")
    foresight_share: float = flag(0.1, at_least=0, help="so many foresight dialogues an episode, on average; an "
                                                     "episode's first comes with a horizon dialogue")
    reasoning_share: float = flag(0.0, at_least=0, help="share of the episodes for which the expert's knowledge is put "
                                                        "into words: thoughts, reflections, yes and no")
    policy_model: str = flag("", help="model folder, with --actor policy (with a server: what it runs, read only for "
                                      "how to ask it)")
    policy_dtype: str = flag("fp16", help="precision of either policy on a GPU", choices=DTYPES)
    policy_device: str = flag("cuda", help="device of either policy")
    temperature: float = flag(0.7, at_least=0, help="sampling temperature of either policy")
    top_p: float = flag(0.9, help="nucleus of the policy's sampling")
    action_selection: str = flag("generate", help="how the policy chooses its action", choices=SELECTIONS)
    concurrency: int = flag(16, at_least=1, help="episodes at a time")
    env_processes: int = flag(2, at_least=1, help="processes that run the environments")
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left in out_dir")


def main() -> None:
    settings = parse_settings(Settings, prog="python -m world_model.collect", description=__doc__)
    check(settings)
    policies = {"policy": settings.policy_model, "noise_policy": settings.noise_policy}
    server = server_of(settings, "policy")
    policies = {role: folder for role, folder in policies.items() if folder}
    for role, folder in policies.items():
        if role != "policy" or server is None or server.needs_template(folder, "auto"):
            check_model_path(folder)
    if settings.reasoning_share and settings.actor != "expert":
        raise UserError(f"--reasoning_share: only --actor expert knows why it acts, not {settings.actor}")
    out = Path(settings.out_dir)
    episodes_file = out / "episodes.jsonl"
    if settings.override:  # first: a run killed in between must not leave old episodes under a new configuration
        episodes_file.unlink(missing_ok=True)
        (out / TIMING).unlink(missing_ok=True)
    config = dataclasses.asdict(settings)
    config |= {f"{role}_fingerprint": model_fingerprint(folder) for role, folder in policies.items()}
    if server:
        config["policy_fingerprint"] = server.identity
    claim_output(out, config, override=settings.override,
                 ignore=("policy_device", "concurrency", "env_processes", "override", "out_dir",
                         "policy_api_timeout_s", "policy_api_max_retries", "cache_gb", "max_batch_tokens"))
    games = _episode_games(settings)
    done = _finished(episodes_file)
    todo = [game for game in games if game.game_id not in done]
    log.info("%d episodes to play, %d there already", len(todo), len(games) - len(todo))
    if todo:
        with timed(out):
            lost = asyncio.run(_play(settings, todo, episodes_file))
        if lost:
            raise UserError(f"{len(lost)} episodes lost their environment process again and again "
                            f"({', '.join(lost[:3])}); start the same command again to play them")
        done = _finished(episodes_file)
    kept = [(game, episode) for game in games if (episode := done[game.game_id])]
    if not kept:
        raise UserError(f"{out}: none of {len(games)} episodes is worth keeping; give other games, or less --noise")
    rows = write_transitions(out / "transitions.jsonl", (t for _, episode in kept for t in episode))
    talks = [talk for game, episode in kept for talk in _dialogues(settings, game, episode)]
    write_json(out / "dialogues.json", talks)
    won = sum(episode[-1].success for _, episode in kept)
    steps = rows / len(kept)
    if dropped := len(games) - len(kept):
        print(f"{dropped} episodes of the expert didn't succeed and are left out")
    print(f"{len(kept)} episodes ({won} won, {steps:.1f} steps on average), {rows} transitions, "
          f"{len(talks)} dialogues in {out}")


def check(settings: Settings) -> None:
    """Raises UserError for what doesn't go together."""
    if settings.actor == "policy" and not settings.policy_model:
        raise UserError("--actor policy needs --policy_model, the folder of the model that acts")
    server = server_of(settings, "policy")
    if server and settings.actor != "policy":
        raise UserError(f"--policy_backend {settings.policy_backend} is for --actor policy; --actor {settings.actor} "
                        "asks no policy there")
    if server:
        server.check_selection(settings.action_selection)
    if settings.noise_policy and not any(_noises(settings.noise)):
        raise UserError("--noise_policy never acts at --noise 0; give its share of the steps, such as --noise 0.3,0.6")
    if settings.env == "alfworld" and not settings.env_data_root:
        raise UserError("--env_data_root is missing: the folder that holds json_2.1.1")
    if settings.env == "scienceworld" and settings.actor in ("handcoded", "planner"):
        raise UserError(f"--actor {settings.actor} is ALFWorld's; ScienceWorld's gold path is --actor expert")


def _episode_games(settings: Settings) -> list[Game]:
    """One entry an episode: the n-th of a game has ``#n`` in its id, which makes its randomness its own."""
    games = games_of(settings, settings.split, settings.env_data_root)
    if settings.env == "scienceworld" and settings.actor == "expert" and not settings.max_steps_override:
        games = [dataclasses.replace(game, max_steps=LONGEST_PATH) for game in games]
    if settings.max_games:  # a random choice: in the list's order the first would all be of one task type
        games = sorted(games, key=lambda g: derive_seed(settings.seed, "games", g.game_id))[:settings.max_games]
    return [dataclasses.replace(mission, game_id=f"{mission.game_id}#{n}") for game in games
            for mission in missions_of(settings, game) for n in range(settings.episodes_per_game)]


def _finished(path: Path) -> dict[str, list[Transition]]:
    """Episodes on file."""
    return {row["game_id"]: [Transition(**t) for t in row["transitions"]] for row in read_appended(path)}


async def _play(settings: Settings, games: Sequence[Game], path: Path) -> list[str]:
    """Play ``games`` and put them on file; the ids of those that the environment lost, which aren't there."""
    quorum = Quorum()
    method = _actor(settings, quorum)
    intruder = _policy(settings, settings.noise_policy, quorum) if settings.noise_policy else AnyAction()
    noisy = Noisy(method, intruder, _noises(settings.noise))
    expert = {"handcoded": "handcoded", "planner": "planner",
              "expert": "gold" if settings.env == "scienceworld" else ""}.get(settings.actor, "")
    pool = EnvPool(engine_of(settings, want_admissible=noisy.want_admissible, expert=expert),
                   processes_for(settings.env_processes, settings.concurrency))
    lost: list[str] = []
    try:
        episodes = run_episodes(pool, noisy, games, max_steps=settings.max_steps,
                                seed=settings.seed, concurrency=settings.concurrency, quorum=quorum)
        with open(path, "a", encoding="utf-8") as file, progress_bar(len(games), "episode") as bar:
            async for episode in episodes:
                bar.update()
                if episode.reason == "env_died":
                    lost.append(episode.game.game_id)
                    continue
                # ScienceWorld's gold paths don't all lead to the goal: what didn't is an empty episode, not data.
                kept = expert != "gold" or episode.success
                transitions = episode_transitions(episode, settings.actor) if kept else []
                row = {"game_id": episode.game.game_id, "transitions": [dataclasses.asdict(t) for t in transitions]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    finally:
        await pool.close()
    return lost


def episode_transitions(episode: Episode, source: str) -> list[Transition]:
    """An episode in the schema of trajectory data.  Nothing in a random walk is worth imitating."""
    return [
        Transition(episode.game.game_id, t, step.state.render(), step.decision.action, step.observation,
                   "" if source == "random" else step.decision.expert_action, step.reward,
                   t == len(episode.steps) - 1, episode.success, episode.game.task_type, source)
        for t, step in enumerate(episode.steps)
    ]


def _dialogues(settings: Settings, game: Game, episode: list[Transition]) -> list[dialogues.Dialogue]:
    """The dialogues of one episode: the whole of it, and for some foresight, horizon and reasoning."""
    if settings.actor == "random":
        return []
    talks = [dialogues.episode_dialogue(episode)]
    draw = random.Random(derive_seed(settings.seed, "foresight", episode[0].episode_id))
    more = draw.random() < settings.foresight_share % 1
    for i in range(int(settings.foresight_share) + more if settings.foresight_k else 0):
        # As often where something is taken or cleaned as on the way: there it matters that it was just imagined.
        action = _verb_first([t.expert_action for t in episode], draw)
        step = draw.choice([at for at, t in enumerate(episode) if t.expert_action == action])
        talks.append(dialogues.foresight_dialogue(episode, step, draw.randint(1, settings.foresight_k)))
        if i == 0:
            talks.append(dialogues.horizon_dialogue(episode, draw.randrange(len(episode)), settings.foresight_k))
    draw = random.Random(derive_seed(settings.seed, "reasoning", episode[0].episode_id))
    if draw.random() < settings.reasoning_share:
        talks += reasoning_dialogues(game, episode, draw, settings.foresight_k)
    return talks


def _noises(text: str) -> list[float]:
    try:
        noises = [float(value) for value in text.split(",")]
    except ValueError as error:
        raise UserError(f"--noise {text!r}: give numbers from 0 to 1, such as 0,0.15,0.4") from error
    if not all(0 <= noise <= 1 for noise in noises):
        raise UserError(f"--noise {text!r}: must lie between 0 and 1")
    return noises


def _actor(settings: Settings, quorum: Quorum) -> Method:
    if settings.actor == "expert":
        return EngineExpert() if settings.env == "scienceworld" else ExpertActor()
    if settings.actor == "random":
        return RandomWalk()
    if settings.actor in ("handcoded", "planner"):
        return EngineExpert()
    return _policy(settings, settings.policy_model, quorum, server_of(settings, "policy"))


def _policy(settings: Settings, folder: str, quorum: Quorum, server: Server | None = None) -> Method:
    lm: LM
    if server:
        lm, tokenizer = server.connect("policy", settings.concurrency), server.tokenizer(folder, "auto")
    else:
        lm = load_policy_lm(folder, device=settings.policy_device, dtype=settings.policy_dtype, quorum=quorum,
                            **settings.engine)
        tokenizer = lm.tokenizer
    style, turns = asked_as(folder, tokenizer, env=settings.env)
    return Direct(Policy(lm, env=settings.env, style=style, turns=turns, selection=settings.action_selection,
                         control=has_heads(folder), keep_steps=history_of(folder), temperature=settings.temperature,
                         top_p=settings.top_p))


class ExpertActor:
    """Our expert.  It is shown the episode so far at every step, so that there is nothing to keep."""

    name, want_admissible = "expert", False

    async def act(self, view: View) -> Decision:
        expert = Expert(task_params(view.game), view.game.task_type, view.state.first)
        for action, observation in view.state.history:
            expert.observe(action, observation)
        return Decision(expert.act())


class EngineExpert:
    """The engine's own experts, as the environment reports them; ALFWorld's look around where they have no plan."""

    name, want_admissible = "engine expert", False

    async def act(self, view: View) -> Decision:
        return Decision(view.observation.expert_action or "look")


def random_action(view: View, draw: random.Random) -> str:
    """An admissible action.  In ScienceWorld its verb is drawn first, because of a thousand actions most connect
    something to something; and it isn't ``focus``, which ends the episode where it is wrong."""
    admissible = view.observation.admissible
    if view.game.env == "scienceworld":
        return _verb_first(admissible, draw, without=("focus",))
    return draw.choice(admissible)


def _verb_first(actions: Sequence[str], draw: random.Random, without: Sequence[str] = ()) -> str:
    """One of ``actions``, each verb as probable as any other."""
    verb = draw.choice(sorted({action.split(" ")[0] for action in actions}.difference(without)))
    return draw.choice([action for action in actions if action.split(" ")[0] == verb])


class RandomWalk:
    """Random actions that a world model can learn from: half of them change something, of whatever thing (an expert's
    are all of its task's); the others are visits, to few enough places that it comes back to them, and a few looks.
    In ScienceWorld: see :func:`random_action`."""

    name, want_admissible = "random", True

    async def act(self, view: View) -> Decision:
        draw = random.Random(view.seed)
        if view.game.env == "scienceworld":
            return Decision(random_action(view, draw))
        admissible, looks = view.observation.admissible, {"look", "inventory", "examine"}
        changes = [action for action in admissible if action.split(" ")[0] not in {*looks, "go", "help"}]
        visits = [action for action in admissible if action.startswith("go to ")]
        visits.sort(key=lambda action: derive_seed(view.game.game_id, action))
        what = draw.random()
        if changes and what < 0.5:
            return Decision(_verb_first(changes, draw))
        if visits and what < 0.9:
            return Decision(draw.choice(visits[:max(3, len(visits) // 3)]))
        return Decision(_verb_first([action for action in admissible if action.split(" ")[0] in looks], draw))


class AnyAction:
    """Any admissible action."""

    name, want_admissible = "any", True

    async def act(self, view: View) -> Decision:
        return Decision(random_action(view, random.Random(view.seed)))


class Noisy:
    """A method that is interrupted by another: an episode's share of its steps is the intruder's."""

    def __init__(self, method: Method, intruder: Method, noises: Sequence[float]) -> None:
        self.method, self.intruder, self.noises = method, intruder, noises
        self.name = method.name
        self.want_admissible = method.want_admissible or max(noises) > 0 and intruder.want_admissible

    async def act(self, view: View) -> Decision:
        decision = await self.method.act(view)
        noise = self.noises[derive_seed("noise", view.game.game_id) % len(self.noises)]
        interrupted = random.Random(derive_seed(view.seed, "noise")).random() < noise
        executed = (await self.intruder.act(view)).action if interrupted else decision.action
        return dataclasses.replace(decision, action=executed, expert_action=decision.action)


if __name__ == "__main__":
    run_main(main)
