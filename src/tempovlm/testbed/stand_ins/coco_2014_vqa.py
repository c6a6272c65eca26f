"""Scenes of objects: colours, counts, shapes, positions, sizes, numbers, yes and no.

The low tier shows the objects, so that questions cost steps and no crops; what stands on some of them in small
print takes crops.
"""

from __future__ import annotations

from tempovlm.testbed.coco import coco_places, coco_writer
from tempovlm.testbed.content.scattered import draw_things
from tempovlm.testbed.content.steps import ask_looks, ask_steps
from tempovlm.testbed.content.yes_no import ask_yes_no
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import StandIn


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Place objects on the canvas and ask about them.

    Returns:
        The most questions to keep.
    """
    things = draw_things(canvas, split)
    ask_steps(quiz, things)
    ask_looks(quiz, things)
    ask_yes_no(quiz, things, split)
    return 5 if quiz.rng.random() < 0.5 else 4


STAND_IN = StandIn(
    paint=paint,
    places=coco_places,
    write=coco_writer("v2_", raw=False),
    weight=0.24,
    yes_no=0.38,
)
