"""Trajectories for training: D_exp of an expert, D_roll of a policy, random walks.

    python -m world_model.collect --actor expert --env_data_root data --out_dir runs/d_exp

writes ``episodes.jsonl`` (a line an episode, as they end: a restart goes on from there) and, at the end,
``transitions.jsonl`` (:mod:`itp.transitions`) and ``dialogues.json`` (:mod:`itp.text.dialogues`).

``--noise`` is the share of steps at which a random admissible action is executed instead of the actor's.  It may be a
list of shares separated by commas: each episode has one of them.  The actor's own choice is kept as
``expert_action``, so such steps show what to do after a mistake without teaching the mistake.
``--noise_policy`` executes a policy's action instead.  The expert then shows what to do where that policy's own
mistakes lead (imitation with a mixture of expert and learner, DAgger: Ross et al., 2011), and the mistakes are in the
data of the world model.  ``--failing`` executes actions that were admissible earlier and aren't now.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from itp.agent.policy import SELECTIONS
from itp.config import Topic, flag, parse_settings
from itp.devices import DTYPES
from itp.envs.pool import EnvPool, processes_for
from itp.envs.registry import EnvFlags, engine_of, games_of, goals_of
from itp.errors import UnplayableGame, UserError
from itp.files import check_output_folder, read_appended, write_json, writing
from itp.games import Game
from itp.lm.memory_budget import EngineFlags
from itp.lm.scheduler import BatchBarrier
from itp.lm.server import PolicyServerFlags, Server, server_of
from itp.methods.actors import (
    AnyAction, EngineExpert, ExpertActor, FailingActor, NoisyActor, RandomWalk, verb_first,
)
from itp.methods.base import Method
from itp.methods.settings import MethodSettings
from itp.methods.sft import Sft
from itp.models import load_policy
from itp.pretrained import check_model_path, model_fingerprint
from itp.program import progress_bar, run_main, say_next, show_success
from itp.rollout import Episode, LeftOut, run_episodes
from itp.run_dir import TIMING, alone_in, open_run_dir, timed
from itp.seeding import derive_seed
from itp.text import dialogues
from itp.transitions import REQUIRED, Transition, to_transition, write_transitions
from world_model.data_processing.reasoning import reasoning_dialogues

log = logging.getLogger(__name__)
ACTORS = ("expert", "handcoded", "planner", "random", "policy")
EPISODES = "episodes.jsonl"
LONGEST_PATH = 400
"""Steps that ScienceWorld's gold paths may have: those of growing plants are longer than the protocol's limits."""


@dataclass
class CollectSettings(EnvFlags, PolicyServerFlags, EngineFlags):
    """What is collected: who acts, and in which games."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "out_dir", "actor", "env", "env_data_root", "split",
        "max_games", "noise", "policy_model", "episodes_per_game", "seed")
    env_data_root: str = flag("", help="ALFWorld: folder that holds json_2.1.1")
    out_dir: str = flag(help="where to write episodes.jsonl, transitions.jsonl, dialogues.json", affects_result=False)
    actor: str = flag("expert", help="who acts: our expert from observations only (ScienceWorld: the simulator's gold "
                                     "path), alfworld's handcoded expert or its planner, a random walk, a policy",
                      choices=ACTORS)
    split: str = flag("train", help="split of the games")
    max_games: int = flag(0, at_least=0, help="a random choice of so many games (0: all)")
    episodes_per_game: int = flag(1, at_least=1, help="episodes of each mission")
    max_steps: int = flag(50, at_least=1, help="ALFWorld: steps of an episode at most")
    acting: ClassVar[Topic] = Topic("How they act, and what is written")
    noise: str = flag("0", help="share of random actions; an episode draws one of a list such as 0,0.15,0.4")
    noise_policy: str = flag("", help="model folder: the share --noise of the actions is this policy's, not random")
    failing: float = flag(0.0, at_least=0, help="share of actions that were admissible earlier and aren't now, so that "
                                                "they fail: for conditions of IMPLEMENT's world model")
    max_k: int = flag(0, at_least=0, help="also write foresight and horizon dialogues up to this depth (0: none)",
                      aliases=("foresight_k",))
    foresight_share: float = flag(0.1, at_least=0, help="so many foresight dialogues an episode, on average; an "
                                                        "episode's first comes with a horizon dialogue")
    reasoning_share: float = flag(0.0, at_least=0, help="share of the episodes for which the expert's knowledge is put "
                                                        "into words: thoughts, reflections, yes and no")
    policy_model: str = flag("", help="model folder, with --actor policy (with a server: what it runs, read only for "
                                      "how to ask it)")
    policy_dtype: str = flag("fp16", help="precision of either policy on a GPU", choices=DTYPES)
    policy_device: str = flag("cuda", help="device of either policy", affects_result=False)
    temperature: float = flag(0.7, at_least=0, help="sampling temperature of either policy")
    top_p: float = flag(0.9, help="nucleus of the policy's sampling")
    action_selection: str = flag("generate", help="how the policy chooses its action", choices=SELECTIONS)
    concurrency: int = flag(16, at_least=1, help="episodes at a time", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the environments", affects_result=False)
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left in out_dir", affects_result=False)


def main() -> None:
    settings = parse_settings(CollectSettings, prog="python -m world_model.collect", description=__doc__)
    check(settings)
    check_output_folder(settings.out_dir)
    with alone_in(settings.out_dir):
        out = open_folder(settings)
        games, left_out = _episode_games(settings), LeftOut()
        episodes = play_missing(settings, games, out, left_out)
        write(settings, games, episodes, out, left_out)
    left_out.check_none_broken()
    say_next(f"python -m itp.training.base_policy --train_json {out / 'dialogues.json'} --model_path BASE --out_dir DIR"
             f", and python -m world_model.base_tuning.finetune --data_path {out / 'transitions.jsonl'} "
             "--model_path BASE --out_dir DIR")


def open_folder(settings: CollectSettings) -> Path:
    """The output folder, with this configuration and its models on record."""
    out, server = Path(settings.out_dir), server_of(settings, "policy")
    check_output_folder(out)
    if settings.override:  # first: a run killed in between must not leave old episodes under a new configuration
        (out / EPISODES).unlink(missing_ok=True)
        (out / TIMING).unlink(missing_ok=True)
    facts = {f"{role}_fingerprint": model_fingerprint(folder) for role, folder in _policy_folders(settings).items()}
    if server:
        facts["policy_fingerprint"] = server.identity
    return open_run_dir(out, settings, facts=facts, override=settings.override)


def play_missing(settings: CollectSettings, games: Sequence[Game], out: Path,
                 left_out: LeftOut) -> dict[str, list[Transition]]:
    """All episodes by game, after those that aren't on file have been played.

    Broken games go into ``left_out``.  Raises UserError where an episode lost its environment's process again and
    again; the others are on file.
    """
    done = _finished(out / EPISODES)
    todo = [game for game in games if game.game_id not in done]
    log.info("%d episodes to play, %d there already", len(todo), len(games) - len(todo))
    if not todo:
        return done
    with timed(out):
        asyncio.run(_play(settings, todo, out / EPISODES, left_out))
    left_out.check_none_lost("episodes")
    return _finished(out / EPISODES)


def write(settings: CollectSettings, games: Sequence[Game], episodes: Mapping[str, list[Transition]], out: Path,
          left_out: LeftOut) -> None:
    """Write ``transitions.jsonl`` and ``dialogues.json``, and say what they hold.

    A played game whose reasoning dialogues can't be made goes into ``left_out``; the others are kept.
    """
    played = [(game, episodes[game.game_id]) for game in games if game.game_id in episodes]
    kept = [(game, episode) for game, episode in played if episode]
    if not kept:
        left_out.check_none_broken()
        raise UserError(f"{out}: none of {len(games)} episodes is worth keeping; give other games, or less --noise")
    rows = write_transitions(out / "transitions.jsonl", (t for _, episode in kept for t in episode))
    talks: list[dialogues.Dialogue] = []
    for game, episode in kept:
        talks += _dialogues(settings, episode)
        try:
            talks += _reasoning(settings, game, episode)
        except UnplayableGame as error:  # its expert's knowledge can't be read any more
            left_out.broken.append(str(error))
    write_json(out / "dialogues.json", talks)
    if dropped := len(played) - len(kept):
        print(f"{dropped} episodes of the expert didn't succeed and are left out")
    won = sum(episode[-1].success for _, episode in kept)
    print(f"{len(kept)} episodes ({won} won, {rows / len(kept):.1f} steps on average), {rows} transitions, "
          f"{len(talks)} dialogues in {out}")


# ---------------------------------------------------------------- what is asked for


def check(settings: CollectSettings) -> None:
    """Raises UserError for what doesn't go together."""
    if settings.actor == "policy" and not settings.policy_model:
        raise UserError("--actor policy needs --policy_model, the folder of the model that acts")
    server = server_of(settings, "policy")
    if server and settings.actor != "policy":
        raise UserError(f"--policy_backend {settings.policy_backend} is for --actor policy; --actor {settings.actor} "
                        "asks no policy there")
    if server:
        server.check_selection(settings.action_selection)
    if settings.failing > 1:
        raise UserError(f"--failing {settings.failing}: a share of the steps, at most 1")
    if settings.noise_policy and not any(_noises(settings.noise)):
        raise UserError("--noise_policy never acts at --noise 0; give its share of the steps, such as --noise 0.3,0.6")
    if settings.env == "alfworld" and not settings.env_data_root:
        raise UserError("--env_data_root is missing: the folder that holds json_2.1.1")
    if settings.env == "scienceworld" and settings.actor in ("handcoded", "planner"):
        raise UserError(f"--actor {settings.actor} is ALFWorld's; ScienceWorld's gold path is --actor expert")
    for role, folder in _policy_folders(settings).items():
        if role != "policy" or server is None or server.needs_template(folder, "auto"):
            check_model_path(folder)
    if settings.reasoning_share and settings.env != "alfworld":
        raise UserError("--reasoning_share: only ALFWorld's expert knows why it acts; leave it out")
    if settings.reasoning_share and settings.actor != "expert":
        raise UserError(f"--reasoning_share: only --actor expert knows why it acts, not {settings.actor}")


def _policy_folders(settings: CollectSettings) -> dict[str, str]:
    """Role -> model folder of the policies that act."""
    folders = {"policy": settings.policy_model, "noise_policy": settings.noise_policy}
    return {role: folder for role, folder in folders.items() if folder}


def _episode_games(settings: CollectSettings) -> list[Game]:
    """One entry an episode: the n-th of a game has ``#n`` in its id, which makes its randomness its own."""
    games = games_of(settings, settings.split, settings.env_data_root)
    if settings.env == "scienceworld" and settings.actor == "expert" and not settings.max_steps_override:
        games = [dataclasses.replace(game, max_steps=LONGEST_PATH) for game in games]
    if settings.max_games:  # a random choice: in the list's order the first would all be of one task type
        games = sorted(games, key=lambda g: derive_seed(settings.seed, "games", g.game_id))[:settings.max_games]
    return [dataclasses.replace(goal, game_id=f"{goal.game_id}#{n}") for game in games
            for goal in goals_of(settings, game) for n in range(settings.episodes_per_game)]


def _finished(path: Path) -> dict[str, list[Transition]]:
    """Episodes on file."""
    rows = read_appended(path, {"game_id": str, "transitions": list})
    return {row["game_id"]: [to_transition(t, str(path), REQUIRED) for t in row["transitions"]] for row in rows}


async def _play(settings: CollectSettings, games: Sequence[Game], path: Path,
                left_out: LeftOut) -> None:
    """Play ``games`` and put them on file; those that weren't played go into ``left_out``."""
    barrier = BatchBarrier()
    method = _actor(settings, barrier)
    noise = _policy(settings, settings.noise_policy, barrier) if settings.noise_policy else AnyAction()
    noisy = FailingActor(NoisyActor(method, noise, _noises(settings.noise)), settings.failing)
    expert = {"handcoded": "handcoded", "planner": "planner",
              "expert": "gold" if settings.env == "scienceworld" else ""}.get(settings.actor, "")
    pool = EnvPool(engine_of(settings, want_admissible=noisy.want_admissible, expert=expert),
                   processes_for(settings.env_processes, settings.concurrency))
    try:
        episodes = run_episodes(pool, noisy, games, max_steps=settings.max_steps,
                                seed=settings.seed, concurrency=settings.concurrency, barrier=barrier)
        with writing(path), open(path, "a", encoding="utf-8") as file, progress_bar(len(games), "episode") as bar:
            won = played = 0
            async for episode in episodes:
                bar.update()
                if left_out.takes(episode):
                    continue
                won, played = won + episode.success, played + 1
                show_success(bar, won, played)
                # ScienceWorld's gold paths don't all lead to the goal: what didn't is an empty episode, not data.
                kept = expert != "gold" or episode.success
                transitions = episode_transitions(episode, settings.actor) if kept else []
                row = {"game_id": episode.game.game_id, "transitions": [dataclasses.asdict(t) for t in transitions]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    finally:
        await pool.close()


def episode_transitions(episode: Episode, source: str) -> list[Transition]:
    """An episode in the schema of trajectory data.  Nothing in a random walk is worth imitating."""
    return [
        Transition(episode.game.game_id, t, step.state.render(), step.decision.action, step.observation,
                   "" if source == "random" else step.decision.expert_action, step.reward,
                   t == len(episode.steps) - 1, episode.success, episode.game.task_type, source)
        for t, step in enumerate(episode.steps)
    ]


def _dialogues(settings: CollectSettings, episode: list[Transition]) -> list[dialogues.Dialogue]:
    """The dialogues of one episode: the whole of it, and for some foresight and horizon."""
    if settings.actor == "random":
        return []
    talks = [dialogues.episode_dialogue(episode)]
    draw = random.Random(derive_seed(settings.seed, "foresight", episode[0].episode_id))
    more = draw.random() < settings.foresight_share % 1
    for i in range(int(settings.foresight_share) + more if settings.max_k else 0):
        # As often where something is taken or cleaned as on the way: there it matters that it was just imagined.
        action = verb_first([t.expert_action for t in episode], draw)
        step = draw.choice([at for at, t in enumerate(episode) if t.expert_action == action])
        talks.append(dialogues.foresight_dialogue(episode, step, draw.randint(1, settings.max_k)))
        if i == 0:
            talks.append(dialogues.horizon_dialogue(episode, draw.randrange(len(episode)), settings.max_k))
    return talks


def _reasoning(settings: CollectSettings, game: Game, episode: list[Transition]) -> list[dialogues.Dialogue]:
    """For some episodes, what the expert thinks in it.  Raises UnplayableGame where its knowledge can't be read."""
    draw = random.Random(derive_seed(settings.seed, "reasoning", episode[0].episode_id))
    if draw.random() >= settings.reasoning_share:
        return []
    return reasoning_dialogues(game, episode, draw, settings.max_k)


def _noises(text: str) -> list[float]:
    try:
        noises = [float(value) for value in text.split(",")]
    except ValueError as error:
        raise UserError(f"--noise {text!r}: give numbers from 0 to 1, such as 0,0.15,0.4") from error
    if not all(0 <= noise <= 1 for noise in noises):
        raise UserError(f"--noise {text!r}: must lie between 0 and 1")
    return noises


def _actor(settings: CollectSettings, barrier: BatchBarrier) -> Method:
    if settings.actor == "expert":
        return EngineExpert() if settings.env == "scienceworld" else ExpertActor()
    if settings.actor == "random":
        return RandomWalk()
    if settings.actor in ("handcoded", "planner"):
        return EngineExpert()
    return _policy(settings, settings.policy_model, barrier, server_of(settings, "policy"))


def _policy(settings: CollectSettings, folder: str, barrier: BatchBarrier, server: Server | None = None) -> Method:
    """The policy in ``folder``, which acts without imagining."""
    policy = load_policy(folder, env=settings.env, server=server, device=settings.policy_device,
                         dtype=settings.policy_dtype, barrier=barrier, engine=settings.engine,
                         concurrency=settings.concurrency, selection=settings.action_selection,
                         temperature=settings.temperature, top_p=settings.top_p)
    return Sft(policy, None, MethodSettings())


if __name__ == "__main__":
    run_main(main)
