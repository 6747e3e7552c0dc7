"""Plays the games of an evaluation and keeps what is finished.

Every finished episode is a file of its own, so a run that was killed is continued by its own command;
another configuration on the same folder is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from foresight_eval import cost, results
from foresight_eval.record_check import read_record
from foresight_eval.report.report import overview
from foresight_eval.settings import EvalSettings
from foresight_eval.summary import log_line, write_summary
from foresight_eval.trials import usages
from itp.distributed import Ranks, rank_devices
from itp.envs.panel import Panel
from itp.envs.pool import EnvPool, processes_for
from itp.errors import UserError
from itp.files import append_line, check_output_folder
from itp.games import Game, spread
from itp.lm.base import Usage
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import EarlierTrial
from itp.plan import EvalPlan, check_answers, check_server, make_plan
from itp.program import progress_bar, say_next, show_success
from itp.rollout import LeftOut, run_episodes
from itp.run_dir import open_run_dir

log = logging.getLogger(__name__)


async def evaluate(settings: EvalSettings) -> None:
    """Play what is missing in ``settings.out_dir``, then write and print the summary.

    Several processes (:class:`Ranks`) share the games; the first one does what is to be done once.
    """
    ranks = Ranks()
    panel = settings.read_panel()
    if panel is not None:
        settings = dataclasses.replace(settings, split=panel.split)
    games = settings.games(panel)
    chosen = choose_games(len(games), settings)
    folder = Path(settings.out_dir)
    if ranks.first:
        plan = make_plan(settings)
        check_answers(plan)
        await check_server(plan)
        folder = open_folder(plan, panel, start_anew=settings.override and not ranks.restarted)
        check_games(folder, games)
    ranks.meet()
    if not ranks.first:  # after the first one, which fetches a model that isn't here
        plan = make_plan(settings)
    missing = [i for i in chosen if not is_finished(settings, folder, i)]
    if ranks.first:
        log.info("%d games to play, %d finished before", len(missing), len(chosen) - len(missing))
    mine = await play(plan, folder, {i: games[i] for i in chosen}, len(missing), ranks) if missing else LeftOut()
    left_out = LeftOut(**await ranks.finished(dataclasses.asdict(mine)))
    left_out.check_none_lost("games")
    if ranks.first:
        finish(folder)
        left_out.check_none_broken()
        say_next(f"python -m foresight_eval.report {folder} --out_dir DIR, also with other result folders to compare")


def choose_games(n: int, settings: EvalSettings) -> list[int]:
    """The indices of the games that this run is to play."""
    chosen = list(range(n))
    if settings.only_ids:
        try:
            chosen = list(dict.fromkeys(int(i) for i in settings.only_ids.split(",")))
        except ValueError as error:
            raise UserError(f"--only_ids {settings.only_ids!r}: give indices such as 0,5,7") from error
        if unknown := [i for i in chosen if not 0 <= i < n]:
            raise UserError(f"--only_ids {unknown}: the split has games 0..{n - 1}")
    if settings.debug:
        chosen = chosen[:5]
    chosen = list(spread(chosen, settings.max_games))
    if settings.part_idx >= settings.part_num:
        raise UserError(f"--part_idx {settings.part_idx}: shares are numbered 0..{settings.part_num - 1}")
    if settings.part_idx >= 0:
        chosen = chosen[settings.part_idx::settings.part_num]  # by position: chosen indices may all be even
    return chosen


def open_folder(plan: EvalPlan, panel: Panel | None, *, start_anew: bool) -> Path:
    """The result folder, with this configuration and the identity of the models and of the panel on record."""
    folder = Path(plan.settings.out_dir)
    check_output_folder(folder)
    if start_anew:  # first: a run killed in between must not leave old results under a new configuration
        for file in results.all_trial_files(folder):
            file.unlink()
        (folder / cost.TIMING).unlink(missing_ok=True)
    facts = plan.facts | {"panel_hash": panel.hash if panel else ""}
    return open_run_dir(folder, plan.settings, facts=facts, override=start_anew, may_grow=("max_seq_len",),
                        redo=functools.partial(forget_shortened, folder))


def forget_shortened(folder: Path) -> None:
    """Remove the results of games with shortened prompts: within a larger budget they are played differently."""
    for index, trials in results.read_trials(folder).items():
        cut = [any(usage.get("shortened") for usage in usages(record)) for record in trials]
        if any(cut):
            log.info("game %d is played again, because a smaller --max_seq_len shortened its prompts", index)
            for trial in reversed(range(cut.index(True), len(trials))):  # the later ones build on it
                results.trial_file(folder, index, trial).unlink()


def check_games(folder: Path, games: list[Game]) -> None:
    """Refuse to go on where games came or went since: a result's index would name another game."""
    for i, trials in results.read_trials(folder).items():
        for trial, record in enumerate(trials):
            if i >= len(games) or games[i].game_id != record["meta"]["game_id"]:
                raise UserError(f"{results.trial_file(folder, i, trial)} is a result of {record['meta']['game_id']}, "
                                f"which is not game {i} of the split any more; choose another output path, or "
                                "--override to start it anew")


def is_finished(settings: EvalSettings, folder: Path, index: int) -> bool:
    """Whether no trial of the game is to be played any more."""
    return earlier_trials(settings, folder, index) is None


def earlier_trials(settings: EvalSettings, folder: Path, index: int) -> tuple[EarlierTrial, ...] | None:
    """The trials of a game that are on file; None where no other is to be played."""
    files = results.trial_files(folder, index)
    if len(files) >= settings.trials:
        return None
    earlier = tuple(results.earlier_trial(read_record(file), file) for file in files)
    solved = any(trial.success for trial in earlier)
    return None if solved and not settings.trials_after_success else earlier


async def play(plan: EvalPlan, folder: Path, games: Mapping[int, Game], missing: int, ranks: Ranks) -> LeftOut:
    """Play this process's share of ``games``, of which ``missing`` aren't finished; what was left out."""
    settings, barrier = plan.settings, BatchBarrier()
    pairs = (plan.uses_world_model and not plan.imagines_in_engine
             and plan.policy_server is plan.wm_server is None)
    policy_device, wm_device = rank_devices(settings.policy_device or settings.device,
                                            settings.wm_device or settings.device, pairs=pairs)
    policy = plan.load_policy(barrier, policy_device)
    world_model = plan.load_world_model(barrier, wm_device) if plan.uses_world_model else None
    method = plan.build_method(policy, world_model)
    concurrency = min(settings.concurrency, -(-missing // ranks.count))  # so that the first doesn't take them all
    pool = EnvPool(settings.make_env(method.want_admissible), processes_for(settings.env_processes, concurrency))
    mine = (games[i] for i in ranks.share(list(games)) if not is_finished(settings, folder, i))
    record = Recorder(folder, games, settings)
    start = time.monotonic()
    try:
        with progress_bar(missing, "game") as bar:
            async for episode in run_episodes(pool, method, mine, max_steps=settings.max_steps, seed=settings.seed,
                                              concurrency=concurrency, barrier=barrier, trials=record):
                bar.update(episode.left_out or record.earlier(episode.game) is None)
                show_success(bar, len(record.solved), len(record.played))
    finally:
        seconds = time.monotonic() - start
        await pool.close()
        await policy.close()
        if world_model:
            await world_model.close()
        cost.record_session(folder, episodes=record.episodes, steps=record.steps, seconds=seconds,
                            processes=ranks.count)
    log.info("%d steps in %.1f s: %.1f steps/s", record.steps, seconds, record.steps / seconds)
    return record.left_out


@dataclasses.dataclass
class Recorder:
    """Writes the trials of ``games`` (by index) as they end, and counts them; for :func:`itp.rollout.run_episodes`.

    What a method is told of earlier trials comes from their files, also within a run: so a run that was killed goes on
    as one that wasn't.
    """

    folder: Path
    games: Mapping[int, Game]
    settings: EvalSettings
    episodes: int = 0
    steps: int = 0
    played: set[str] = dataclasses.field(default_factory=set)
    solved: set[str] = dataclasses.field(default_factory=set)
    """The games of this run that were a success, in one of their trials."""
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    """Games that weren't played: they have no file, so that the next run plays them."""

    def __post_init__(self) -> None:
        self._index = {game.game_id: i for i, game in self.games.items()}

    def earlier(self, game: Game) -> tuple[EarlierTrial, ...] | None:
        return earlier_trials(self.settings, self.folder, self._index[game.game_id])

    def keep_note(self, game: Game, trial: int, note: str, usage: dict[str, Usage]) -> None:
        results.write_note(self.folder, self._index[game.game_id], trial, note, usage)

    def keep(self, episode: results.Episode) -> None:
        if self.left_out.takes(episode):
            return
        i = self._index[episode.game.game_id]
        results.forget_later_trials(self.folder, i, episode.trial)
        record = results.write_episode(self.folder, i, episode)
        append_line(self.folder / "log.txt", log_line(i, record["meta"]))
        self.played.add(episode.game.game_id)
        if episode.success:
            self.solved.add(episode.game.game_id)
        self.episodes, self.steps = self.episodes + 1, self.steps + len(episode.steps)


def finish(folder: Path) -> None:
    """Write and print the summary; say what went wrong on the way, and what would mend it."""
    summary = write_summary(folder)
    (result,) = results.read_results([folder])
    print(overview([result]))
    if too_long := [meta["game_id"] for meta in result.metas if meta["terminate_reason"] == "prompt_too_long"]:
        log.warning("%d episodes ended because a prompt was longer than the model's context (%s), and count as no "
                    "success: imagine fewer steps (--max_k), let answers be shorter (--act_tokens, "
                    "--wm_max_new_tokens), or give prompts less history (--history_keep_steps), with another --out_dir",
                    len(too_long), ", ".join(too_long[:3]) + ", ..." * (len(too_long) > 3))
    if summary["shortened_prompts"]:
        log.warning("%d prompts lost their oldest steps, since they were beyond --max_seq_len or the model's context",
                    summary["shortened_prompts"])
    print(f"results: {folder}")
