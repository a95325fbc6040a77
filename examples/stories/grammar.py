"""Short children's stories from a grammar of our own.

    story = plot, a sequence of beats; beat = alternative sentences; sentence = text with {roles} in it

A role is drawn when it is first mentioned and remembered to the end of the story, so the red ball stays red and
whoever spoke is answered by name. Every draw goes through `Dice`, which adds up the surprise of what it chose:
no model of these stories can, on average, need fewer nats for a story than a small amount below that sum (a
little below, because two derivations may print the same text). A story's split is decided by a checksum of its
text: no story can be in both.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple, TypeVar

from cast import ANIMALS, CHILDREN, NEIGHBOURS
from plots import ASIDES, CLOSINGS, OPENINGS, PLOTS
from words import ROLES, SYNONYMS

T = TypeVar("T")
HELD_OUT_ONE_IN = 16  # of all stories, one in so many is held out of training


class Dice:
    """Draws from a seeded generator and adds up the surprise of the draws, in nats."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"stories {seed}")
        self.nats = 0.0

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        self.nats += math.log(len(options))
        return options[self._random.randrange(len(options))]


class Scene(Mapping[str, object]):
    """What the placeholders of one story stand for: a role is remembered, a synonym is drawn anew."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._roles: dict[str, object] = {}

    def __getitem__(self, role: str) -> object:
        if role in SYNONYMS:
            return self._dice.pick(SYNONYMS[role])
        if role not in self._roles:
            self._roles[role] = self._cast(role)
        return self._roles[role]

    def _cast(self, role: str) -> object:
        if role == "hero":
            return self._dice.pick(self._dice.pick((CHILDREN, ANIMALS)))
        if role == "friend":
            hero = self._roles.get("hero")
            return self._dice.pick([one for one in self._dice.pick((NEIGHBOURS, ANIMALS)) if one.name != f"{hero}"])
        return self._dice.pick(ROLES[role])

    def __iter__(self) -> Iterator[str]:
        return iter((*ROLES, *SYNONYMS))

    def __len__(self) -> int:
        return len(ROLES) + len(SYNONYMS)


class Story(NamedTuple):
    """A finished story: its seed, its text, the name of its plot, and the surprise of its derivation in nats."""

    seed: int
    text: str
    plot: str
    nats: float


def polish(text: str) -> str:
    """Settle a(n) by the next letter, and begin every sentence with a capital.    "a(n) owl. she" -> "an owl. She"."""
    text = re.sub(r"\b([aA])\(n\) (?=[aeiouAEIOU]|honest)", r"\1n ", text).replace("(n)", "")
    return re.sub(r'(^|[.!?] |\." )([a-z])', lambda start: start[1] + start[2].upper(), text)


def tell(seed: int) -> Story:
    """The story of a seed; the same one on every machine."""
    dice = Dice(seed)
    scene = Scene(dice)
    plot = dice.pick(tuple(PLOTS))
    beats = (OPENINGS, ASIDES, *PLOTS[plot], CLOSINGS)
    sentences = [dice.pick(beat).format_map(scene) for beat in beats]
    text = polish(" ".join(sentence for sentence in sentences if sentence))
    return Story(seed, text, plot, dice.nats)


def is_held_out(text: str) -> bool:
    """Whether a story is kept from training: decided by its text alone."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def stories(held_out: bool, first_seed: int = 0) -> Iterator[Story]:
    """The endless stories of one split, in the order of their seeds."""
    for seed in count(first_seed):
        story = tell(seed)
        if is_held_out(story.text) == held_out:
            yield story
