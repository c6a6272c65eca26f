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

from output import write_json
from tempovlm.api import model_folder
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.judge.headroom import Floats, Scored, Texts, budgets_up_to, headroom_at
from tempovlm.lab.statistics import Resamples, percentile_interval
from tempovlm.lab.table import Table, table_of
from tempovlm.model.weights import read_config

UPPER_LEVEL = 0.99

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


def scored(frame: pd.DataFrame, table: Table, kind: str) -> Scored:
    """Return the questions of a table by kind."""
    return Scored(table.accuracy, table.dataset, kinds_of(frame, table, kind))


def row_of(
    train: Scored, test: Scored, pictures: Sequence[str], space: KnobSpace, budget_ms: float, upper_ms: Floats
) -> dict[str, Any]:
    """Return the headroom at a budget; `pictures` are those of the test questions."""
    fits = upper_ms <= budget_ms
    found = headroom_at(train, test, fits)
    low, high = percentile_interval(Resamples(pictures).means(found.gains[:, None])[1:, 0])
    return {
        "budget_ms": round(budget_ms, 3),
        "settings": int(fits.sum()),
        "single": str(space.settings[found.single]),
        "accuracy_single": round(test.mean(found.single), 2),
        "accuracy_by_kind": round(test.mean(found.settings), 2),
        "headroom": round(float(found.gains.mean()), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
        "chosen": {kind: str(space.settings[index]) for kind, index in found.chosen.items()},
    }


def headroom(folders: Sequence[Path], model: str, budgets_ms: Sequence[float]) -> dict[str, Any]:
    """Measure the headroom of each kind at each budget.

    Args:
        folders: results directories of the core experiment.
        model: the model that they are of.
        budgets_ms: in milliseconds; without any, five quantiles of the upper times.

    Raises:
        UserError: results cannot be read, a split or a setting's time is missing.
    """
    space = KnobSpace.for_model(read_config(model_folder(model)).shape)
    frame = read_results(folders, None, space)
    train, test = (table_of(frame, space, split) for split in ("train", "val"))
    upper_ms = train.usual_ms(UPPER_LEVEL)
    native_ms = upper_ms[space.index(space.native)]
    if not budgets_ms:
        budgets_ms = budgets_up_to(upper_ms, native_ms)
    if min(budgets_ms) < upper_ms.min():
        raise UserError(
            f"--budgets {min(budgets_ms)}: no setting fits; the cheapest takes {upper_ms.min():.1f} ms"
        )
    pictures = [f"{dataset}/{image}" for dataset, image in zip(test.dataset, test.image_id, strict=True)]
    rows: dict[str, Any] = {}
    for kind in KINDS:
        parts = scored(frame, train, kind), scored(frame, test, kind)
        rows[kind] = [row_of(*parts, pictures, space, budget_ms, upper_ms) for budget_ms in budgets_ms]
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
