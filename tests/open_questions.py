"""Questions that list no options, pictures to ask them about, and what is an answer to one."""

from __future__ import annotations

import numpy as np

import tiny_model
from tempovlm.data.sample import choice_question

OPEN = ("What is this?", "Why?", "Describe the image.", "which region is north of the red one?")
CHOICE = choice_question("which is it?", ("a star", "a bear"))
PICTURES = (np.full((128, 128, 3), 200, np.uint8), tiny_model.picture(0, 128, 128))


def says_something(text: str) -> bool:
    """Whether it is more than nothing and an option's letter."""
    return len(text) > 1 or text.isdecimal()
