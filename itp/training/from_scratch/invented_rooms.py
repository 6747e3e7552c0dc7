"""Episodes in invented rooms: nothing about them can be known by heart, so what is seen again must be copied.

A small model that learns real rooms remembers them instead of reading back.  Here every episode has its own contents.
A place that was seen is visited again, and meanwhile objects may be taken and put down elsewhere.  The rooms' places
are those of real episodes, the contents are random, and the sentences are the engine's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from itp.envs.alfworld.vocabulary import object_types, place_types
from itp.text import alfworld_phrases as phrases
from itp.text.kinds import kind_of
from itp.text.state import ACTION, OBSERVATION, State, parse
from itp.training.examples import Example
from itp.transitions import Transition

_COUNTS = (0, 1, 1, 2, 2, 3, 4, 5, 6, 8)
"""How many things may lie in a place."""
_NUMBERS = range(1, 7)


class InventedRoom:
    """Some places of a real room, with random contents.  One acts in it as in the engine."""

    def __init__(self, places: Sequence[str], draw: random.Random) -> None:
        things = [f"{kind} {number}" for kind in object_types() for number in _NUMBERS]
        draw.shuffle(things)
        self.contents = {place: {things.pop() for _ in range(draw.choice(_COUNTS))} for place in places}
        self.closed = {place for place in places if place_types().get(phrases.kind(place))}
        self.openable = frozenset(self.closed)
        self.at = self.hand = ""

    def go(self, place: str) -> str:
        self.at = place
        return f"{phrases.arrived(place)} {self._sight()}"

    def open(self) -> str:
        self.closed.remove(self.at)
        return f"You open the {self.at}. {self._sight()}"

    def close(self) -> str:
        self.closed.add(self.at)
        return f"You close the {self.at}."

    def take(self, thing: str) -> str:
        self.contents[self.at].remove(thing)
        self.hand = thing
        return phrases.picked_up(thing, self.at)

    def move(self) -> str:
        self.contents[self.at].add(self.hand)
        thing, self.hand = self.hand, ""
        return phrases.moved(thing, self.at)

    def inventory(self) -> str:
        return f"{phrases.CARRIES} a {self.hand}." if self.hand else "You are not carrying anything."

    def _sight(self) -> str:
        if self.at in self.closed:
            return f"The {self.at} is closed."
        head = f"The {self.at} is open. In it" if self.at in self.openable else f"On the {self.at}"
        return f"{head}{phrases.SEES}{phrases.listed(self.contents[self.at])}."


def invented_episode(start: State, name: str, steps: int, change: float, draw: random.Random) -> list[Transition]:
    """An episode of ``steps`` steps in some of the places that ``start`` lists, most of them visited several times.

    ``change``: the probability of doing something with an object or a door where one stands, instead of going on.
    """
    listing = phrases.receptacles(start.first)
    places = draw.sample(listing, min(len(listing), draw.randint(2, 9)))
    room, state, rows = InventedRoom(places, draw), start, []
    for step in range(steps):
        action, answer = _act(room, places, change, draw)
        rows.append(Transition(name, step, state.render(), action, answer, source="invented"))
        state = state.after(action, answer)
    return rows


def _act(room: InventedRoom, places: Sequence[str], change: float, draw: random.Random) -> tuple[str, str]:
    """A random action, and the answer to it."""
    here = room.at
    if here in room.closed and draw.random() < 0.8:
        return f"open {here}", room.open()
    if here and here not in room.closed and draw.random() < change:
        options = [*(("take", thing) for thing in sorted(room.contents[here]) if not room.hand),
                   *[("move", room.hand)] * 4 * bool(room.hand), ("inventory", ""),
                   *[("close", "")] * (here in room.openable)]
        what, thing = draw.choice(options)
        if what == "take":
            return phrases.take(thing, here), room.take(thing)
        if what == "move":
            return phrases.move(thing, here), room.move()
        return ("inventory", room.inventory()) if what == "inventory" else (f"close {here}", room.close())
    place = draw.choice([place for place in places if place != here])
    return phrases.go_to(place), room.go(place)


def memory_exercises(episodes: Sequence[Sequence[Transition]], count: int, seed: int,
                     change: float = 0.0) -> Iterator[Example]:
    """``count`` episodes in invented rooms as pretraining exercises: what is seen again is learned, and what is held.

    ``episodes`` of ALFWorld give the rooms' places.  The answer to an action isn't learned: the engine refuses to put
    a pot into a garbage can, and an invented room doesn't.
    """
    starts = list(map(parse, dict.fromkeys(episode[0].state for episode in episodes)))
    for episode in invented_episodes(starts, count, seed, change):
        segments = [(episode[0].state, False)]
        for t in episode:
            learned = kind_of(parse(t.state), t.action, t.next_state) in ("revisit", "inspect")
            segments += [(f"\n{ACTION}{t.action}\n{OBSERVATION.rstrip()}", False), (f" {t.next_state}", learned)]
        yield Example(segments, eos=False, keep_first=True, group=episode[0].episode_id)


def invented_episodes(starts: Sequence[State], count: int, seed: int, change: float) -> Iterator[list[Transition]]:
    """``count`` episodes of 6 to 24 steps, in the rooms of ``starts``; none where these list no places."""
    draw = random.Random(f"invented {seed}")
    starts = [start for start in starts if len(phrases.receptacles(start.first)) > 1]
    for number in range(count if starts else 0):
        yield invented_episode(draw.choice(starts), f"invented {number}", draw.randint(6, 24), change, draw)
