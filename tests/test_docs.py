"""Every command in README and docs/ is one that the programs take: the module, each flag and its value, and files."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from foresight_eval.extract_conditions import ExtractSettings
from foresight_eval.extract_episodes import EpisodesSettings
from foresight_eval.report.report import ReportSettings
from foresight_eval.score import ScoreSettings
from foresight_eval.settings import AlfworldSettings, SciworldSettings
from itp import doctor, smollm2
from itp.config import add_flags
from itp.envs.alfworld import generate as alfworld_games
from itp.envs.panel import PanelSettings
from itp.serve.settings import ServeSettings
from itp.training.base_policy import BasePolicySettings
from itp.training.critic_data import CriticSettings
from itp.training.explore import ExploreSettings
from itp.training.from_scratch.base_lm import BaseLMSettings
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.label import LabelSettings
from itp.training.itp_r.warm_up_data import SftSettings
from world_model import collect, early_experience, fidelity, state_fidelity
from world_model.knowledge import KnowledgeSettings
from world_model.rules import RulesSettings
from world_model.base_tuning.examples import WorldModelSettings
from world_model.data_processing import convert, fetch, metaicl

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SETTINGS = {
    "itp.doctor": doctor.DoctorSettings, "itp.smollm2": smollm2.Smollm2Settings,
    "itp.envs.alfworld_games": alfworld_games.GenerateSettings, "itp.envs.panel": PanelSettings,
    "world_model.collect": collect.CollectSettings, "world_model.fidelity": fidelity.FidelitySettings,
    "world_model.state_fidelity": state_fidelity.StateFidelitySettings,
    "world_model.early_experience": early_experience.EarlySettings,
    "world_model.data_processing.convert": convert.ConvertSettings,
    "world_model.data_processing.fetch": fetch.FetchSettings,
    "world_model.data_processing.metaicl": metaicl.MetaiclSettings,
    "foresight_eval.extract_conditions": ExtractSettings, "foresight_eval.extract_episodes": EpisodesSettings,
    "foresight_eval.report": ReportSettings, "foresight_eval.score": ScoreSettings,
    "world_model.base_tuning.finetune": WorldModelSettings, "itp.training.base_lm": BaseLMSettings,
    "itp.training.base_policy": BasePolicySettings, "foresight_eval": AlfworldSettings,
    "foresight_eval.runner_sciworld": SciworldSettings, "itp.serve": ServeSettings,
    "itp.training.train_adaptive_k label": LabelSettings, "itp.training.train_adaptive_k sft": SftSettings,
    "itp.training.train_adaptive_k rl_k": RlSettings,
    "world_model.rules": RulesSettings, "world_model.knowledge": KnowledgeSettings,
    "itp.training.explore": ExploreSettings, "itp.training.critic": CriticSettings,
}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's bash blocks, variables of the block filled in."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line)
            words = [one for word in shlex.split(line, comments=True) for one in braces(word)]
            for part in line.split("; ") if re.match(r"\w+=\S+$", line) or "=\"" in line else []:
                name, _, value = part.strip().partition("=")
                variables[name] = value.strip('"')
            if words:
                yield words


def braces(word: str) -> list[str]:
    """a{b,c} as bash expands it."""
    if not (found := re.fullmatch(r"(.*)\{(.+,.+)\}(.*)", word)):
        return [word]
    return [f"{found[1]}{part}{found[3]}" for part in found[2].split(",")]


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module or script of ours that a command starts, perhaps behind a launcher, and its arguments; or ""."""
    flag = {"-m", "--module"} & set(words)
    scripts = [word for word in words[:2] if word.endswith(".py")]
    if not flag and not scripts:
        return "", words
    at = words.index(flag.pop()) + 1 if flag else words.index(scripts[0])
    module, rest = words[at], words[at + 1:]
    if module.endswith("train_adaptive_k") and rest:
        module, rest = f"{module} {rest[0]}", rest[1:]
    return module, [word for word in rest if word not in ("...", "|", ">")]


def modules(page: Path) -> Iterator[tuple[str, list[str]]]:
    for words in commands(page):
        module, rest = module_of(words)
        if module and not module.endswith(".py"):
            yield module, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_flags_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, arguments in modules(page):
        if module in SETTINGS:
            parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
            add_flags(parser, SETTINGS[module])
            if "two" in arguments:  # the example's own method
                assert arguments.pop(arguments.index("two")) and arguments.pop(arguments.index("--method"))
            _, unknown = parser.parse_known_args(arguments)
            if module in ("foresight_eval.report", "foresight_eval.score"):  # which are given folders
                unknown = [word for word in unknown if word.startswith("--")]
            assert not unknown, f"{page.name}: {module} doesn't take {unknown}"
        else:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_files_exist(page: Path) -> None:
    for words in commands(page):
        for word in words:
            if re.match(r"(scripts|configs|world_model)/", word) and "=" not in word:
                assert (ROOT / word.split(":")[0]).exists(), f"{page.name}: {word}"


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


WRITTEN = sorted([*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *(ROOT / "models").rglob("*.md")])


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("page", [*(ROOT / "docs").glob("*.md"), ROOT / "ARCHITECTURE.md"], ids=lambda p: p.stem)
def test_a_page_begins_with_what_it_is_for(page: Path) -> None:
    assert re.match(r"# .+\n\nThis page (says|is|shows|gives|has|lists|collects) ", page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in listed, page.name


def test_the_map_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split()) <= 2500


def test_the_example_of_the_readme_imagines_and_acts(capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    said = capsys.readouterr().out
    assert said.count("\nIf: ") == said.count("\nThen: You ") == 2 and re.search(r"\nAction: [a-z]+ ", said)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_there_are_commands_to_check() -> None:
    assert sum(len(list(modules(page))) for page in PAGES) > 25


def test_the_example_method_plays(tmp_path: Path, games_root: Path) -> None:
    """The method of docs/extending.md, as it stands there, on a real game."""
    import asyncio
    import functools

    from itp.envs.alfworld.env import AlfworldEnv
    from itp.envs.pool import EnvPool
    from itp.envs.alfworld.games import list_games
    from itp.lm.local import LocalLM
    from itp.lm.scheduler import BatchBarrier
    from itp.agent.policy import Policy
    from itp.methods.settings import MethodSettings
    from itp.rollout import run_episodes
    from tests.tiny import write_tiny_model

    code, = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)

    async def play() -> list:
        barrier = BatchBarrier()
        lm = LocalLM.load(str(write_tiny_model(tmp_path / "m")), barrier=barrier)
        method = names["Two"](Policy(lm, temperature=1.0, action_tokens=4), None, MethodSettings())
        pool = EnvPool(functools.partial(AlfworldEnv), 1)
        try:
            return [e async for e in run_episodes(pool, method, list_games("seen", games_root)[:1],
                                                  max_steps=2, seed=0, concurrency=1, barrier=barrier)]
        finally:
            await pool.close()
            await lm.close()

    episode, = asyncio.run(play())
    assert len(episode.steps) == 2 and all(step.decision.logprob is not None for step in episode.steps)
