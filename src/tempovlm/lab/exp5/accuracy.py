"""Exp 5 by regression: the expected accuracy of every setting, from the question and from its encoded picture.

A network reads the question and expects an accuracy of every setting; the tier is that of the best one that fits.
When the picture is encoded at it, a second network expects accuracies of the tier's settings from both. Each seed
learns on its own part of the pictures, and what serves is the mean of all seeds' logits, drawn towards the usual
accuracies: single answers say little about a question, and the guard acts on small differences.

Shapes: `N` questions, `K` settings, `T` tiers, `L` and `V` widths of features, `P` pairs of question and budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.networks import AccuracyNetwork, SeenAccuracyNetwork
from tempovlm.control.select import TIE, Ints, best
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.lab.exp5.values import VALUE_OPTIONS, train_seen_values, train_values
from tempovlm.lab.grpo.environment import FIXED_BUDGETS
from tempovlm.lab.statistics import spread
from tempovlm.lab.table import Floats, Table, budget_range, draw_budgets

if TYPE_CHECKING:
    from tempovlm.lab.exp5.end_to_end import JointJob

CHECKPOINT = "best_accuracy.pt"
SCHEMA = "tempovlm.accuracy_report/1"

SHARE = 0.7
"""Weight of what the networks say of a question; the rest is what is usual. Chosen on validation questions."""


@dataclass(frozen=True, slots=True)
class Nets:
    """Expected accuracies before and after the picture is encoded."""

    first: AccuracyNetwork
    seen: SeenAccuracyNetwork

    def shrink(self, accuracy: Tensor) -> None:
        """Draw both towards mean accuracies (K,)."""
        self.first.shrink(SHARE, accuracy)
        self.seen.shrink(SHARE, accuracy)

    @torch.no_grad()
    def expected(self, language: Tensor, vision: Tensor) -> tuple[Floats, Floats]:
        """Return the accuracies (N, K) that both expect of questions (N, L) with pictures (N, T, V)."""
        logits = (self.first(language), self.seen(language, vision))
        first, seen = (one.double().sigmoid().numpy() for one in logits)
        return first, seen


def run_job(job: JointJob) -> dict[str, Any]:
    """Train every seed, judge, and write everything; returns the report.

    Raises:
        UserError: wrong input, or the folder cannot be written or another process trains in it.
    """
    job.check()
    table, samples = job.read(job.results_dirs)
    table = table.split_by_picture(job.train_split, job.options.seed).for_training(job.estimator)
    found = job.features(job.results_dirs[0], samples)
    language, vision = torch.as_tensor(found.language), torch.as_tensor(found.vision)
    with writing_to(job.output_dir) as folder:
        runs, rows = [], []
        for seed in job.seeds:
            part = table.split_by_picture(job.train_split, seed)
            runs.append(_train(job, part, language, vision, seed, folder / f"seed_{seed}"))
            rows.append({"seed": seed} | _judged(runs[-1], part, language, vision))
        whole = Nets(
            AccuracyNetwork.ensemble([one.first for one in runs]),
            SeenAccuracyNetwork.ensemble([one.seen for one in runs]),
        )
        whole.shrink(torch.as_tensor(table.accuracy.mean(axis=0), dtype=torch.float32))
        whole.first.fit_usual(language)
        report = _report(job, table, rows)
        save_controller(
            folder / CHECKPOINT,
            kind="seen_value",
            networks={"accuracy": whole.first, "seen": whole.seen},
            space=table.space,
            weights_hash=job.weights_hash,
            stamp=table.stamp,
            options={"policy": "accuracy", **report["options"]},
            metrics=report["seeds"],
            dtype=torch.float16,
        )
        write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _train(job: JointJob, table: Table, language: Tensor, vision: Tensor, seed: int, folder: Path) -> Nets:
    fitting = replace(
        VALUE_OPTIONS, num_epochs=job.options.regression_epochs, hidden_dim=job.hidden_dim, seed=seed
    )
    return Nets(
        train_values(table, language, fitting, folder / "question"),
        train_seen_values(table, language, vision, fitting, folder / "picture"),
    )


def _judged(nets: Nets, table: Table, language: Tensor, vision: Tensor) -> dict[str, float]:
    """Compare one seed's networks with the table, on pictures that neither learned from.

    Both go by the training part alone. The seed's networks stay as they are: a mean of one, drawn as the whole is.
    """
    usual = table.accuracy[table.rows("train")].mean(axis=0)
    own = Nets(AccuracyNetwork.ensemble([nets.first]), SeenAccuracyNetwork.ensemble([nets.seen]))
    own.shrink(torch.as_tensor(usual, dtype=torch.float32))
    rows = table.rows("test")
    every = np.repeat(rows, FIXED_BUDGETS)
    limits_ms = budget_range(table.upper_ms[table.rows("train")])
    budget_ms = draw_budgets(np.random.default_rng(len(rows)), len(every), limits_ms)
    first, seen = own.expected(language, vision)
    of_table = np.broadcast_to(usual, first.shape)
    served, known = (
        served_accuracy(table, every, budget_ms, *pair) for pair in ((first, seen), (of_table, of_table))
    )
    return {"accuracy": float(served.mean()), "over_table": float((served - known).mean())}


def served_accuracy(table: Table, rows: Ints, budget_ms: Floats, first: Floats, seen: Floats) -> Floats:
    """Return the accuracies (P,) of what the guard picks by expected ones (N, K) before and after the picture."""
    upper_ms, accuracy = table.upper_ms[rows], table.accuracy[rows]
    fits = upper_ms <= budget_ms[:, None]
    chosen = best(first[rows], fits, upper_ms, tie=TIE)
    tiers = np.arange(len(table.space)) // table.per_tier
    at_tier = tiers[None] == tiers[chosen][:, None]
    settled = best(seen[rows], fits & at_tier, upper_ms, tie=TIE)
    return np.take_along_axis(accuracy, settled[:, None], axis=1)[:, 0]


def _report(job: JointJob, table: Table, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("accuracy", "over_table")
    return {
        "schema": SCHEMA,
        "architecture": job.architecture,
        "seeds": {"runs": list(rows), **{name: spread([row[name] for row in rows]) for name in names}},
        "share": SHARE,
        "questions": len(table),
        "options": job.options.record() | {"hidden_dim": job.hidden_dim, "train_split": job.train_split},
        "knob_space": table.space.fingerprint,
        "stamp": dict(table.stamp),
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'seed':<8} {'accuracy':>9} {'over the table':>15}"]
    for row in report["seeds"]["runs"]:
        lines.append(f"{row['seed']:<8} {row['accuracy']:>9.4f} {row['over_table']:>+15.4f}")
    mean = report["seeds"]["over_table"]
    around = "" if mean["interval"] is None else " [{:+.4f}, {:+.4f}]".format(*mean["interval"])
    lines.append(f"single networks over the table, on pictures that they did not see: {mean['mean']:+.4f}{around}")
    return "\n".join(lines) + "\n"
