"""docs/api.md: what it calls public is there and documented, and the reference of it can be made."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*) \|$", PAGE, re.MULTILINE))


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public functions and classes of ``module`` without a docstring of theirs, and the same of their methods."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__ or not callable(value):
            continue
        doc = inspect.getdoc(value) or ""
        if inspect.isfunction(value) and not doc or inspect.isclass(value) and (
                not doc or doc.startswith(f"{name}(") and not issubclass(value, tuple)):
            yield f"{module.__name__}.{name}"
        if inspect.isclass(value):
            for own, member in vars(value).items():
                called = isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)
                if called and not own.startswith("_") and not inspect.getdoc(getattr(value, own)):
                    yield f"{module.__name__}.{name}.{own}"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ and not list(undocumented(module))


@pytest.mark.parametrize("name", MODULES)
def test_names_that_the_page_says_are_there(name: str) -> None:
    module = importlib.import_module(name)
    for said in re.findall(r"`(\w+)`", MODULES[name]):
        assert hasattr(module, said), f"{name} has no {said}"


def test_the_reference_is_made_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    made = subprocess.run(["bash", str(ROOT / "scripts/api_reference.sh"), str(tmp_path)], env=os.environ,
                          capture_output=True, text=True, check=False)
    assert made.returncode == 0 and not made.stderr, made.stderr
    for name in MODULES:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8")
        assert name.rpartition(".")[2] in page
