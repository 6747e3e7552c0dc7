r"""Stage 1, pseudo-labels (eq. 5): how far would it have paid to look ahead, at every step of the expert.

    K̃_t = argmax_{0 <= k <= K_max} [ log π_θ0(a*_t | s_t, τ̂_t(k)) − λ_K·k ], ties to the smaller k.

    python -m itp.training.train_adaptive_k label --expert_jsonl transitions.jsonl --policy_model POLICY \
        --wm_model WORLD_MODEL --out_labeled_jsonl labeled.jsonl --max_k 5

Departures from the paper and the authors' release: by default τ̂_t is imagined freely, as in every later
stage, and the policy reads all of it; teacher-forced, the expert's own action would stand in that prompt,
so the paper's way goes with ``--foresight_format last_obs`` only.  a*_t is the action that the expert would take, not a
random action that was executed instead.

Rows are the fields of the expert file and ``k_label``; ``obs_list`` (obs_list[k]: the last imagined
observation after k steps, obs_list[0] the current one; what isn't imagined repeats the last); ``imagined``
[[action, observation], ...] of the largest k; ``scores`` {k: score}; ``logprobs`` {k: log π_θ0(a*|s, τ̂(k)),
the sum over its tokens}; ``tokens``, what it cost; ``shortened``, how many prompts lost old steps to the budget;
``shown``, what of history and future the policy read, and in how many tokens (:mod:`itp.model_card`);
``label_by``.  With ``--label_by branch`` (:mod:`itp.training.itp_r.branches`) K̃_t comes from the game itself.  Then
scores are gains over the draft, and in place of ``logprobs`` there are ``actions`` {k: a_k}, ``values`` {k: value(a_k)}
(empty where all actions are the same), ``branches`` {action: [[success, steps], ...]}, ``revise`` {k: a_k wins against
the draft}, ``margins`` {k: log π(a_k|s, τ̂(k)) − log π(a_0|s, τ̂(k))} where they differ, ``winner`` (the action of the
highest value; empty where nothing was compared or none succeeded) and ``engine_steps``.
``OUT.run/`` holds the configuration, ``rows.jsonl`` (a line a finished row, what a restart goes on from) and
``summary.json``; the output itself is written when all is done, in the order of the input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itp.agent.heads import has_heads, kmax_of
from itp.envs.pool import EnvPool, processes_for
from itp.errors import PromptTooLong, UnplayableGame, UserError
from itp.files import check_output_file, check_output_folder, read_appended, write_atomic, write_json, writing
from itp.games import Game
from itp.lm.scheduler import BatchBarrier
from itp.model_card import AS_RELEASED, prompt_settings, resolve_by_card
from itp.models import check_recall, load_policy, load_world_model
from itp.pretrained import check_model_path, model_fingerprint
from itp.program import progress_bar
from itp.rollout import run_workers
from itp.run_dir import TIMING, alone_in, open_run_dir, timed
from itp.training.itp_r import branches
from itp.training.itp_r.expert_steps import ExpertStep, choose_rows, read_expert
from itp.training.itp_r.label_settings import BY_BRANCH, LabelSettings, parse_candidates
from itp.training.itp_r.pseudo_labels import Labeler

log = logging.getLogger(__name__)
ROW = {"row": int, "added": dict}
"""The fields of a line of rows.jsonl: the index of a step, and what was added to it."""


def run(settings: LabelSettings) -> None:
    """Label what is missing, write the output, print the distribution of labels."""
    candidates = check(settings)
    settings = resolve_by_card(settings, settings.policy_model, AS_RELEASED)
    skipped: list[str] | None = [] if settings.skip_bad_rows else None
    rows = choose_rows(read_expert(settings.expert_jsonl, skipped), settings.max_rows, settings.seed)
    for message in skipped or ():
        log.warning("skipped: %s", message)
    games = branches.find_games(settings, rows) if settings.label_by == "branch" else {}
    folder = Path(f"{settings.out_labeled_jsonl}.run")
    check_output_file(settings.out_labeled_jsonl)
    check_output_folder(folder)
    with alone_in(folder):
        _run(settings, candidates, rows, games, skipped or [])


def _run(settings: LabelSettings, candidates: tuple[int, ...], rows: Sequence[ExpertStep], games: Mapping[str, Game],
         skipped: list[str]) -> None:
    folder = claim(settings)
    finished = read_finished(folder / "rows.jsonl")
    todo = [row for row in rows if row.index not in finished]
    log.info("%d rows to label, %d labeled before", len(todo), len(rows) - len(todo))
    unfit: list[str] = []
    if todo:
        with timed(folder):
            asyncio.run(_label_all(settings, candidates, todo, games, folder / "rows.jsonl", unfit))
        finished = read_finished(folder / "rows.jsonl")
    kept = [(row, finished[row.index]) for row in rows if row.index in finished]
    if not kept:
        raise UserError(f"{settings.expert_jsonl}: no row is left to label; {(unfit or skipped or ['it is empty'])[0]}")
    shown = {"label_by": settings.label_by, "shown": prompt_settings(settings)}
    lines = [json.dumps({**dataclasses.asdict(row.transition), **added, **shown}, ensure_ascii=False)
             for row, added in kept]
    write_atomic(settings.out_labeled_jsonl, "".join(line + "\n" for line in lines))
    summary = summarize([added for _, added in kept], len(skipped) + len(unfit))
    write_json(folder / "summary.json", summary)
    print(report(summary))
    print(f"{len(kept)} labeled rows: {settings.out_labeled_jsonl}")


def check(settings: LabelSettings) -> tuple[int, ...]:
    """The candidates.  Refuses, before any model is loaded, what can't work."""
    if settings.imagination == "teacher_forced" and settings.foresight_format != "last_obs":
        raise UserError("--imagination teacher_forced writes the expert's action into the prompt that is to predict "
                        "it; add --foresight_format last_obs")
    candidates = parse_candidates(settings.k_candidates, settings.max_k)
    check_label_by(settings)
    path = settings.policy_model
    check_model_path(path)
    check_model_path(settings.wm_model)
    if settings.wm_recall:
        check_recall(settings.wm_model, settings.env)
    if has_heads(path) and kmax_of(path) != settings.max_k:
        raise UserError(f"--max_k {settings.max_k} contradicts {path}, whose K-head has kmax {kmax_of(path)}; "
                        f"give --max_k {kmax_of(path)}")
    return candidates


def check_label_by(settings: LabelSettings) -> None:
    """Refuse flags of one way to label with the other."""
    if settings.label_by == "likelihood":
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        if given := [name for name in BY_BRANCH if getattr(settings, name) != defaults[name]]:
            raise UserError(f"--{given[0]} is for --label_by branch; leave it out, or add that")
        return
    if settings.imagination == "teacher_forced":
        raise UserError("--label_by branch compares the policy's own actions, and --imagination teacher_forced shows "
                        "the expert's: give one of them")
    if settings.logprob_norm != "sum":
        raise UserError("--logprob_norm is of --label_by likelihood; leave it out with branch")
    if settings.max_k == 0:
        raise UserError("--label_by branch compares what follows imagined steps with the draft: give --max_k 1 or more")
    if settings.branch_gamma > 1:
        raise UserError(f"--branch_gamma {settings.branch_gamma}: more than 1, so a later success would be worth more")
    if settings.env == "alfworld" and not settings.env_data_root:
        raise UserError("--label_by branch plays the games of the rows: give --env_data_root, the folder that holds "
                        "json_2.1.1")


def claim(settings: LabelSettings) -> Path:
    """The folder of this run beside its output, with its configuration, data and models on record."""
    folder = Path(f"{settings.out_labeled_jsonl}.run")
    facts = {"expert_sha256": hashlib.sha256(Path(settings.expert_jsonl).read_bytes()).hexdigest(),
             "policy_fingerprint": model_fingerprint(settings.policy_model),
             "wm_fingerprint": model_fingerprint(settings.wm_model)}
    if settings.override:  # first: a run killed in between must not leave old rows under a new configuration
        for name in ("rows.jsonl", TIMING):
            (folder / name).unlink(missing_ok=True)
    return open_run_dir(folder, settings, facts=facts, override=settings.override, may_grow=("max_seq_len",),
                        redo=lambda: forget_shortened(folder / "rows.jsonl"))


def forget_shortened(path: Path) -> None:
    """Remove the rows with shortened prompts: within a larger budget they are labeled from other prompts."""
    rows = read_appended(path, ROW)
    # Rows of earlier versions don't say whether their prompts were shortened.
    kept = [row for row in rows if row["added"].get("shortened") == 0]
    log.info("%d rows are labeled again: a smaller --max_seq_len may have shortened their prompts",
             len(rows) - len(kept))
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def read_finished(path: Path) -> dict[int, dict[str, Any]]:
    """Index of the step -> what was added."""
    return {row["row"]: row["added"] for row in read_appended(path, ROW)}


async def _label_all(settings: LabelSettings, candidates: tuple[int, ...], rows: Sequence[ExpertStep],
                     games: Mapping[str, Game], path: Path, unfit: list[str]) -> None:
    """Append a line for every row to ``path``, ``concurrency`` episodes at a time.

    The rows of an episode follow each other in one coroutine, so that a state finds its beginning computed.
    """
    barrier = BatchBarrier()
    labeler = load_labeler(settings, candidates, barrier, games)
    episodes = iter([list(group) for _, group in itertools.groupby(rows, key=lambda r: r.transition.episode_id)])
    with writing(path), open(path, "a", encoding="utf-8") as file, progress_bar(len(rows), "row") as bar:

        async def worker() -> None:
            barrier.add(live=1)
            try:
                for row in itertools.chain.from_iterable(episodes):
                    await one(row)
            finally:
                barrier.add(live=-1)

        async def one(row: ExpertStep) -> None:
            try:
                added = await labeler.label(row)
            except (PromptTooLong, UnplayableGame) as error:
                unfit.append(f"{row.where}: {error}")
                log.warning("left out: %s", unfit[-1])
                return
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from error
            file.write(json.dumps({"row": row.index, "added": added}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        try:
            await run_workers(worker, settings.concurrency)
        finally:
            await labeler.close()


def load_labeler(settings: LabelSettings, candidates: tuple[int, ...], barrier: BatchBarrier,
                 games: Mapping[str, Game]) -> Labeler:
    """Both models, prompted as their training prompted them.  ``games``: those of the rows, to label by branch."""
    policy = load_policy(
        settings.policy_model, env=settings.env, device=settings.policy_device, dtype=settings.policy_dtype,
        barrier=barrier, engine={"max_batch_rows": settings.score_batch_size, **settings.engine},
        temperature=settings.temperature, top_p=settings.top_p, selection=settings.action_selection,
        **prompt_settings(settings))
    world_model = load_world_model(
        settings.wm_model, env=settings.env, device=settings.wm_device, dtype=settings.wm_dtype, barrier=barrier,
        engine={"max_batch_rows": settings.wm_batch_size, **settings.engine}, max_new_tokens=settings.wm_max_new_tokens,
        recall=settings.wm_recall)
    if settings.label_by == "likelihood":
        return Labeler(policy, world_model, candidates, settings)
    make_env = branches.engine(settings.env, want_admissible=settings.action_selection != "generate")
    pool = EnvPool(make_env, processes_for(settings.env_processes, settings.concurrency))
    return branches.BranchLabeler(policy, world_model, candidates, settings, games, pool, barrier,
                                  asyncio.Semaphore(settings.concurrency))


def summarize(added: Sequence[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """The distribution of labels, the mean score of every k, and what all of it cost."""
    labels = Counter(row["k_label"] for row in added)
    scores: dict[int, list[float]] = {}
    for row in added:
        for k, score in row["scores"].items():
            scores.setdefault(int(k), []).append(score)
    tokens: Counter[str] = Counter()
    for row in added:
        tokens.update(row["tokens"])
    summary = {
        "rows": len(added),
        "skipped": skipped,
        "shortened_prompts": sum(row.get("shortened", 0) for row in added),
        "labels": {str(k): labels[k] for k in sorted(scores)},
        "mean_score": {str(k): sum(values) / len(values) for k, values in sorted(scores.items())},
    }
    if "branches" in added[0]:
        return summary | branches.summarize(added)
    return summary | {
        "tokens": {name: tokens[name] for name in ("imagine", "world_model", "score", "largest_alone")},
        "score_over_largest_alone": tokens["score"] / tokens["largest_alone"] if added else 0.0,
    }


def report(summary: dict[str, Any]) -> str:
    """The summary as a few lines of text."""
    lines = [f"{summary['rows']} rows labeled, {summary['skipped']} skipped; "
             f"{summary['shortened_prompts']} prompts lost their oldest steps"]
    for k, count in summary["labels"].items():
        lines.append(f"k={k}: {count} ({count / summary['rows']:.1%}), mean score {summary['mean_score'][k]:.3f}")
    if "outcomes" in summary:
        return "\n".join([*lines, *branches.report(summary)])
    tokens, ratio = summary["tokens"], summary["score_over_largest_alone"]
    lines.append(f"tokens computed: policy imagining {tokens['imagine']}, scoring all k {tokens['score']} = "
                 f"{ratio:.2f} times the {tokens['largest_alone']} of the largest k alone; world model "
                 f"{tokens['world_model']}")
    return "\n".join(lines)
