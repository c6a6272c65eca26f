"""Knowledge scenes: objects, flags and company signs, and questions that combine the picture with stored facts.

Questions refer to things without naming them. A company is referred to by the colour of its sign, so that its name
must be read before anything known about it can be recalled.
"""

from __future__ import annotations

from tempovlm.testbed.coco import coco_places, coco_writer
from tempovlm.testbed.content.cabinet import paint_cabinet
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import StandIn


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Place things and ask for facts about them.

    Returns:
        The most questions to keep.
    """
    paint_cabinet(canvas, quiz, split)
    return 4


STAND_IN = StandIn(paint=paint, places=coco_places, write=coco_writer("", raw=True), weight=0.2)
