"""Take the screenshot of the README: an opened episode on the page of ``scripts/demo.sh``.

    python scripts/screenshot.py runs/demo/report/index.html docs/images/page.png

Needs playwright and a Chromium: on the PATH, named by $CHROMIUM, or installed by ``playwright install chromium``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from itp.errors import UserError
from itp.program import run_main

SIZE = {"width": 1100, "height": 760}
"""Pixels."""


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give the page and the image: scripts/screenshot.py PAGE.html IMAGE.png")
    page, image = Path(sys.argv[1]), Path(sys.argv[2])
    if not page.is_file():
        raise UserError(f"{page}: no such page; bash scripts/demo.sh makes it")
    image.parent.mkdir(parents=True, exist_ok=True)
    take(page, image)


def take(page: Path, image: Path) -> None:
    """Open the first episode that was played with imagination, and write what is then to be seen to ``image``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened = browser.new_page(viewport=SIZE)
        opened.goto(page.resolve().as_uri())
        opened.select_option("#by-method", index=3)  # the third of the demo's methods; 0 is all of them
        first = opened.locator(".episode").first
        first.locator("summary").click()
        opened.wait_for_selector(".episode:first-child .inside")
        first.scroll_into_view_if_needed()
        first.evaluate("episode => window.scrollTo(0, episode.getBoundingClientRect().top + window.scrollY - 60)")
        opened.screenshot(path=str(image))
        browser.close()


if __name__ == "__main__":
    run_main(main)
