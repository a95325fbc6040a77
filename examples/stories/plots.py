"""The plots of the stories: each a sequence of beats, each beat a choice of sentences.

Placeholders name roles and synonyms of `words.py`, with `a(n)` where the next word decides. An empty sentence
makes a beat optional. A sentence begins with a capital by itself, except after a quotation.
"""

from __future__ import annotations

from cast import Beat
from plots_of_courage import AFRAID, GARDEN, NIGHT_NOISE, RACE, RESCUE, TRUTH
from plots_of_friendship import BAKING, LOST_AND_FOUND, OUTING, QUARREL, SHARING

OPENINGS: Beat = (
    (
        "Once upon a time there was a(n) {trait.adjective} {hero.kind} named {hero} who lived in a(n) {home}. {hero} "
        "{trait.habit}."
    ),
    "Once upon a time, in a(n) {home}, lived a(n) {trait.adjective} {hero.kind}. {hero.their} name was {hero}.",
    "Once upon a time there was a(n) {hero.kind} named {hero}. {hero} was {trait.adjective} and {trait.habit}.",
    "Once upon a time, a {little} {hero.kind} named {hero} lived in a(n) {home}. {weather.morning} that {time}.",
    (
        "Once upon a time, on a(n) {weather.adjective} {time}, a {little} {hero.kind} named {hero} stood at the door "
        "of a(n) {home}."
    ),
    "There once was a {little} {hero.kind} named {hero}. {hero.their} home was a(n) {home}.",
    "Long ago, in a(n) {home}, there lived a(n) {trait.adjective} {hero.kind} named {hero}.",
    (
        "It was a(n) {weather.adjective} {time}. {weather.morning}. {hero}, a(n) {trait.adjective} {hero.kind}, "
        "looked out of the window."
    ),
)

CLOSINGS: Beat = (
    "",
    "Then they all had {food.many} and were {happy}.",
    "{evening}, {weather.evening}, and {hero} fell asleep with a smile.",
    "{hero} {went} home to the {home}, tired and {happy}.",
    '"{trait.praise}, {hero}!" said everyone, and {hero} was {happy}.',
    "And they lived happily ever after.",
    "And when {weather.evening}, {hero} was still awake, thinking about it all.",
    "{hero} told the whole story at home, in the {home}, and nobody wanted to go to bed.",
)

ASIDES: Beat = (
    "",
    "{hero} liked three things best: {food.many}, {colour} flowers and a good story.",
    "In the pocket of {hero.their} {colour} coat {hero} always had a(n) {food.one}.",
    "Everybody in the village knew {hero}, for {hero.they} {trait.habit}.",
    "{hero.their} bed stood by the window, and on it lay a(n) {colour} pillow.",
    "For breakfast there was bread with butter, and a(n) {food.one}.",
    "{helper} the {helper.kind} lived next door and told the best stories.",
    '"Never stand still," {hero.their} mother liked to say, and {hero} never did.',
)

PLOTS: dict[str, tuple[Beat, ...]] = {
    "lost and found": LOST_AND_FOUND,
    "sharing": SHARING,
    "baking": BAKING,
    "rescue": RESCUE,
    "afraid": AFRAID,
    "quarrel": QUARREL,
    "outing": OUTING,
    "truth": TRUTH,
    "garden": GARDEN,
    "race": RACE,
    "night noise": NIGHT_NOISE,
}
