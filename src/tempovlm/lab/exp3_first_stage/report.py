"""Report of the first stage: confusion, tiers by budget, and a comparison with other models on the same inputs.

Gradient boosting on the same inputs is the ceiling, gradient boosting on the budget alone the floor; both are
fitted to the training rows, their number of trees is chosen on the validation rows, and all are compared on the
test rows, question by question, with intervals clustered by picture. Shapes: `R` rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.select import Ints, best
from tempovlm.lab.exp3_first_stage.data import Rows, label
from tempovlm.lab.features import Features32
from tempovlm.lab.statistics import clustered_bootstrap
from tempovlm.lab.table import Floats, Table, budget_bins

SCHEMA = "tempovlm.stage1_report/1"

TREES = 120
"""Boosting rounds at most."""

_RATE, _LEAVES = 0.06, 15


def judge_stage1(
    table: Table, seen: Sequence[Features32], parts: Mapping[str, Rows], logits: Floats, seed: int
) -> dict[str, Any]:
    """The report, on the test rows.

    Args:
        table: of all parts.
        seen: (N, F) features that the network looks at; the ceiling looks at the same.
        parts: rows by `train`, `validation` and `test`.
        logits: (R, 3) of the network on the test rows.
        seed: of the boosting and the bootstraps.
    """
    test = parts["test"]
    images = table.image_id[test.question].tolist()
    chosen = logits.argmax(axis=1)
    right = chosen == test.tier
    literal = label(table, test.question, test.budget_ms).tier
    served = served_tier(table, test, logits)
    ceiling = boosted(seen, parts, seed)
    floor = boosted((), parts, seed) if seen else ceiling
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "questions": {name: len(table.rows(name)) for name in parts},
        "split": table.split,
        "left_out": table.left_out,
        "accuracy": float(right.mean()),
        "accuracy_interval": interval(right, images, seed),
        "literal_accuracy": float((chosen == literal).mean()),
        "served_accuracy": float((served == test.tier).mean()),
        "lost_points": lost_points(table, test, served),
        "worth": worth(table, test, served, images, seed),
        "most_common_tier": float(np.bincount(test.tier).max() / len(test)),
        "confusion": confusion(table, test.tier, chosen),
        "tier_by_budget": tier_by_budget(table, test, chosen),
        "by_dataset": by_dataset(table, test, right),
        "gradient_boosting": compared(ceiling, right, test, images, seed),
        "budget_only": compared(floor, right, test, images, seed),
        "knob_space": table.space.fingerprint,
    }
    return report


def interval(values: NDArray[Any], images: list[str], seed: int) -> list[float]:
    """Ends of the bootstrap interval of a mean, clustered by picture."""
    return list(clustered_bootstrap(values.astype(float).tolist(), images, seed=seed))


def inputs(seen: Sequence[Features32], rows: Rows) -> Floats:
    """(R, F) what a network sees: the budget and features of the question."""
    return np.concatenate([np.log(rows.budget_ms)[:, None], *(one[rows.question] for one in seen)], axis=1)


def boosted(seen: Sequence[Features32], parts: Mapping[str, Rows], seed: int) -> Ints | None:
    """(R,) tiers that gradient boosting predicts for the test rows; None where scikit-learn is not installed.

    Source: histogram gradient boosting, G. Ke et al., LightGBM, NeurIPS 2017.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        return None
    train, validation, test = (parts[name] for name in ("train", "validation", "test"))
    if len(np.unique(train.tier)) < 2:
        return np.full(len(test), train.tier[0])
    model = HistGradientBoostingClassifier(
        max_iter=TREES, learning_rate=_RATE, max_leaf_nodes=_LEAVES, early_stopping=False, random_state=seed
    )
    model.fit(inputs(seen, train), train.tier)
    stages = model.staged_predict(inputs(seen, validation))
    scores = [float((guess == validation.tier).mean()) for guess in stages]
    best = int(np.argmax(scores))
    guesses = model.staged_predict(inputs(seen, test))
    found: Ints = next(guess for i, guess in enumerate(guesses) if i == best)
    return found


def compared(
    guess: Ints | None, right: NDArray[np.bool_], test: Rows, images: list[str], seed: int
) -> dict[str, Any] | None:
    """Accuracy of another predictor, and what the network has beyond it, in points, with its interval."""
    if guess is None:
        return None
    other = guess == test.tier
    ahead = right.astype(float) - other.astype(float)
    ends = [100 * end for end in interval(ahead, images, seed)]
    return {"accuracy": float(other.mean()), "ahead_points": float(100 * ahead.mean()), "interval_points": ends}


def served_tier(table: Table, rows: Rows, logits: Floats) -> Ints:
    """(R,) the best tier among those of which a setting fits the budget, as it is served; else the cheapest."""
    latency_ms, per_tier = table.latency_ms[rows.question], table.per_tier
    fits = latency_ms <= rows.budget_ms[:, None]
    return best(np.repeat(logits, per_tier, axis=1), fits, latency_ms) // per_tier


def lost_points(table: Table, rows: Rows, tier: Ints) -> float:
    """Accuracy points between the best setting that fits and the best of the chosen tier that fits.

    Labels of single questions tie and turn at random; this is what a wrong tier costs.
    """
    accuracy, latency_ms = table.accuracy[rows.question], table.latency_ms[rows.question]
    fits = latency_ms <= rows.budget_ms[:, None]
    shape = (len(rows), len(table.space.tiers), -1)
    reached = np.where(fits, accuracy, 0.0).reshape(shape).max(axis=2)
    feasible = fits.any(axis=1)
    lost = reached.max(axis=1) - reached[np.arange(len(rows)), tier]
    return float(100 * lost[feasible].mean()) if feasible.any() else 0.0


def worth(table: Table, rows: Rows, tier: Ints, images: list[str], seed: int) -> dict[str, Any]:
    """Mean accuracy of the chosen tiers at their usual best settings, beside that of the best tier for the budget.

    The latter looks at the budget only: of the tiers that fit, the one whose usual best setting is right most
    often on the questions of training.
    """
    usual = table.accuracy[table.rows("train")].mean(axis=0)
    fits = table.latency_ms[rows.question] <= rows.budget_ms[:, None]
    static = np.where(fits, usual, -1.0).argmax(axis=1) // table.per_tier
    own, other = (rows.value[np.arange(len(rows)), which] for which in (tier, static))
    ends = [100 * end for end in interval(own - other, images, seed)]
    ahead = float(100 * (own - other).mean())
    accuracy = {"accuracy": float(own.mean()), "by_budget_alone": float(other.mean())}
    return {**accuracy, "ahead_points": ahead, "interval_points": ends}


def confusion(table: Table, tier: Ints, chosen: Ints) -> dict[str, dict[str, int]]:
    """Best tier → chosen tier → number of rows."""
    names = table.space.tiers
    return {
        name: {other: int(((tier == i) & (chosen == j)).sum()) for j, other in enumerate(names)}
        for i, name in enumerate(names)
    }


def tier_by_budget(table: Table, rows: Rows, chosen: Ints) -> list[dict[str, Any]]:
    """Shares of the best and of the chosen tiers, and the accuracy, in ranges of the budget."""
    names, result = table.space.tiers, []
    for ends, here in budget_bins(rows.budget_ms):
        shares = [np.bincount(part[here], minlength=len(names)) / here.sum() for part in (rows.tier, chosen)]
        best, own = (dict(zip(names, map(float, part), strict=True)) for part in shares)
        accuracy = float((chosen == rows.tier)[here].mean())
        result.append({**ends, "rows": int(here.sum()), "best": best, "chosen": own, "accuracy": accuracy})
    return result


def by_dataset(table: Table, rows: Rows, right: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Accuracy of each data set, and the share of its most common tier."""
    names = table.dataset[rows.question]
    result = {}
    for name in np.unique(names):
        here = names == name
        most = np.bincount(rows.tier[here]).max() / here.sum()
        row = {"rows": int(here.sum()), "accuracy": float(right[here].mean()), "most_common_tier": float(most)}
        result[str(name)] = row
    return result


def render(report: Mapping[str, Any]) -> str:
    """Confusion, tiers by budget and accuracy by data set, as text."""
    names = list(report["confusion"])
    lines = [f"{'best / chosen':<16}" + "".join(f"{name:>9}" for name in names)]
    lines += [f"{name:<16}" + "".join(f"{row[n]:>9}" for n in names) for name, row in report["confusion"].items()]
    lines += ["", f"{'budget ms':>19}  accuracy   best: {' / '.join(names)}   chosen"]
    for row in report["tier_by_budget"]:
        shares = ["/".join(f"{row[part][name]:4.0%}" for name in names) for part in ("best", "chosen")]
        ends = f"{row['from_ms']:>8.1f} - {row['to_ms']:>8.1f}"
        lines.append(f"{ends}    {row['accuracy']:6.1%}   {shares[0]}   {shares[1]}")
    lines += ["", f"{'data set':<16} accuracy  most common tier"]
    for name, row in report["by_dataset"].items():
        lines.append(f"{name:<16} {row['accuracy']:8.1%}  {row['most_common_tier']:16.1%}")
    ends = ", ".join(f"{end:.1%}" for end in report["accuracy_interval"])
    lines += [
        "",
        f"accuracy {report['accuracy']:.1%} [{ends}] on {report['label']} labels, "
        f"{report['literal_accuracy']:.1%} on literal ones; a wrong tier costs {report['lost_points']:.2f} points",
    ]
    own, (low, high) = report["worth"], report["worth"]["interval_points"]
    lines.append(
        f"the chosen tiers answer {own['accuracy']:.1%} right, the best by budget alone "
        f"{own['by_budget_alone']:.1%}: {own['ahead_points']:+.2f} points [{low:+.2f}, {high:+.2f}]"
    )
    for title, name in (("gradient boosting", "gradient_boosting"), ("budget only", "budget_only")):
        if found := report[name]:
            low, high = found["interval_points"]
            own = f"{title} {found['accuracy']:.1%}; the network is ahead by {found['ahead_points']:+.2f}"
            lines.append(f"{own} points [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines) + "\n"
