"""The benchmark's yardstick answers what the engine answers, and what is counted in nested meters."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from itp.errors import UserError
from itp.lm.base import GenParams, Generation, asking, metered
from itp.lm.local import LocalLM
from tests.rl_runs import write_models
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

PROMPTS = ["Task: put a clean plate in fridge\nObservation: You arrive at cabinet 1.\nAction:",
           "Task: put a clean plate in fridge\nObservation: You see a mug 2.\nAction: look\nObservation:"]


def test_one_by_one_gives_the_same_answers_as_batched(tmp_path):
    from sequential import SequentialLM

    folder = str(write_tiny_model(tmp_path / "m"))
    choices = (" go to cabinet 1\n", " go to fridge 1\n", " open cabinet 1\n", " look\n")
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in choices]

    async def ask(lm) -> tuple:
        free = await lm.generate(PROMPTS, GenParams(max_new_tokens=12, stop=("\n",)))
        stopped = await lm.generate(PROMPTS, GenParams(max_new_tokens=12, stop=("clean",)))
        chosen = await lm.generate(PROMPTS, GenParams(choices=choices))
        scores = await lm.loglikelihood(pairs)
        await lm.close()
        return ([g.text.strip() for g in (*free, *stopped)], [g.text for g in chosen],
                [p for score in scores for p in score.logprobs] + [g.logprob for g in (*free, *chosen)])

    one = asyncio.run(ask(SequentialLM(folder, role="policy", device="cpu", dtype="fp32")))
    batched = asyncio.run(ask(LocalLM.load(folder)))
    assert one[:2] == batched[:2]
    assert one[2] == pytest.approx(batched[2], abs=1e-4)


def test_a_random_model_in_the_benchmark_reads_what_decoding_must(tmp_path, games_root, capsys):
    """A miniature of the GPU's command: a random model as policy and world model, one by one and batched."""
    from bench import BenchSettings, describe, read_bytes, run_part
    from random_model import RandomModelSettings, write

    from itp.envs.alfworld.games import list_games

    tokenizer = str(write_tiny_model(tmp_path / "m"))
    (tmp_path / "m" / "itp_model.json").write_text('{"prompt_style": "tuned"}')
    folder = str(tmp_path / "random")
    write(RandomModelSettings(tokenizer=tokenizer, out_dir=folder, size="tiny"))
    parameters = 2048 * 32 + 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert f"{parameters / 1e6:.1f} million" in capsys.readouterr().out

    async def generated() -> int:
        lm = LocalLM.load(folder)
        before = read_bytes(lm)
        answer, = await lm.generate(["Task: look\nAction:"], GenParams(max_new_tokens=4))
        n, new = answer.prompt_tokens, answer.completion_tokens
        await lm.close()
        assert before == 0 and new == 4
        return read_bytes(lm) - 4 * (new * parameters + sum(n + i for i in range(new)) * 2 * 2 * 2 * 8)

    assert asyncio.run(generated()) == 0
    settings = BenchSettings(policy_model=folder, wm_model=folder, env_data_root=str(games_root), games=2,
                             sequential_games=1, max_steps=1, fixed_k=1, env_processes=1, action_selection="generate")
    games = list_games("unseen", str(games_root))
    alone, batched = (asyncio.run(run_part(settings, "foresight", how, games)) for how in ("one by one", "2"))
    assert batched.actions.items() >= alone.actions.items() and 0 < batched.gb_read < 2 * alone.gb_read
    said = describe(batched, alone, 2.0)
    rate = batched.gb_read / batched.seconds
    assert f"{rate:.2f} GB/s read ({rate / 2:.1%} of 2)" in said and batched.peak_memory_gb > 0.1


def test_an_outer_meter_counts_what_inner_ones_do():
    def ask(role: str, *answer) -> None:
        with asking(role) as answers:
            answers.append(Generation(*answer, "stop"))

    with metered() as outer:
        ask("policy", "a", 5, 2, 1)
        with metered() as inner:
            ask("policy", "b", 7, 3, 0)
            ask("world_model", "c", 1, 1, 0)
    assert (inner["policy"].calls, inner["policy"].prompt_tokens) == (1, 7)
    assert (outer["policy"].calls, outer["policy"].prompt_tokens, outer["policy"].completion_tokens) == (2, 12, 5)
    assert outer["world_model"].calls == 1


def test_the_cosine_of_two_batches_is_the_share_of_the_signal():
    from gradient_signal import mean_cosine

    torch.manual_seed(0)
    signal, batches, size = 2.0, 40, 5000
    direction = torch.nn.functional.normalize(torch.randn(size), dim=0)
    noise = torch.randn(batches, size) * 4 / size ** 0.5  # of squared length 16
    own, error = mean_cosine(signal * direction + noise, signal * direction + noise)
    assert own == pytest.approx(4 / (4 + 16), abs=0.02) and 0 < error < 0.02
    other = 9 * direction + 0 * noise  # other batches of another measure without noise: c is a root
    assert mean_cosine(signal * direction + noise, other)[0] == pytest.approx((4 / (4 + 16)) ** 0.5, abs=0.02)
    # The jackknife of a mean over pairs is about what such means scatter by.
    means = [mean_cosine(*2 * [torch.randn(12, 40) + 0.5]) for _ in range(200)]
    scatter = torch.tensor([mean for mean, _ in means]).std().item()
    assert sum(error for _, error in means) / 200 == pytest.approx(scatter, rel=0.25)


def test_the_signal_of_gradients_is_measured_on_real_games(tmp_path, games_root, capsys, monkeypatch):
    import gradient_signal

    policy, _ = write_models(tmp_path, games_root)
    monkeypatch.setattr(sys, "argv", [
        "gradient_signal.py", "--policy_model", str(policy), "--fixed_k", "0", "--env_data_root", str(games_root),
        "--policy_device", "cpu", "--env_processes", "1", "--num_envs", "2", "--episodes_per_update", "4",
        "--max_steps", "4", "--action_selection", "constrained", "--gammas", "0.9,0.5", "--gae_lambdas", "1,0.5",
        "--batches", "3", "--advantages", "critic,gigpo", "--group_size", "4"])
    gradient_signal.main()
    printed = capsys.readouterr().out
    assert printed.count("explained variance") == printed.count("groups with signal") == 3
    rows = [line.split() for line in printed.splitlines()[-6:]]
    assert [row[:3] for row in rows] == [["critic", "0.90", "1.00"], ["critic", "0.90", "0.50"],
                                         ["critic", "0.50", "1.00"], ["critic", "0.50", "0.50"],
                                         ["gigpo", "0.90", "-"], ["gigpo", "0.50", "-"]]
    assert rows[0][3:6] == rows[0][6:9]  # towards itself
    assert len({row[3] for row in rows}) > 1
    for wrong, said in (("critic,ppo", "'ppo' isn't one of critic, group, gigpo"), ("critic,group", "give 2 or more")):
        monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--advantages", wrong])
        with pytest.raises(UserError, match=said):
            gradient_signal.main()


def test_the_gpu_check_names_what_it_does_not_know(tmp_path) -> None:
    for flags, said in ((["--parts", "tests,speed"], "--parts: speed isn't one of tests, demo, bench, memory"),
                        (["--sizes", "0.5b,70b"], "--sizes: 70b isn't one of 0.5b, 1.5b, 7b, 8b, tiny")):
        program = str(ROOT / "scripts" / "gpu_check.py")
        done = subprocess.run([sys.executable, program, "--out_dir", str(tmp_path), *flags],
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
