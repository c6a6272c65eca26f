"""`tempovlm calibrate`: measure the latency of each setting on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tempovlm.api import load
from tempovlm.cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from tempovlm.latency.profile import LatencyProfile

DESCRIPTION = "Measure what each knob setting takes on this machine, and store it for the budgets to come."

EXAMPLES = (
    "tempovlm calibrate",
    "tempovlm calibrate --force --json",
)


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags of `tempovlm calibrate`."""

    model: str = "pocket"
    """`pocket` (part of the package), a local model folder, or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    force: bool = False
    """Measure again, even if this machine was measured before."""
    json: console.Json = False
    """Print one JSON object on one line of stdout, and nothing else there."""


def main(argv: list[str]) -> None:
    """Measure, store and print.

    Raises:
        UserError: invalid input.
    """
    flags = console.parse(Flags, argv, "calibrate", DESCRIPTION, EXAMPLES)
    profile = load(flags.model, device=flags.device).calibrate(force=flags.force)
    if flags.json:
        console.print_json(summary(profile))
        return
    out = console.stdout()
    out.print(table(profile))
    out.print(
        f"median ms (upper bound ms) of an answer with {profile.output.mean:.1f} tokens "
        f"on average; measured {profile.stamp['created']} on {profile.stamp['hardware']}"
    )


def summary(profile: LatencyProfile) -> dict[str, object]:
    """Return every setting with its median and bound."""
    settings = [
        {
            **knobs.as_dict(),
            "p50_ms": round(profile.p50_total_ms(i), 3),
            "upper_ms": round(profile.upper_total_ms(i), 3),
            "step_ms": round(profile.step_ms(i), 3),
        }
        for i, knobs in enumerate(profile.space)
    ]
    return {"settings": settings, "busy_cores": profile.busy_cores, "stamp": dict(profile.stamp)}


def table(profile: LatencyProfile) -> Table:
    """Return a table with depth across, tier and top-k down."""
    from rich.table import Table

    space = profile.space
    result = Table("tier", "top-k", *(f"{n} blocks" for n in space.block_counts))
    for tier in space.tiers:
        for top_k in space.top_ks:
            rows = [i for i, k in enumerate(space) if (k.tier, k.top_k) == (tier, top_k)]
            cells = (f"{profile.p50_total_ms(i):.0f} ({profile.upper_total_ms(i):.0f})" for i in rows)
            result.add_row(tier, str(top_k), *cells, end_section=top_k == space.top_ks[-1])
    return result
