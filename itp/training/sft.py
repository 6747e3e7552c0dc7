r"""Stage 2, warm-up (eq. 6): the policy learns to act on imagined futures, its K-head how far to look.

    L_WT = L_π + η·L_K,   L_π = −log π_θ(a*_t | s_t, τ̂_t(K̃_t)),   L_K = −log P_θ(K̃_t | s_t)

    python -m itp.training.train_adaptive_k sft --train_jsonl labeled.jsonl --policy_model_path POLICY --out_dir OUT

The rows are those of stage 1.  L_π is the mean over the tokens of the expert's actions, L_K over the steps.
The prompt is the one of every later stage: state, ``<CTRL>``, where K is learned, the imagined trajectory
of K̃_t steps, and the action.  The value head is left as it is: eq. 6 has no returns.

``--act_on all`` is a departure: L_π also has the trajectories of the other k.  A policy that was never
trained on imagined steps takes them for real ones, and with nearly all labels 0 eq. 6 doesn't teach it better.

By default a step is a sequence of its own, as in the paper.  ``--steps_per_sequence`` packs steps of an
episode into one (:mod:`itp.training.token_tree`), which computes their common beginning once: same loss,
several times cheaper.  An optimizer step then covers as many times more steps of the expert.

``OUT/merged_full`` is a policy with heads (:mod:`itp.policy.heads`); the rest is as in
:mod:`itp.training.finetune`, which does the work, and the same command again goes on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from itp.config import flag
from itp.games import ENVIRONMENTS, K_MAX
from itp.policy.heads import has_heads, kmax_of
from itp.policy.shown import FORMAT_CHOICES, settle, shown
from itp.runtime import UserError
from itp.text.prompts import foresight_text
from itp.text.state import State, parse
from itp.training.finetune import FinetuneSettings, check_settings, claim_run, is_first_process, train
from itp.transitions import read_rows

log = logging.getLogger("itp.finetune")


@dataclass
class SftSettings(FinetuneSettings):
    train_jsonl: str = flag(help="labelled steps, as stage 1 (label) writes them")
    policy_model_path: str = flag(help="the base policy π_θ0: a model folder, or a name on the Hugging Face hub")
    model_path: str = ""
    env: str = flag("alfworld", help="environment of the rows", choices=ENVIRONMENTS)
    kmax: int = flag(-1, at_least=1, help="K_max, the most steps to look ahead (-1: the paper's, 5 for ALFWorld, 8 for "
                              "ScienceWorld)")
    beta_k: float = flag(0.5, at_least=0, help="η, the weight of the K-head's loss")
    foresight_format: str = flag("auto", choices=FORMAT_CHOICES,
                                 help="what of the imagined trajectory the policy reads (auto: as it was labelled, "
                                      "else full)")
    history_keep_steps: int = flag(-1, at_least=0, help="steps of history in a prompt (0: all; -1: as it was labelled, "
                                                        "else all)")
    act_on: str = flag("label", choices=("label", "all"),
                       help="which imagined trajectories of a step the policy learns to act on: the labelled K's "
                            "(eq. 6), or every K's from 0 to kmax")
    steps_per_sequence: int = flag(1, at_least=0,
                                   help="steps of one episode in a sequence, which share their common beginning; "
                                        "0: as many as fit into max_seq_len")
    max_seq_len: int = flag(1536, at_least=1, help="tokens of a sequence; longer prompts lose history, oldest first")
    padding_side: str = flag("left", choices=("left", "right"), help="where shorter sequences of a batch are padded")
    device_map: str = flag("", choices=("", "auto", "balanced", "sequential"),
                           help="spread the layers of a large model over the GPUs of one process; empty: every "
                                "process has the whole model")

    def __post_init__(self) -> None:
        self.kmax = K_MAX[self.env] if self.kmax == -1 else self.kmax


@dataclass(frozen=True)
class Step:
    """One labelled step: act on ``foresight`` (text of τ̂_t(K̃_t)), look ahead ``k`` = K̃_t steps.

    ``k`` is None where only acting is to be learned: on a trajectory that isn't the labelled one.
    """

    episode_id: str
    state: State
    foresight: str
    action: str
    k: int | None


def as_labelled(settings: SftSettings) -> SftSettings:
    """``settings`` with what the policy is shown as stage 1 showed it; files of others don't say."""
    path = settings.train_jsonl
    _, first = next(read_rows(path), ("", None))
    return settle(settings, first.get("shown", {}) if isinstance(first, dict) else {}, path)


def read_labelled(settings: SftSettings) -> list[Step]:
    """The steps of a file of stage 1, in its order.  Raises UserError naming the line that isn't one."""
    path, kmax, foresight_format, steps = settings.train_jsonl, settings.kmax, settings.foresight_format, []
    for where, row in read_rows(path):
        labelled = _step(row, where, settings)
        if not labelled.action:
            continue  # its action isn't to be imitated
        steps.append(labelled)
        if settings.act_on == "all":
            steps += [dataclasses.replace(labelled, k=None, foresight=foresight_text(
                _imagined(row, where, k, foresight_format), foresight_format))
                for k in range(min(kmax, len(row.get("imagined", ()))) + 1) if k != labelled.k]
    if not steps:
        raise UserError(f"{path}: holds no labelled steps; write it with train_adaptive_k label")
    return steps


def _step(row: Any, where: str, settings: SftSettings) -> Step:
    kmax, foresight_format = settings.kmax, settings.foresight_format
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a row of named fields; write the file with train_adaptive_k label")
    for name, kind in (("episode_id", (str, int)), ("state", str), ("action", str), ("k_label", int)):
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            raise UserError(f"{where}: field {name!r} is {row.get(name)!r}, which isn't what train_adaptive_k label "
                            "writes; mend or remove the line")
    if row.get("shown", shown(settings)) != shown(settings):
        raise UserError(f"{where}: labelled with {row['shown']}, and this run is {shown(settings)}; label all rows the "
                        "same way")
    k = row["k_label"]
    if not 0 <= k <= kmax:
        raise UserError(f"{where}: k_label is {k} and --kmax {kmax}; train with the kmax that the labels were made for")
    try:
        state = parse(row["state"]).last(settings.history_keep_steps)
    except ValueError as error:
        raise UserError(f"{where}: field 'state' isn't a state ({error}); mend or remove the line") from error
    foresight = foresight_text(_imagined(row, where, k, foresight_format), foresight_format)
    # What was executed may have been exploration; the label was made for what the expert would have done.
    action = row.get("expert_action", row["action"])
    if not isinstance(action, str):
        raise UserError(f"{where}: field 'expert_action' is {action!r}, which isn't an action; mend or remove the line")
    return Step(str(row["episode_id"]), state, foresight, action, k)


def _imagined(row: dict[str, Any], where: str, k: int, foresight_format: str) -> list[tuple[str, str]]:
    """The first k imagined (action, observation) pairs."""
    pairs, seen = row.get("imagined"), row.get("obs_list")
    if pairs is None and foresight_format == "last_obs" and isinstance(seen, list) and len(seen) > k \
            and all(isinstance(text, str) for text in seen):
        return [("", seen[k])] * bool(k)  # the release's rows hold observations only, and this format needs no more
    if k == 0:
        return []
    if not isinstance(pairs, list) or len(pairs) < k or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in pairs):
        raise UserError(f"{where}: k_label is {k}, but 'imagined' doesn't hold {k} pairs of action and observation; "
                        "label again (files of the authors' release: --foresight_format last_obs)")
    return [(action, observation) for action, observation in pairs[:k]]


def run(settings: SftSettings) -> dict[str, Any] | None:
    """Train; the metrics, or None where another run did it or in all but the first process."""
    settings = as_labelled(dataclasses.replace(settings, model_path=settings.policy_model_path))
    steps = read_labelled(settings)
    check_settings(settings)
    if settings.device_map and settings.q_lora:
        raise UserError("--q_lora keeps the base in 4 bits on one GPU and --device_map spreads it over several; give "
                        "one of them")
    if settings.device_map and settings.deepspeed:
        raise UserError("--device_map spreads the model over the GPUs of one process, --deepspeed over processes; "
                        "give one of them")
    if settings.attn_implementation == "flash_attention_2" and settings.steps_per_sequence != 1:
        raise UserError("--attn_implementation flash_attention_2 knows no mask of who sees whom, which sequences of "
                        "several steps need; give --steps_per_sequence 1, or take sdpa")
    if has_heads(settings.model_path) and (there := kmax_of(settings.model_path)) != settings.kmax:
        raise UserError(f"{settings.model_path} has a K-head for kmax {there}, and --kmax is {settings.kmax}; "
                        f"give --kmax {there}, or start from a policy without heads")
    if claim_run(settings, [settings.train_jsonl], ignore=("train_jsonl", "policy_model_path")):
        return None
    if is_first_process():
        counts = Counter(step.k for step in steps if step.k is not None)
        log.info("%d labelled steps: %s", counts.total(), ", ".join(
            f"k={k} {counts[k]} ({counts[k] / counts.total():.1%})" for k in sorted(counts)))
    from itp.training.warm_up import WarmUpTask

    return train(settings, WarmUpTask(settings, steps))
