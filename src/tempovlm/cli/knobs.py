"""The flags that say which settings a command may choose among, and which blocks run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tempovlm.core.knobs import KNOBS


def _arg(metavar: str, default: str = "all", aliases: tuple[str, ...] = ()) -> Any:
    hint = f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, aliases=aliases)


@dataclass(frozen=True, kw_only=True)
class KnobFlags:
    """Settings to choose among, and the blocks that a depth runs.

    Attributes:
        tiers: Vision tiers, of low, medium and high.
        top_k: Numbers of experts that each token visits, such as 6 8.
        num_blocks: Numbers of decoder blocks that run, such as 12 16.
        ranking: JSON file of the blocks, the most important first; a smaller num_blocks leaves out the last ones.
            docs/adding.md shows the formats. With another ranking than the model's, accuracies are assumed.
    """

    tiers: Annotated[tuple[str, ...], _arg("TIER [TIER ...]", aliases=("--tier",))] = ()
    top_k: Annotated[tuple[int, ...], _arg("K [K ...]")] = ()
    num_blocks: Annotated[tuple[int, ...], _arg("N [N ...]")] = ()
    ranking: Annotated[Path | None, _arg("FILE", "the model's own")] = None

    @property
    def values(self) -> dict[str, Any]:
        """The values of each knob that was given, by its name."""
        given = {name: self.tiers if name == "tier" else getattr(self, name) for name in KNOBS}
        return {name: values for name, values in given.items() if values}

    @property
    def chosen(self) -> dict[str, Any]:
        """The arguments of `load` that the flags make."""
        return {"space": self.values, "ranking": self.ranking}

    @property
    def words(self) -> list[str]:
        """The same flags as words of a command line."""
        words = [word for name, some in self.values.items() for word in (f"--{name}", *map(str, some))]
        return words if self.ranking is None else [*words, "--ranking", str(self.ranking)]


ALL = KnobFlags()
"""All settings, by the model's own ranking."""

Knobs = Annotated[KnobFlags, tyro.conf.OmitArgPrefixes]
"""Type of a command's field for these flags."""
