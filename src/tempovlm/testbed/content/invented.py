"""Invented facts about objects in a colour: nothing tells but memory, and there is nothing to read.

Each pair of object and colour has facts of its own, the same in both splits, so that each appears rarely.
"""

from __future__ import annotations

from zlib import crc32

from tempovlm.testbed.content.companies import fact_values, said_otherwise
from tempovlm.testbed.scene import Quiz

QUESTIONS: dict[str, str] = {
    "owner": "who owns the {ref}?",
    "home": "which city is the {ref} from?",
    "since": "since which decade is the {ref} here?",
    "inside": "what is inside the {ref}?",
    "friend": "which animal is a friend of the {ref}?",
    "age": "how old is the {ref}?",
}
"""Fact to its phrasing; `{ref}` is how the object is pointed at."""

_SAME_AS = {"owner": "founder", "home": "city", "since": "decade", "inside": "product", "friend": "mascot",
            "age": "staff"}  # fmt: skip
"""Fact to the one about companies that has the same values."""


def values_of(fact: str) -> tuple[str, ...]:
    """Return the values that a fact of `QUESTIONS` can have."""
    return fact_values(_SAME_AS[fact])


def invented(name: str, fact: str) -> str:
    """Return what is known of an object in its colour, for example of `red star`."""
    values = values_of(fact)
    return values[crc32(f"{name}|{fact}".encode()) % len(values)]


def ask_invented(quiz: Quiz, name: str, ref: str) -> None:
    """Ask for two of the facts about an object.

    Args:
        quiz: takes the questions.
        name: colour and class of the object.
        ref: how it is pointed at.
    """
    for fact in quiz.rng.sample(list(QUESTIONS), 2):
        answer = invented(name, fact)
        others = said_otherwise(_SAME_AS[fact], answer)
        quiz.ask(f"fact_{fact}", QUESTIONS[fact].format(ref=ref), answer, others)
