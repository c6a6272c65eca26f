"""A table of simulations: every policy at every price, load and kind of arrivals, with intervals.

Requests of all simulations of one kind of arrivals are the same, and so are the resamples of their blocks, so
differences between policies are paired.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.control.forecast import Forecast
from tempovlm.control.price import DERIVED, Price, parse_price
from tempovlm.control.queue import Discipline, Schedule
from tempovlm.control.select import Mask
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.core.progress import Advance, progress_bar, silent
from tempovlm.core.units import now_ms, s_from_ms
from tempovlm.lab.bench.summary import rounded
from tempovlm.lab.options import DataDirFlags, DeviceFlags
from tempovlm.lab.queueing import choosers
from tempovlm.lab.queueing.arrivals import gaps_of
from tempovlm.lab.queueing.choosers import CLAIRVOYANT, GREEDY, KIND, Chooser
from tempovlm.lab.queueing.shares import blocks_of, gap_closed, share_row
from tempovlm.lab.queueing.simulate import Outcome, simulate
from tempovlm.lab.queueing.world import Traffic, World, draw_traffic, read_world
from tempovlm.lab.script import flag, required
from tempovlm.lab.script import seed as read_seed
from tempovlm.lab.statistics import Resamples
from tempovlm.lab.table import Floats

SCHEMA = "tempovlm.queueing/1"

DIGITS = 4
"""Decimals of the figures in files."""

_RESULTS = tuple(Path(f"results/core_exp_pocket_{name}") for name in ("val", "train", "cpu"))
WAITING = "waiting"
"""Price that is derived from those who wait alone, without a forecast of who may come."""

_BUDGET_FACTOR = 2.0
"""The default budget over the native setting's median time."""


@dataclass(frozen=True, kw_only=True)
class Study(DataDirFlags, DeviceFlags):
    """The flags of a study."""

    arrivals: Sequence[str] = required("a trace FILE.csv with a column TIMESTAMP, poisson, or bursts; several")
    loads: Sequence[float] = flag((1.0,), "arrivals over what all lanes answer at the native setting")
    budgets_ms: Sequence[float] = flag(
        (), "budgets in ms, of which each request draws one; default: 2 x the native median"
    )
    policies: Sequence[str] = flag(
        ("native", "table"),
        f"{', '.join(choosers.NAMES)}, {CLAIRVOYANT}:NAME, or paths of checkpoints",
    )
    prices: Sequence[str] = flag(
        ("derived",), "of lane time: derived, waiting (of those who wait alone), 0, or accuracy per ms", "--price"
    )
    disciplines: Sequence[Discipline] = flag(("edf",), "who is let in first: edf, fcfs or slack", "--discipline")
    results_dirs: Sequence[Path] = flag(
        _RESULTS, "results with answers (split val), training answers and times", "--results_dir"
    )
    assumed_accuracy: bool = flag(
        False,
        "take the accuracies that a server assumes where none were measured; for results of random weights, of "
        "which no answer is right",
    )
    lanes: int = flag(1, "answers at once")
    first_request: int = flag(0, "number of the first request of the arrivals, from 0")
    num_requests: int | None = flag(None, "requests; default: the rest of a trace, 4000 of drawn ones")
    seed: int = flag(0, "seed of questions, budgets, times and drawn arrivals", read=read_seed)
    json: Path | None = flag(None, "file of all figures")
    output_dir: Path | None = flag(None, "folder of a page with plots")
    model_path: str = flag("pocket", "model that was measured: pocket, a folder or a hub id")

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        for name, values in (("loads", self.loads), ("budgets_ms", self.budgets_ms)):
            if wrong := [value for value in values if not 0 < value < math.inf]:
                raise UserError(f"--{name} {wrong[0]:g}: must be a positive number")
        for name, value, least in (
            ("lanes", self.lanes, 1),
            ("first_request", self.first_request, 0),
            ("num_requests", self.num_requests, 2),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name} {value}: must be at least {least}")
        if self.lanes > 1 and any(name.startswith(CLAIRVOYANT) for name in self.policies):
            raise UserError(f"--lanes {self.lanes}: the clairvoyant plans for one lane; leave it out, or give 1")


Plan = tuple[Chooser, str | None, Discipline | None]
"""A policy, the price and the discipline; the last two are None where they change nothing."""

Key = tuple[str, float, str, str | None, str | None]
"""Arrivals, load, and the name, price and discipline of a plan."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Inputs:
    """The questions, times, requests and plans that the flags of a study name.

    Attributes:
        study: the flags. world: questions, answers and times. budgets_ms: of which each request has one.
        gaps: (n,) between arrivals, by the name as given. prices: of lane time, by the text as given.
        plans: what to do at each load of each kind of arrivals.
    """

    study: Study
    world: World
    budgets_ms: Sequence[float]
    gaps: Mapping[str, Floats]
    prices: Mapping[str, Price]
    plans: Sequence[Plan]

    @property
    def cells(self) -> list[tuple[str, float]]:
        """Kinds of arrivals with loads."""
        return [(name, load) for name in self.gaps for load in self.study.loads]

    @property
    def num_requests(self) -> int:
        """Requests of all plans in all cells."""
        return sum(len(self.gaps[name]) for name, _ in self.cells) * len(self.plans)

    def traffic(self, name: str, load: float) -> Traffic:
        """Return the requests of a cell."""
        study = self.study
        return draw_traffic(self.world, self.gaps[name], load, self.budgets_ms, study.seed, study.lanes)

    def simulate(self, plan: Plan, traffic: Traffic, advance: Advance = silent) -> Outcome:
        """Simulate a plan for some requests."""
        chooser, price, discipline = plan
        cost = self.prices.get(price or "", Price(is_derived=False))
        make = partial(_schedule, self.study.lanes, cost, discipline or "edf", price != WAITING)
        return simulate(self.world, traffic, chooser, make, advance)

    def report(self, schema: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
        """Return a report without rows."""
        return {"schema": schema, "stamp": dict(stamp), "conditions": conditions_of(self), "rows": [], "kinds": []}


def key_of(name: str, load: float, plan: Plan) -> Key:
    """Return the key of a plan in a cell."""
    return Path(name).name, load, plan[0].name, *plan[1:]


def read_inputs(study: Study) -> Inputs:
    """Read what the flags name, and check them.

    Raises:
        UserError: a flag makes no sense, or a file cannot be read.
    """
    study.check()
    prices = {text: parse_price(DERIVED if text == WAITING else text) for text in dict.fromkeys(study.prices)}
    world = read_world(study.results_dirs, _space(study.model_path), assumed=study.assumed_accuracy)
    budgets_ms = budgets_of(study.budgets_ms, world)
    gaps = {one: gaps_of(one, study.first_request, study.num_requests, study.seed) for one in study.arrivals}
    plans = _plans(study, _choosers(study, world, budgets_ms), prices)
    return Inputs(study=study, world=world, budgets_ms=budgets_ms, gaps=gaps, prices=prices, plans=plans)


def run_study(study: Study) -> dict[str, Any]:
    """Simulate everything; returns the report.

    Raises:
        UserError: a flag makes no sense, or a file cannot be read.
    """
    inputs = read_inputs(study)
    report = inputs.report(SCHEMA, inputs.world.judged.stamp) | {"closed": []}
    total, done, began_ms = inputs.num_requests, 0, now_ms()
    with progress_bar(f"Simulating {total} requests") as advance:
        for name, load in inputs.cells:
            traffic, outcomes = inputs.traffic(name, load), dict[Key, Outcome]()
            for plan in inputs.plans:
                outcome = inputs.simulate(plan, traffic, partial(_tell, advance, done, total))
                outcomes[key_of(name, load, plan)] = outcome
                done += len(traffic)
            add_rows(report, inputs, traffic, outcomes)
            report["closed"] += _closed(outcomes, blocks_of(len(traffic)))
    report["rate"] = total / max(s_from_ms(now_ms() - began_ms), 1e-9)
    return report


def budgets_of(given: Sequence[float], world: World) -> list[float]:
    """Return the given budgets in ms, ascending; by default twice the native setting's median."""
    return sorted(set(given)) or [_BUDGET_FACTOR * float(world.usual_ms[world.native])]


def _tell(advance: Advance, before: int, total: int, done: int, _: int) -> None:
    advance(before + done, total)


def _schedule(lanes: int, price: Price, discipline: Discipline, looks_ahead: bool) -> Schedule:
    most = 10**9  # who waits is limited by deadlines alone
    forecast = Forecast() if price.is_derived and looks_ahead else None
    return Schedule(lanes, most, most, discipline=discipline, price=price, forecast=forecast)


def _space(model: str) -> KnobSpace:
    from tempovlm.api import model_folder
    from tempovlm.model.weights import read_config

    return KnobSpace.for_model(read_config(model_folder(model)).shape)


def conditions_of(inputs: Inputs) -> dict[str, Any]:
    """Return what a study's figures depend on, beside the flags that its rows name."""
    study, world = inputs.study, inputs.world
    return {
        "budgets_ms": list(inputs.budgets_ms),
        "native_ms": world.native_ms,
        "lanes": study.lanes,
        "first_request": study.first_request,
        "num_requests": {Path(name).name: len(one) for name, one in inputs.gaps.items()},
        "seed": study.seed,
        "assumed_accuracy": study.assumed_accuracy,
        "questions": len(world.judged),
        "timed_questions": len(world.laps_ms),
        "repeats": world.laps_ms.shape[1],
        "results": [str(folder) for folder in study.results_dirs],
    }


def _plans(study: Study, known: Sequence[Chooser], prices: Mapping[str, Price]) -> list[Plan]:
    """Return what to do in each cell: price and discipline only where they change something."""
    plans: list[Plan] = []
    for chooser in known:
        orders = [None] if chooser.plans or not chooser.is_guarded else list(dict.fromkeys(study.disciplines))
        for order in orders:
            plans += [(chooser, price, order) for price in (prices if chooser.has_price else [None])]
    return plans


def is_path(policy: str) -> bool:
    """Whether a policy is named by the path of its checkpoint."""
    return "/" in policy or policy.endswith(".pt")


def _choosers(study: Study, world: World, budgets_ms: Sequence[float]) -> list[Chooser]:
    asked = dict.fromkeys(name.removeprefix(f"{CLAIRVOYANT}:") for name in study.policies)
    paths = [name for name in asked if is_path(name)]
    if paths:
        from tempovlm.lab.queueing.learned import learned_choosers

        learned = learned_choosers(paths, world, budgets_ms, study.model_path, study.device, study.data_dir)
    else:
        learned = {}
    result = []
    for name in dict.fromkeys(study.policies):
        plan, _, of = name.partition(":")
        if plan == CLAIRVOYANT:
            result.append(choosers.knowing(learned.get(of) or choosers.named(of or KIND, world)))
        else:
            result.append(learned.get(name) or choosers.named(name, world))
    return result


def add_rows(report: dict[str, Any], inputs: Inputs, traffic: Traffic, outcomes: Mapping[Key, Outcome]) -> None:
    """Add the rows of one kind of arrivals at one load to a report."""
    blocks, datasets = blocks_of(len(traffic)), inputs.world.judged.dataset[traffic.question]
    classes = budget_classes(inputs.budgets_ms, traffic)
    for key, outcome in outcomes.items():
        head, tail = head_of(key), tail_of(key)
        for budget_ms, chosen in classes:
            row = share_row(outcome, blocks, chosen)
            report["rows"].append({**head, "budget_ms": budget_ms, **tail, **row})
        for kind in np.unique(datasets):
            report["kinds"].append(
                {**head, "kind": str(kind), **tail, **share_row(outcome, blocks, datasets == kind)}
            )


def budget_classes(budgets_ms: Sequence[float], traffic: Traffic) -> list[tuple[float | None, Mask | None]]:
    """Return the budgets that get a row, None for all together, each with a mask (n,) of its requests."""
    if len(budgets_ms) == 1:
        return [(budgets_ms[0], None)]
    masks = [(budget_ms, traffic.budget_ms == budget_ms) for budget_ms in budgets_ms]
    return [(None, None), *((budget_ms, mask) for budget_ms, mask in masks if mask.any())]


def head_of(key: Key) -> dict[str, Any]:
    """Return the fields of a row that come before its budget."""
    return dict(zip(("arrivals", "load"), key[:2], strict=True))


def tail_of(key: Key) -> dict[str, Any]:
    """Return the fields of a row that name a plan."""
    return dict(zip(("policy", "price", "discipline"), key[2:], strict=True))


def _closed(outcomes: Mapping[Key, Outcome], blocks: Resamples) -> list[dict[str, Any]]:
    """Return the share of the way from the greedy table to each clairvoyant that each other policy goes."""
    right = {key: outcome.right_on_time for key, outcome in outcomes.items()}
    greedy = next((values for key, values in right.items() if key[2] == GREEDY), None)
    bounds = {key[2]: values for key, values in right.items() if key[2].startswith(CLAIRVOYANT)}
    if greedy is None:
        return []
    result = []
    for key, values in right.items():
        if key[2] == GREEDY or key[2] in bounds:
            continue
        for bound, best in bounds.items():
            closed = gap_closed(values, greedy, best, blocks)
            if closed is not None:
                result.append({**head_of(key), **tail_of(key), "bound": bound, **closed})
    return result


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write all figures but the rate, which differs from run to run.

    Raises:
        UserError: the file cannot be written.
    """
    kept = {name: value for name, value in report.items() if name != "rate"}
    whole = rounded(kept, DIGITS)
    lists = {name: value for name, value in whole.items() if isinstance(value, list)}
    head = json.dumps({name: value for name, value in whole.items() if name not in lists}, indent=1)
    body = "".join(
        f',\n "{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]"
        for name, rows in lists.items()
    )
    write_whole(path, head.removesuffix("\n}") + body + "\n}\n")


def render(report: Mapping[str, Any]) -> str:
    """Render a study's rows as a table for a terminal."""
    return render_rows(report["rows"]) + f"{report['rate']:.0f} simulated requests a second\n"


def cell_of(row: Mapping[str, Any]) -> str:
    """Return the first columns of a table of rows: arrivals, load and budget."""
    budget = "all" if row["budget_ms"] is None else f"{row['budget_ms']:.0f}"
    return f"{row['arrivals'][-23:]:<24}{row['load']:>5g}{budget:>8}  "


def render_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render rows as a table for a terminal."""
    lines = [
        f"{'arrivals':<24}{'load':>5}{'budget':>8}  {'policy':<24}{'price':<9}{'order':<6}"
        f"{'right on time':>22}{'on time':>9}{'refused':>9}{'late':>7}{'told late':>11}"
    ]
    for row in rows:
        low, high = row["interval"]
        share = f"{100 * row['right_on_time']:.1f} ({100 * low:.1f}, {100 * high:.1f})"
        lines.append(
            f"{cell_of(row)}{row['policy'][-23:]:<24}"
            f"{row['price'] or '':<9}{row['discipline'] or '':<6}{share:>22}"
            + "".join(
                f"{100 * row[name]:>{width}.1f}"
                for name, width in (("on_time", 9), ("refused", 9), ("late", 7), ("refused_late", 11))
            )
        )
    return "\n".join(lines) + "\n"
