"""Measures what a controller can gain by content alone: the best setting for each kind of question.

For each budget the settings whose upper time fits it are compared. One setting for all, and one for each kind of
question, are chosen by accuracy on training questions and scored on the others; the difference is the headroom. A
kind is a question's template, or its data set. The accuracy of a kind is smoothed towards that of all questions,
or few questions would choose. Budgets are quantiles of the upper times, up to the native setting's.

    python benchmarks/headroom.py --json headroom.json --results_dir results/core_exp_pocket_{train,val,cpu}

The directories hold the sweep of training questions, that of validation questions, and the times of every setting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from output import write_json
from tempovlm.api import model_folder
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.statistics import Resamples, percentile_interval
from tempovlm.lab.table import Table, table_of
from tempovlm.model.weights import read_config

Floats = NDArray[np.float64]
Texts = NDArray[np.str_]

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Places of the budgets among the upper times of settings that take no more than the native one."""

UPPER_LEVEL = 0.99
SMOOTHING = 20.0
"""Questions of all kinds that are added to those of each kind."""

KINDS = ("dataset", "template")


def kinds_of(frame: pd.DataFrame, table: Table, kind: str) -> Texts:
    """Return the kind of each question of a table, (N,): its data set, with its template where that is wished."""
    if kind == "dataset":
        return table.dataset
    keys = ["dataset", "question_id"]
    names = frame.drop_duplicates(keys).set_index(keys)["template"].to_dict()
    if not all(names.values()):
        raise UserError("--results_dir: questions without a template; results of generated data have one")
    return np.array([f"{dataset}/{names[dataset, number]}" for dataset, number in table.questions])


def weights_of(table: Table) -> Floats:
    """Return weights (N,) under which the mean over questions is the mean of the data sets' means."""
    names, place, counts = np.unique(table.dataset, return_inverse=True, return_counts=True)
    return len(table) / (len(names) * counts[place].astype(float))


def choose(train: Table, kinds: Texts, fits: NDArray[np.bool_]) -> tuple[int, dict[str, int]]:
    """Choose among settings that fit, (K,), the best for all training questions and the best for each kind."""
    weights = weights_of(train)
    overall = np.average(train.accuracy, axis=0, weights=weights)
    chosen = {}
    for kind in np.unique(kinds):
        own = train.accuracy[kinds == kind]
        smoothed = (own.sum(axis=0) + SMOOTHING * overall) / (len(own) + SMOOTHING)
        chosen[str(kind)] = int(np.where(fits, smoothed, -1.0).argmax())
    return int(np.where(fits, overall, -1.0).argmax()), chosen


def row_of(
    train: Table, test: Table, kinds: tuple[Texts, Texts], budget_ms: float, upper_ms: Floats
) -> dict[str, Any]:
    """Return the headroom at a budget; `kinds` are those of the training and of the test questions."""
    single, chosen = choose(train, kinds[0], upper_ms <= budget_ms)
    settings = np.array([chosen.get(kind, single) for kind in kinds[1].tolist()])
    every = np.arange(len(test))
    weights = weights_of(test)
    gains = 100 * weights * (test.accuracy[every, settings] - test.accuracy[:, single])
    pictures = [f"{dataset}/{image}" for dataset, image in zip(test.dataset, test.image_id, strict=True)]
    low, high = percentile_interval(Resamples(pictures).means(gains[:, None])[1:, 0])
    names = setting_names(train)
    return {
        "budget_ms": round(budget_ms, 3),
        "settings": int((upper_ms <= budget_ms).sum()),
        "single": names[single],
        "accuracy_single": round(100 * float(np.average(test.accuracy[:, single], weights=weights)), 2),
        "accuracy_by_kind": round(100 * float(np.average(test.accuracy[every, settings], weights=weights)), 2),
        "headroom": round(float(gains.mean()), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
        "chosen": {kind: names[index] for kind, index in chosen.items()},
    }


def setting_names(table: Table) -> list[str]:
    """Return the settings' texts."""
    return [str(knobs) for knobs in table.space]


def headroom(folders: Sequence[Path], model: str, budgets_ms: Sequence[float]) -> dict[str, Any]:
    """Measure the headroom of each kind at each budget.

    Args:
        folders: results directories of the core experiment.
        model: the model that they are of.
        budgets_ms: in milliseconds; without any, at `QUANTILES` of the upper times.

    Raises:
        UserError: results cannot be read, a split or a setting's time is missing.
    """
    space = KnobSpace.for_model(read_config(model_folder(model)).shape)
    frame = read_results(folders, None, space)
    train, test = (table_of(frame, space, split) for split in ("train", "val"))
    upper_ms = train.usual_ms(UPPER_LEVEL)
    native_ms = upper_ms[space.index(space.native)]
    if not budgets_ms:
        budgets_ms = np.quantile(upper_ms[upper_ms <= native_ms], QUANTILES).tolist()
    if min(budgets_ms) < upper_ms.min():
        raise UserError(
            f"--budgets {min(budgets_ms)}: no setting fits; the cheapest takes {upper_ms.min():.1f} ms"
        )
    rows: dict[str, Any] = {}
    for kind in KINDS:
        kinds = kinds_of(frame, train, kind), kinds_of(frame, test, kind)
        rows[kind] = [row_of(train, test, kinds, budget_ms, upper_ms) for budget_ms in budgets_ms]
    return {
        "model": model,
        "results": [str(folder) for folder in folders],
        "stamp": dict(train.stamp),
        "questions": {"train": len(train), "test": len(test)},
        "upper_level": UPPER_LEVEL,
        "headroom": rows,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", nargs="+", type=Path, required=True, help="of the core experiment")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--budgets", nargs="+", type=float, default=[], help="in ms; by default five quantiles")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    try:
        record = headroom(flags.results_dir, flags.model, flags.budgets)
    except UserError as error:
        sys.exit(f"error: {error.flagged}")
    for kind, rows in record["headroom"].items():
        for row in rows:
            low, high = row["interval"]
            sys.stderr.write(
                f"{kind:9} {row['budget_ms']:8.1f} ms  {row['single']:14} {row['accuracy_single']:6.2f} %"
                f"  by kind {row['accuracy_by_kind']:6.2f} %  headroom {row['headroom']:+.2f}"
                f" ({low:+.2f} to {high:+.2f})\n"
            )
    write_json(record, flags.json)


if __name__ == "__main__":
    main()
