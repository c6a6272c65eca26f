"""What a chain of steps has done in its folder, kept so that a kill at any moment loses one step at most.

A step counts as done when it ended and all its results are still there. Knows no step's meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tempovlm.core.errors import UserError
from tempovlm.core.paths import write_whole

FILE = "reproduce.json"
SCHEMA = "tempovlm.reproduce/1"


class Part(Protocol):
    """A step of a chain."""

    @property
    def name(self) -> str:
        """Unique in the chain."""

    @property
    def results(self) -> tuple[str, ...]:
        """Files that are there when it is done."""

    @property
    def about_ms(self) -> float:
        """What it takes, roughly."""


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(slots=True)
class Journal:
    """The file in a run's folder.

    Attributes:
        folder: of the run. conditions: what all its steps have in common.
        took_ms: by the name of each step that ended.
    """

    folder: Path
    conditions: Mapping[str, Any]
    took_ms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, conditions: Mapping[str, Any]) -> Journal:
        """Take up what is there.

        Raises:
            UserError: the folder holds a run of other conditions, or a damaged journal.
        """
        path = folder / FILE
        if not path.exists():
            return cls(folder, conditions)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            before, took_ms = record["conditions"], {k: float(v) for k, v in record["took_ms"].items()}
            # What a journal of an earlier version does not hold cannot be compared.
            differs = [name for name in conditions if before.get(name, conditions[name]) != conditions[name]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); use another --output_dir") from None
        if differs:
            raise UserError(
                f"--output_dir {folder}: holds a run with another {', '.join(differs)} ({path.name} says which); "
                "repeat that command to go on, or use another folder"
            )
        return cls(folder, conditions, took_ms)

    def is_done(self, part: Part) -> bool:
        """Whether the step ended and its results are still there."""
        return part.name in self.took_ms and all((self.folder / name).exists() for name in part.results)

    def start(self, parts: Iterable[AnyPart]) -> list[AnyPart]:
        """What is left to do: the first step that is not done and all after it, which rest on it."""
        left: list[AnyPart] = []
        for part in parts:
            if left or not self.is_done(part):
                left.append(part)
                self.took_ms.pop(part.name, None)
        return left

    def finish(self, part: Part, took_ms: float) -> None:
        """Keep that a step ended.

        Raises:
            UserError: a result is missing, or the folder cannot be written.
        """
        for name in part.results:
            if not (self.folder / name).exists():
                raise UserError(f"{self.folder / name}: was not written; see logs/{part.name}.txt beside it")
        self.took_ms[part.name] = took_ms
        record = {"schema": SCHEMA, "conditions": dict(self.conditions), "took_ms": self.took_ms}
        write_whole(self.folder / FILE, json.dumps(record, indent=1) + "\n")

    def left_ms(self, parts: Iterable[Part], left: Iterable[Part]) -> float:
        """What the steps that are left take, by how the done ones compared with what was expected of them."""
        known = [part for part in parts if part.name in self.took_ms]
        expected_ms = sum(part.about_ms for part in known)
        pace = sum(self.took_ms[part.name] for part in known) / expected_ms if expected_ms else 1.0
        return pace * sum(part.about_ms for part in left)
