"""The generated test bed: scenes that stand in for four data sets, drawn from a seed.

It knows what is in a picture and what is right to say about it; it does not know how a model sees it.
"""

from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import CHARSET, COLORS, HELD_OUT_WORDS, SHAPES
from tempovlm.testbed.scene import DATASETS, SIZES, SPLITS, Scene, SceneQuestion
from tempovlm.testbed.words import alphabet, count_tokens, vocabulary

__all__ = [
    "CHARSET",
    "COLORS",
    "DATASETS",
    "HELD_OUT_WORDS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Scene",
    "SceneQuestion",
    "alphabet",
    "count_tokens",
    "make_scene",
    "vocabulary",
]
