"""Plays the games of an evaluation and keeps what is finished.

Every finished game is a file of its own, so a run that was killed is continued by its own command;
another configuration on the same folder is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from foresight_eval import cost, report, results
from foresight_eval.methods import build
from foresight_eval.methods.settings import (
    DRAW_ACTIONS, LOOK_AHEAD, NEED_WORLD_MODEL, NEED_YES_OR_NO, TREE_SEARCH, WRITE_THOUGHTS, MethodSettings,
)
from foresight_eval.ranks import Ranks
from foresight_eval.settings import EvalSettings
from itp.envs.pool import EnvPool, processes_for
from itp.games import Game, spread
from itp.lm.base import LM
from itp.lm.chat import asked_as
from itp.lm.local import LocalLM, Quorum
from itp.lm.openai import OpenAILM
from itp.lm.server import server_of
from itp.policy.agent import IMAGINED_ACTION_TOKENS, Policy
from itp.policy.heads import has_heads, kmax_of, load_policy_lm
from itp.policy.shown import show_as_trained
from itp.rollout import run_episodes
from itp.runtime import (
    UserError, check_model_path, claim_output, load_tokenizer, model_fingerprint, progress_bar, rank_devices,
)
from itp.text.prompts import NO, YES
from itp.world_model import WorldModel

log = logging.getLogger(__name__)

NO_INFLUENCE = ("output_path", "override", "debug", "part_num", "part_idx", "only_ids", "max_games", "device",
                "policy_device", "wm_device", "concurrency", "env_processes", "wm_api_timeout_s", "wm_api_max_retries",
                "policy_api_timeout_s", "policy_api_max_retries", "cache_gb", "max_batch_tokens")
"""Settings that don't change the result of a game: where, how many at a time, and which of the games."""


async def evaluate(settings: EvalSettings) -> None:
    """Play what is missing in ``settings.output_path``, then write and print the summary.

    Several processes (:class:`Ranks`) share the games; the first one does what is to be done once.
    """
    ranks = Ranks()
    games = settings.games()
    chosen = choose_games(len(games), settings)
    folder = Path(settings.output_path)
    if ranks.first:
        check(settings)
        await check_server(settings)
        if ranks.restarted:  # what --override was to delete is deleted
            settings = dataclasses.replace(settings, override=False)
        # Not before the check, which fetches of a hub name what tells how it is asked.
        folder = claim(show_as_trained(settings, settings.policy_model))
        check_games(folder, games)
    ranks.meet()
    if not ranks.first:  # another node has a cache of its own
        check_model(settings, "policy", settings.policy_model, settings.prompt_style)
    settings = show_as_trained(settings, settings.policy_model)
    missing = [i for i in chosen if not is_finished(folder, i)]
    if ranks.first:
        log.info("%d games to play, %d finished before", len(missing), len(chosen) - len(missing))
    lost = await play(settings, folder, {i: games[i] for i in chosen}, len(missing), ranks) if missing else []
    everyones = await ranks.finished(len(lost))
    if everyones:
        raise UserError(f"{everyones} games lost their environment process again and again ({', '.join(lost[:3])}); "
                        "start the same command again to play them")
    if not ranks.first:
        return
    report.write_summary(folder)
    print(report.table([folder]))
    print(f"results: {folder}")


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
        chosen = [i for i in chosen if i % settings.part_num == settings.part_idx]
    return chosen


def check(settings: EvalSettings) -> None:
    """Refuse, before any model is loaded, what can't work."""
    if needs_world_model(settings) and server_of(settings, "wm") is None and not settings.wm_model:
        raise UserError(f"--method {settings.method} needs --wm_model (or --wm_backend openai, or --disable_wm 1)")
    if settings.k_policy == "fixed" and settings.fixed_k < 0:
        raise UserError("--k_policy fixed needs --fixed_k, the number of steps to imagine")
    if settings.fixed_k >= 0 and settings.k_policy not in ("auto", "fixed"):
        raise UserError(f"--fixed_k {settings.fixed_k} contradicts --k_policy {settings.k_policy}; give one of them")
    if settings.min_k > max_k(settings):
        raise UserError(f"--min_k {settings.min_k}: more than K_max, which is {max_k(settings)}; give less")
    check_method(settings)
    check_server_policy(settings)
    check_model(settings, "policy", settings.policy_model, settings.prompt_style)
    if needs_world_model(settings):
        check_model(settings, "wm", settings.wm_model, settings.wm_prompt_style)
    check_horizon(settings)
    check_answers(settings)


def check_model(settings: EvalSettings, prefix: str, path: str, style: str) -> None:
    """Refuse a model that isn't there, where it, or the tokenizer of what a server runs, is to be loaded."""
    server = server_of(settings, prefix)
    if server is None or settings.chat_template and server.needs_template(path, style):
        check_model_path(path)


def check_server_policy(settings: EvalSettings) -> None:
    """Refuse what a policy behind a server can't do; what depends on the server is asked in :func:`check_server`."""
    server, method = server_of(settings, "policy"), settings.method
    if server is None:
        return
    server.check_selection(settings.action_selection)
    if settings.action_selection == "score" and method in DRAW_ACTIONS:
        raise UserError(f"--method {method} draws several actions: with --policy_backend {settings.policy_backend} it "
                        "needs --action_selection generate")
    if method == "rap":
        raise UserError("--method rap weighs an action by the log-probability of what the policy wrote, which a server "
                        "doesn't say: use --method mcts, or a local policy")
    if method == "foresight" and method_settings(settings).k_policy == "head":
        raise UserError(f"--policy_backend {settings.policy_backend}: a server has no K-head; choose --k_policy prompt "
                        "or random, --fixed_k, or a local policy")


def check_horizon(settings: EvalSettings) -> None:
    """Refuse a K that the K-head can't choose; warn of one that the policy has never been trained to read."""
    path, heads = settings.policy_model, has_heads(settings.policy_model)
    if settings.k_policy == "head" and not heads:
        raise UserError(f"--k_policy head: {path} has no K-head; train one with "
                        "`python -m itp.training.train_adaptive_k sft`, or choose another --k_policy")
    if not heads or settings.method != "foresight":
        return
    chosen, trained = method_settings(settings), kmax_of(path)
    name, k = ("fixed_k", chosen.fixed_k) if chosen.k_policy == "fixed" else ("max_k", chosen.max_k)
    if k <= trained:
        return
    if chosen.k_policy == "head":
        raise UserError(f"--{name} {k}: the K-head of {path} was trained with K_max {trained}; give at most that")
    log.warning("--%s %d: %s was trained with K_max %d, and longer imagined trajectories are new to it", name, k,
                path, trained)


def check_method(settings: EvalSettings) -> None:
    """Refuse flags that contradict the method."""
    method = settings.method
    if method in WRITE_THOUGHTS and settings.action_selection != "generate":
        raise UserError(f"--method {method} writes thought and action in one reply: use --action_selection generate")
    if settings.thinking and settings.action_selection != "generate":
        raise UserError("--thinking: a model that thinks writes its action freely; use --action_selection generate")
    if settings.thinking and method in NEED_YES_OR_NO:
        raise UserError(f"--thinking: --method {method} reads how sure the policy is of yes where its answer begins, "
                        "so it can't think first; leave the flag out")
    if method in NEED_WORLD_MODEL and method != "foresight" and (settings.disable_wm or settings.fixed_k >= 0):
        raise UserError(f"--method {method} is nothing without its world model: --disable_wm and --fixed_k are for "
                        "--method foresight")
    if method in LOOK_AHEAD and max_k(settings) < 1:
        raise UserError(f"--method {method} looks --max_k steps ahead: give at least 1")


def check_answers(settings: EvalSettings) -> None:
    """Refuse a policy that can't say what the method asks it for."""
    if settings.method not in NEED_YES_OR_NO or server_of(settings, "policy"):
        return
    yes, no = load_tokenizer(settings.policy_model)([YES, NO], add_special_tokens=False)["input_ids"]
    if yes == no:
        raise UserError(f"--method {settings.method} asks the policy for yes or no, and the tokenizer of "
                        f"{settings.policy_model} knows neither word; train it on dialogues that have them "
                        "(world_model.collect --reasoning_share)")


async def check_server(settings: EvalSettings) -> None:
    """Ask a policy's server whether it can do what the run needs, before anything is written."""
    if server := server_of(settings, "policy"):
        policy_lm = server.connect("policy", concurrency=1)
        try:
            await check_scores(settings, policy_lm)
        finally:
            await policy_lm.close()


async def check_scores(settings: EvalSettings, policy_lm: LM) -> None:
    """Refuse a server that can't say how likely a given text is, where that is asked of the policy."""
    judges, scores = settings.method in NEED_YES_OR_NO, settings.action_selection == "score"
    if not judges and not scores:
        return
    try:
        yes, no = await policy_lm.loglikelihood([("Helps:", YES), ("Helps:", NO)])
    except UserError as error:
        what = f"--method {settings.method}" if judges else "--action_selection score"
        raise UserError(f"{what} needs the log-probabilities of given text: {error}") from error
    if judges and yes.logprobs == no.logprobs:
        raise UserError(f"--method {settings.method} asks the policy for yes or no, and to {settings.policy_api_model} "
                        "both are the same; train it on dialogues that have them (world_model.collect "
                        "--reasoning_share)")


def needs_world_model(settings: EvalSettings) -> bool:
    return settings.method in NEED_WORLD_MODEL and not settings.disable_wm and settings.fixed_k != 0


def claim(settings: EvalSettings) -> Path:
    """The result folder, with this configuration and the identity of the models on record."""
    config = dataclasses.asdict(settings)
    server = server_of(settings, "policy")
    config["policy_fingerprint"] = server.identity if server else model_fingerprint(settings.policy_model)
    config["max_k"] = max_k(settings)  # not -1: what a report measures budgets by
    if needs_world_model(settings) and settings.wm_backend == "local":
        config["wm_fingerprint"] = model_fingerprint(settings.wm_model)
    if settings.override:  # first: a run killed in between must not leave old results under a new configuration
        folder = Path(settings.output_path)
        for index in results.read_episodes(folder):
            (folder / f"{index}.json").unlink()
        (folder / cost.TIMING).unlink(missing_ok=True)
    return claim_output(settings.output_path, config, override=settings.override, ignore=NO_INFLUENCE)


def check_games(folder: Path, games: list[Game]) -> None:
    """Refuse to go on where games came or went since: a result's index would name another game."""
    for i, record in results.read_episodes(folder).items():
        if i >= len(games) or games[i].game_id != record["meta"]["game_id"]:
            raise UserError(f"{folder}/{i}.json is a result of {record['meta']['game_id']}, which is not game {i} of "
                            "the split any more; choose another output path, or --override to start it anew")


def is_finished(folder: Path, index: int) -> bool:
    return (folder / f"{index}.json").exists()


async def play(settings: EvalSettings, folder: Path, games: dict[int, Game], missing: int,
               ranks: Ranks) -> list[str]:
    """Play this process's share of ``games``, of which ``missing`` aren't finished; the ids of those lost."""
    quorum = Quorum()
    pairs = needs_world_model(settings) and settings.wm_backend == settings.policy_backend == "local"
    policy_device, wm_device = rank_devices(settings.policy_device or settings.device,
                                            settings.wm_device or settings.device, pairs=pairs)
    policy_lm = load_policy(settings, policy_device, quorum)
    wm_lm = load_world_model(settings, wm_device, quorum) if needs_world_model(settings) else None
    method = build(settings.method, make_policy(settings, policy_lm),
                   make_world_model(settings, wm_lm) if wm_lm else None, method_settings(settings))
    make_env = settings.make_env(method.want_admissible)
    concurrency = min(settings.concurrency, -(-missing // ranks.count))  # so that the first doesn't take them all
    pool = EnvPool(make_env, processes_for(settings.env_processes, concurrency))
    index = {game.game_id: i for i, game in games.items()}
    mine = (games[i] for i in ranks.share(list(games)) if not is_finished(folder, i))
    lost: list[str] = []
    start, episodes, steps = time.monotonic(), 0, 0
    try:
        with open(folder / "log.txt", "a", encoding="utf-8") as log_file, progress_bar(missing, "game") as bar:
            async for episode in run_episodes(pool, method, mine, max_steps=settings.max_steps, seed=settings.seed,
                                              concurrency=concurrency, quorum=quorum):
                bar.update()
                if episode.reason == "env_died":
                    lost.append(episode.game.game_id)
                    continue
                i = index[episode.game.game_id]
                results.write_episode(folder, i, episode)
                log_file.write(report.log_line(i, results.episode_record(i, episode)["meta"]) + "\n")
                log_file.flush()
                episodes, steps = episodes + 1, steps + len(episode.steps)
    finally:
        seconds = time.monotonic() - start
        cost.record_session(folder, episodes=episodes, steps=steps, seconds=seconds, processes=ranks.count)
        await pool.close()
        await policy_lm.close()
        if wm_lm:
            await wm_lm.close()
    log.info("%d steps in %.1f s: %.1f steps/s", steps, seconds, steps / seconds)
    return lost


def load_policy(settings: EvalSettings, device: str, quorum: Quorum) -> LM:
    if server := server_of(settings, "policy"):
        return server.connect("policy", settings.concurrency)
    return load_policy_lm(settings.policy_model, device=device, dtype=settings.policy_dtype, quorum=quorum,
                          **settings.engine)


def load_world_model(settings: EvalSettings, device: str, quorum: Quorum) -> LM:
    if server := server_of(settings, "wm"):
        return server.connect("world_model", settings.concurrency)
    return LocalLM.load(settings.wm_model, device=device, dtype=settings.wm_dtype, quorum=quorum, role="world_model",
                        **settings.engine)


def tokenizer_of(settings: EvalSettings, prefix: str, lm: LM, path: str, style: str) -> Any:
    """The tokenizer whose chat template asks a model; None where a server has its own, or plain text is asked for."""
    if server := server_of(settings, prefix):
        return server.tokenizer(path, style) if settings.chat_template else None
    return lm.tokenizer


def make_policy(settings: EvalSettings, lm: LM) -> Policy:
    tokenizer = tokenizer_of(settings, "policy", lm, settings.policy_model, settings.prompt_style)
    style, turns = asked_as(settings.policy_model, tokenizer, env=settings.env, style=settings.prompt_style,
                            chat=settings.chat_template, thinking=settings.thinking)
    policy = Policy(lm, env=settings.env, style=style, turns=turns, selection=settings.action_selection,
                    keep_steps=settings.history_keep_steps, history=bool(settings.use_history),
                    control=has_heads(settings.policy_model), temperature=settings.temperature, top_p=settings.top_p,
                    imagined_action_tokens=IMAGINED_ACTION_TOKENS[settings.env], action_tokens=settings.act_tokens,
                    text_tokens=settings.act_tokens, decision_tokens=settings.decision_tokens,
                    thinking_tokens=settings.thinking_tokens, score_answers=isinstance(lm, OpenAILM))
    if settings.method in TREE_SEARCH:
        tokens = settings.rap_action_gen_tokens
        policy = dataclasses.replace(policy, action_tokens=tokens, imagined_action_tokens=tokens)
    return policy


def make_world_model(settings: EvalSettings, lm: LM) -> WorldModel:
    tokenizer = tokenizer_of(settings, "wm", lm, settings.wm_model, settings.wm_prompt_style)
    style, turns = asked_as(settings.wm_model, tokenizer, role="world_model", env=settings.env,
                            style=settings.wm_prompt_style, chat=settings.chat_template)
    limit = "rap_wm_pred_tokens" if settings.method in TREE_SEARCH else "foresight_tokens"
    return WorldModel(lm, env=settings.env, style=style, turns=turns, max_new_tokens=getattr(settings, limit),
                      keep_steps=settings.history_keep_steps, limit=f"--{limit}")


def method_settings(settings: EvalSettings) -> MethodSettings:
    fixed = 0 if settings.disable_wm else settings.fixed_k
    k_policy = settings.k_policy
    if fixed >= 0:
        k_policy = "fixed"
    elif k_policy == "auto":
        k_policy = "head" if has_heads(settings.policy_model) else "prompt"
    style, _ = asked_as(settings.policy_model, style=settings.prompt_style)
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(MethodSettings) if f.name != "reflect"}
    return MethodSettings(**given | {"max_k": max_k(settings), "k_policy": k_policy, "fixed_k": fixed},
                          reflect=style != "tuned")


def max_k(settings: EvalSettings) -> int:
    """K_max: the flag's, else the K-head's, else the environment's."""
    if settings.max_k >= 0:
        return settings.max_k
    return kmax_of(settings.policy_model) if has_heads(settings.policy_model) else settings.max_k_without_head
