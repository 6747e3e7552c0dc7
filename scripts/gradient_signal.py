r"""How much of A2C's gradient is signal?  Cosines between the gradients of batches that the same weights played.

    python scripts/gradient_signal.py --policy_model runs/quickstart/itp_r/last --fixed_k 0 \
        --env_data_root runs/quickstart/data --missions 16 --config configs/demo/rl_k.yaml \
        --gammas 0.97,0.9 --gae_lambdas 1,0.95,0.5 --batches 12

Takes the flags of rl_k, and --batches, --advantages, --gammas and --gae_lambdas; nothing is trained.  Let S be the
squared length of the expected gradient and N the mean squared length of the noise in a batch's gradient.  The mean
cosine c of two batches is S / (S + N), so the gradient of (1 - c) / c batches together is half signal.  A lower gamma
or gae_lambda has less noise, but its expected gradient is biased.  The column "towards" shows this: the mean cosine
with other batches' gradients by the first row's values.  Put values first that need no good critic: gae_lambda 1.
Behind +- is the standard error (jackknife over the batches).  If c isn't well above it, there are too few batches to
tell.  --advantages critic,group,gigpo compares them on the same episodes, --group_size of which are of each game.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from itp.config import flag, parse_settings
from itp.distributed import Processes
from itp.envs.pool import EnvPool, processes_for
from itp.errors import UserError
from itp.program import run_main
from itp.training.itp_r.a2c import environment, load
from itp.training.itp_r.a2c_rollout import episode_games, prepare
from itp.training.itp_r.a2c_settings import ADVANTAGES, RlSettings, check, checked
from itp.training.itp_r.checkpoint import RunFolder

if TYPE_CHECKING:
    import torch

SHOWN = ("success", "explained_variance", "groups_with_signal")
"""Metrics of a batch that are printed where there are such."""


@dataclass
class SignalSettings(RlSettings):
    batches: int = flag(8, at_least=3, help="batches of --episodes_per_update episodes")
    advantages: str = flag("", help="values of --advantage to compare on the same episodes, separated by commas")
    gammas: str = flag("", help="values of --gamma to compare on the same episodes, separated by commas")
    gae_lambdas: str = flag("", help="values of --gae_lambda to compare with each of them")
    out_dir: str = ""  # not for users: nothing is left behind

    @property
    def variants(self) -> list[RlSettings]:
        gammas = _numbers("gammas", self.gammas) or [self.gamma]
        lambdas = _numbers("gae_lambdas", self.gae_lambdas) or [self.gae_lambda]
        chosen = self.advantages.split(",") if self.advantages else [self.advantage]
        if unknown := set(chosen) - set(ADVANTAGES):
            raise UserError(f"--advantages {self.advantages}: {unknown.pop()!r} isn't one of {', '.join(ADVANTAGES)}")
        return [dataclasses.replace(self, advantage=advantage, gamma=g, gae_lambda=lam)
                for advantage, g in itertools.product(chosen, gammas)
                for lam in (lambdas if advantage == "critic" else lambdas[:1])]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UserError(f"--{name} {text}: not numbers separated by commas") from error


def main() -> None:
    settings = parse_settings(SignalSettings, prog="python scripts/gradient_signal.py", description=__doc__)
    settings = dataclasses.replace(
        settings, eval_every=0, value_coef=0.0, observation_loss=0.0,  # the gradient is the actor's alone
        epochs=1, episodes_per_epoch=settings.batches * settings.batch_episodes)
    settings = checked(settings)
    variants = settings.variants
    for variant in variants:
        check(variant)
    with tempfile.TemporaryDirectory() as nothing:
        found = asyncio.run(gradients(settings, variants, RunFolder(nothing)))
    print(f"{settings.batches} batches of {settings.batch_episodes} episodes")
    print(f"advantage {'gamma':>6} {'lambda':>6} {'cosine':>15} {'towards':>15} {'batches for half':>17}")
    for variant, own in zip(variants, found, strict=True):
        (cosine, error), (towards, its_error) = mean_cosine(own, own), mean_cosine(own, found[0])
        needed = f"{(1 - cosine) / cosine:.0f}" if cosine > error else "-"
        lam = f"{variant.gae_lambda:.2f}" if variant.has_critic else "-"
        print(f"{variant.advantage:9} {variant.gamma:6.2f} {lam:>6} {cosine:7.3f} +- {error:.3f} {towards:7.3f} +- "
              f"{its_error:.3f} {needed:>17}")


async def gradients(settings: SignalSettings, variants: Sequence[RlSettings], folder: RunFolder) -> list[torch.Tensor]:
    """The policy's gradients by each variant, (batches, weights) float32, all of the same episodes."""
    import torch

    processes = Processes()
    make_env, games, _ = environment(settings)
    _, player, learner = load(settings, folder, processes)
    found = []
    async with EnvPool(make_env, processes_for(settings.env_processes, settings.num_envs)) as player.pool:
        for batch in range(settings.batches):
            size = settings.batch_episodes
            episodes = await player.play(episode_games(settings, games, batch * size, size))
            ends = await player.bootstraps(episodes)
            made = [prepare(episodes, ends, player.lm, variant, processes, learner.token_values)
                    for variant in variants]
            found.append([learner.gradient(samples).cpu() for samples, _ in made])
            if not all(bool(gradient.isfinite().all()) for gradient in found[-1]):
                raise UserError("a gradient isn't finite; use --bf16, or neither of --bf16 and --fp16")
            row = {name: value for _, figures in reversed(made) for name, value in figures.items()}
            said = ", ".join(f"{name.replace('_', ' ')} {row[name]:.2f}" for name in SHOWN if name in row)
            print(f"batch {batch + 1}: {said}", flush=True)
    await player.close()
    return [torch.stack(own) for own in zip(*found, strict=True)]


def mean_cosine(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """Between the gradient of each batch in ``one`` (batches, weights) and those of the other batches in ``two``.

    Returns the mean, and its standard error by leaving out one batch at a time.
    """
    import torch

    cosines = torch.nn.functional.normalize(one, dim=1) @ torch.nn.functional.normalize(two, dim=1).T
    cosines.fill_diagonal_(0)
    count, total = len(cosines), cosines.sum()
    without = (total - cosines.sum(0) - cosines.sum(1)) / ((count - 1) * (count - 2))
    return (total / (count * (count - 1))).item(), (without.std(correction=0) * (count - 1) ** 0.5).item()


if __name__ == "__main__":
    run_main(main)
