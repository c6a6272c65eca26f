"""The values from which a test bed is drawn, as its notice tells them and as results name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.testbed import EDITION, NOTICE

_MADE_AGAIN = "tempovlm data make --output_dir {folder} --num_train {num_train} --num_val {num_val} --seed {seed}"
_TOLD = re.compile(_MADE_AGAIN.format(folder=r"\S+", num_train=r"(\d+)", num_val=r"(\d+)", seed=r"(\d+)"))
_EDITION = re.compile(r"edition of the questions: (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """The values from which a test bed is drawn: the same ones draw the same files.

    Attributes:
        num_train, num_val: pictures of each data set for training and for validation.
        seed: of the pictures. edition: of the questions, see `testbed.EDITION`.
    """

    num_train: int
    num_val: int
    seed: int = 0
    edition: int = EDITION

    @property
    def name(self) -> str:
        """Name of a folder for it."""
        return f"edition{self.edition}_seed{self.seed}_train{self.num_train}_val{self.num_val}"

    def command(self, folder: str | Path = "DIR") -> str:
        """Return the shell command that draws it."""
        return _MADE_AGAIN.format(folder=folder, **asdict(self))

    def covers(self, other: Bed) -> bool:
        """Whether it has all pictures of another, since a picture depends only on its number."""
        is_same_draw = (self.seed, self.edition) == (other.seed, other.edition)
        return is_same_draw and self.num_train >= other.num_train and self.num_val >= other.num_val

    def to_json(self) -> dict[str, int]:
        """Return a JSON object with one field for each attribute."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str | Path) -> Bed:
        """Return the test bed of a stored record; one without an edition is of the first.

        Raises:
            UserError: the record, which is from `where`, has a field missing or a wrong one.
        """
        try:
            return cls(**{"edition": 1} | {name: int(value) for name, value in record.items()})
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: field bed is half-written or damaged ({error})") from None

    @classmethod
    def read(cls, folder: Path) -> Bed | None:
        """Return what the notice in a folder tells; None where there is none, or one that does not tell."""
        path = folder / NOTICE
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found, edition = _TOLD.search(text), _EDITION.search(text)
        if found is None:
            return None
        num_train, num_val, seed = map(int, found.groups())
        return cls(num_train=num_train, num_val=num_val, seed=seed, edition=int(edition[1]) if edition else 1)
