"""--help: ten flags first, every flag by topic with --help-all; completion by a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from foresight_eval import score
from itp.config import FEW, Topic, first_flags, flag, flag_fields, make_parser, topics
from itp.program import progress_bar, say_next, show_success
from tests.test_docs import ROOT, SETTINGS


@dataclass
class Base:
    """Shared things."""

    size: int = flag(1, help="a size")
    where: str = flag("", help="a place")


@dataclass
class Own(Base):
    """Things of its own.

    More about them.
    """

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = ("out", "where")
    out: str = flag(help="a folder")
    learning: ClassVar[Topic] = Topic("How it learns")
    lr: float = flag(0.1, help="a rate")
    size: int = flag(2, help="another size")


def test_a_flag_belongs_to_the_topic_of_the_class_that_declares_it_first() -> None:
    assert topics(Own) == {"out": "Things of its own", "lr": "How it learns", "size": "Shared things",
                           "where": "Shared things"}
    assert first_flags(Own) == ("size", "where", "out", "lr")  # few: all of them


def said_by(argument: str, capsys: pytest.CaptureFixture[str], settings: type, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        make_parser(settings).parse_args([argument])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SETTINGS)
def test_help_is_short_and_complete(name: str, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS[name]
    fields = {field.name: field.metadata["flag"] for field in flag_fields(settings)}
    first = first_flags(settings)
    short, everything = (said_by(word, capsys, settings, monkeypatch) for word in ("--help", "--help-all"))
    assert set(first) <= set(fields) and len(set(first)) == len(first) <= FEW
    assert {field for field, about in fields.items() if about.required} <= set(first)
    at = [everything.index(f"\n  --{field} ") for field in first]
    assert at == sorted(at)
    for field in fields:
        assert f"\n  --{field} " in everything or f"\n  --{field}, " in everything
        assert ((f"\n  --{field} " in short) or (f"\n  --{field}, " in short)) == (field in first)
    if len(fields) > FEW:
        assert len(first) <= 10 and f"{len(fields) - len(first)} more flags: --help-all" in short


@pytest.mark.parametrize("name", [name for name, settings in SETTINGS.items() if len(flag_fields(settings)) > FEW])
def test_topics_have_titles_and_few_flags(name: str) -> None:
    found = list(topics(SETTINGS[name]).values())
    assert len(found) == len(flag_fields(SETTINGS[name]))
    for title in set(found):
        assert " " in title and len(title) <= 110, f"{title}: give its class a docstring"
        assert found.count(title) <= 20, f"{name}: {title} has {found.count(title)} flags; divide it by a Topic"


def completions(line: str) -> set[str]:
    """What bash is told by the program when Tab is pressed at the end of ``line``."""
    env = os.environ | {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
                        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    code = f"import sys; sys.argv = [{line.split()[0]!r}]; from foresight_eval.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    return set(done.stdout.split("\n"))


def test_a_shell_completes_flags_and_their_values() -> None:
    pytest.importorskip("argcomplete")
    assert {"--policy_model", "--policy_dtype"} <= completions("itp-eval --policy_")
    assert completions("itp-eval --method rea") == {"react"}
    assert "rl_k" in completions("itp-train ")
    assert {"--gamma", "--gae_lambda"} <= completions("itp-train rl_k --ga")
    assert "--baseline" in completions("itp-report runs/x --ba")


def test_scores_have_the_help_of_every_program(capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["score", "--help-all"])
    with pytest.raises(SystemExit) as end:
        score.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and "usage: python -m foresight_eval.score DIR [DIR ...] [flags]" in said


def test_a_bar_shows_how_many_were_won(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(4, "game") as bar:
        show_success(bar, 0, 0)  # nothing yet, and no division by it
        assert "won" not in str(bar)
        show_success(bar, 2, 3)
        assert "2 of 3 won, 67%" in str(bar)


@pytest.mark.parametrize("value, said", [("", "next: itp-eval\n"), ("off", "")])
def test_the_next_command_can_be_kept_away(value: str, said: str, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITP_NEXT", value)
    say_next("itp-eval")
    assert capsys.readouterr().out == said
