"""Problems of ALFWorld games, translated once for the native library.

TextWorld translates a game's PDDL to SAS in Python at each load and reset, which takes from 0.3 to several seconds.
The translation is a function of two texts and of the translator, so it is made once and kept.  The process keeps recent
translations in memory, and a file of about 20 KB under ``$ITP_CACHE`` (default ``~/.cache/itp``) serves later
processes; ``ITP_CACHE=off`` writes no files.  A folder that can't be written costs time, not the run.
"""

from __future__ import annotations

import base64
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fast_downward
from fast_downward.translate.pddl.conditions import Atom
from fast_downward.translate.pddl.f_expression import Assign
from textworld.logic import Placeholder, Proposition, Variable

from itp.files import cache_folder, keep, read_cached

log = logging.getLogger(__name__)
WORLDS_KEPT = 256
"""Translated problems that a process keeps.  Each takes about 1 MB with its propositions."""

GroundFact = tuple[str, tuple[str, ...]]
"""A proposition's name and the names of its arguments."""


class Parameter(NamedTuple):
    """A parameter of an action, as TextWorld reads it."""

    name: str
    type_name: str


@dataclass(frozen=True)
class Schema:
    """The part of a translated action that TextWorld uses, and its parameters as placeholders."""

    parameters: tuple[Parameter, ...]
    placeholders: tuple[Placeholder, ...]


@dataclass
class TranslatedWorld:
    """The part of a translation that a game needs, without the translator's other objects."""

    sas: bytes
    types: tuple[tuple[str, tuple[str, ...]], ...]
    name2type: Mapping[str, str]
    schemas: Mapping[str, Schema]
    task_facts: tuple[Proposition, ...]
    """Facts of the problem text, in its order."""
    state_facts: tuple[Proposition, ...] | None = None
    """Facts that the native library reports at the start; set when it first loads this world."""


@functools.lru_cache(WORLDS_KEPT)
def world(domain: str, problem: str) -> TranslatedWorld:
    """The translation of a problem, from the cache file if there is one."""
    file = _cache_file(domain, problem)
    if (kept := read_cached(file)) is not None:
        try:
            return _revive(json.loads(zlib.decompress(base64.b85decode(kept))))
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            log.warning("%s: damaged (%s); the world is translated again", file, type(error).__name__)
    task, sas = translate(domain, problem, optimize=False)
    name2type = {o.name: o.type_name for o in task.objects}
    plain = {
        "sas": sas,
        "types": [(t.name, list(t.supertype_names)) for t in task.types],
        "name2type": name2type,
        "schemas": {action.name: [(p.name, p.type_name) for p in action.parameters] for action in task.actions},
        "task_facts": [fact for element in task.init if (fact := _fact(element)) is not None],
    }
    keep(file, base64.b85encode(zlib.compress(json.dumps(plain).encode(), 1)).decode())
    return _revive(plain)


def _cache_file(domain: str, problem: str) -> Path | None:
    cache = cache_folder("alfworld")
    if cache is None:
        return None
    version = importlib.metadata.version("fast_downward_textworld")
    key = hashlib.sha256("\0".join((version, domain, problem)).encode()).hexdigest()
    return cache / key[:2] / f"{key[2:40]}.world"


def _revive(plain: dict[str, Any]) -> TranslatedWorld:
    name2type = plain["name2type"]
    return TranslatedWorld(
        sas=zlib.compress(plain["sas"].encode(), 1),
        types=tuple((name, tuple(supertypes)) for name, supertypes in plain["types"]),
        name2type=name2type,
        schemas={name: _schema(parameters) for name, parameters in plain["schemas"].items()},
        task_facts=tuple(Proposition(name, [Variable(arg, name2type[arg]) for arg in args])
                         for name, args in plain["task_facts"]),
    )


def _schema(parameters: list[tuple[str, str]]) -> Schema:
    return Schema(tuple(Parameter(*p) for p in parameters),
                  tuple(Placeholder(name.strip("?"), type_name) for name, type_name in parameters))


def _fact(element: Any) -> GroundFact | None:
    """An element of the initial state as a fact; None for equalities and numbers (distances, costs)."""
    if isinstance(element, Atom) and element.predicate != "=":
        return element.predicate, tuple(element.args)
    if isinstance(element, Assign) and element.fluent.symbol != "total-cost":
        value = str(element.expression.value)
        if not value.isdigit():
            return value, tuple(element.fluent.args)
    return None


@functools.lru_cache(WORLDS_KEPT)
def planner_sas(domain: str, problem: str) -> bytes:
    """The second, optimized translation.  Only the planner reads it, so it is made at the first plan."""
    return zlib.compress(translate(domain, problem, optimize=True)[1].encode(), 1)


def translate(domain: str, problem: str, *, optimize: bool) -> tuple[Any, str]:
    """The translator's task and its SAS text."""
    argv = sys.argv  # pddl2sas overwrites it
    collects = gc.isenabled()
    # The translator makes a million small objects; garbage collection took a tenth of the time of making a game.
    gc.disable()
    try:
        return fast_downward.pddl2sas(domain, problem, optimize=optimize)
    finally:
        sys.argv = argv
        if collects:
            gc.enable()
