"""What stories are made of: the kinds of rows in `words.py`, and the characters who act in them."""

from __future__ import annotations

from typing import NamedTuple

Beat = tuple[str, ...]  # the sentences that may tell one step of a plot


class Character(NamedTuple):
    """Someone who acts and speaks; prints as the name, carries the pronouns that agree with it."""

    name: str
    kind: str
    they: str
    them: str
    their: str

    def __format__(self, spec: str) -> str:
        return self.name


class Thing(NamedTuple):
    """Something one can own, lose and break; prints as its noun. `broke` and `cure` are what happens to it."""

    noun: str
    broke: str
    cure: str

    def __format__(self, spec: str) -> str:
        return self.noun


class Weather(NamedTuple):
    """A day outside: its adjective, the sky in the morning, the same sky in the evening."""

    adjective: str
    morning: str
    evening: str


class Trait(NamedTuple):
    """What someone is like, the habit that shows it, and what others say of it in the end."""

    adjective: str
    habit: str
    praise: str


class Food(NamedTuple):
    """Something to pick and to share, one and many."""

    one: str
    many: str


class Count(NamedTuple):
    """A number and the numbers left when one, then another, is given away."""

    all: str
    less_one: str
    less_two: str


class Dish(NamedTuple):
    """Something to bake, what is missing for it, and how it smells."""

    name: str
    missing: str
    smell: str


class Chore(NamedTuple):
    """Work a helper asks for, and the same work done."""

    ask: str
    done: str


class Trap(NamedTuple):
    """Where a little one is stuck, the tool that helps, and how it is used."""

    where: str
    tool: str
    rescue: str


class Fear(NamedTuple):
    """What someone fears, when it comes, the advice against it, and how the advice is followed."""

    of: str
    scene: str
    advice: str
    done: str


class Storm(NamedTuple):
    """Weather that spoils a plan: how it comes, how it ends."""

    comes: str
    ends: str


class Pastime(NamedTuple):
    """Something to do while waiting, as a plan and as a deed."""

    plan: str
    done: str


class Pot(NamedTuple):
    """Something that breaks while someone plays: the thing and how it happened."""

    noun: str
    accident: str


class Crop(NamedTuple):
    """Something to grow: its seed, its first leaves, its harvest, what it becomes in the kitchen."""

    seed: str
    harvest: str
    meal: str


class Thief(NamedTuple):
    """Who eats a garden, and what keeps it away kindly."""

    kind: str
    trick: str
    done: str


class Noise(NamedTuple):
    """A sound in the night, what one fears it is, and what made it."""

    sound: str
    guess: str
    truth: str
    kindness: str


def characters(kinds: str, names: str, they: str, them: str, their: str) -> tuple[Character, ...]:
    """Every name as every kind, both written as words with spaces between."""
    return tuple(Character(n, k, they, them, their) for k in kinds.split() for n in names.split())


def phrases(text: str) -> tuple[str, ...]:
    """The phrases of a list in commas.    "red, blue" -> ("red", "blue")"""
    return tuple(text.split(", "))


SHE = ("she", "her", "her")
HE = ("he", "him", "his")
ANIMAL_KINDS = "fox hare otter mouse badger hedgehog squirrel owl frog duck beaver mole rabbit goat pony wren"
CHILDREN = characters("girl", "Mira Anna Lily Elsa Nora Ida Ruby Wanda Zoe Tilda Greta Maya Dora Ines Olive Sana", *SHE)
CHILDREN += characters("boy", "Tom Otto Ben Leo Karl Amir Hugo Finn Emil Noah Samir Jonas Paul Igor Max Arlo", *HE)
NEIGHBOURS = characters("shepherd sailor juggler piper drummer", "Frieda Lotte Alma Carla Vera Edda Rita Jette", *SHE)
NEIGHBOURS += characters("shepherd sailor juggler piper drummer", "Oskar Anton Felix Bruno Jakob Mats Theo Viktor", *HE)
ANIMALS = characters(ANIMAL_KINDS, "Hazel Poppy Fern Juniper Clover Tansy Willow Mabel Pearl Dot", *SHE)
ANIMALS += characters(ANIMAL_KINDS, "Pip Bramble Moss Rusty Acorn Thistle Basil Nutkin Flint Button", *HE)
BABIES = characters("duckling kitten lamb puppy gosling owlet fawn cub chick piglet", "Bibi Lulu Mimi Nell", *SHE)
BABIES += characters("duckling kitten lamb puppy gosling owlet fawn cub chick piglet", "Bo Dodo Tipp Momo", *HE)
HELPERS = tuple(
    Character(f"{title} {name}", job, *pronouns)
    for titles, names, pronouns in (
        ("Grandma Aunt", "Rose Maple Marigold Ivy Agnes Ursula", SHE),
        ("Grandpa Uncle", "Birch Reed Wick Stone Bernard Gustav", HE),
    )
    for title in titles.split()
    for name in names.split()
    for job in ("baker", "miller", "farmer", "gardener", "carpenter", "fisher", "teacher", "weaver")
)
