"""TextWorld's PDDL engine, made fast, with exactly the same text.

:class:`FastPddlEnv` is a drop-in ``textworld.envs.PddlEnv`` with the same observations, admissible commands, facts,
plans, ``won`` and score.  TextWorld's own engine is slow because it repeats the same work.  Each piece here is either a
memo or an evaluation without copies, and its docstring says why the result is the same:

=====================  =================================================================================
:func:`world`          PDDL is translated to SAS four times per load and reset; here once per problem
:func:`game_logic`     the grammar is parsed at each load; games differ only in its task sentence
:class:`Grammar`       derivation deep-copies symbols and contexts, and parses templates and queries anew
:class:`_State`        facts are sorted for every query; every operator's command is derived every step
:class:`FastPddlEnv`   uses these (:mod:`itp.envs.alfworld.fast_translation`, :mod:`itp.envs.alfworld.fast_grammar`)
=====================  =================================================================================

All memos are bounded; the least recently used entry goes first.  Importing this module changes nothing in TextWorld.

The engine sorts its lists, so observations don't depend on PYTHONHASHSEED.  The order of the ``facts`` list does,
because TextWorld keeps facts in sets, and alfworld's handcoded expert uses this order.  Therefore facts enter the sets
in TextWorld's own order, and :mod:`itp.envs.pool` runs its processes with a fixed seed.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import fast_downward
import mementos.core
from textworld.core import GameState
from textworld.envs.pddl import logic as pddl_logic
from textworld.envs.pddl.pddl import PddlEnv
from textworld.generator.game import EntityInfo
from textworld.logic import Action, Placeholder, Proposition, Rule, Signature, Type, Variable

from itp.envs.alfworld import fast_translation as translation
from itp.envs.alfworld.fast_grammar import game_logic, make_context
from itp.files import read_json
from itp.text.alfworld_phrases import NOTHING_HAPPENS

MEMENTOS_KEPT = 200_000
"""TextWorld itself keeps every proposition.  When it keeps more than this, a load clears them."""


class _State(pddl_logic.PddlState):
    """A ``PddlState`` that is quick to make and to query.

    It loads its problem into the native library at the first query, because ``load`` makes a state only to name the
    entities and ``reset`` makes another one.  As in TextWorld, the states of one engine share its library, so only the
    newest state may be used.
    """

    def __init__(self, downward_lib: Any, pddl_problem: str, logic: pddl_logic.GameLogic) -> None:
        self._facts = defaultdict(set)
        self._vars_by_name = {}
        self._vars_by_type = defaultdict(set)
        self._var_counts = Counter()
        self._sorted: dict[Signature, list[Proposition]] = {}
        self._operators_seen: dict[int, tuple[str, Action, str]] = {}
        self._commands: dict[tuple[Variable | str, ...], str] = {}
        self._logic = logic
        self.downward_lib = downward_lib
        self.pddl_problem = pddl_problem
        self._world = world = translation.world(logic.domain, pddl_problem)
        self._actions = world.schemas
        self.name2type = world.name2type
        self._lib_loaded = self._planner_loaded = False
        for name, supertypes in world.types:
            if name not in logic.types._types:
                logic.types.add(Type(name, supertypes))
        # Both lists, in TextWorld's order and with its repetitions, so that the sets have TextWorld's order too.
        self.add_facts(world.task_facts)
        if world.state_facts is None:
            world.state_facts = self._facts_of_library()
        self.add_facts(world.state_facts)

    def _facts_of_library(self) -> tuple[Proposition, ...]:
        self._load_library()
        atoms = (pddl_logic.Atom * self.downward_lib.get_state_size())()
        self.downward_lib.get_state(atoms)
        facts = (atom.get_fact(self.name2type) for atom in atoms)
        return tuple(fact for fact in facts if not fact.is_negation)

    def _load_library(self) -> None:
        if not self._lib_loaded:
            self.downward_lib.load_sas(zlib.decompress(self._world.sas))
            self._lib_loaded = True

    def check_goal(self) -> bool:
        self._load_library()
        return super().check_goal()

    def all_applicable_actions(self) -> list[Action]:
        self._load_library()
        return super().all_applicable_actions()

    def replan(self, infos: Mapping[str, EntityInfo]) -> list[str]:
        # The planner starts from the library's current state, so its problem may be loaded at any time.
        self._load_library()
        if not self._planner_loaded:
            sas = translation.planner_sas(self._logic.domain, self.pddl_problem)
            self.downward_lib.load_sas_replan(zlib.decompress(sas))
            self._planner_loaded = True
        return super().replan(infos)

    def commands(self, infos: Mapping[str, EntityInfo], names: Mapping[str, str],
                 facts: list[Proposition]) -> tuple[list[Action], list[str]]:
        """``all_applicable_actions`` and their commands, each made once.

        An action is a function of its operator.  A command depends on three things: the arguments that its template
        mentions, their names (which change only at a load, with a new state), and the facts that its template queries
        (see :meth:`apply`).
        """
        self._load_library()
        operators = (fast_downward.Operator * self.downward_lib.get_applicable_operators_count())()
        self.downward_lib.get_applicable_operators(operators)
        self._operators = {operator.id: operator for operator in operators}
        found: dict[str, tuple[Action, str]] = {}  # operators with the same name are one action: the first
        for number, operator in self._operators.items():
            seen = self._operators_seen.get(number)
            if seen is None:
                name = operator.name
                action = self._action(number, name)
                action.command_template = self._command(action, infos, facts)
                seen = self._operators_seen[number] = (name, action, action.format_command(names))
            found.setdefault(seen[0], seen[1:])
        return [action for action, _ in found.values()], [command for _, command in found.values()]

    def _action(self, number: int, operator: str) -> Action:
        name, *arguments = operator.split()
        action = Action(name=name, preconditions=[], postconditions=[])
        action.id = number
        action.mapping = {placeholder: Variable(argument, placeholder.type)
                          for placeholder, argument in zip(self._actions[name].placeholders, arguments)}
        action.command_template = self._logic.actions[name].template
        action.feedback_rule = self._logic.actions[name].feedback_rule
        return action

    def _command(self, action: Action, infos: Mapping[str, EntityInfo], facts: list[Proposition]) -> str:
        bound = self._actions[action.name].placeholders
        mentioned = self._logic.grammar.mentioned(action.command_template, bound)
        key = (action.name, *(action.mapping[placeholder] for placeholder in mentioned))
        command = self._commands.get(key)
        if command is None:
            context = make_context(self, infos, facts, action.mapping)
            command = self._commands[key] = self._logic.grammar.derive(action.command_template, context)
        return command

    def apply(self, action: Action) -> list[Proposition]:
        changes = super().apply(action)
        # ALFWorld's templates query only the places of receptacles, which no action changes.
        if any(fact.name.removeprefix("not_") in self._logic.grammar.queried for fact in changes):
            self._operators_seen.clear()
            self._commands.clear()
        return changes

    def add_fact(self, prop: Proposition) -> None:
        self._sorted.pop(prop.signature, None)
        super().add_fact(prop)

    def remove_fact(self, prop: Proposition) -> None:
        self._sorted.pop(prop.signature, None)
        super().remove_fact(prop)

    def _all_applicable_assignments(self, rule: Rule, mapping: dict, used_vars: set,
                                    new_phs_by_depth: list, depth: int) -> Iterator[Mapping]:
        """TextWorld's search for a query's answers, on facts that stay sorted until they change.

        The base class sorts the candidate facts at every step of the search, with the same order as a result.  Where
        all arguments are known, at most one fact matches, so that fact is looked up.
        """
        if depth >= len(rule.preconditions):
            if new_phs_by_depth[depth]:
                yield from self._all_assignments(new_phs_by_depth[depth], mapping, used_vars, False)
            else:
                yield mapping.copy()
            return
        predicate = rule.preconditions[depth]
        types = [self._logic.types.get(t) for t in predicate.signature.types]
        known = [mapping.get(placeholder) for placeholder in predicate.parameters]
        sought = Proposition(predicate.name, known) if None not in known else None
        for subtypes in self._logic.types.multi_subtypes(types):
            signature = Signature(predicate.signature.name, [t.name for t in subtypes])
            if sought is not None:
                if sought in self.facts_with_signature(signature):
                    yield from self._all_applicable_assignments(rule, mapping, used_vars, new_phs_by_depth, depth + 1)
                continue
            for fact in self._in_order(signature):
                for placeholder, var in zip(predicate.parameters, fact.arguments):
                    existing = mapping.get(placeholder)
                    if existing is None:
                        if var in used_vars:
                            break
                        mapping[placeholder] = var
                        used_vars.add(var)
                    elif existing != var:
                        break
                else:
                    yield from self._all_applicable_assignments(rule, mapping, used_vars, new_phs_by_depth, depth + 1)
                for placeholder in new_phs_by_depth[depth]:
                    used_vars.discard(mapping.pop(placeholder, None))

    def _in_order(self, signature: Signature) -> list[Proposition]:
        facts = self._sorted.get(signature)
        if facts is None:
            facts = self._sorted[signature] = sorted(self.facts_with_signature(signature))
        return facts


# --- the engine


class FastPddlEnv(PddlEnv):
    """TextWorld's ``PddlEnv`` on the pieces above, with the same class attributes, wrappers and infos."""

    def load(self, filename_or_data: str | Mapping[str, Any]) -> None:
        if len(mementos.core._memento_cache) > MEMENTOS_KEPT:
            mementos.core._memento_cache.clear()  # safe: propositions are compared by value
        if isinstance(filename_or_data, Mapping):
            self._game_data, self._game_file = filename_or_data, None
        else:
            self._game_data, self._game_file = read_json(filename_or_data), filename_or_data
        self.walkthrough = self._game_data.get("walkthrough", None)
        self._logic = game_logic(self._game_data["pddl_domain"], self._game_data["grammar"])
        self._pddl_state = _State(self.downward_lib, self._game_data["pddl_problem"], self._logic)
        self._entity_infos = self._get_entity_infos()

    def _get_entity_infos(self) -> dict[str, EntityInfo]:
        """One info per entity, in the order of first mention; TextWorld makes one per mention."""
        entity_infos: dict[str, EntityInfo] = {}
        for fact in self._pddl_state.facts:
            for var in fact.arguments:
                if var.name not in entity_infos:
                    info = entity_infos[var.name] = EntityInfo(var.name, var.type)
                    info.name, info.definite, info.indefinite = info.id, "the", "a"
        return entity_infos

    def reset(self) -> GameState:
        self._pddl_state = _State(self.downward_lib, self._game_data["pddl_problem"], self._logic)
        self._readable_facts: dict[Proposition, Proposition] = {}  # names change only at a load
        self.prev_state = None
        self.state = GameState()
        self._last_action = None
        self._moves = 0
        self.state.feedback = self._derive("#intro#", {})
        self.state.raw = self.state.feedback
        self._gather_infos()
        if "walkthrough" in self.request_infos.extras:
            self.state["extra.walkthrough"] = self.walkthrough or self._pddl_state.replan(self._entity_infos)
        return self.state

    def step(self, command: str) -> tuple[GameState, int, bool]:
        command = command.strip()
        self.prev_state = self.state
        self.state = GameState()
        self.state.last_command = command
        self._last_action = None
        if command in self.prev_state["_valid_commands"]:
            index = self.prev_state["_valid_commands"].index(command)
            self._last_action = self.prev_state["_valid_actions"][index]
            self._pddl_state.apply(self._last_action)
            self.state.feedback = self._derive(self._last_action.feedback_rule, self._last_action.mapping)
            self._moves += 1
        else:
            self.state.feedback = NOTHING_HAPPENS
        self.state.raw = self.state.feedback
        self._gather_infos()
        if "walkthrough" in self.request_infos.extras:
            self.state["extra.walkthrough"] = self.prev_state["extra.walkthrough"]
        self.state["score"] = 1 if self.state["won"] else 0
        self.state["done"] = self.state["won"] or self.state["lost"]
        return self.state, self.state["score"], self.state["done"]

    def _derive(self, rule: str, mapping: Mapping[Placeholder, Variable]) -> str:
        facts = list(self._pddl_state.facts)
        return self._logic.grammar.derive(rule, make_context(self._pddl_state, self._entity_infos, facts, mapping))

    def _gather_infos(self) -> None:
        state, facts = self._pddl_state, list(self._pddl_state.facts)
        names = {name: info.name for name, info in self._entity_infos.items()}
        actions, commands = state.commands(self._entity_infos, names, facts)
        self.state.update({
            "command_templates": sorted({action.template for action in self._logic.actions.values()}),
            "won": state.check_goal(),
            "lost": False,
            "_entity_infos": dict(self._entity_infos),
            "_facts": facts,
            "last_action": None,
            "_last_action": self._last_action,
            "_valid_actions": actions,
            "_valid_commands": commands,
            "admissible_commands": sorted(set(commands)),
        })
        if self.request_infos.facts:
            for fact in facts:
                if fact not in self._readable_facts:
                    self._readable_facts[fact] = self._get_human_readable_fact(fact)
            self.state["facts"] = [self._readable_facts[fact] for fact in facts]
        if self.request_infos.moves:
            self.state["moves"] = self._moves
        if self.request_infos.policy_commands:
            self.state["policy_commands"] = state.replan(self._entity_infos)
