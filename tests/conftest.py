"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: the others fill the second core meanwhile, instead of leaving it idle at the end."""
    items.sort(key=lambda item: item.path.stem != "test_quickstart")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests leave no translated games in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def games_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real ALFWorld games made on the spot: 6 train (one of each task type), 2 seen, 2 unseen."""
    from itp.envs.alfworld.generate import GenerateSettings, generate

    root = tmp_path_factory.mktemp("games")
    generate(GenerateSettings(out_dir=str(root), train=6, seen=2, unseen=2))
    return root
