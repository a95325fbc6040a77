"""Plots about courage: rescue, afraid, truth, garden, race, night noise.    Read `plots.py` first."""

from __future__ import annotations

from cast import Beat

RESCUE: tuple[Beat, ...] = (
    (
        "One {weather.adjective} {time} {hero} heard someone cry. It was {baby}, a {little} {baby.kind}, {trap.where}.",
        (
            'On the way to {goal}, {hero} heard a thin voice. "Help! I am stuck!" A(n) {baby.kind} named {baby} sat '
            "{trap.where}."
        ),
        "{hero} and {friend} the {friend.kind} were playing {place} when they saw {baby} the {baby.kind} {trap.where}.",
    ),
    (
        '"Do not be afraid, {baby}! I will get help," {cried} {hero}.',
        '"Hold on, {baby}!" {cried} {hero}. "I will be back {soon}."',
        (
            '{baby} was very {sad}. "How did you get there, {baby}?" {asked} {hero}. "I wanted to see the world," '
            "{whispered} {baby}."
        ),
    ),
    (
        "{hero} pulled and pushed, but {hero.they} was not strong enough.",
        "{hero} tried alone, but it did not work.",
        "",
    ),
    (
        (
            '{hero} {went} to {helper} the {helper.kind}. "{helper}, {baby} is {trap.where}!" "Then we need a(n) '
            '{trap.tool}," {answered} {helper}.'
        ),
        (
            '{helper} the {helper.kind} heard the noise. "What has happened, {hero}?" {asked} {helper}. "{baby} is '
            'stuck. Do you have a(n) {trap.tool}?" {answered} {hero}.'
        ),
    ),
    (
        "{helper} fetched the {trap.tool}. {trap.rescue}.",
        "They found a(n) {trap.tool} {hideout} and hurried back. {trap.rescue}.",
    ),
    (
        '{soon} {baby} was safe. "Thank you, {hero}! Thank you, {helper}!" {cried} {baby}.',
        '"You saved me!" {cried} {baby} and jumped into the arms of {hero}.',
        "{baby} was free! {helper} {smiled}, and {hero} danced with joy.",
    ),
    (
        (
            'Some days later {hero} lost {hero.their} {colour} {thing}. "Now it is my turn to help," said {baby}, and '
            "found the {colour} {thing} {hideout}."
        ),
        '"Next time, ask before you go, {baby}," said {helper}. "I promise, {helper}," {answered} {baby}.',
        "Since then, {baby} the {baby.kind} follows {hero} wherever {hero.they} goes.",
    ),
    (
        "",
        "Nobody is too small to be a friend.",
        "And the {trap.tool} hangs in the {home} to this day.",
        "It is brave to help, and it is clever to ask for help.",
    ),
)

AFRAID: tuple[Beat, ...] = (
    (
        "{hero} was not afraid of much, but {hero.they} was afraid of {fear.of}.",
        "There was one thing {hero} did not like at all: {fear.of}.",
        "Everybody knew that {hero} was afraid of {fear.of}.",
    ),
    (
        "{fear.scene}, {hero} trembled and hid {hideout}.",
        "{fear.scene}, {hero} wanted to run home.",
        "{friend} the {friend.kind} laughed about it, and that made {hero} even more {sad}.",
    ),
    (
        (
            'One {time} {hero} talked to {helper} the {helper.kind}. "I am afraid of {fear.of}, {helper}," {hero.they} '
            "{whispered}."
        ),
        (
            '"What is the matter, {hero}?" {asked} {helper} the {helper.kind}. "It is {fear.of}, {helper}. I am so '
            'afraid," {answered} {hero}.'
        ),
    ),
    (
        '"I was afraid of {fear.of} too, {hero}," {answered} {helper}. "{fear.advice}."',
        '{helper} {smiled}. "Everyone is afraid of something, {hero}. {fear.advice}."',
        '"Take this {colour} {thing} with you, {hero}," said {helper}. "And remember: {fear.advice}."',
    ),
    (
        "{soon} the day came. {fear.scene}, {hero} remembered what {helper} had said and {fear.done}.",
        "The very next {time} it happened again. {fear.scene}, {hero} wanted to cry. But then {hero.they} {fear.done}.",
    ),
    (
        "And look, the fear grew smaller and smaller, until it was as small as a(n) {food.one}.",
        "It helped! {hero.their} heart beat slowly again.",
        '"I can do it!" {cried} {hero}.',
    ),
    (
        (
            '{baby}, a {little} {baby.kind}, was afraid of {fear.of} as well. "{fear.advice}, {baby}," said {hero}, '
            "and it worked again."
        ),
        (
            '{friend} the {friend.kind} was surprised. "How did you do that, {hero}?" {asked} {friend}. "{helper} told '
            'me: {fear.advice}," {answered} {hero}.'
        ),
        "{helper} was {happy} and gave {hero} {prize}.",
    ),
    (
        "",
        "Now {hero} is no longer afraid of {fear.of}.",
        "To be brave is to be afraid and to do it anyway.",
    ),
)

TRUTH: tuple[Beat, ...] = (
    (
        (
            'One {weather.adjective} {time} {hero} visited {helper} the {helper.kind}. "Play quietly, {hero}," said '
            "{helper}."
        ),
        "{hero} was alone in the house of {helper} the {helper.kind}.",
        (
            "{helper} the {helper.kind} had a(n) {colour} {pot.noun} and loved it very much. One {time} {hero} came to "
            "play."
        ),
    ),
    (
        "But {hero} {pot.accident}.",
        "{hero} {pot.accident}. Oh no!",
        '"Watch me, {friend}!" {cried} {hero} to {friend} the {friend.kind}. Then {hero} {pot.accident}.',
    ),
    (
        "{hero} swept up the pieces and hid them {hideout}.",
        "{hero} was so {sad} that {hero.they} ran away and hid {hideout}.",
        '"Nobody saw it," {whispered} {hero}. But {hero.their} heart was heavy.',
    ),
    (
        '{soon} {helper} came. "Who broke my {pot.noun}?" {asked} {helper}. {hero} said nothing.',
        '"Was it the wind that broke the {pot.noun}?" {asked} {helper}. {hero} looked at the floor.',
    ),
    (
        "That night {hero} could not sleep, and ate not one {food.one} in the morning.",
        (
            '"What should I do, {friend}?" {asked} {hero}. "Tell the truth, {hero}," {answered} {friend}, who was a '
            "wise {friend.kind}."
        ),
        "",
    ),
    (
        'At last {hero} {went} to {helper}. "It was me, {helper}. I broke the {pot.noun}," said {hero}.',
        '"I must tell you something, {helper}," {whispered} {hero}. "I {pot.accident}. I am sorry."',
    ),
    (
        '"It takes courage to say that, {hero}," said {helper}. "A(n) {pot.noun} is only a(n) {pot.noun}."',
        '{helper} {smiled}. "I knew it, {hero}. But I wanted to hear it from you."',
        '{helper} was not angry at all. "Thank you for the truth, {hero}," said {helper}.',
    ),
    (
        "To make it good, {hero} {chore.done} for {helper} every {time}.",
        '"You can {chore.ask}, and we are even," said {helper}. So {hero} {chore.done}.',
        "{hero} saved every coin and {soon} bought a new {pot.noun} for {helper}. It was {colour}.",
    ),
    (
        "",
        "The truth is light, and a lie is heavy.",
        "And {hero} never hid anything {hideout} again.",
    ),
)

GARDEN: tuple[Beat, ...] = (
    (
        '{helper} the {helper.kind} gave {hero} a(n) {crop.seed}. "Plant it, {hero}, and be patient," said {helper}.',
        "One {time} {hero} found a(n) {crop.seed} {hideout} and planted it {place}.",
        (
            '"What is this, {helper}?" {asked} {hero}. "A(n) {crop.seed}," {answered} {helper} the {helper.kind}. So '
            "{hero} planted it {place}."
        ),
    ),
    (
        "{hero} watered it every day from a(n) {colour} cup.",
        '"Grow!" {cried} {hero}. But nothing happened for {count.all} days.',
        (
            '{friend} the {friend.kind} came to look. "There is nothing there, {hero}," said {friend}. "Wait and see, '
            '{friend}," {answered} {hero}.'
        ),
    ),
    (
        "On a(n) {weather.adjective} {time}, a green leaf came out of the earth, and {soon} there were {count.all}.",
        "Then, {count.all} weeks later, there were {count.all} green leaves.",
    ),
    (
        "But a(n) {thief.kind} came in the night and ate from it. Now only {count.less_one} leaves were left.",
        '"Someone has eaten my leaves!" {cried} {hero}. It was a hungry {thief.kind}.',
    ),
    (
        (
            '"What can I do against a(n) {thief.kind}, {helper}?" {asked} {hero}. "{thief.trick}," {answered} {helper} '
            "the {helper.kind}."
        ),
        '"{thief.trick}, {hero}," said {friend}, a(n) {friend.kind} who knew all about it.',
        "{hero} was {sad}, but {hero.they} had an idea.",
    ),
    (
        "So {hero} {thief.done}, and the {thief.kind} never came back.",
        "{hero} {thief.done}. After that, the {thief.kind} found another supper.",
    ),
    (
        "In autumn, the {crop.seed} had become {crop.harvest}.",
        "All summer long it grew, and {soon} {hero} had {crop.harvest}.",
        '"Look!" {cried} {hero} at last. There was {crop.harvest}!',
    ),
    (
        "They made {crop.meal} out of it, enough for all the neighbours.",
        (
            '{hero} cooked {crop.meal} and asked {helper} the {helper.kind} to supper. "This is the best {crop.meal} '
            'of my life, {hero}," said {helper}.'
        ),
        "Even the {thief.kind} got a bit of the {crop.meal}.",
    ),
    (
        "",
        "Good things take time.",
        "And {hero} kept one {crop.seed} for the next year.",
    ),
)

RACE: tuple[Beat, ...] = (
    (
        "Every year there was a race to {goal}, and the winner got {prize}. {hero} wanted to win.",
        (
            '"I am faster than you, {hero}," said {friend} the {friend.kind}. "Let us race to {goal}, {friend}!" '
            "{answered} {hero}."
        ),
        '{helper} the {helper.kind} held up {prize}. "Who is first at {goal} shall have it!"',
    ),
    (
        "{hero} wore a(n) {colour} cap so that everyone could see {hero.them}.",
        "{hero} ate {count.all} {food.many} to be strong.",
        "",
    ),
    (
        (
            '"One, two, three, go!" {cried} {helper} the {helper.kind}. {hero} ran as fast as the wind, and {friend} '
            "the {friend.kind} was close behind."
        ),
        "They all ran. {friend} the {friend.kind} was first, and {hero} was second.",
        "At the start {hero} was slow, but {soon} {hero.they} passed everyone, even {friend} the {friend.kind}.",
    ),
    (
        "Then {hero} heard a cry. {baby}, the smallest {baby.kind}, had fallen {place}.",
        'Suddenly {friend} stumbled and fell. "Ouch, my foot!" {cried} {friend}.',
    ),
    (
        "{hero} looked at {goal}. It was so near! But {hero.they} turned around.",
        '"Run on, {hero}!" {cried} the people. But {hero} stopped.',
        "What was more important, to win or to help? {hero} did not think long.",
    ),
    (
        (
            "{hero} washed the wound and tied {hero.their} {colour} scarf around it. They {went} to {goal} together, "
            "very slowly."
        ),
        '"Lean on me," said {hero}. Step by step they came to {goal}, last of all.',
    ),
    (
        (
            'But everyone clapped. "The prize is for the kindest heart," said {helper} the {helper.kind} and gave '
            "{hero} {prize}."
        ),
        '"You are the real winner, {hero}," said {helper} the {helper.kind}. {hero} got {prize}, and everyone cheered.',
        "Somebody else had won {prize}. But {hero} had won a friend.",
    ),
    (
        "",
        "Winning is nice, but helping is better.",
        "{hero} never forgot the race to {goal}.",
    ),
)

NIGHT_NOISE: tuple[Beat, ...] = (
    (
        "One night {hero} heard {noise.sound}.",
        "{evening}, when all was still, there was {noise.sound} in the house.",
        "{hero} lay in bed and could not sleep. What was that? It was {noise.sound}.",
    ),
    (
        '"It must be {noise.guess}!" thought {hero} and pulled up the {colour} blanket.',
        (
            '"Do you hear it, {friend}?" {whispered} {hero}. "I think it is {noise.guess}," {answered} {friend} the '
            "{friend.kind}."
        ),
    ),
    (
        "{hero} took a(n) {colour} stick in one hand and a candle in the other.",
        "{hero} {went} on tiptoe to the door, with a(n) {colour} candle in {hero.their} hand.",
        '"I must look," said {hero}, and {hero.their} voice trembled.',
    ),
    (
        "There it was again: {noise.sound}. Slowly, {hero} came closer.",
        "{hero} looked {hideout}, but there was only {junk}. Then the sound came again.",
    ),
    (
        "And what was it? Not {noise.guess}, but {noise.truth}!",
        "{hero} held up the light and laughed. It was only {noise.truth}.",
        '"You are not {noise.guess} at all!" {cried} {hero}. It was {noise.truth}.',
    ),
    (
        '"All you need is {noise.kindness}," said {hero}.',
        'The next {time} {helper} the {helper.kind} laughed. "What you need is {noise.kindness}, {hero}."',
    ),
    (
        "So it got {noise.kindness}, and the nights were quiet again.",
        "{hero} gave it {noise.kindness}, and everyone slept well.",
    ),
    (
        "",
        "In the dark, small things seem big.",
        "When {hero} hears {noise.sound} today, {hero.they} only smiles.",
    ),
)
