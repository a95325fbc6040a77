"""Plots about friends: lost and found, sharing, baking, quarrel, outing.    Read `plots.py` first."""

from __future__ import annotations

from cast import Beat

LOST_AND_FOUND: tuple[Beat, ...] = (
    (
        "{hero} had a(n) {colour} {thing} and took it everywhere.",
        "For {hero.their} birthday {hero} got a(n) {colour} {thing}. {hero.they} loved it very much.",
        "Of all the things {hero} owned, {hero.they} loved {hero.their} {colour} {thing} the most.",
    ),
    (
        "One {time} {hero} played {place}. When it was time to go home, the {thing} was gone.",
        (
            "One {weather.adjective} {time} {hero} {went} out to play {place}. But {soon} the {colour} {thing} was "
            "nowhere to be seen."
        ),
        "Then, one {time} {place}, {hero} looked around and could not find the {thing}.",
    ),
    (
        "{hero} looked everywhere, but found only {junk}.",
        "{hero.they} looked and looked. {hero.they} found {junk}, but no {thing}.",
        "{hero} was so {sad} that {hero.they} sat down and cried.",
        '"Where is my {thing}?" {cried} {hero}. Nobody answered.',
    ),
    (
        (
            '{friend} the {friend.kind} came along. "Why are you so {sad}, {hero}?" {asked} {friend}. "I have lost my '
            '{colour} {thing}," {answered} {hero}.'
        ),
        'Then {hero} met a(n) {friend.kind} named {friend}. "Have you seen a(n) {colour} {thing}?" {asked} {hero}.',
        (
            '"What are you looking for, {hero}?" {asked} {friend}, a(n) {friend.kind} from next door. "My {thing}! It '
            'is {colour}," {answered} {hero}.'
        ),
    ),
    (
        '"I saw something {colour} {hideout}," said {friend}. So they {went} there together.',
        '"Let us look {hideout}, {hero}," said {friend}. "Lost things like to hide there."',
        (
            '"I have not seen it, {hero}. But {helper} knows every corner," {answered} {friend}. So they {went} to '
            '{helper} the {helper.kind}. "Look {hideout}," {answered} {helper}.'
        ),
    ),
    (
        "And there it was! The {thing} lay {hideout}, as {colour} as ever.",
        "They looked {hideout}, and there was the {colour} {thing}.",
        '{friend} was the first to see it. "There, {hideout}!" {cried} {friend}. It was the {colour} {thing}.',
    ),
    (
        '"Thank you, {friend}! You are a true friend," {answered} {hero}.',
        '"Oh, {friend}, you found my {thing}!" {cried} {hero} and {smiled}.',
        '{hero} gave {friend} a big hug. "Now you may play with the {thing} too, {friend}," said {hero}.',
    ),
    (
        "",
        "From that day on {hero} kept the {colour} {thing} {keep}.",
        "And {hero} learned that four eyes see more than two.",
        "After that, {hero} and {friend} were friends, and the {thing} was never lost again.",
    ),
)

SHARING: tuple[Beat, ...] = (
    (
        "One {time} {hero} picked {count.all} {food.many} and put them into a(n) {colour} basket.",
        "One {weather.adjective} {time} {helper} the {helper.kind} gave {hero} {count.all} {food.many}.",
        "{hero} had {count.all} {food.many} and wanted to eat them all alone {place}.",
    ),
    (
        "On the way home {hero} met {friend} the {friend.kind}, who looked hungry.",
        "{hero} sat down {place}. {soon} a(n) {friend.kind} named {friend} came by and looked at the {food.many}.",
        "Just then {friend}, a {little} {friend.kind}, came along the road. {friend.they} had not eaten all day.",
    ),
    (
        '"May I have one {food.one}, please?" {asked} {friend}.',
        '"I am so hungry, {hero}," {whispered} {friend}.',
        '"What lovely {food.many} you have," said {friend}. "I have none."',
    ),
    (
        (
            '"Of course, {friend}," {answered} {hero} and gave {friend.them} one {food.one}. Now {hero} had '
            "{count.less_one} {food.many} left."
        ),
        (
            '"No, they are mine!" {cried} {hero}. {friend} {went} away, and {hero} felt {sad}. "Wait, {friend}! I was '
            'wrong. Take one," {hero} called. Now there were {count.less_one} left.'
        ),
        '{hero} thought for a moment. "Here, {friend}, take one," {hero.they} said. That left {count.less_one}.',
    ),
    (
        "",
        "{baby} the {baby.kind} was hungry too, and got another {food.one}. Then there were only {count.less_two}.",
        (
            'A(n) {baby.kind} named {baby} cried in the grass. "Here is a(n) {food.one} for you, {baby}," said {hero}, '
            "and {count.less_two} remained."
        ),
    ),
    (
        "They ate together, and the {food.many} tasted better than ever.",
        "They sat {place}, ate, and laughed.",
        '"How good it is to eat together," said {friend}.',
    ),
    (
        (
            "The next day {hero} was hungry and had nothing at all. {friend} came with a whole basket of {food.many}. "
            '"These are for you, {hero}," said {friend}.'
        ),
        (
            "A week later {friend} knocked at the door of the {home} with a big surprise: a(n) {colour} {thing} for "
            "{hero}!"
        ),
        '"Come, {hero}, I will show you something," said {friend}. {hideout} stood a whole basket of {food.many}.',
    ),
    (
        "",
        "{hero} learned that a shared {food.one} is twice as sweet.",
        "Who shares has always enough.",
        "Since then {hero} never eats {food.many} alone.",
    ),
)

BAKING: tuple[Beat, ...] = (
    (
        "It was the birthday of {friend} the {friend.kind}, and {hero} wanted to make {dish.name}.",
        '"Tomorrow is the birthday of my friend {friend}," said {hero}. "I will make {dish.name}!"',
        "{hero} wanted to surprise {hero.their} friend {friend}, a(n) {friend.kind}, with {dish.name}.",
    ),
    (
        "But there was no {dish.missing} in the kitchen.",
        "{hero} opened every cupboard, and found {junk}, but no {dish.missing}.",
        "Everything was ready, only the {dish.missing} was missing.",
    ),
    (
        'So {hero} {went} to {helper} the {helper.kind}. "Do you have some {dish.missing}, {helper}?" {asked} {hero}.',
        (
            '{hero} knocked at the door of {helper}, the {helper.kind}. "Please, {helper}, may I have some '
            '{dish.missing}?"'
        ),
    ),
    (
        '"Yes, {hero}, if you {chore.ask}," {answered} {helper}. So {hero} {chore.done}.',
        (
            '"Nothing is free, {hero}," {answered} {helper} and {smiled}. "First {chore.ask}." {hero} {chore.done} and '
            "sang a song."
        ),
        (
            '"I am tired today," said {helper}. "If you {chore.ask}, {hero}, you shall have it." {hero} {chore.done} '
            "at once."
        ),
    ),
    (
        '"Well done, {hero}," said {helper} and gave {hero.them} the {dish.missing}.',
        'Then {helper} filled a(n) {colour} bowl with {dish.missing}. "Thank you, {helper}!" {cried} {hero}.',
        "{helper} {smiled} and kept the promise. {hero} carried the {dish.missing} home in both hands.",
    ),
    (
        "{soon} the whole house smelled of {dish.smell}.",
        "{hero} stirred and stirred until everything smelled of {dish.smell}.",
        "The first try was burnt. {hero} tried again, and this time it smelled of {dish.smell}.",
    ),
    (
        (
            '"Happy birthday, {friend}!" {cried} {hero}. "You made {dish.name} for me?" {asked} {friend}. "For you, '
            '{friend}," {answered} {hero}.'
        ),
        'When {friend} came in, {friend.their} eyes grew wide. "{dish.name}! Thank you, {hero}!" {cried} {friend}.',
        '{friend} ate {count.all} pieces of it. "Nobody cooks like you, {hero}," said {friend}.',
    ),
    (
        "",
        "{helper} got a piece too, because without {dish.missing} there is no {dish.name}.",
        "The best gifts are made with your own hands.",
    ),
)

QUARREL: tuple[Beat, ...] = (
    (
        "{hero} and {friend} the {friend.kind} found a(n) {colour} {thing} {hideout}.",
        (
            "One {weather.adjective} {time} {helper} the {helper.kind} gave a(n) {colour} {thing} to {hero} and "
            "{hero.their} friend {friend}."
        ),
        "{hero} had a friend, a(n) {friend.kind} named {friend}. {place} they found a(n) {colour} {thing}.",
    ),
    (
        '"It is mine!" {cried} {hero}. "No, it is mine!" {cried} {friend}.',
        '"I saw it first, {friend}," said {hero}. "But I touched it first, {hero}!" {cried} {friend}.',
        "Both wanted to have the {thing}, and neither wanted to wait.",
    ),
    (
        "{hero} pulled on one side, and {friend} pulled on the other, until the {thing} {thing.broke}.",
        "They pulled and pulled. Then there was a terrible sound, and the {colour} {thing} {thing.broke}.",
    ),
    (
        "Now nobody could play with it. {hero} felt {sad}, and {friend} was {sad} too.",
        "{friend} {went} away without a word, and {hero} sat alone {place}.",
        '"That is your fault, {friend}!" said {hero}. They did not speak for {count.all} days.',
    ),
    (
        (
            'At last {hero} {went} to {friend}. "I am sorry, {friend}," said {hero}. "I am sorry too, {hero}," '
            "{answered} {friend}."
        ),
        '"{friend}, I miss you more than the {thing}," said {hero}. "I miss you too, {hero}," {whispered} {friend}.',
    ),
    (
        "{helper} the {helper.kind} gave them {thing.cure}, and together they mended the {colour} {thing}.",
        '"We need {thing.cure}," said {friend}. They worked all {time}, and {soon} the {thing} was whole again.',
        (
            'They asked {helper} the {helper.kind} for help. "With {thing.cure} it will be as good as new," said '
            "{helper}. And so it was."
        ),
    ),
    (
        "From then on, {hero} had the {thing} in the morning and {friend} in the evening.",
        '"You first, {friend}," said {hero}. "No, you first, {hero}," {answered} {friend}, and they laughed.',
        "Now they always played with the {colour} {thing} together.",
    ),
    (
        "",
        "A friend is worth more than a(n) {thing}.",
        "It is easy to break a(n) {thing}, and hard to mend it.",
    ),
)

OUTING: tuple[Beat, ...] = (
    (
        "{hero} and {hero.their} friend {friend}, a(n) {friend.kind}, wanted to walk to {goal}.",
        (
            '"Let us go to {goal} today, {friend}," said {hero}. {friend} the {friend.kind} {smiled}. "Yes, let us go, '
            '{hero}!"'
        ),
        (
            'One {weather.adjective} {time} {friend} the {friend.kind} knocked at the door. "Will you come with me to '
            '{goal}, {hero}?" {friend.they} {asked}.'
        ),
    ),
    (
        "They packed {count.all} {food.many} and a(n) {colour} {thing}.",
        "{hero} carried a bag of {food.many}, and {friend} carried a(n) {colour} {thing}.",
        '{helper} the {helper.kind} gave them {count.all} {food.many} for the way. "Thank you, {helper}," they said.',
    ),
    (
        "They had not gone far when {storm.comes}.",
        "But halfway to {goal} {storm.comes}.",
        "At first all {went} well. Then {storm.comes}.",
    ),
    (
        (
            '"Oh no! What shall we do, {friend}?" {asked} {hero}. "Look, {hero}, there is a(n) {shelter}!" {cried} '
            "{friend}."
        ),
        (
            '"I want to go home," {whispered} {friend}. "Do not be {sad}, {friend}. I see a(n) {shelter}," {answered} '
            "{hero}."
        ),
        "{hero} was {sad}, but {friend} pointed to a(n) {shelter}.",
    ),
    (
        (
            'They sat in the {shelter} and shared the {food.many}. "Let us {pastime.plan}," said {friend}. So they '
            "{pastime.done}."
        ),
        "In the {shelter} it was dry. They ate the {food.many} and {pastime.done}.",
        (
            'Inside sat {baby}, a(n) {baby.kind}, all alone. "May we stay with you, {baby}?" {asked} {hero}. All three '
            "{pastime.done}."
        ),
    ),
    (
        "They did not notice how the time passed. At last {storm.ends}.",
        "{soon} {storm.ends}.",
        "When they looked out again, {storm.ends}.",
    ),
    (
        (
            'It was too late for {goal}. "We can go tomorrow, {hero}," said {friend}. "Or we come back to the '
            '{shelter}," {answered} {hero} and {smiled}.'
        ),
        "They {went} on to {goal}, and from there they could see the {home}.",
        '"This was better than {goal}, {friend}," said {hero}.',
    ),
    (
        "",
        "A bad day can become a good day with a friend.",
        "And whenever they see the {shelter}, they remember how they {pastime.done}.",
    ),
)
