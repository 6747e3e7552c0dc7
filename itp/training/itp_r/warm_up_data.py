"""The settings and the data of stage 2: the labeled steps that stage 1 wrote."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from itp.config import flag
from itp.errors import UserError
from itp.files import Fields, checked_object, read_rows
from itp.games import ENVIRONMENTS, K_MAX
from itp.model_card import AS_RELEASED, PromptFlags, prompt_settings, resolve
from itp.text.prompts import FORESIGHT_FORMATS, foresight_text
from itp.text.state import State, parse
from itp.training.settings import FinetuneSettings, PackingFlags

MEND = "mend or remove the line"
SHOWN: Fields = {"foresight_format": str, "history_keep_steps": int, "max_seq_len": int}
"""Of a labeled row's ``shown``."""


@dataclass
class SftSettings(PromptFlags, PackingFlags, FinetuneSettings):
    """What the warm-up learns."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "train_jsonl", "policy_model", "out_dir", "env", "max_k",
        "beta_k", "epochs", "lr", "lora_r", "bf16")
    train_jsonl: str = flag(help="labeled steps, as stage 1 (label) writes them", affects_result=False, holds="data")
    policy_model: str = flag(help="the base policy π_θ0: a model folder, or a name on the Hugging Face hub",
                             affects_result=False, holds="path", aliases=("policy_model_path",))
    model_path: str = ""
    env: str = flag("alfworld", help="environment of the rows", choices=ENVIRONMENTS)
    max_k: int = flag(-1, at_least=1, help="K_max, the most steps to look ahead (-1: the paper's, 5 for ALFWorld, 8 "
                                           "for ScienceWorld)", aliases=("kmax",))
    beta_k: float = flag(0.5, at_least=0, help="η, the weight of the K-head's loss")
    k_balance: float = flag(0.0, at_least=0, before=0.0,
                            help="weight rare labels K more: by (1 / share of the label) to this power (0: eq. 6; 1: "
                                 "all labels weigh the same in sum).  Where most labels are 0, an unweighted K-head "
                                 "never looks ahead")
    act_on: str = flag("label", choices=("label", "all"),
                       help="which imagined trajectories of a step the policy learns to act on: the labeled K's "
                            "(eq. 6), or every K's from 0 to kmax")
    act_as: str = flag("expert", choices=("expert", "winner"), before="expert",
                       help="which action the policy learns: the expert's (eq. 6), or the one that won the row's "
                            "branches, if any did (label --label_by branch)")
    max_seq_len: int = flag(-1, at_least=1, help="tokens of a prompt and its action; where a prompt has more, its "
                                                 "oldest steps are left out (-1: as it was labeled, else 1536)")
    padding_side: str = flag("left", choices=("left", "right"), help="where shorter sequences of a batch are padded")
    device_map: str = flag("", choices=("", "auto", "balanced", "sequential"),
                           help="spread the layers of a large model over the GPUs of one process; empty: every "
                                "process has the whole model")

    def __post_init__(self) -> None:
        self.max_k = K_MAX[self.env] if self.max_k == -1 else self.max_k


@dataclass(frozen=True)
class LabeledStep:
    """One labeled step: act on ``foresight`` (text of τ̂_t(K̃_t)), look ahead ``k`` = K̃_t steps.

    ``k`` is None where only acting is to be learned: on a trajectory that isn't the labeled one.
    """

    episode_id: str
    state: State
    foresight: str
    action: str
    k: int | None


def k_weights(steps: Sequence[LabeledStep], power: float, kmax: int) -> list[float]:
    """The weight of each label K = 0..``kmax`` in the K-head's loss, whose mean over the labeled steps is 1.

    Proportional to (1 / share of the label) ** ``power``; 1 for a label that no step has.
    """
    counts = Counter(step.k for step in steps if step.k is not None)
    raw = {k: (counts.total() / n) ** power for k, n in counts.items()}
    mean = sum(raw[k] * n for k, n in counts.items()) / max(counts.total(), 1)
    return [raw[k] / mean if k in raw else 1.0 for k in range(kmax + 1)]


def as_labeled(settings: SftSettings) -> SftSettings:
    """``settings`` with the prompts' history, format and budget of stage 1; files of others don't say."""
    path = settings.train_jsonl
    where, first = next(read_rows(path), ("", None))
    recorded = _shown(first, where) if isinstance(first, dict) else {}
    return resolve(settings, recorded, path, AS_RELEASED)


def read_labeled(settings: SftSettings) -> list[LabeledStep]:
    """The steps of a file of stage 1, in its order.  Raises UserError naming the line that isn't one."""
    path, kmax, foresight_format, steps = settings.train_jsonl, settings.max_k, settings.foresight_format, []
    for where, row in read_rows(path):
        labeled = _step(row, where, settings)
        if not labeled.action:
            continue  # its action isn't to be imitated
        steps.append(labeled)
        if settings.act_on == "all":
            steps += [dataclasses.replace(labeled, k=None, foresight=foresight_text(
                _imagined(row, where, k, foresight_format), foresight_format))
                for k in range(min(kmax, len(row.get("imagined") or ())) + 1) if k != labeled.k]
    if not steps:
        raise UserError(f"{path}: holds no labeled steps; write it with train_adaptive_k label")
    return steps


def _shown(row: dict[str, Any], where: str) -> dict[str, Any]:
    """How much of the past stage 1 showed the policy; files of others don't say."""
    shown = checked_object(row.get("shown", {}), f"{where}: shown", {}, MEND)
    checked_object(shown, f"{where}: shown", {name: SHOWN[name] for name in SHOWN if name in shown}, MEND)
    if shown.get("foresight_format", "full") not in FORESIGHT_FORMATS or any(
            value < 0 for value in shown.values() if isinstance(value, int)):
        raise UserError(f"{where}: shown is {str(shown)[:100]}, which isn't what train_adaptive_k label writes; {MEND}")
    return shown


def _step(row: Any, where: str, settings: SftSettings) -> LabeledStep:
    kmax, foresight_format = settings.max_k, settings.foresight_format
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a row of named fields; write the file with train_adaptive_k label")
    for name, kind in (("episode_id", (str, int)), ("state", str), ("action", str), ("k_label", int)):
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            raise UserError(f"{where}: field {name!r} is {row.get(name)!r}, which isn't what train_adaptive_k label "
                            f"writes; {MEND}")
    if not isinstance(row.get("imagined"), (list, type(None))):
        raise UserError(f"{where}: field 'imagined' isn't a list; {MEND}")
    shown, here = _shown(row, where), prompt_settings(settings)
    if any(shown.get(name, here[name]) != here[name] for name in ("foresight_format", "history_keep_steps")):
        raise UserError(f"{where}: labeled with {shown}, and this run is {here}; label all rows the same way")
    k = row["k_label"]
    if not 0 <= k <= kmax:
        raise UserError(f"{where}: k_label is {k} and --max_k {kmax}; train with the K_max that the labels were made "
                        "for")
    try:
        state = parse(row["state"]).last(settings.history_keep_steps)
    except ValueError as error:
        raise UserError(f"{where}: field 'state' isn't a state ({error}); {MEND}") from error
    foresight = foresight_text(_imagined(row, where, k, foresight_format), foresight_format)
    # What was executed may have been exploration; the label was made for what the expert would have done.
    action = row.get("expert_action", row["action"])
    if not isinstance(action, str):
        raise UserError(f"{where}: field 'expert_action' is {action!r}, which isn't an action; {MEND}")
    if settings.act_as == "winner":
        if not isinstance(row.get("winner"), str):
            raise UserError(f"{where}: no field 'winner' for --act_as winner; label with --label_by branch")
        action = row["winner"] or action
    return LabeledStep(str(row["episode_id"]), state, foresight, action, k)


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
