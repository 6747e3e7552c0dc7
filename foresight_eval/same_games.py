"""Were results made on the same games?  Only then their rates say which method is better."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from foresight_eval.results import Result
from itp.errors import UserError


def check_same_games(results: Sequence[Result], *, allow_mixed: bool) -> None:
    """Raises UserError where two of ``results`` are of different panels or games.

    ``allow_mixed``: only where one name stands for two different games, since a comparison game by game would be wrong.
    """
    for first, other in itertools.combinations([result for result in results if result.records], 2):
        pair = f"{first.name} and {other.name}"
        if name := _two_games_of_one_name(first, other):
            raise UserError(f"{pair} played different games that are both called {name}; compare results of the same "
                            "games only")
        if not allow_mixed and (why := _difference(first, other)):
            raise UserError(f"{pair} {why}; give results of the same games, or --allow_mixed to compare those that "
                            "both played")


def _two_games_of_one_name(one: Result, other: Result) -> str:
    """The first name of two games; results of before there were hashes aren't looked at."""
    hashes = [{(meta["split"], meta["game_id"]): meta["game_hash"] for meta in each.metas if meta.get("game_hash")}
              for each in (one, other)]
    return next((game_id for (split, game_id), found in hashes[0].items()
                 if hashes[1].get((split, game_id), found) != found), "")


def _difference(one: Result, other: Result) -> str:
    if one.panel != other.panel:
        return f"are of different panels ({one.panel or 'none'}; {other.panel or 'none'})"
    games = [set(one.outcomes), set(other.outcomes)]
    if games[0] == games[1]:
        return ""
    return (f"played different games: {len(games[0])} and {len(games[1])}, of which {len(games[0] & games[1])} are the "
            "same")
