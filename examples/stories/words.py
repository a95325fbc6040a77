"""The words of the stories: who may act, what may be lost, baked, feared or grown.

A *role* (`ROLES`) is drawn once per story and remembered: the red ball stays red. A *synonym*
(`SYNONYMS`) is drawn anew each time it is mentioned. The grammar in `grammar.py` does the drawing.
"""

from __future__ import annotations

from cast import (
    BABIES,
    HELPERS,
    Chore,
    Count,
    Crop,
    Dish,
    Fear,
    Food,
    Noise,
    Pastime,
    Pot,
    Storm,
    Thief,
    Thing,
    Trait,
    Trap,
    Weather,
    phrases,
)

ROLES: dict[str, tuple[object, ...]] = {
    "baby": BABIES,
    "helper": HELPERS,
    "colour": phrases("red, blue, green, yellow, orange, purple, white, pink, silver, golden, brown"),
    "thing": (
        *(Thing(n, "tore", "a needle and thread") for n in ("kite", "scarf", "hat", "blanket", "cape", "flag")),
        *(
            Thing(n, "broke in two", "some glue")
            for n in ("boat", "drum", "whistle", "cart", "spoon", "sword", "flute")
        ),
        *(Thing(n, "cracked", "a drop of glue") for n in ("cup", "bell", "lantern", "mask", "top", "box")),
        *(Thing(n, "came apart", "a strong string") for n in ("ball", "basket", "puppet", "necklace", "umbrella")),
    ),
    "place": phrases(
        "in the meadow, by the river, on the hill, in the forest, near the old mill, at the market, "
        "by the pond, on the beach, in the orchard, at the edge of the village, in the garden, "
        "along the stream, in the barn, near the windmill"
    ),
    "hideout": phrases(
        "under the old bridge, behind the tall oak, inside a hollow log, beneath a bush, "
        "under a pile of leaves, beside the stone wall, between two big rocks, at the bottom of the stairs, "
        "in the long grass, behind the water barrel, under the apple tree, on top of the hay, "
        "next to the well, behind the garden gate"
    ),
    "home": phrases(
        "small house by the sea, cottage at the end of the lane, cosy den under the roots of an oak, "
        "tall house with a green door, little house on the hill, round hut near the lake, "
        "bright room above the bakery, old tower full of books, wooden house in the valley, "
        "mill by the stream, warm burrow near the forest, white house with a garden, "
        "stone hut between two mountains"
    ),
    "weather": (
        Weather("sunny", "The sun was warm and the sky was blue", "the sun went down behind the hills"),
        Weather("windy", "The wind shook the trees", "the wind grew quiet"),
        Weather("snowy", "Snow lay on every roof", "the snow shone in the moonlight"),
        Weather("misty", "A grey mist hung over the fields", "the mist was gone and the stars came out"),
        Weather("cold", "There was ice on the puddles", "smoke rose from every chimney"),
        Weather("hot", "Even the bees were resting in the shade", "the air was cool at last"),
        Weather("rainy", "Rain tapped on the windows", "the rain stopped and the frogs began to sing"),
        Weather("bright", "The birds sang in every tree", "the birds slept in their nests"),
        Weather("cloudy", "Big clouds sailed over the roofs", "the moon peeped out between the clouds"),
    ),
    "trait": (
        Trait("brave", "never ran away from anything", "What a brave heart"),
        Trait("curious", "asked a hundred questions a day", "What clever questions"),
        Trait("shy", "liked to hide behind the door when guests came", "What a good and quiet friend"),
        Trait("clever", "could solve any riddle", "What a clever head"),
        Trait("gentle", "would not hurt even a fly", "What gentle hands"),
        Trait("playful", "turned every chore into a game", "What fun we had"),
        Trait("careful", "looked twice before every step", "What good care you take"),
        Trait("stubborn", "never gave up", "How good that you never give up"),
        Trait("dreamy", "often looked at the clouds", "What a fine dreamer"),
        Trait("eager", "was always first to wake up", "What an early bird"),
        Trait("impatient", "did not like to wait", "How patient you were today"),
        Trait("honest", "always told the truth", "What an honest friend"),
    ),
    "food": (
        *(Food(n, n + "s") for n in ("pear", "plum", "apple", "nut", "fig", "grape", "lemon", "apricot")),
        Food("berry", "berries"),
        Food("cherry", "cherries"),
        Food("peach", "peaches"),
    ),
    "count": (
        Count("four", "three", "two"),
        Count("five", "four", "three"),
        Count("six", "five", "four"),
        Count("seven", "six", "five"),
        Count("eight", "seven", "six"),
    ),
    "dish": (
        Dish("plum cake", "flour", "butter and plums"),
        Dish("pumpkin soup", "salt", "herbs and pumpkin"),
        Dish("apple pie", "sugar", "apples and cinnamon"),
        Dish("honey bread", "honey", "warm honey"),
        Dish("cheese tart", "butter", "melted cheese"),
        Dish("carrot cake", "flour", "carrots and nuts"),
        Dish("berry jam", "sugar", "summer and berries"),
        Dish("nut biscuits", "nuts", "toasted nuts"),
    ),
    "chore": (
        Chore("sweep my floor", "swept the floor"),
        Chore("stack my wood", "stacked the wood"),
        Chore("feed my hens", "fed the hens"),
        Chore("wash my windows", "washed the windows"),
        Chore("water my roses", "watered the roses"),
        Chore("carry my bags", "carried the bags"),
        Chore("brush my donkey", "brushed the donkey"),
        Chore("find my glasses", "found the glasses"),
    ),
    "trap": (
        Trap("at the bottom of a dry well", "rope", "They let the rope down and pulled with all their strength"),
        Trap("high up in a tree", "ladder", "They leaned the ladder against the tree and climbed up slowly"),
        Trap("in the deep mud", "plank", "They laid the plank across the mud and reached out"),
        Trap("on a rock in the river", "raft", "They pushed the raft across the water and came close to the rock"),
        Trap("behind a heavy gate", "iron bar", "They put the iron bar under the gate and lifted it a little"),
        Trap("in a thorny hedge", "pair of shears", "They cut the thorns away with the shears, one by one"),
        Trap("on the roof of the barn", "blanket", "They held the blanket tight and waited for the jump"),
    ),
    "fear": (
        Fear("the dark", "When the lamp went out", "Count the stars until you fall asleep", "counted the stars"),
        Fear("thunder", "When the thunder rolled", "Sing louder than the thunder", "sang louder and louder"),
        Fear("deep water", "When the water reached the knees", "Breathe slowly and keep moving", "breathed slowly"),
        Fear("the high bridge", "When the bridge began to swing", "Look ahead and not down", "looked straight ahead"),
        Fear("big dogs", "When a big dog barked", "Stand still and speak softly", "stood still and spoke softly"),
        Fear(
            "the forest",
            "When the branches creaked",
            "Leave a trail of white stones",
            "dropped one white stone after another",
        ),
        Fear(
            "singing in front of others",
            "When everyone fell silent",
            "Look only at your best friend",
            "looked only at one face",
        ),
    ),
    "storm": (
        Storm("dark clouds came and it began to rain", "the rain stopped, and a rainbow stood over the fields"),
        Storm("a thick fog rolled in", "the fog lifted, and the path was clear again"),
        Storm("a strong wind blew the picnic cloth away", "the wind fell asleep, and the cloth hung in a tree"),
        Storm("it began to snow", "the snow stopped, and the whole world was white"),
        Storm("hail came down like little stones", "the hail was over, and ice glittered in the grass"),
    ),
    "shelter": phrases("cave, old barn, empty hut, hollow tree, boat house, shepherd's tent"),
    "pastime": (
        Pastime("tell stories", "told stories about dragons and kings"),
        Pastime("sing songs", "sang all the songs they knew"),
        Pastime("ask riddles", "asked each other riddles"),
        Pastime("draw pictures", "drew pictures on the wall with chalk"),
        Pastime("play shadow games", "made shadows with their hands"),
        Pastime("build a castle", "built a castle out of sticks"),
    ),
    "pot": (
        Pot("flower pot", "jumped over the bench and knocked the flower pot down"),
        Pot("window", "threw a stone too far and broke the window"),
        Pot("milk jug", "danced around the table and pushed the milk jug over"),
        Pot("clock", "climbed up the shelf, and the clock fell to the floor"),
        Pot("mirror", "ran through the hall and bumped into the mirror"),
        Pot("teapot", "played with a stick and hit the teapot"),
    ),
    "crop": (
        Crop("pumpkin seed", "a huge pumpkin", "soup"),
        Crop("bean", "a tower of beans", "stew"),
        Crop("sunflower seed", "a sunflower as tall as the house", "seed bread"),
        Crop("strawberry plant", "a bowl of strawberries", "jam"),
        Crop("potato", "a sack of potatoes", "dumplings"),
        Crop("melon seed", "a sweet melon", "cold juice"),
        Crop("onion", "a string of onions", "pie"),
    ),
    "thief": (
        Thief("snail", "Put sand around it", "put sand around the plant"),
        Thief("crow", "Make a scarecrow", "made a scarecrow from an old coat"),
        Thief("deer", "Build a fence", "built a fence of branches"),
        Thief("caterpillar", "Carry it to the nettles", "carried it to the nettles, leaf by leaf"),
        Thief("rat", "Hang up a little bell", "hung up a little bell that rang in the wind"),
    ),
    "noise": (
        Noise("a soft scratching", "a monster with long claws", "a lost hedgehog at the door", "a saucer of water"),
        Noise("a slow tapping", "a ghost with cold fingers", "a branch that tapped on the glass", "a gentle trim"),
        Noise("a deep humming", "a giant who could not sleep", "a swarm of bees in the wall", "a new house of straw"),
        Noise("a sad whistling", "a wolf in the chimney", "the wind in a broken bottle", "a place in the sun"),
        Noise("a strange rustling", "a dragon in the cupboard", "a tiny bat with a tired wing", "a warm box"),
        Noise("a loud splash", "a sea snake", "a fat fish in the pond", "some crumbs of bread"),
    ),
    "keep": phrases("on a hook by the door, in a box under the bed, on the highest shelf, close by at all times"),
    "junk": phrases("an old boot, a sleepy snail, dry leaves, a broken plate, a rusty key, an empty shell"),
    "prize": phrases("a crown of flowers, a silver cup, a basket of buns, a blue ribbon, a jar of honey"),
    "goal": phrases("the old lighthouse, the top of the hill, the stone bridge, the chapel, the big rock, the ferry"),
}

SYNONYMS: dict[str, tuple[str, ...]] = {
    "answered": ("said", "answered", "replied"),
    "asked": ("asked", "wondered"),
    "cried": ("cried", "called", "shouted"),
    "whispered": ("whispered", "murmured", "sighed"),
    "sad": ("sad", "worried", "lonely", "unhappy", "upset"),
    "happy": ("happy", "glad", "proud", "cheerful", "full of joy"),
    "time": ("morning", "afternoon", "day"),
    "little": ("little", "small", "young"),
    "smiled": ("smiled", "laughed", "nodded", "grinned"),
    "went": ("went", "walked", "ran", "hurried"),
    "soon": ("soon", "before long", "a little later", "after a while"),
    "evening": ("that evening", "in the evening", "when the day was over"),
}
