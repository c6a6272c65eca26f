"""The three knobs and the list of legal settings of a model.

`plan` says what a setting runs, and `cost` what it costs. Elsewhere code takes the knobs from here, as named axes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from tempovlm.core.checks import checked_integer, checked_text, shown, wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.core.shape import ModelShape

TIERS = ("low", "medium", "high")
"""Vision tiers from the fewest crops to the most."""


@dataclass(frozen=True, slots=True)
class Knob:
    """The way that the values of a knob are checked and written.

    Attributes:
        legal: the field of `KnobSpace` with its legal values.
        check: takes a flag and its value, and returns a plain value or raises a `UserError`.
        prefix: before a value in the text of a setting.
        label: in a line for people.
        unit: of a value.
        head: over a plot.
    """

    legal: str
    check: Callable[[str, object], str | int]
    prefix: str
    label: str
    unit: str
    head: str


AXES = {
    "tier": Knob("tiers", checked_text, "", "tier", "tier", "vision tier"),
    "top_k": Knob("top_ks", checked_integer, "k", "top-k", "experts", "experts per token"),
    "num_blocks": Knob("block_counts", checked_integer, "b", "blocks", "blocks", "blocks"),
}
"""The knobs by name, in the order of a setting's index."""

KNOBS = tuple(AXES)
"""The knobs' names."""

_TOP_K_OF_NATIVE = (0.5, 0.75, 1.0, 1.25, 1.5)
_BLOCKS_OF_ALL = (0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True, order=False)
class KnobConfig:
    """One setting: vision `tier`, experts per token `top_k`, transformer blocks that run `num_blocks`.

    Raises:
        UserError: `tier` is not text, or another knob not an integer. `KnobSpace` checks whether they are legal.
    """

    tier: str
    top_k: int
    num_blocks: int

    def __post_init__(self) -> None:
        for name, knob in AXES.items():
            object.__setattr__(self, name, knob.check(name, getattr(self, name)))

    @classmethod
    def from_values(cls, values: Iterable[Any]) -> KnobConfig:
        """Make a setting from a value for each knob, in the order of `KNOBS`."""
        return cls(**dict(zip(KNOBS, values, strict=True)))

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> KnobConfig:
        """Make a setting from the knobs' fields of a row, which may have more fields.

        Raises:
            KeyError: the row lacks a knob.
        """
        return cls.from_values(row[name] for name in KNOBS)

    @property
    def values(self) -> tuple[Any, ...]:
        """The value of each knob, in the order of `KNOBS`."""
        return tuple(getattr(self, name) for name in KNOBS)

    def as_dict(self) -> dict[str, Any]:
        """Return the value of each knob by its name."""
        return dict(zip(KNOBS, self.values, strict=True))

    def __str__(self) -> str:
        return spell(self.values)


def spell(values: Iterable[object]) -> str:
    """Write a value for each knob, legal or not, as the text of a setting, such as `low/k4/b8`."""
    return "/".join(f"{knob.prefix}{value}" for knob, value in zip(AXES.values(), values, strict=True))


@dataclass(frozen=True)
class KnobSpace:
    """All legal settings of a model, in a fixed order, convertible to an index and back.

    The order is tier-major, then top-k, then blocks, each from cheap to expensive, as in an array of `shape`.
    `fingerprint` is stored with everything that holds an index, so that an index can never change its meaning.
    """

    tiers: tuple[str, ...]
    top_ks: tuple[int, ...]
    block_counts: tuple[int, ...]
    native_top_k: int

    @classmethod
    def for_model(cls, shape: ModelShape) -> KnobSpace:
        """Derive the space from a shape: half to one and a half times its top-k, half to all of its blocks.

        MolmoE-1B (16 blocks, 64 experts, top-8) has top-k 4, 6, 8, 10, 12 and blocks 8, 10, 12, 14, 16.
        """
        top_ks = {round(shape.top_k * f) for f in _TOP_K_OF_NATIVE}
        top_ks = {min(max(k, 1), shape.num_experts) for k in top_ks}
        blocks = {max(round(shape.num_blocks * f), min(2, shape.num_blocks)) for f in _BLOCKS_OF_ALL}
        return cls(TIERS, tuple(sorted(top_ks)), tuple(sorted(blocks)), shape.top_k)

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The legal values of each knob, from cheap to dear, by its name."""
        return {name: getattr(self, knob.legal) for name, knob in AXES.items()}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The number of legal values of each knob."""
        return tuple(map(len, self.axes.values()))

    @property
    def counts(self) -> dict[str, int]:
        """The entries of `shape` under the names of networks' sizes, such as `num_tiers`."""
        return {f"num_{knob.legal}": size for knob, size in zip(AXES.values(), self.shape, strict=True)}

    @cached_property
    def settings(self) -> tuple[KnobConfig, ...]:
        """All settings, in index order."""
        return tuple(map(KnobConfig.from_values, product(*self.axes.values())))

    def subset(self, wanted: KnobSpace | Mapping[str, Iterable[Any]]) -> KnobSpace:
        """Return the space of some values of the knobs.

        Args:
            wanted: values by the name of the knob, which keeps all if it is left out; or a space that has them.

        Raises:
            UserError: a knob or a value does not exist, or a knob has no value.
        """
        axes = wanted.axes if isinstance(wanted, KnobSpace) else wanted
        if not isinstance(axes, Mapping):
            raise UserError(f"space {shown(wanted)}: give a KnobSpace, or values by knob: {{'tier': ['low']}}")
        chosen: dict[str, Any] = {}
        for name, values in axes.items():
            if name not in AXES:
                raise UserError(f"space: there is no knob {shown(repr(name))}; choose from {', '.join(KNOBS)}")
            some = [values] if isinstance(values, str) or not isinstance(values, Iterable) else [*values]
            if not some:
                raise UserError(f"space: {name} has no value; leave it out to keep all")
            given = {getattr(self._checked({name: value}), name) for value in some}
            chosen[AXES[name].legal] = tuple(value for value in self.axes[name] if value in given)
        return replace(self, **chosen)

    def _checked(self, given: Mapping[str, Any]) -> KnobConfig:
        knobs = replace(self.native, **given)
        self.validate(knobs)
        return knobs

    @property
    def native(self) -> KnobConfig:
        """The setting as trained: all crops, the trained top-k, all blocks; in a subset the nearest to it."""
        top_k = max((one for one in self.top_ks if one <= self.native_top_k), default=self.top_ks[0])
        return replace(self.largest, top_k=top_k)

    @property
    def largest(self) -> KnobConfig:
        """The most expensive setting; above the trained top-k, accuracy need not rise."""
        return self.settings[-1]

    @property
    def cheapest(self) -> KnobConfig:
        """The cheapest setting."""
        return self.settings[0]

    def __len__(self) -> int:
        return len(self.settings)

    def __iter__(self) -> Iterator[KnobConfig]:
        return iter(self.settings)

    def __contains__(self, knobs: object) -> bool:
        return knobs in self._index

    @cached_property
    def _index(self) -> dict[KnobConfig, int]:
        return {knobs: i for i, knobs in enumerate(self.settings)}

    def index(self, knobs: KnobConfig) -> int:
        """Return the index of a setting.

        Raises:
            UserError: the setting is not in the space; names the knob and its legal values.
        """
        found = self._index.get(knobs) if isinstance(knobs, KnobConfig) else None  # a dict has no hash
        if found is None:
            self.validate(knobs)
            raise KeyError(knobs)
        return found

    def validate(self, knobs: KnobConfig) -> None:
        """Raise a `UserError` that names the first knob with an illegal value."""
        if not isinstance(knobs, KnobConfig):
            raise UserError(f"knobs {knobs!r}: must be a KnobConfig, such as the space's native")
        for (name, legal), value in zip(self.axes.items(), knobs.values, strict=True):
            if value not in legal:
                choices = ", ".join(str(v) for v in legal)
                raise wrong_argument(name, value, f"not in the knob space of this model; choose from {choices}")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when any legal value or the order changes."""
        text = json.dumps([*self.axes.values(), self.native_top_k])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return the fields with lists for tuples, as checkpoints hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> KnobSpace:
        """Read the fields that `to_json` wrote.

        Raises:
            KeyError: a field is missing.
            TypeError: a field has another type.
        """
        legal: dict[str, Any] = {knob.legal: tuple(record[knob.legal]) for knob in AXES.values()}
        return cls(**legal, native_top_k=record["native_top_k"])
