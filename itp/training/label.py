r"""Stage 1, pseudo-labels (eq. 5): how far would it have paid to look ahead, at every step of the expert.

    K̃_t = argmax_{0 <= k <= K_max} [ log π_θ0(a*_t | s_t, τ̂_t(k)) − λ_K·k ], ties to the smaller k.

    python -m itp.training.train_adaptive_k label --expert_jsonl transitions.jsonl --policy_model_path POLICY \
        --wm_model_path WORLD_MODEL --out_labeled_jsonl labeled.jsonl --kmax 5

Departures from the paper and the authors' release: by default τ̂_t is imagined freely, as in every later
stage, and the policy reads all of it; teacher-forced, the expert's own action would stand in that prompt,
so the paper's way goes with ``--foresight_format last_obs`` only.  The longest trajectory is imagined once
and those of smaller k are its beginnings.  a*_t is what the expert would do, not a random action that was
executed instead.

Rows are the fields of the expert file and ``k_label``; ``obs_list`` (obs_list[k]: the last imagined
observation after k steps, obs_list[0] the current one; what isn't imagined repeats the last); ``imagined``
[[action, observation], ...] of the largest k; ``scores`` {k: score}; ``logprobs`` {k: log π_θ0(a*|s, τ̂(k)),
the sum over its tokens}; ``tokens``, what it cost; ``shown``, what the policy read (:mod:`itp.policy.shown`).
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from itp.config import flag
from itp.games import ENVIRONMENTS, K_MAX
from itp.imagination import ImaginedTrajectory, imagine
from itp.lm.base import Usage, metered
from itp.lm.chat import asked_as
from itp.lm.local import LocalLM, Quorum
from itp.lm.room import EngineFlags
from itp.policy.agent import IMAGINED_ACTION_TOKENS, Policy
from itp.policy.shown import FORMAT_CHOICES, show_as_trained, shown
from itp.runtime import (
    DTYPES, TIMING, UserError, check_model_path, claim_output, derive_seed, model_fingerprint, progress_bar, timed,
    write_atomic, write_json,
)
from itp.text.prompts import action_target, foresight_text
from itp.text.state import State, parse
from itp.training.fitting import Fitting
from itp.transitions import REQUIRED, Transition, locate_transitions, read_appended
from itp.world_model import WorldModel

log = logging.getLogger("itp.label")


@dataclass
class LabelSettings(EngineFlags):
    expert_jsonl: str = flag(help="the expert's transitions: rows of episode_id, step, state, action, next_state")
    policy_model_path: str = flag(help="the base policy π_θ0")
    wm_model_path: str = flag(help="the world model")
    out_labeled_jsonl: str = flag(help="where to write; the same command again goes on with what is missing")
    env: str = flag("alfworld", help="environment of the rows", choices=ENVIRONMENTS)
    kmax: int = flag(-1, at_least=0, help="K_max, the most steps to look ahead (-1: the paper's, 5 for ALFWorld, 8 for "
                              "ScienceWorld)")
    lambda_k: float = flag(0.2, help="price λ_K of one imagined step, in nats")
    k_candidates: str = flag("", help="the k to try, such as 0,2,5 (empty: all up to kmax); 0 is always tried")
    logprob_norm: str = flag("sum", choices=("sum", "mean"), help="the action's log-probability: of all its tokens, "
                                                                  "or of one on average")
    imagination: str = flag("free", choices=("free", "teacher_forced"),
                            help="who acts in the imagined trajectory: the policy, or the expert as recorded "
                                 "(needs --foresight_format last_obs)")
    foresight_format: str = flag("auto", choices=FORMAT_CHOICES,
                                 help="what of the imagined trajectory the policy reads (auto: as it was trained, "
                                      "else full)")
    history_keep_steps: int = flag(-1, at_least=0, help="steps of history in a prompt (0: all; -1: as the policy was "
                                                        "trained, else all)")
    max_seq_len: int = flag(1536, at_least=1,
                            help="tokens of a prompt and what follows it; longer ones lose history, oldest first")
    wm_max_new_tokens: int = flag(192, at_least=1, help="tokens of an imagined observation at most")
    temperature: float = flag(0.0, at_least=0, help="sampling temperature of imagined actions (0: greedy)")
    top_p: float = flag(1.0, help="nucleus of imagined actions")
    wm_batch_size: int = flag(4, at_least=1, help="rows in a batch of the world model at most")
    score_batch_size: int = flag(48, at_least=1, help="rows in a batch of the policy at most")
    padding_side: str = flag("left", choices=("left", "right"),
                             help="part of the release's command line; padded rows are computed exactly as they are "
                                  "alone, so no label depends on it")
    max_rows: int = flag(0, at_least=0, help="label so many rows, of episodes chosen at random (0: all)")
    skip_bad_rows: bool = flag(False, help="leave out and count rows that can't be read or don't fit, instead of "
                                           "stopping at the first")
    policy_device: str = flag("cuda:0", help="device of the policy")
    wm_device: str = flag("cuda:1", help="device of the world model")
    policy_dtype: str = flag("fp16", help="precision of the policy on a GPU", choices=DTYPES)
    wm_dtype: str = flag("fp16", help="precision of the world model on a GPU", choices=DTYPES)
    concurrency: int = flag(32, at_least=1, help="episodes at a time")
    cache_gb: float = flag(0.0, at_least=0, help="GB for each model's computed prefixes; too little shows in the token "
                                                 "count (0: on a GPU a share of what is free, on a CPU 1)")
    fixed_cache_gb: ClassVar[float] = 1.0
    seed: int = flag(123, help="seed of everything random")
    override: bool = flag(False, help="delete what another configuration left at out_labeled_jsonl")

    def __post_init__(self) -> None:
        self.kmax = K_MAX[self.env] if self.kmax == -1 else self.kmax


NOT_THE_RESULT = ("expert_jsonl", "policy_model_path", "wm_model_path", "out_labeled_jsonl", "wm_batch_size",
                  "score_batch_size", "padding_side", "skip_bad_rows", "policy_device", "wm_device", "concurrency",
                  "cache_gb", "max_batch_tokens", "override")
"""Settings that don't change a label (files and models are on record by their content)."""


@dataclass(frozen=True)
class Row:
    """One step to label.  ``forced``: the expert's actions a*_t, a*_{t+1}, ... as far as they were executed."""

    index: int
    where: str
    transition: Transition
    state: State
    forced: tuple[str, ...]


# ---------------------------------------------------------------- the formula


def penalised(logprobs: dict[int, float], lambda_k: float) -> dict[int, float]:
    """log π_θ0(a*|s, τ̂(k)) − λ_K·k for every candidate k."""
    return {k: value - lambda_k * k for k, value in sorted(logprobs.items())}


def best_k(scores: dict[int, float]) -> int:
    """K̃_t: the k of the highest score, of equal ones the smallest."""
    return min(scores, key=lambda k: (-scores[k], k))


@dataclass(frozen=True)
class Labeller:
    """Eq. 5 on one row.  Written as if alone: rows that run at the same time become batches in the LMs."""

    policy: Policy
    world_model: WorldModel
    candidates: tuple[int, ...]
    settings: LabelSettings

    async def label(self, row: Row) -> dict[str, Any]:
        """What is added to the row.  Raises UserError where it doesn't fit ``max_seq_len``."""
        fitting = Fitting(self.policy, self.world_model, self.settings.max_seq_len)
        with metered() as imagining:
            trajectory = await self._imagine(row, fitting)
        # An episode that ends sooner has no teacher-forced future beyond.
        candidates = [k for k in self.candidates if k <= len(trajectory.steps)]
        target = action_target(row.transition.expert_action)
        with metered() as scoring:
            totals, sizes, alone = await self._score(row, trajectory, candidates, target, fitting)
        norm = 1 if self.settings.logprob_norm == "sum" else sizes
        scores = penalised({k: v / norm for k, v in totals.items()}, self.settings.lambda_k)
        seen = [row.state.observation, *(observation for _, observation in trajectory.steps)]
        return {
            "k_label": best_k(scores),
            "obs_list": [seen[min(k, len(seen) - 1)] for k in range(self.settings.kmax + 1)],
            "imagined": [list(step) for step in trajectory.steps],
            "scores": scores,
            "logprobs": totals,
            "tokens": {"imagine": _computed(imagining.get("policy")), "score": _computed(scoring["policy"]),
                       "largest_alone": alone, "world_model": _computed(imagining.get("world_model")),
                       "target": sizes},
        }

    async def _imagine(self, row: Row, fitting: Fitting) -> ImaginedTrajectory:
        k, transition = self.candidates[-1], row.transition
        if self.settings.imagination == "teacher_forced":
            forced = row.forced[:k]
            return await imagine(_Recorded(iter(forced)), fitting, row.state, len(forced), seed=0)
        seed = derive_seed(self.settings.seed, transition.episode_id, transition.step)
        return await imagine(fitting, fitting, row.state, k, seed)

    async def _score(self, row: Row, trajectory: ImaginedTrajectory, candidates: Sequence[int], target: str,
                     fitting: Fitting) -> tuple[dict[int, float], int, int]:
        """({k: log π_θ0(a*|s, τ̂(k))}, tokens of a*, tokens computed for the largest k).

        The largest k goes first and alone.  Its prompt holds the beginnings of all others, so that these,
        one batch, cost only what differs: the label and the action.
        """
        futures = [foresight_text(trajectory.steps[:k], self.settings.foresight_format) for k in candidates]
        state = fitting.for_scoring(row.state, futures, target)
        pairs = [(self.policy.prompt(state, "Action", foresight=future), target) for future in futures]
        largest = await self.policy.lm.loglikelihood(pairs[-1:])
        answers = [*await self.policy.lm.loglikelihood(pairs[:-1]), *largest]
        totals = {k: answer.total for k, answer in zip(candidates, answers, strict=True)}
        return totals, len(largest[0].logprobs), largest[0].prompt_tokens - largest[0].cached_tokens


class _Recorded:
    """Proposes what the expert did."""

    def __init__(self, actions: Iterator[str]) -> None:
        self.actions = actions

    async def propose(self, state: State, seed: int) -> str:
        return next(self.actions)


def _computed(usage: Usage | None) -> int:
    """Tokens that really went through the model."""
    return usage.tokens - usage.cached_tokens if usage else 0


# ---------------------------------------------------------------- rows in


def parse_candidates(text: str, kmax: int) -> tuple[int, ...]:
    """The k to try, ascending.  Raises UserError."""
    if not text.strip():
        return tuple(range(kmax + 1))
    try:
        given = {int(k) for k in text.split(",")}
    except ValueError as error:
        raise UserError(f"--k_candidates {text!r}: give numbers such as 0,2,5") from error
    if wrong := [k for k in sorted(given) if not 0 <= k <= kmax]:
        raise UserError(f"--k_candidates {text!r}: {wrong[0]} isn't between 0 and --kmax {kmax}")
    return tuple(sorted(given | {0}))


def read_expert(path: str, skipped: list[str] | None) -> list[Row]:
    """The rows of an expert file that hold something to imitate.

    What is wrong with one is raised, or put into ``skipped`` if it is a list.
    """
    rows: list[Row] = []
    for where, transition in locate_transitions(path, required=(*REQUIRED, "episode_id", "step"), skipped=skipped):
        try:
            rows.append(Row(len(rows), where, transition, parse(transition.state), ()))
        except ValueError as error:
            message = f"{where}: field 'state' isn't a state ({error})"
            if skipped is None:
                raise UserError(message) from error
            skipped.append(message)
    if not rows:
        raise UserError(f"{path}: holds no usable rows; give a JSONL file of the expert's transitions")
    imitated = [dataclasses.replace(row, index=i, forced=forced)
                for i, (row, forced) in enumerate(zip(rows, _forced_actions(rows), strict=True)) if forced]
    if not imitated:
        raise UserError(f"{path}: 'expert_action' is empty in every row, so nothing is to be imitated; give the "
                        "expert's transitions")
    if left_out := len(rows) - len(imitated):
        log.info("%d rows with an empty 'expert_action' are left out: they aren't to be imitated", left_out)
    return imitated


def _forced_actions(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """For every row the expert's actions from there on, as long as they were executed and belong together."""
    following = {(row.transition.episode_id, row.transition.step): row.transition for row in rows}
    for row in rows:
        actions, here = [], row.transition
        while here is not None and here.expert_action:
            actions.append(here.expert_action)
            # After another action than the expert's, the next row isn't what follows from the expert's.
            executed = here.action == here.expert_action
            here = following.get((here.episode_id, here.step + 1)) if executed else None
        yield tuple(actions)


def choose_rows(rows: list[Row], settings: LabelSettings) -> list[Row]:
    """``max_rows`` rows of episodes drawn by chance, in the order of the file.

    Whole episodes, because their steps share most of what is to be computed.
    """
    if not settings.max_rows:
        return rows
    drawn = sorted(rows, key=lambda r: (derive_seed(settings.seed, "rows", r.transition.episode_id), r.index))
    return sorted(drawn[:settings.max_rows], key=lambda row: row.index)


# ---------------------------------------------------------------- the program


def run(settings: LabelSettings) -> None:
    """Label what is missing, write the output, print the distribution of labels."""
    candidates = check(settings)
    settings = show_as_trained(settings, settings.policy_model_path)
    skipped: list[str] | None = [] if settings.skip_bad_rows else None
    rows = choose_rows(read_expert(settings.expert_jsonl, skipped), settings)
    for message in skipped or ():
        log.warning("skipped: %s", message)
    folder = claim(settings)
    finished = read_finished(folder / "rows.jsonl")
    todo = [row for row in rows if row.index not in finished]
    log.info("%d rows to label, %d labelled before", len(todo), len(rows) - len(todo))
    unfit: list[str] = []
    if todo:
        with timed(folder):
            asyncio.run(_label_all(settings, candidates, todo, folder / "rows.jsonl", unfit))
        finished = read_finished(folder / "rows.jsonl")
    kept = [(row, finished[row.index]) for row in rows if row.index in finished]
    lines = [json.dumps({**dataclasses.asdict(row.transition), **added, "shown": shown(settings)}, ensure_ascii=False)
             for row, added in kept]
    write_atomic(settings.out_labeled_jsonl, "".join(line + "\n" for line in lines))
    summary = summarise([added for _, added in kept], len(skipped or ()) + len(unfit))
    write_json(folder / "summary.json", summary)
    print(report(summary))
    print(f"{len(kept)} labelled rows: {settings.out_labeled_jsonl}")


def check(settings: LabelSettings) -> tuple[int, ...]:
    """The candidates.  Refuses, before any model is loaded, what can't work."""
    if settings.imagination == "teacher_forced" and settings.foresight_format != "last_obs":
        raise UserError("--imagination teacher_forced writes the expert's action into the prompt that is to predict "
                        "it; add --foresight_format last_obs")
    candidates = parse_candidates(settings.k_candidates, settings.kmax)
    from itp.policy.heads import has_heads, kmax_of

    path = settings.policy_model_path
    check_model_path(path)
    check_model_path(settings.wm_model_path)
    if has_heads(path) and kmax_of(path) != settings.kmax:
        raise UserError(f"--kmax {settings.kmax} contradicts {path}, whose K-head has kmax {kmax_of(path)}; "
                        f"give --kmax {kmax_of(path)}")
    return candidates


def claim(settings: LabelSettings) -> Path:
    """The folder of this run beside its output, with its configuration, data and models on record."""
    folder = Path(f"{settings.out_labeled_jsonl}.run")
    config = dataclasses.asdict(settings)
    config["expert_sha256"] = hashlib.sha256(Path(settings.expert_jsonl).read_bytes()).hexdigest()
    config["policy_fingerprint"] = model_fingerprint(settings.policy_model_path)
    config["wm_fingerprint"] = model_fingerprint(settings.wm_model_path)
    if settings.override:  # first: a run killed in between must not leave old rows under a new configuration
        for name in ("rows.jsonl", TIMING):
            (folder / name).unlink(missing_ok=True)
    return claim_output(folder, config, override=settings.override, ignore=NOT_THE_RESULT)


def read_finished(path: Path) -> dict[int, dict[str, Any]]:
    """Row index -> what was added."""
    return {row["row"]: row["added"] for row in read_appended(path)}


async def _label_all(settings: LabelSettings, candidates: tuple[int, ...], rows: Sequence[Row], path: Path,
                     unfit: list[str]) -> None:
    """Append a line for every row to ``path``, ``concurrency`` episodes at a time.

    The rows of an episode follow each other in one coroutine, so that a state finds its beginning computed.
    """
    quorum = Quorum()
    labeller = load_labeller(settings, candidates, quorum)
    episodes = iter([list(group) for _, group in itertools.groupby(rows, key=lambda r: r.transition.episode_id)])
    with open(path, "a", encoding="utf-8") as file, progress_bar(len(rows), "row") as bar:

        async def worker() -> None:
            quorum.add(live=1)
            try:
                for row in itertools.chain.from_iterable(episodes):
                    await one(row)
            finally:
                quorum.add(live=-1)

        async def one(row: Row) -> None:
            try:
                added = await labeller.label(row)
            except UserError as error:
                message = f"{row.where}: {error}"
                if not settings.skip_bad_rows:
                    raise UserError(message) from error
                log.warning("skipped: %s", message)
                unfit.append(message)
                return
            file.write(json.dumps({"row": row.index, "added": added}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        workers = [asyncio.create_task(worker()) for _ in range(settings.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for lm in (labeller.policy.lm, labeller.world_model.lm):
                await lm.close()


def load_labeller(settings: LabelSettings, candidates: tuple[int, ...], quorum: Quorum) -> Labeller:
    """Both models, asked as their training asked them."""
    from itp.policy.heads import has_heads, load_policy_lm

    engine = {"quorum": quorum, **settings.engine}
    policy_path, wm_path = settings.policy_model_path, settings.wm_model_path
    policy_lm = load_policy_lm(policy_path, device=settings.policy_device, dtype=settings.policy_dtype,
                               role="policy", max_batch_rows=settings.score_batch_size, **engine)
    wm_lm = LocalLM.load(wm_path, device=settings.wm_device, dtype=settings.wm_dtype, role="world_model",
                         max_batch_rows=settings.wm_batch_size, **engine)
    style, turns = asked_as(policy_path, policy_lm.tokenizer, env=settings.env)
    policy = Policy(policy_lm, env=settings.env, style=style, turns=turns, keep_steps=settings.history_keep_steps,
                    control=has_heads(policy_path), temperature=settings.temperature, top_p=settings.top_p,
                    imagined_action_tokens=IMAGINED_ACTION_TOKENS[settings.env])
    style, turns = asked_as(wm_path, wm_lm.tokenizer, role="world_model", env=settings.env)
    world_model = WorldModel(wm_lm, env=settings.env, style=style, turns=turns,
                             max_new_tokens=settings.wm_max_new_tokens,
                             keep_steps=settings.history_keep_steps)
    return Labeller(policy, world_model, candidates, settings)


def summarise(added: Sequence[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """The distribution of labels, the mean score of every k, and what all of it cost."""
    labels = Counter(row["k_label"] for row in added)
    scores: dict[int, list[float]] = {}
    for row in added:
        for k, score in row["scores"].items():
            scores.setdefault(int(k), []).append(score)
    tokens: Counter[str] = Counter()
    for row in added:
        tokens.update(row["tokens"])
    return {
        "rows": len(added),
        "skipped": skipped,
        "labels": {str(k): labels[k] for k in sorted(scores)},
        "mean_score": {str(k): sum(values) / len(values) for k, values in sorted(scores.items())},
        "tokens": {name: tokens[name] for name in ("imagine", "world_model", "score", "largest_alone")},
        "score_over_largest_alone": tokens["score"] / tokens["largest_alone"] if added else 0.0,
    }


def report(summary: dict[str, Any]) -> str:
    """The summary as a few lines of text."""
    lines = [f"{summary['rows']} rows labelled, {summary['skipped']} skipped"]
    for k, count in summary["labels"].items():
        lines.append(f"k={k}: {count} ({count / summary['rows']:.1%}), mean score {summary['mean_score'][k]:.3f}")
    tokens, ratio = summary["tokens"], summary["score_over_largest_alone"]
    lines.append(f"tokens computed: policy imagining {tokens['imagine']}, scoring all k {tokens['score']} = "
                 f"{ratio:.2f} times the {tokens['largest_alone']} of the largest k alone; world model "
                 f"{tokens['world_model']}")
    return "\n".join(lines)
