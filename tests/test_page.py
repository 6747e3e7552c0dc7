"""The report's page in a real headless browser: filters, trajectories, widths, speed, and a silent console.

Needs Chromium or Chrome: on the PATH, named by $CHROMIUM, or installed by ``playwright install chromium``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from foresight_eval.report import page, plots, tables
from foresight_eval.results import Result
from tests.made_results import DESK, PLAYED, TAKEN, make_episode, make_games, write_result

EVIL = "put a mug in </script><img src=x onerror=alert(1)> & fridge"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]
"""A test may run as root and without a network."""


def render(results: list[Result]) -> str:
    return page.render(results, tables.all_tables(results, results[0]), plots.draw(results, []))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Two methods on seven games.  sft solves the first four; itp imagines at every step and solves the last two."""
    root = tmp_path_factory.mktemp("results")
    games = make_games(root / "games", 7)
    seen = DESK.replace("a mug 1", "a cup 1")  # at depth 1: one word is wrong
    imagined = [[(PLAYED[0][0], seen), PLAYED[1]], [PLAYED[1], ("open fridge 1", "You open it.")],
                [PLAYED[2], PLAYED[0]]]
    sft = [make_episode(g, success=i < 4, imagined=[], task=EVIL if i == 0 else "") for i, g in enumerate(games)]
    itp = [make_episode(g, success=i >= 5, imagined=imagined, tokens=300 + i) for i, g in enumerate(games)]
    made = [write_result(root / "sft", sft, method="sft"), write_result(root / "itp", itp)]
    # What searching methods record besides, and what such a step costs.
    made[1].records[1]["foresight_steps"][0] |= {
        "considered": [{"action": "look", "value": 0.25, "tries": 1}, {"action": "go", "value": 0.5, "tries": 3}],
        "usage": {"policy": {"calls": 2, "prompt_tokens": 1000, "completion_tokens": 9}}}
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium; skipped where there is none (continuous integration installs it)."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None) \
            or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: install the package chromium, or set $CHROMIUM")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with all that its console said and all that it asked for."""

    def __init__(self, browser, path: Path, width: int = 1280) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def texts(self, selector: str) -> list[str]:
        """Their texts, also where the browser spares itself the layout of what isn't in sight."""
        return self.page.locator(selector).all_text_contents()

    def methods(self) -> list[str]:
        return self.texts(".episode summary .method")

    def expand(self, nth: int) -> str:
        """Open the ``nth`` episode; a selector for what is in it."""
        self.page.locator(".episode > summary").nth(nth).click()
        self.page.wait_for_selector(f".episode:nth-child({nth + 1}) .inside")
        return f".episode:nth-child({nth + 1}) "


@pytest.fixture
def opened(browser, results: list[Result], tmp_path: Path) -> Iterator[Opened]:
    path = tmp_path / "index.html"
    path.write_text(render(results), encoding="utf-8")
    opened = Opened(browser, path)
    yield opened
    # Nothing but the page itself and what it carries was loaded, and nothing went wrong.
    assert opened.said == [] and {url for url in opened.asked if not url.startswith("data:")} == {path.as_uri()}
    opened.page.close()


def test_the_page_carries_everything(results: list[Result]) -> None:
    text = render(results)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert "<!--" not in text and "/*CSS" not in text and "onerror=alert" not in text.split('id="index"')[0]
    index = json.loads(re.search(r'id="index">(.*?)</script>', text, re.DOTALL)[1])
    assert index["results"] == ["sft", "itp"] and len(index["episodes"]) == 14
    assert index["episodes"][0]["task"] == EVIL and index["episodes"][13]["tokens"] == 3 * (306 + 4)
    assert text.count('<script type="application/json" id="e') == 14


def test_filters(opened: Opened) -> None:
    where = opened.page
    assert opened.texts("#count") == ["14 episodes, 6 solved (42.9 %)"]
    assert opened.methods() == ["sft"] * 7 + ["itp"] * 7
    where.select_option("#by-method", "itp")
    assert opened.methods() == ["itp"] * 7 and opened.texts("#count") == ["7 episodes, 2 solved (28.6 %)"]
    where.select_option("#by-outcome", "1")
    assert opened.texts(".episode .task") == ["put a mug in fridge game_5", "put a mug in fridge game_6"]
    where.select_option("#by-type", "Pick")  # games 0 and 6
    assert opened.texts(".episode .task") == ["put a mug in fridge game_6"]
    where.select_option("#by-outcome", "0")
    assert opened.texts(".episode .task") == ["put a mug in fridge game_0"]
    where.click("#filters button[type=reset]")
    # A form resets its fields after its event, and only then the page follows.
    where.locator(".episode").nth(13).wait_for(state="attached")
    assert len(opened.methods()) == 14
    where.fill("#by-text", "GAME_3 mug")
    assert opened.methods() == ["sft", "itp"]
    where.fill("#by-text", "no such game")
    assert opened.methods() == [] and opened.texts("#count") == ["0 episodes, 0 solved"]
    where.fill("#by-text", "")
    where.select_option("#sort", "tokens")
    assert opened.methods() == ["itp"] * 7 + ["sft"] * 7
    assert opened.texts(".episode .task")[0] == "put a mug in fridge game_6"


def test_a_trajectory_shows_what_was_imagined_beside_what_happened(opened: Opened) -> None:
    opened.page.select_option("#by-method", "itp")
    inside = opened.expand(1)
    assert opened.texts(inside + ".did b") == [action for action, _ in PLAYED]
    assert opened.texts(inside + ".step .saw") == [observation for _, observation in PLAYED]
    assert opened.texts(inside + ".note") == ["Compared: go (0.50, 3 tries) · look (0.25)"]
    assert opened.texts(inside + ".did small")[:2] == ["0.10 s · 2 calls · 1,009 tokens",
                                                         "0.20 s · 2 calls · 305 tokens"]
    assert opened.texts(inside + ".chip.k") == ["looked 2 steps ahead"] * 3
    # step 1: a wrong word, then right; step 2: right, then it did something else; step 3: right, then the end
    # The facts of the first: it arrives (right), a cup (wrong) and a pen (right); F1 = 2 * 2 / 6.
    assert opened.texts(inside + ".pair .chip") == ["Fact-F1 67 %", "came true", "came true", "went another way",
                                                    "came true", "the episode had ended"]
    assert opened.texts(inside + "del") == ["cup"] and opened.texts(inside + "ins") == ["mug"]
    pair = opened.page.locator(inside + ".pair").nth(0).locator("> div")
    assert pair.nth(0).locator("p").text_content() == DESK.replace("a mug 1", "a cup 1")
    assert pair.nth(1).locator("p").text_content() == DESK
    assert opened.page.locator(inside + ".pair").nth(1).locator("> div").nth(1).locator("p").text_content() == TAKEN
    facts = opened.texts(inside + ".facts")[0]
    assert "policy: 6 calls, 903 prompt tokens (50 % from the cache), 12 generated" in facts
    assert "step limit after 3 steps" in facts and "the expert's solution has 5 steps" in facts


def test_texts_are_never_markup(opened: Opened) -> None:
    assert opened.texts(".episode .task")[0] == EVIL
    inside = opened.expand(0)
    assert EVIL in opened.texts(inside + ".inside")[0] and opened.page.locator(".inside img").count() == 0
    assert opened.page.locator(inside + ".ahead").count() == 3  # its record says that it chose k = 0


def test_the_same_game_by_another_method(opened: Opened) -> None:
    inside = opened.expand(5)
    assert opened.texts(inside + ".others button") == ["✓itp"]
    opened.page.click(inside + ".others button")
    assert opened.methods() == ["sft", "itp"]
    assert opened.texts(".episode[open] .method") == ["itp"]


@pytest.mark.parametrize("width, height", [(1280, 720), (390, 664)])
def test_the_first_screen_says_whether_it_helped(browser, tmp_path: Path, width: int, height: int) -> None:
    games = make_games(tmp_path / "games", 40)
    won = {"base": 20, "better": 36, "worse": 4, "same": 21}
    made = [write_result(tmp_path / name, [make_episode(g, success=i < n, imagined=[]) for i, g in enumerate(games)],
                         method=name) for name, n in won.items()]
    path = tmp_path / "index.html"
    path.write_text(render(made), encoding="utf-8")
    opened = Opened(browser, path, width)
    opened.page.set_viewport_size({"width": width, "height": height})
    assert opened.texts("#answer h2") == ["Did it help?"]
    assert "base solves 50.0 % of 40 games" in opened.texts("#answer p")[0]
    cards = [re.sub(r"\s+", " ", text) for text in opened.texts(".verdicts li")]
    assert [card.split(" (")[0] for card in cards] == ["better +40.0", "same +2.5", "worse -40.0"]
    assert [card.split(") ")[1] for card in cards] == ["helps on 40 games", "can't be told from chance on 40 games",
                                                      "hurts on 40 games"]
    bottom = opened.page.evaluate("document.querySelector('.verdicts').getBoundingClientRect().bottom")
    assert bottom <= height and opened.said == []
    opened.page.close()


def focused(opened: Opened) -> str:
    return opened.page.evaluate("(document.activeElement.closest('.episode') || document.activeElement).dataset.id"
                                " || document.activeElement.id")


def test_keys_lead_through_the_episodes(opened: Opened) -> None:
    keys = opened.page.keyboard
    keys.press("j")
    assert focused(opened) == "0"
    keys.press("ArrowDown")
    keys.press("j")
    assert focused(opened) == "2"
    keys.press("k")
    assert focused(opened) == "1"
    keys.press("Enter")
    opened.page.wait_for_selector(".episode[open] .inside")
    keys.press("j")
    assert opened.page.evaluate("[...document.querySelectorAll('.episode[open]')].map(e => e.dataset.id)") == ["2"]
    keys.press("/")
    assert focused(opened) == "by-text"
    keys.type("game_3 j/k")  # letters, not keys
    assert opened.page.input_value("#by-text") == "game_3 j/k"
    keys.press("Escape")
    assert focused(opened) != "by-text"


def test_an_episode_has_a_link(browser, opened: Opened, results: list[Result], tmp_path: Path) -> None:
    opened.page.select_option("#by-method", "itp")
    inside = opened.expand(4)
    link = opened.page.locator(inside + ".facts a").get_attribute("href")
    assert opened.page.url.endswith(link) and "game_4" in link
    path = tmp_path / "another.html"
    path.write_text(render(results), encoding="utf-8")
    there = Opened(browser, path)
    there.page.goto(path.as_uri() + link)
    there.page.reload()
    there.page.wait_for_selector(".episode[open] .inside")
    assert there.texts(".episode[open] .method") == ["itp"]
    assert there.texts(".episode[open] summary .task") == ["put a mug in fridge game_4"]
    assert there.said == []
    there.page.close()


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_is_wider_than_the_screen(browser, results: list[Result], tmp_path: Path, width: int) -> None:
    path = tmp_path / "index.html"
    path.write_text(render(results), encoding="utf-8")
    opened = Opened(browser, path, width)
    opened.expand(8)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    sizes = opened.page.evaluate("[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
    assert len(sizes) == 2 and all(natural > 0 and 0 < shown <= width for natural, shown in sizes)
    assert opened.said == []
    opened.page.close()


def test_a_thousand_episodes_are_fast(browser, tmp_path: Path) -> None:
    games = make_games(tmp_path / "games", 250)
    imagined = [PLAYED[:2]] * 30
    made = [write_result(tmp_path / name, [make_episode(g, success=i % 3 == 0, imagined=imagined, played=PLAYED * 10)
                                           for i, g in enumerate(games)]) for name in ("a", "b")]
    made += [Result(name, r.config, r.summary, r.records) for name, r in zip("cd", made, strict=True)]
    path = tmp_path / "index.html"
    path.write_text(render(made), encoding="utf-8")
    opened = Opened(browser, path)
    assert opened.texts("#count") == ["1,000 episodes, 336 solved (33.6 %)"]
    assert len(opened.methods()) == 100 and opened.texts("#more") == ["Show 100 more of 900"]
    opened.page.click("#more")
    assert len(opened.methods()) == 200
    loaded = opened.page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    filtered = opened.page.evaluate("""() => { const start = performance.now();
        document.getElementById("by-outcome").value = "1"; applyFilters(); document.body.offsetHeight;
        return performance.now() - start; }""")
    assert opened.texts("#count") == ["336 episodes, 336 solved (100.0 %)"]
    print(f"1,000 episodes: ready after {loaded:.0f} ms, filtered in {filtered:.0f} ms")
    assert loaded < 4000 and filtered < 1000  # milliseconds, on a busy machine
    assert opened.said == []
    opened.page.close()
