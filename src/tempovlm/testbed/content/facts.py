"""The fact table about the objects of the knowledge scenes, the same in both splits.

Some facts are true, some only common belief.
"""

from __future__ import annotations

FACTS: dict[str, dict[str, str]] = {
    "umbrella": {"use": "to keep dry", "season": "autumn"},
    "scissors": {"use": "to cut paper", "who": "a tailor"},
    "hammer": {"use": "to hit nails", "who": "a carpenter"},
    "key": {"use": "to open doors", "made": "metal"},
    "fish": {"eat": "worms", "live": "in the sea"},
    "bird": {"eat": "seeds", "live": "in a nest", "sound": "tweet", "legs": "2"},
    "cat": {"eat": "mice", "live": "in a house", "sound": "meow", "legs": "4"},
    "rabbit": {"eat": "carrots", "live": "in a burrow", "legs": "4"},
    "snail": {"eat": "leaves", "live": "in a shell"},
    "bee": {"eat": "nectar", "live": "in a hive", "sound": "buzz", "legs": "6"},
    "spider": {"eat": "flies", "live": "in a web", "legs": "8"},
    "penguin": {"eat": "fish", "live": "on the ice", "legs": "2"},
    "mouse": {"eat": "cheese", "live": "in a hole", "sound": "squeak", "legs": "4"},
    "apple": {"grow": "on a tree", "kind": "a fruit", "season": "autumn"},
    "banana": {"grow": "on a palm", "kind": "a fruit", "place": "in the jungle"},
    "carrot": {"grow": "in the ground", "kind": "a vegetable"},
    "pear": {"grow": "on a tree", "kind": "a fruit"},
    "cherry": {"grow": "on a tree", "kind": "a fruit", "season": "summer"},
    "pepper": {"grow": "on a bush", "kind": "a vegetable"},
    "mushroom": {"grow": "in the forest", "kind": "a fungus", "season": "autumn"},
    "cactus": {"grow": "in the desert", "kind": "a plant"},
    "flower": {"grow": "in a garden", "kind": "a plant", "season": "spring"},
    "leaf": {"season": "autumn", "place": "in the forest"},
    "snowman": {"season": "winter", "made": "snow"},
    "sun": {"season": "summer", "place": "in the sky"},
    "cloud": {"made": "water", "place": "in the sky"},
    "lightning": {"place": "in a storm", "sound": "thunder"},
    "rocket": {"use": "to fly to the moon", "place": "in space", "who": "an astronaut"},
    "plane": {"use": "to fly", "place": "at the airport", "who": "a pilot"},
    "boat": {"use": "to cross the water", "place": "in the harbor", "who": "a sailor"},
    "car": {"use": "to drive to work", "place": "on the road", "who": "a driver", "wheels": "4"},
    "bicycle": {"use": "to ride", "place": "on a path", "who": "a cyclist", "wheels": "2"},
    "train": {"use": "to travel far", "place": "at the station", "wheels": "many"},
    "ball": {"use": "to play soccer", "place": "in a stadium", "who": "a player"},
    "book": {"use": "to read", "place": "in a library", "made": "paper"},
    "pencil": {"use": "to write", "place": "at school", "made": "wood"},
    "cup": {"use": "to drink tea", "place": "in the kitchen", "made": "clay"},
    "fork": {"use": "to eat food", "place": "in the kitchen", "made": "steel"},
    "bed": {"use": "to sleep", "place": "in the bedroom", "made": "wood"},
    "chair": {"use": "to sit", "place": "in the office", "made": "wood"},
    "lamp": {"use": "to give light", "place": "in the bedroom"},
    "candle": {"use": "to give light", "made": "wax", "place": "in a church"},
    "bell": {"use": "to ring", "sound": "ding dong", "made": "bronze"},
    "guitar": {"use": "to make music", "who": "a musician", "made": "wood"},
    "drum": {"use": "to make music", "who": "a drummer", "sound": "boom"},
    "tent": {"use": "to camp outside", "place": "at a campsite", "made": "cloth"},
    "crown": {"who": "a king", "wear": "on the head", "made": "gold"},
    "ladder": {"use": "to climb up", "who": "a painter", "made": "wood"},
    "anchor": {"use": "to stop a ship", "who": "a sailor", "made": "iron"},
    "hat": {"wear": "on the head", "made": "felt"},
    "glove": {"wear": "on the hand", "season": "winter", "made": "wool"},
    "boot": {"wear": "on the foot", "made": "leather"},
    "heart": {"kind": "a symbol", "use": "to show love"},
    "star": {"place": "in the night sky", "kind": "a symbol"},
    "moon": {"place": "in the night sky"},
    "house": {"use": "to live in", "made": "brick"},
    "tree": {"place": "in the forest", "made": "wood"},
}
"""Object to fact name to canonical answer."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "use": ("what is the {ref} used for?", "why would you use the {ref}?"),
    "who": ("who uses the {ref}?", "who would need the {ref}?"),
    "season": ("which season does the {ref} belong to?",),
    "made": ("what is the {ref} made of?",),
    "eat": ("what does the {ref} eat?", "what food does the {ref} like?"),
    "live": ("where does the {ref} live?",),
    "sound": ("what sound does the {ref} make?",),
    "legs": ("how many legs does the {ref} have?",),
    "wheels": ("how many wheels does the {ref} have?",),
    "grow": ("where does the {ref} grow?",),
    "kind": ("what kind of thing is the {ref}?",),
    "place": ("where would you find the {ref}?",),
    "wear": ("where do you wear the {ref}?",),
}
"""Fact name to its phrasings; `{ref}` is how the object is pointed at, never its name."""

ANIMALS: tuple[str, ...] = ("fish", "bird", "cat", "rabbit", "snail", "bee", "spider", "penguin", "mouse")

SYNONYMS: dict[str, tuple[str, ...]] = {
    "autumn": ("fall",), "on the road": ("road", "street"), "to cut paper": ("cutting paper", "cutting"),
    "to write": ("writing",), "to read": ("reading",), "to sleep": ("sleeping",), "to sit": ("sitting",),
    "to give light": ("light", "lighting"), "to make music": ("music", "playing music"), "to fly": ("flying",),
    "to ride": ("riding",), "to keep dry": ("stay dry", "keep dry"), "in the sea": ("sea", "water"),
    "in a nest": ("nest",), "in a house": ("house", "home"), "on a tree": ("tree", "trees"),
    "in the ground": ("ground", "soil"), "on the head": ("head",), "on the hand": ("hand", "hands"),
    "on the foot": ("foot", "feet"), "in a hive": ("hive",), "in a web": ("web",), "in the sky": ("sky",),
    "to play soccer": ("soccer", "play football"), "to drink tea": ("drinking", "drink tea"),
    "in the forest": ("forest", "woods"), "at the airport": ("airport",), "in the kitchen": ("kitchen",),
    "in a library": ("library", "bookshelf"), "in the bedroom": ("bedroom",), "2": ("two",), "4": ("four",),
    "6": ("six",), "8": ("eight",),
}  # fmt: skip
"""Canonical answer to other ways in which people say it."""

FLAGS: dict[str, tuple[str, str, tuple[str, str, str]]] = {
    "france": ("paris", "v", ("blue", "white", "red")),
    "italy": ("rome", "v", ("green", "white", "red")),
    "ireland": ("dublin", "v", ("green", "white", "orange")),
    "belgium": ("brussels", "v", ("black", "yellow", "red")),
    "romania": ("bucharest", "v", ("blue", "yellow", "red")),
    "germany": ("berlin", "h", ("black", "red", "yellow")),
    "russia": ("moscow", "h", ("white", "blue", "red")),
    "hungary": ("budapest", "h", ("red", "white", "green")),
    "austria": ("vienna", "h", ("red", "white", "red")),
    "lithuania": ("vilnius", "h", ("yellow", "green", "red")),
}
"""Country to capital, direction of the bands (v upright, h level) and their colours."""
