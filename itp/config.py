"""Settings of a program: one dataclass, filled from defaults, then ``--config file.yaml``, then flags.

>>> @dataclass
... class Settings:
...     out: str = flag(help="where to write")              # no default: required
...     games: int = flag(5, help="how many games")
>>> parse_settings(Settings, ["--out", "x", "--games", "3"])
Settings(out='x', games=3)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import operator
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from itp.errors import UserError
from itp.files import read_yaml

T = TypeVar("T")
FEW = 12
"""So many flags need no topics: ``--help`` shows them all."""
_REQUIRED = object()
_HOLDS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt}


@dataclass(frozen=True)
class Flag:
    """Metadata of a flag: everything except its name, type and default.

    ``affects_result``: whether another value changes what the run computes; if not, the run may go on with another
    one (:func:`itp.run_dir.open_run_dir`).  ``aliases``: other names that the flag is known by.  ``bounds``: where its
    value must lie, as word -> limit.  ``holds``: "data" where it names training data, "path" where it leads to another
    place of this machine.  ``selects_games``: whether it decides which games are played, and how long.  ``before``: the
    value that runs had before the flag was there, if it wasn't off.
    """

    help: str
    choices: Sequence[Any] | None
    required: bool
    bounds: Mapping[str, float]
    affects_result: bool
    aliases: tuple[str, ...]
    holds: str
    selects_games: bool
    before: Any = None


def flag(default: Any = _REQUIRED, *, help: str, choices: Sequence[Any] | None = None, at_least: float | None = None,
         above: float | None = None, below: float | None = None, affects_result: bool = True,
         aliases: tuple[str, ...] = (), holds: str = "", selects_games: bool = False, before: Any = None) -> Any:
    """A dataclass field with what its flag needs (:class:`Flag`).  Without a default the flag is required.

    ``at_least``, ``above``, ``below``: where its value must lie; :func:`from_args` refuses others.
    """
    limits = {"at least": at_least, "above": above, "below": below}
    about = Flag(help, choices, default is _REQUIRED, {word: n for word, n in limits.items() if n is not None},
                 affects_result, aliases, holds, selects_games, before)
    return dataclasses.field(default=None if about.required else default, metadata={"flag": about})


class Topic(str):
    """The title of the flags that a settings class declares after it, in ``--help``.

    >>> @dataclass
    ... class Settings:
    ...     out: str = flag("", help="the topic of this flag is the first line of the class's docstring")
    ...     learning: ClassVar[Topic] = Topic("How it learns")
    ...     lr: float = flag(1e-5, help="learning rate, under How it learns")
    """


def topics(settings: type) -> dict[str, str]:
    """Flag -> its topic: of the class that declares it first.  The program's own topics come before its bases'."""
    flags = {field.name for field in flag_fields(settings)}
    found: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        doc = cls.__doc__ or ""
        title = cls.__name__ if doc.startswith(f"{cls.__name__}(") else doc.partition("\n")[0].rstrip(".")
        for name in vars(cls).get("__annotations__", {}):
            if isinstance(vars(cls).get(name), Topic):
                title = str(vars(cls)[name])
            elif name in flags:
                found.setdefault(name, title)
    order = list(dict.fromkeys(found.values()))
    own = [title for title in order if title not in _topics_of_bases(settings)]
    order = own + [title for title in order if title not in own]
    return {name: title for title in order for name in found if found[name] == title}


def _topics_of_bases(settings: type) -> set[str]:
    return {title for base in settings.__bases__ if dataclasses.is_dataclass(base) for title in topics(base).values()}


def first_flags(settings: type) -> tuple[str, ...]:
    """The flags that ``--help`` shows: ``FIRST_FLAGS`` of the class, or all where they are few."""
    names = tuple(field.name for field in flag_fields(settings))
    if len(names) <= FEW:
        return names
    return tuple(name for name in getattr(settings, "FIRST_FLAGS", names) if name in names)


def add_flags(parser: argparse.ArgumentParser, settings: type) -> argparse._ArgumentGroup:
    """Add one ``--name`` for every flag of ``settings``, those that matter first, then by topic, and ``--config``.

    Returns the last group, that of ``--config``.
    """
    types, fields = typing.get_type_hints(settings), {field.name: field for field in flag_fields(settings)}
    first = first_flags(settings)
    groups = {"": parser.add_argument_group("flags that matter most" if len(first) < len(fields) else "flags")}
    titles = dict.fromkeys(first, "")
    for name, title in (titles | {n: t for n, t in topics(settings).items() if n not in first}).items():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], fields[name], types[name])
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE[:SECTION]",
                         help="YAML file with any of these settings, or a section of one; flags win")
    return general


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, kind: type) -> None:
    about = field.metadata["flag"]
    note = " (required)" if about.required else "" if field.default == "" else f" (default: {field.default})"
    options: dict[str, Any] = {"help": about.help.replace("%", "%%") + note, "default": argparse.SUPPRESS,
                               "dest": field.name}
    if kind is bool:
        # A switch, which also takes a value: --override and --override false.
        options.update(nargs="?", const=True, type=_boolean, metavar="BOOL")
    else:
        shown = None if about.choices else kind.__name__.upper()
        options.update(type=kind, choices=about.choices, metavar=shown)
    group.add_argument(*(f"--{name}" for name in (field.name, *about.aliases)), action=_OneSpelling, **options)


class _Help(argparse.Action):
    """``--help``: the flags that matter most; ``--help-all``: every flag, by topic."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        settings = self.const
        first, all_topics = first_flags(settings), topics(settings)
        rest = [name for name in all_topics if name not in first]
        if rest and option_string != "--help-all":
            for action in parser._actions:
                if action.dest in rest:
                    action.help = argparse.SUPPRESS
            titles = dict.fromkeys(all_topics[name] for name in rest)
            parser.epilog = (f"{len(rest)} more flags: --help-all\n" + "\n".join(f"  {title}" for title in titles))
        parser.print_help()
        parser.exit()


def make_parser(settings: type, *, prog: str | None = None, description: str | None = None,
                positional: str = "") -> argparse.ArgumentParser:
    """A parser of ``settings`` whose ``--help`` is short; ``positional``: what the usage line shows before flags."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, add_help=False,
                                     usage=f"%(prog)s {positional}[flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, settings).add_argument("-h", "--help", "--help-all", action=_Help, nargs=0, const=settings,
                                             default=argparse.SUPPRESS, help="show these flags, or all of them")
    return parser


class _OneSpelling(argparse.Action):
    """Stores a value, and refuses a flag that is given under two of its names."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        spelled = vars(namespace).setdefault("_spelled", {})
        if (first := spelled.setdefault(self.dest, option_string)) != option_string:
            parser.error(f"{option_string} is another name of {first}; give one of them")
        setattr(namespace, self.dest, values)


def flag_fields(settings: type) -> list[dataclasses.Field]:
    """The fields made with :func:`flag`.  A plain field (also one that overrides a flag) is not for users."""
    return [field for field in dataclasses.fields(settings) if field.metadata]


def flags_that(settings: type, test: Callable[[Flag], bool]) -> list[str]:
    """The names of the flags of ``settings`` for which ``test`` holds."""
    return [field.name for field in flag_fields(settings) if test(field.metadata["flag"])]


def canonical_names(settings: type) -> dict[str, str]:
    """Every name that a flag of ``settings`` is known by -> its own."""
    return {name: field.name for field in flag_fields(settings)
            for name in (field.name, *field.metadata["flag"].aliases)}


def by_own_names(recorded: Mapping[str, Any], *settings: type) -> dict[str, Any]:
    """A record's values by the flags' own names.  Names that are no flag's of ``settings`` stay as they are."""
    own_name = {name: own for each in settings for name, own in canonical_names(each).items()}
    return {own_name.get(name, name): value for name, value in recorded.items()}


def from_args(settings: type[T], args: argparse.Namespace) -> T:
    """The settings that parsed ``args`` ask for.  Unknown keys of the YAML file and values out of bounds are errors."""
    fields = {f.name for f in flag_fields(settings)}
    given = _read_yaml(args.config, settings) if args.config else {}
    return _made(settings, given | {k: v for k, v in vars(args).items() if k in fields})


def _made(settings: type[T], given: Mapping[str, Any]) -> T:
    fields = {f.name: f for f in flag_fields(settings)}
    missing = [name for name, f in fields.items() if f.metadata["flag"].required and given.get(name) is None]
    if missing:
        raise UserError(f"missing required {', '.join('--' + m for m in missing)} (see --help)")
    for name, value in given.items():
        bounds = fields[name].metadata["flag"].bounds
        # A default out of bounds means something of its own, such as -1: as the checkpoint says.
        if value != fields[name].default and not all(_HOLDS[word](value, limit) for word, limit in bounds.items()):
            said = " and ".join(f"{word} {limit}" for word, limit in bounds.items())
            raise UserError(f"--{name} {value}: must be {said}")
    return settings(**given)


def parse_settings(settings: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None,
                   description: str | None = None) -> T:
    """Parse a command line (``sys.argv`` by default) into ``settings``."""
    parser = make_parser(settings, prog=prog, description=description)
    complete(parser)
    return from_args(settings, _parse_known(parser, argv))


def asked_to_complete() -> bool:
    """Whether a shell has started this program to ask for completions (docs/install.md)."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end; else do nothing."""
    if asked_to_complete():
        import argcomplete

        argcomplete.autocomplete(parser)


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """``parser.parse_args``, whose complaint about unknown flags doesn't quote their values: one may be a key."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(names or unknown)}")
    return args


def _boolean(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false, 1, 0, yes, no")
    return values[text.lower()]


def _read_yaml(path: str, settings: type) -> dict[str, Any]:
    file, _, section = (path, "", "") if Path(path).is_file() else path.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"--config {path}: no such file")
    values = read_yaml(file, f"--config {path}")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold `name: value` lines")
    return _typed(_section(values, path, section), settings, f"--config {path}")


def _typed(values: Mapping[str, Any], settings: type, where: str) -> dict[str, Any]:
    """``values`` in the types of their settings.  Unknown names and other types are errors, which name ``where``."""
    own_name = canonical_names(settings)
    for name in values:
        if name not in own_name:
            raise UserError(f"{where}: unknown setting {name!r}{did_you_mean(name, own_name)}")
        if name != own_name[name] and own_name[name] in values:
            raise UserError(f"{where}: {name} is another name of {own_name[name]}; give one of them")
    values = {own_name[name]: value for name, value in values.items()}
    hints = typing.get_type_hints(settings)
    types = {f.name: hints[f.name] for f in flag_fields(settings)}
    choices = {f.name: f.metadata["flag"].choices for f in flag_fields(settings)}
    for name, value in values.items():
        if types[name] is float and _is_number(value):
            values[name] = float(value)
        elif type(value) is not types[name]:
            raise UserError(f"{where}: {name} must be {types[name].__name__}, not {value!r}")
        if choices[name] and value not in choices[name]:
            raise UserError(f"{where}: {name} must be one of {list(choices[name])}, not {value!r}")
    return values


def _section(values: dict[str, Any], path: str, section: str) -> dict[str, Any]:
    """The settings of one program, where a file has those of several under their names."""
    sections = [str(name) for name, value in values.items() if isinstance(value, dict)]
    if not section and sections:
        raise UserError(f"--config {path}: holds sections; name one of {', '.join(sections)}, as {path}:{sections[0]}")
    if section and section not in sections:
        near = did_you_mean(section, sections) or f"; it has {', '.join(sections) or 'none'}"
        raise UserError(f"--config {path}: no section {section!r}{near}")
    return values[section] if section else values


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown name: the nearest known one, where one is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _is_number(value: Any) -> bool:
    """Also 2e-5, which YAML takes for a text (it wants 2.0e-5)."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value))
    return isinstance(value, int) and not isinstance(value, bool)
