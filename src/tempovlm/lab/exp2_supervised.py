"""Exp 2: a controller that sees only the budget, trained on a table of measured settings.

The table's best setting is a staircase over the budget: what the network can learn is where its steps are. Budgets
are drawn over the whole feasible range and split into two parts. The table is the same for both, so the validation
says how well the staircase was learned and not how well the table holds for other pictures.

Shapes: `N` budgets, `K` settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.networks import SupervisedController
from tempovlm.control.select import TIE, best
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KNOBS, TIERS, KnobConfig, KnobSpace
from tempovlm.core.paths import read_json, write_whole
from tempovlm.lab.fit import SCORE, fit, seeded
from tempovlm.lab.options import FitOptions, SupervisedFlags
from tempovlm.lab.table import Floats, Table, budget_bins, budget_range, draw_budgets

CHECKPOINT = "best_supervised_controller.pt"
SCHEMA = "tempovlm.supervised_report/1"


QUANTILES = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedJob(SupervisedFlags):
    """Exp 2: its flags and how to train."""

    options: FitOptions


def read_profile_table(paths: Sequence[Path], quantile: str = "p95") -> Table:
    """Read one or several `profiling_results.json` as a table of one row, the mean over questions.

    Raises:
        UserError: a file is missing, damaged, incomplete, or of another model or machine than the first.
    """
    if quantile not in QUANTILES:
        raise UserError(f"--latency_quantile {quantile}: choose from {', '.join(QUANTILES)}")
    files = {path: _records(path) for path in paths}
    first = next(iter(files))
    stamp = files[first][0].get("stamp") or {}
    for path, row in ((path, row) for path, rows in files.items() for row in rows):
        for name in ("weights", "hardware", "device", "knob_space"):
            if (row.get("stamp") or {}).get(name) != stamp.get(name):
                raise UserError(f"{path}: field {name} of its stamp is not that of {first}; give results of one")
    space = _space_of(files[first], stamp.get("knob_space"), first)
    parts = [_columns(path, rows, space, quantile) for path, rows in files.items()]
    counts = np.array([float(rows[0].get("num_samples") or 1) for rows in files.values()])
    accuracy, latency_ms = (np.average([part[i] for part in parts], axis=0, weights=counts) for i in (0, 1))
    return Table.of(space, accuracy[None], latency_ms, stamp=stamp)


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_json(path, "profiling_with_importance.py writes it")
    if not isinstance(records, list) or not records or not all(isinstance(row, dict) for row in records):
        raise UserError(f"{path}: no list of settings; give a profiling_results.json of Exp 7")
    for row in records:
        for name in (*KNOBS, "accuracy", "T_total"):
            if row.get(name) is None:
                raise UserError(f"{path}: field {name} of a setting is missing; profile with latency and accuracy")
        for name, kind in (*((name, int) for name in KNOBS[1:]), (KNOBS[0], str), ("stamp", dict | None)):
            if not isinstance(row.get(name), kind):
                raise UserError(f"{path}: field {name} of a setting is {row[name]!r}; profile again")
    return records


def _space_of(records: Sequence[Mapping[str, Any]], fingerprint: str | None, path: Path) -> KnobSpace:
    """The space whose values the records have; its native top-k is the one that the fingerprint tells."""
    top_ks, blocks = (tuple(sorted({int(row[name]) for row in records})) for name in KNOBS[1:])
    if fingerprint is None:
        return KnobSpace(TIERS, top_ks, blocks, top_ks[len(top_ks) // 2])
    for native in top_ks:
        space = KnobSpace(TIERS, top_ks, blocks, native)
        if space.fingerprint == fingerprint:
            return space
    raise UserError(
        f"{path}: field knob_space of its stamp is {fingerprint}, which its settings do not make; profile all"
    )


def _columns(path: Path, records: Sequence[Mapping[str, Any]], space: KnobSpace, quantile: str) -> list[Floats]:
    """Accuracy and total of each setting, in the space's order."""
    known = {KnobConfig.from_mapping(row): row for row in records}
    columns: list[list[float]] = [[], []]
    for knobs in space:
        row = known.get(knobs)
        if row is None:
            raise UserError(f"{path}: setting {knobs} is missing; profile all {len(space)} settings")
        total = row["T_total"] if quantile == "mean" else row.get(f"T_total_{quantile}", row["T_total"])
        are_numbers = all(isinstance(value, int | float) for value in (row["accuracy"], total))
        if not are_numbers or not 0 <= row["accuracy"] <= 1 or not 0 < total < np.inf:
            raise UserError(f"{path}: setting {knobs} has accuracy {row['accuracy']} and T_total {total}")
        columns[0].append(float(row["accuracy"]))
        columns[1].append(float(total))
    return [np.array(column) for column in columns]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Budgets (N,) with the best setting of each, and the index of each of its knobs (N, 3)."""

    budget_ms: Floats
    setting: NDArray[np.int64]
    knobs: NDArray[np.int64]

    @classmethod
    def of(cls, table: Table, budget_ms: Floats) -> Labelled:
        """Label budgets by a table."""
        fits = table.latency_ms <= budget_ms[:, None]
        setting = best(table.accuracy, fits, table.latency_ms, tie=TIE)
        return cls(budget_ms, setting, knob_indices(table.space)[setting])


def knob_indices(space: KnobSpace) -> NDArray[np.int64]:
    """(K, 3) index of each setting's tier, top-k and number of blocks among the legal values."""
    return np.stack(np.unravel_index(np.arange(len(space)), space.shape), axis=1)


class BudgetObjective:
    """Cross-entropy of the three heads, the budgets of training in a new order every epoch."""

    def __init__(self, net: SupervisedController, table: Table, train: Labelled, other: Labelled) -> None:
        self.net, self.table, self.other = net, table, other
        self.device = next(net.parameters()).device
        self.rows = self._tensors(train)
        self.held_out = self._tensors(other)

    def _tensors(self, rows: Labelled) -> tuple[Tensor, Tensor]:
        budgets = torch.tensor(rows.budget_ms, dtype=torch.float32, device=self.device)
        return budgets, torch.tensor(rows.knobs, device=self.device)

    def draw(self, rng: np.random.Generator) -> Sequence[Tensor]:
        """All budgets of training, shuffled."""
        order = torch.from_numpy(rng.permutation(len(self.rows[0]))).to(self.device)
        return [column[order] for column in self.rows]

    def loss(self, *batch: Tensor) -> Tensor:
        """Sum over the knobs."""
        budgets, knobs = batch
        logits = self.net(budgets)
        return torch.stack([F.cross_entropy(row, knobs[:, i]) for i, row in enumerate(logits)]).sum()

    def validate(self) -> Mapping[str, float]:
        """Loss and accuracies on the other budgets; the score is the share that is right in all three knobs."""
        loss = self.loss(*self.held_out).item()
        found = measure(self.net, self.table, self.other)
        names = (*KNOBS, "overall")
        own = {f"val_{name}": float(found[name]) for name in names}
        return {"val_loss": loss, SCORE: own["val_overall"], **own, "val_regret_points": found["regret_points"]}


@torch.no_grad()
def measure(net: SupervisedController, table: Table, rows: Labelled) -> dict[str, float]:
    """Shares of right heads, of all three together, and what the choices lose in accuracy points.

    The loss is of the choice as it is served: the best joint logit among the settings that fit the budget.
    """
    device = next(net.parameters()).device
    logits = net(torch.tensor(rows.budget_ms, dtype=torch.float32, device=device))
    heads = [row.double().cpu().numpy() for row in logits]
    right = np.stack([row.argmax(axis=1) for row in heads], axis=1) == rows.knobs
    places = knob_indices(table.space)
    joint = sum(row[:, places[:, i]] for i, row in enumerate(heads))
    fits = table.latency_ms <= rows.budget_ms[:, None]
    chosen = best(np.asarray(joint), fits, table.latency_ms)
    lost = table.accuracy[0, rows.setting] - table.accuracy[0, chosen]
    return {
        **{name: float(right[:, i].mean()) for i, name in enumerate(KNOBS)},
        "overall": float(right.all(axis=1).mean()),
        "served": float((chosen == rows.setting).mean()),
        "regret_points": float(100 * lost.mean()),
    }


def by_budget(net: SupervisedController, table: Table, rows: Labelled) -> list[dict[str, float]]:
    """Return the same in each of ten ranges of the budget."""
    result = []
    for ends, here in budget_bins(rows.budget_ms):
        part = Labelled(rows.budget_ms[here], rows.setting[here], rows.knobs[here])
        result.append({**ends, "budgets": int(here.sum()), **measure(net, table, part)})
    return result


def run_job(job: SupervisedJob) -> dict[str, Any]:
    """Train and write the checkpoint and `report.json`; returns the report.

    Raises:
        UserError: wrong input, or the folder cannot be written or another process trains in it.
    """
    job.options.check()
    if not 0 < job.train_split < 1:
        raise UserError(f"--train_split {job.train_split}: must be between 0 and 1")
    table = read_profile_table(job.profiling_results, job.latency_quantile)
    with writing_to(job.output_dir):
        return _train(job, table)


def _train(job: SupervisedJob, table: Table) -> dict[str, Any]:
    options = job.options
    limits_ms = budget_range(table.latency_ms)
    budgets = draw_budgets(np.random.default_rng(options.seed), max(job.num_budgets, 2), limits_ms)
    count = min(max(round(job.train_split * len(budgets)), 1), len(budgets) - 1)
    train, other = Labelled.of(table, budgets[:count]), Labelled.of(table, budgets[count:])
    net = seeded(options.seed, lambda: SupervisedController(options.hidden_dim, **table.space.counts))
    net.to(options.device)
    net.budget.fit(limits_ms)
    data = {
        "accuracy": table.accuracy[0].tolist(),
        "latency_ms": table.latency_ms[0].tolist(),
        "budgets": len(budgets),
    }
    data["train_split"] = job.train_split
    fitted = fit(net, BudgetObjective(net, table, train, other), options, job.output_dir, data)
    found = measure(net, table, other)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "profiling_results": [str(path) for path in job.profiling_results],
        "latency_quantile": job.latency_quantile,
        "budget_range_ms": list(limits_ms),
        "budgets": {"train": len(train.budget_ms), "validation": len(other.budget_ms)},
        "settings_that_are_best_somewhere": len(np.unique(train.setting)),
        "best_epoch": fitted.best_epoch,
        "validation": found,
        "by_budget": by_budget(net, table, other),
        "options": asdict(options),
        "knob_space": table.space.fingerprint,
        "stamp": dict(table.stamp),
    }
    save_controller(
        job.output_dir / CHECKPOINT,
        kind="supervised",
        networks={"controller": net},
        space=table.space,
        weights_hash=table.stamp.get("weights"),
        stamp=table.stamp,
        options={**asdict(options), "train_split": job.train_split, "latency_quantile": job.latency_quantile},
        metrics=found,
    )
    write_whole(job.output_dir / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def render(report: Mapping[str, Any]) -> str:
    """Return accuracy by budget and in all, as text."""
    lines = [f"{'budget ms':>19}  overall    tier   top-k  blocks  regret"]
    for row in report["by_budget"]:
        shares = "  ".join(f"{row[name]:6.1%}" for name in ("overall", *KNOBS))
        lines.append(f"{row['from_ms']:>8.1f} - {row['to_ms']:>8.1f}   {shares}  {row['regret_points']:6.2f}")
    found = report["validation"]
    shares = "  ".join(f"{found[name]:6.1%}" for name in ("overall", *KNOBS))
    return "\n".join([*lines, f"{'all':>19}   {shares}  {found['regret_points']:6.2f}"]) + "\n"
