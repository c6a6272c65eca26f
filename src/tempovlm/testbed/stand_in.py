"""The declaration of a stand-in: how its pictures are drawn, where they go, and the files that describe them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.scene import Quiz

Record = dict[str, Any]
"""One drawn picture: index, width, height and its questions as dictionaries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """Generator of a data set, in its official file formats.

    Attributes:
        paint: Draws on a canvas and adds questions to a quiz, for a split; returns the most questions to keep.
        places: From split, number of the picture and number of questions to pairs of paths, relative to the data
            set's folder: of the picture and of its twin.
        write: Writes the questions of a split into the data set's folder.
        weight: Share among the pictures that the pocket model is trained on, relative to the other stand-ins:
            harder ones are shown more often.
        paper: Whether pictures are drawn on paper rather than in front of a scene.
        yes_no: Share of questions with the answer yes or no; None leaves it to chance.
    """

    paint: Callable[[Canvas, Quiz, str], int]
    places: Callable[[str, int, int], list[tuple[str, str]]]
    write: Callable[[Path, str, Iterable[Record]], None]
    weight: float
    paper: bool = False
    yes_no: float | None = None


def dump(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
