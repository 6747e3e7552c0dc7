r"""Stage 2, warm-up (eq. 6): the policy learns to act on imagined futures, its K-head how far to look.

    L_WT = L_π + η·L_K,   L_π = −log π_θ(a*_t | s_t, τ̂_t(K̃_t)),   L_K = −log P_θ(K̃_t | s_t)

    python -m itp.training.train_adaptive_k sft --train_jsonl labeled.jsonl --policy_model POLICY --out_dir OUT

The rows are those of stage 1.  L_π is the mean over the tokens of the expert's actions, L_K over the steps.
Both prompts are those of every later stage: state and ``<CTRL>``, where K is learned; state, the imagined trajectory
of K̃_t steps, and the action.  The value head is left as it is: eq. 6 has no returns.

Departures: ``--k_balance`` weights rare labels more.  Where nearly all labels are 0, eq. 6 teaches a K-head that never
looks ahead.  ``--act_on all`` also trains L_π on the trajectories of the other k.  A policy without it treats
imagined steps as real ones.  Eq. 6 doesn't correct this if nearly all labels are 0.

Rows of ``--label_by branch`` know which action won in the game itself.  ``--act_as winner`` learns that action in place
of the expert's.  Where nothing was compared or no branch succeeded, the expert's is learned.  With ``--act_on all`` the
policy learns it after every imagined trajectory, which trains the margin of gated revision
(:mod:`itp.methods.revise`).

By default a step is a sequence of its own, as in the paper.  ``--steps_per_sequence`` packs steps of an
episode into one (:mod:`itp.training.token_tree`), which computes their common beginning once: same loss,
several times cheaper.  An optimizer step then covers as many times more steps of the expert.

``OUT/merged_full`` is a policy with heads (:mod:`itp.agent.policy_with_heads`); the rest is as
in :mod:`itp.training.run`, which does the work, and the same command again goes on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from typing import Any

from itp.agent.heads import has_heads, kmax_of
from itp.distributed import is_first_process
from itp.errors import UserError
from itp.training.itp_r.warm_up_data import SftSettings, as_labeled, read_labeled
from itp.training.run import open_run, train
from itp.training.settings import check_settings

log = logging.getLogger(__name__)


def run(settings: SftSettings) -> dict[str, Any] | None:
    """Train; the metrics, or None where another run did it or in all but the first process."""
    settings = as_labeled(dataclasses.replace(settings, model_path=settings.policy_model))
    steps = read_labeled(settings)
    check_settings(settings)
    check_warm_up(settings)
    if open_run(settings, [settings.train_jsonl]):
        return None
    if is_first_process():
        counts = Counter(step.k for step in steps if step.k is not None)
        log.info("%d labeled steps: %s", counts.total(), ", ".join(
            f"k={k} {counts[k]} ({counts[k] / counts.total():.1%})" for k in sorted(counts)))
    from itp.training.itp_r.warm_up_task import WarmUpTask

    return train(settings, WarmUpTask(settings, steps))


def check_warm_up(settings: SftSettings) -> None:
    """Raises UserError for what doesn't go together in stage 2."""
    if settings.device_map and settings.q_lora:
        raise UserError("--q_lora keeps the base in 4 bits on one GPU and --device_map spreads it over several; give "
                        "one of them")
    if settings.device_map and settings.deepspeed:
        raise UserError("--device_map spreads the model over the GPUs of one process, --deepspeed over processes; "
                        "give one of them")
    if settings.attn_implementation == "flash_attention_2" and settings.steps_per_sequence != 1:
        raise UserError("--attn_implementation flash_attention_2 knows no mask of who sees whom, which sequences of "
                        "several steps need; give --steps_per_sequence 1, or take sdpa")
    if has_heads(settings.model_path) and (there := kmax_of(settings.model_path)) != settings.max_k:
        raise UserError(f"{settings.model_path} has a K-head for kmax {there}, and --max_k is {settings.max_k}; "
                        f"give --max_k {there}, or start from a policy without heads")
