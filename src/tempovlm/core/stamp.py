"""The stamp of a figure: machine, versions, weights, knob space. `engine.environment` collects it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tempovlm.core.errors import UserError

__version__ = "0.2.0"
"""The version of this program, a part of every stamp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Stored beside every figure.

    Attributes:
        hardware: name of the processor that ran the model. device: `cpu` or `cuda`.
        threads: the most of a stage on a CPU.
        commit: that contains the package's source, with `+` if that had changes; None if no commit does.
        weights: hash of the weights. knob_space: fingerprint of the legal settings.
        ranking: digest of the order of the blocks, where it is not the model's own.
        instructions: the widest of a CPU that torch uses. cores: that the process may use.
        data_source: `synthetic` for generated pictures, a data set's name otherwise, None without data.
        created: UTC, ISO 8601.
    """

    hardware: str
    device: str
    threads: int
    os: str
    python: str
    torch: str
    tempovlm: str
    commit: str | None
    model: str
    weights: str
    knob_space: str
    data_source: str | None
    created: str
    ranking: str | None = None
    instructions: str | None = None
    cores: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with one field for each attribute."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Stamp:
        """Return the stamp of a stored record; fields of other versions are ignored.

        Raises:
            UserError: a field is missing.
        """
        try:
            known = {"ranking": None, "instructions": None, "cores": None, **record}
            return cls(**{field.name: known[field.name] for field in fields(cls)})
        except KeyError as missing:
            raise UserError(f"the stamp has no field {missing}; was the file made by this program?") from None
