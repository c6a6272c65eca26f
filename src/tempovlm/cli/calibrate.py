"""`tempovlm calibrate`: measure the latency of each setting on this machine."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tempovlm.api import TempoVLM, load
from tempovlm.cli import console
from tempovlm.cli.knobs import ALL, Knobs
from tempovlm.core.decode_dtype import Backend, DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded
from tempovlm.core.request import Request

if TYPE_CHECKING:
    from rich.table import Table

    from tempovlm.control.guard import Guard
    from tempovlm.latency.profile import Factor, LatencyProfile

DESCRIPTION = """\
Measure what each knob setting takes on this machine, and store it for the budgets to come.

Then shows from which budget on each setting may run, and what runs at round budgets."""

EXAMPLES = (
    "tempovlm calibrate",
    "tempovlm calibrate --force --json",
    "tempovlm calibrate --max_new_tokens 64",
    "tempovlm calibrate --tiers low medium --num_blocks 12 16",
    "tempovlm calibrate --images photos/*.jpg",
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of the files of a folder, those that are taken for pictures."""

_MOST_PICTURES = 64
_ROUND = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
_MOST_ROWS = 8


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags of `tempovlm calibrate`."""

    model: str = "pocket"
    """`pocket` (part of the package), a local model folder, or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    weights: DecodeDtype = "bf16"
    """Weights for decoding on CUDA: bf16 (as loaded), or one-byte copies, fp8 or int8."""
    backend: Backend = "auto"
    """Runs the model on a CPU: kernels, fast and in bfloat16 where the processor can, torch, or auto: the
    kernels where they can run."""
    max_new_tokens: int = 16
    """Cap on generated tokens of the requests that the budgets are shown for."""
    knobs: Knobs = ALL
    """Settings to measure; answers with the same flags use it."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")] = ()
    """Your own pictures, files or folders, to measure on; always measures again. By default some are made."""
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
    pictures = read_pictures(flags.images)
    request = any_request(flags.max_new_tokens)
    given = {"weights": flags.weights, "backend": flags.backend, **flags.knobs.chosen}
    model = load(flags.model, device=flags.device, policy="table", **given)
    profile = model.calibrate(force=flags.force, pictures=pictures)
    guard = model.guard_for(request)
    if flags.json:
        console.print_json(summary(guard, model))
        return
    out = console.stdout()
    out.print(table(guard))
    stamp = profile.stamp
    out.print(
        f"median ms (least budget in ms) of an answer with {_profile(guard).output.mean:.1f} tokens "
        f"on average; measured {stamp['created']} on {stamp['hardware']}, {stamp['device']}"
    )
    if profile.threads:
        out.print(f"threads: {threads_text(profile.threads)}")
    if profile.shared:
        out.print(f"in flight together, times those alone: {sharing_text(profile)}")
    measured = bool(model.card.accuracy)
    show_budgets(guard, "accuracy" if measured else "accuracy (assumed)")
    known = "measured with the model" if measured else "assumed, not measured"
    own = model.card.ran(model.ranking, model.space)
    hint = (
        f"measure them on your own questions: tempovlm tune FILE{_of_model(flags.model)}"
        if own
        else "those of the model are of its own ranking"
    )
    out.print(f"accuracies are {known}; {hint}")


def _of_model(model: str) -> str:
    """Return the flag that names a model, where it is not the default one."""
    return "" if model == "pocket" else f" --model {shlex.quote(model)}"


def any_request(max_new_tokens: int) -> Request:
    """Make a request with a budget, to see which settings the guard lets run."""
    return Request(images=(), question="what?", budget_ms=1.0, max_new_tokens=max_new_tokens)


def read_pictures(paths: Sequence[str]) -> list[Path]:
    """Return the pictures that files and folders name, an even choice of them if there are many.

    Raises:
        UserError: there is no such file, no picture in a folder, or a file is no picture.
    """
    from tempovlm.model.vision.image import open_image

    found: list[Path] = []
    for name in paths:
        path = expanded(name)
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"--images {name}: holds no pictures ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    chosen = found[:: math.ceil(len(found) / _MOST_PICTURES)] if found else []
    for path in chosen:
        open_image(path)
    return chosen


def summary(guard: Guard, model: TempoVLM) -> dict[str, Any]:
    """Return every setting with its median and least budget, and the choices at round budgets."""
    profile, bounds_ms = _profile(guard), guard.budgets_ms()
    settings = [
        {
            **knobs.as_dict(),
            "p50_ms": round(profile.p50_total_ms(i), 3),
            "upper_ms": round(float(bounds_ms[i]), 3),
            "step_ms": round(profile.step_ms(i), 3),
        }
        for i, knobs in enumerate(profile.space)
    ]
    return {
        "settings": settings,
        "feasible_from_ms": round(float(bounds_ms.min()), 3),
        "everything_fits_from_ms": round(float(bounds_ms.max()), 3),
        "accuracy_measured": bool(model.card.accuracy),
        "budgets": choices(guard),
        "output_tokens": round(profile.output.mean, 3),
        "threads": {stage: dict(pairs) for stage, pairs in profile.threads.items()},
        "in_flight": [asdict(one) for one in profile.shared],
        "busy_cores": profile.busy_cores,
        "stamp": dict(profile.stamp),
    }


def threads_text(threads: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    """Return the threads of each stage, from the least to the largest of its measured works."""
    counts = {stage: [str(count) for _, count in pairs] for stage, pairs in threads.items()}
    return ", ".join(f"{stage} {' to '.join(dict.fromkeys(some))}" for stage, some in counts.items())


def sharing_text(profile: LatencyProfile) -> str:
    """Return the factors of requests in flight together, by their number."""
    found = (profile.sharing(count) for count in sorted({one.in_flight for one in profile.shared}))
    return ", ".join(
        f"{one.most} requests: reading {factor_text(one.reading)} each, a token {factor_text(one.step)}"
        for one in found
        if one
    )


def factor_text(factor: Factor) -> str:
    """Return a factor at the shortest and at the longest time that it was measured at."""
    return " to ".join(dict.fromkeys(f"{one:.2f}" for one in (factor.at_short, factor.at_long)))


def table(guard: Guard) -> Table:
    """Return a table with depth across, tier and top-k down."""
    from rich.table import Table

    profile, bounds_ms = _profile(guard), guard.budgets_ms()
    space = profile.space
    result = Table("tier", "top-k", *(f"{n} blocks" for n in space.block_counts))
    for tier in space.tiers:
        for top_k in space.top_ks:
            rows = [i for i, k in enumerate(space) if (k.tier, k.top_k) == (tier, top_k)]
            cells = (f"{profile.p50_total_ms(i):.0f} ({bounds_ms[i]:.0f})" for i in rows)
            result.add_row(tier, str(top_k), *cells, end_section=top_k == space.top_ks[-1])
    return result


def show_budgets(guard: Guard, accuracy: str = "accuracy") -> None:
    """Print from where on budgets can be kept, and what runs at round ones; `accuracy` heads its column."""
    from rich.table import Table

    out, bounds_ms = console.stdout(), guard.budgets_ms()
    out.print(f"feasible from {bounds_ms.min():.0f} ms · everything fits from {bounds_ms.max():.0f} ms")
    rows = Table("budget", "setting", accuracy, "median", box=None, padding=(0, 2, 0, 0))
    for row in choices(guard):
        expected = f"{100 * row['accuracy']:.1f} %"
        rows.add_row(f"{row['budget_ms']:g} ms", row["setting"], expected, f"{row['p50_ms']:.0f} ms")
    out.print(rows)


def choices(guard: Guard) -> list[dict[str, Any]]:
    """Return the choices of a table of accuracies at round budgets, up to where everything fits."""
    import numpy as np

    from tempovlm.control.policy import Question
    from tempovlm.control.select import best

    profile, bounds_ms, policy = _profile(guard), guard.budgets_ms(), guard.policy
    medians_ms = np.array([profile.p50_total_ms(i) for i in range(len(profile.space))])
    rows = []
    for budget_ms in round_budgets_ms(float(bounds_ms.min()), float(bounds_ms.max())):
        scores = policy.look(Question(text="what?", left_ms=budget_ms), budget_ms)
        index = int(best(scores, bounds_ms <= budget_ms, medians_ms, tie=policy.tie))
        rows.append(
            {
                "budget_ms": budget_ms,
                "setting": str(profile.space.settings[index]),
                "accuracy": round(float(scores[index]), 4),
                "p50_ms": round(float(medians_ms[index]), 3),
            }
        )
    return rows


def round_budgets_ms(least_ms: float, most_ms: float) -> list[float]:
    """Round numbers from the first above `least_ms` to the first above `most_ms`, at most eight."""
    found: list[float] = []
    power = math.floor(math.log10(max(least_ms, 1e-3)))
    while not found or found[-1] < most_ms:
        found += [step * 10.0**power for step in _ROUND if step * 10.0**power >= least_ms]
        power += 1
    end = next(i for i, value in enumerate(found) if value >= most_ms)
    found = found[: end + 1]
    places = {round(i * (len(found) - 1) / max(_MOST_ROWS - 1, 1)) for i in range(_MOST_ROWS)}
    return found if len(found) <= _MOST_ROWS else [found[i] for i in sorted(places)]


def _profile(guard: Guard) -> LatencyProfile:
    assert guard.profile is not None
    return guard.profile
