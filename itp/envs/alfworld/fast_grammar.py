"""The grammar of :mod:`itp.envs.alfworld.fast_engine`, which derives the engine's text without parsing or copying.

TextWorld's ``ContextSensitiveGrammar`` keeps a stack of symbols, deep-copied with their contexts, and parses each
template and query with TatSu at every use.  Derivation has no side effects and goes from left to right, so a recursion
that passes the context down gives the same text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from textworld.envs.pddl import logic as pddl_logic, textgen
from textworld.envs.pddl.logic import PddlState
from textworld.generator.game import EntityInfo
from textworld.logic import Placeholder, Proposition, Rule, TypeHierarchy, Variable

from itp.text.alfworld_phrases import TASK

LOGICS_KEPT = 8
"""Parsed grammars that a process keeps.  ALFWorld has one, apart from the task sentence."""
TEXTS_KEPT = 4096
"""Parsed templates, queries and task sentences that a process keeps: about a hundred, and one per task."""

Context = Mapping[str, Any]
"""TextWorld's: state, facts, variables (name -> entity), mapping (placeholder -> variable), entity_infos."""

_TASK_RULE = re.compile(r'("task":\s*\[\s*\{\s*"rhs":\s*")(' + TASK + r'(?:[^"\\]|\\.)*)("\s*\}\s*\])')

# Parsing is a function of the text.  Its results are shared and never changed: Grammar doesn't attach contexts to
# symbols, and the search for a query's answers only reads the rule.
_parsed_grammar = functools.lru_cache(LOGICS_KEPT)(
    functools.partial(pddl_logic._parse_and_convert, rule_name="pddlStart"))
_symbols = functools.lru_cache(TEXTS_KEPT)(functools.partial(textgen._parse_and_convert, rule_name="symbols"))
_query = functools.lru_cache(TEXTS_KEPT)(Rule.parse_conjunctive_query)
_expression = functools.lru_cache(TEXTS_KEPT)(functools.partial(compile, filename="<grammar>", mode="eval"))


def game_logic(domain: str, grammar: str) -> pddl_logic.GameLogic:
    """A ``GameLogic`` for which only the task sentence is parsed again.

    The sentence is the right-hand side of a rule of its own, so parsing it apart from the rest gives the same rules.  A
    grammar whose task has another form is parsed as a whole, and remembered.
    """
    sentences = _TASK_RULE.findall(grammar)
    shared = _TASK_RULE.sub(r"\1\3", grammar) if len(sentences) == 1 else grammar
    actions, parsed = _parsed_grammar(shared)
    logic = pddl_logic.GameLogic.__new__(pddl_logic.GameLogic)
    logic.domain = domain
    logic.actions = dict(actions)
    logic.types = TypeHierarchy()
    logic.grammar = Grammar()
    logic.grammar.update(parsed)
    if shared is not grammar:
        symbols = _symbols(json.loads(f'"{sentences[0][1]}"'))
        logic.grammar._rules["task"] = [textgen.ProductionRule("task", symbols, condition="")]
    logic.grammar.queried = logic.grammar.predicates_of(action.template for action in logic.actions.values())
    return logic


class Grammar(textgen.ContextSensitiveGrammar):
    """A grammar that derives by recursion: each symbol gets the context that TextWorld would copy for it."""

    queried: frozenset[str] = frozenset()
    """Predicates that the commands' templates query."""

    def __init__(self) -> None:
        super().__init__()
        self._mentioned: dict[tuple[str, tuple[Placeholder, ...]], tuple[Placeholder, ...]] = {}

    def predicates_of(self, templates: Iterable[str]) -> frozenset[str]:
        """The predicates of all queries that the derivation of ``templates`` may reach."""
        queries, rules, todo = set(), set(), [s for template in templates for s in _symbols(template)]
        while todo:
            symbol = todo.pop()
            if isinstance(symbol, textgen.ListSymbol):
                todo.append(symbol.symbol)
            elif isinstance(symbol, textgen.ConditionalSymbol):
                todo.append(symbol.expression)
                queries.add(symbol.given)
            elif isinstance(symbol, textgen.NonterminalSymbol) and symbol.symbol not in rules:
                rules.add(symbol.symbol)
                for rule in self._rules.get(symbol.symbol, ()):
                    todo += rule.rhs
                    queries.add(rule.condition)
        queries -= {None, ""}
        return frozenset(p.name.removeprefix("not_") for q in queries for p in _query(q).preconditions)

    def mentioned(self, template: str, bound: tuple[Placeholder, ...]) -> tuple[Placeholder, ...]:
        """The placeholders among ``bound`` that the derivation of ``template`` can depend on.

        It can depend on all of them if the template leads to other rules, or if its queries bind a new placeholder,
        whose value must differ from the values of the others.
        """
        known = self._mentioned.get((template, bound))
        if known is None:
            known = self._mentioned[template, bound] = _mentioned(_symbols(template), bound)
        return known

    def derive(self, start: str, context: Context = {}) -> str:  # noqa: B006 (TextWorld's signature)
        return "".join(self._text(symbol, context) for symbol in _symbols(start))

    def _text(self, symbol: textgen.Symbol, context: Context) -> str:
        if isinstance(symbol, textgen.TerminalSymbol):
            return str(symbol)
        if isinstance(symbol, textgen.NonterminalSymbol):
            return self._rule_text(symbol.symbol, context)
        if isinstance(symbol, textgen.EvalSymbol):
            names = {**context["variables"], "self": symbol, "context": context}
            return str(eval(_expression(symbol.expression), vars(textgen), names))
        if isinstance(symbol, textgen.ConditionalSymbol):
            return "".join(self._alternatives(symbol, context))
        return self._list_text(self._alternatives(symbol.symbol, context), context)

    def _rule_text(self, name: str, context: Context) -> str:
        """The text of the first rule whose condition holds."""
        rules = self._rules.get(name)
        if not rules:
            raise textgen.CSGUnknownSymbolError(name)
        for rule in rules:
            if not rule.condition or _answers(rule.condition, context):
                return "".join(self._text(symbol, context) for symbol in rule.rhs)
        raise IndexError(f"no rule of #{name}# applies")

    def _alternatives(self, symbol: textgen.ConditionalSymbol, context: Context) -> list[str]:
        """The text of ``{expression|given}`` for each answer to the query ``given``."""
        if not symbol.given:
            return [self._text(symbol.expression, context)]
        infos = context["entity_infos"]
        texts = []
        for answer in _answers(symbol.given, context):
            variables = {**context["variables"], **{ph.name: infos[var.name] for ph, var in answer.items()}}
            inner = {**context, "variables": variables, "mapping": {**context["mapping"], **answer}}
            texts.append(self._text(symbol.expression, inner))
        return texts

    def _list_text(self, texts: list[str], context: Context) -> str:
        if not texts:
            return self._rule_text("list_empty", context)
        if len(texts) == 1:
            return texts[0]
        separator = self._rule_text("list_separator", context) if len(texts) > 2 else ""
        return separator.join(texts[:-1]) + self._rule_text("list_last_separator", context) + texts[-1]


def _mentioned(symbols: Iterable[textgen.Symbol], bound: tuple[Placeholder, ...]) -> tuple[Placeholder, ...]:
    names: set[str] = set()
    todo = list(symbols)
    while todo:
        symbol = todo.pop()
        if isinstance(symbol, textgen.EvalSymbol):
            names.update(_expression(symbol.expression).co_names)
        elif isinstance(symbol, textgen.ListSymbol):
            todo.append(symbol.symbol)
        elif isinstance(symbol, textgen.ConditionalSymbol):
            queried = _query(symbol.given).placeholders if symbol.given else ()
            if not set(queried) <= set(bound):
                return bound
            names.update(placeholder.name for placeholder in queried)
            todo.append(symbol.expression)
        elif not isinstance(symbol, textgen.TerminalSymbol):
            return bound
    return tuple(placeholder for placeholder in bound if placeholder.name in names)


def _answers(query: str, context: Context) -> list[Mapping[Placeholder, Variable]]:
    return list(context["state"].all_assignments(_query(query), context["mapping"]))


def make_context(state: PddlState, infos: Mapping[str, EntityInfo], facts: list[Proposition],
                 mapping: Mapping[Placeholder, Variable]) -> dict[str, Any]:
    variables = {placeholder.name: infos[var.name] for placeholder, var in mapping.items()}
    return {"state": state, "facts": facts, "variables": variables, "mapping": mapping, "entity_infos": infos}
