"""How good the first stage is: confusion, tiers by budget, and against what the same inputs allow at all.

Gradient boosting on the same inputs is the ceiling, gradient boosting on the budget alone the floor; both are
fitted to the training rows, their number of trees is chosen on the validation rows, and all are compared on the
test rows, question by question, with intervals clustered by picture. Shapes: `R` rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.select import best
from tempovlm.lab.exp2_supervised import BINS, bin_edges
from tempovlm.lab.exp3_first_stage.data import Material, Rows
from tempovlm.lab.features import Ints
from tempovlm.lab.statistics import clustered_bootstrap
from tempovlm.lab.table import Floats

SCHEMA = "tempovlm.stage1_report/1"

TREES = 120
"""Boosting rounds at most."""

_RATE, _LEAVES = 0.06, 15


def judge_stage1(
    variant: str, data: Material, parts: Mapping[str, Rows], logits: Floats, seed: int
) -> dict[str, Any]:
    """The report, on the test rows.

    Args:
        variant: what the network looks at; the ceiling looks at the same.
        data: of all parts.
        parts: rows by `train`, `validation` and `test`.
        logits: (R, 3) of the network on the test rows.
        seed: of the boosting and the bootstraps.
    """
    test = parts["test"]
    images = data.table.image_id[test.question].tolist()
    chosen = logits.argmax(axis=1)
    right = chosen == test.tier
    ceiling = boosted(variant, data, parts, seed)
    floor = ceiling if variant == "budget" else boosted("budget", data, parts, seed)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "variant": variant,
        "questions": {name: int(getattr(data.split, name).sum()) for name in parts},
        "split": data.table.split,
        "left_out": data.table.left_out,
        "accuracy": float(right.mean()),
        "accuracy_interval": interval(right, images, seed),
        "served_accuracy": float((served_tier(data, test, logits) == test.tier).mean()),
        "lost_points": lost_points(data, test, served_tier(data, test, logits)),
        "worth": worth(data, test, served_tier(data, test, logits), images, seed),
        "most_common_tier": float(np.bincount(test.tier).max() / len(test)),
        "confusion": confusion(data, test.tier, chosen),
        "tier_by_budget": tier_by_budget(data, test, chosen),
        "by_dataset": by_dataset(data, test, right),
        "gradient_boosting": compared(ceiling, right, test, images, seed),
        "budget_only": compared(floor, right, test, images, seed),
        "knob_space": data.space.fingerprint,
    }
    return report


def interval(values: NDArray[Any], images: list[str], seed: int) -> list[float]:
    """Ends of the bootstrap interval of a mean, clustered by picture."""
    return list(clustered_bootstrap(values.astype(float).tolist(), images, seed=seed))


def inputs(variant: str, data: Material, rows: Rows) -> Floats:
    """(R, F) what the network of a variant sees."""
    columns = [np.log(rows.budget_ms)[:, None]]
    if variant != "budget":
        columns.append(data.features.language[rows.question])
    if variant == "glance":
        columns.append(data.features.glance[rows.question])
    return np.concatenate(columns, axis=1)


def boosted(variant: str, data: Material, parts: Mapping[str, Rows], seed: int) -> Ints | None:
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
    model.fit(inputs(variant, data, train), train.tier)
    stages = model.staged_predict(inputs(variant, data, validation))
    scores = [float((guess == validation.tier).mean()) for guess in stages]
    best = int(np.argmax(scores))
    guesses = model.staged_predict(inputs(variant, data, test))
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


def served_tier(data: Material, rows: Rows, logits: Floats) -> Ints:
    """(R,) the best tier among those of which a setting fits the budget, as it is served; else the cheapest."""
    latency_ms, per_tier = data.latency_ms[rows.question], len(data.space) // len(data.space.tiers)
    fits = latency_ms <= rows.budget_ms[:, None]
    return best(np.repeat(logits, per_tier, axis=1), fits, latency_ms) // per_tier


def lost_points(data: Material, rows: Rows, tier: Ints) -> float:
    """Accuracy points between the best setting that fits and the best of the chosen tier that fits.

    Labels of single questions tie and turn at random; this is what a wrong tier costs.
    """
    accuracy, latency_ms = data.table.accuracy[rows.question], data.latency_ms[rows.question]
    fits = latency_ms <= rows.budget_ms[:, None]
    shape = (len(rows), len(data.space.tiers), -1)
    reached = np.where(fits, accuracy, 0.0).reshape(shape).max(axis=2)
    feasible = fits.any(axis=1)
    lost = reached.max(axis=1) - reached[np.arange(len(rows)), tier]
    return float(100 * lost[feasible].mean()) if feasible.any() else 0.0


def worth(data: Material, rows: Rows, tier: Ints, images: list[str], seed: int) -> dict[str, Any]:
    """Mean accuracy of the chosen tiers at their usual best settings, beside that of the best tier for the budget.

    The latter looks at the budget only: of the tiers that fit, the one whose usual best setting is right most
    often on the questions of training.
    """
    usual = data.table.accuracy[data.split.train].mean(axis=0)
    fits = data.latency_ms[rows.question] <= rows.budget_ms[:, None]
    static = np.where(fits, usual, -1.0).argmax(axis=1) // (len(data.space) // len(data.space.tiers))
    own, other = (rows.value[np.arange(len(rows)), which] for which in (tier, static))
    ends = [100 * end for end in interval(own - other, images, seed)]
    ahead = float(100 * (own - other).mean())
    accuracy = {"accuracy": float(own.mean()), "by_budget_alone": float(other.mean())}
    return {**accuracy, "ahead_points": ahead, "interval_points": ends}


def confusion(data: Material, tier: Ints, chosen: Ints) -> dict[str, dict[str, int]]:
    """Best tier → chosen tier → number of rows."""
    names = data.space.tiers
    return {
        name: {other: int(((tier == i) & (chosen == j)).sum()) for j, other in enumerate(names)}
        for i, name in enumerate(names)
    }


def tier_by_budget(data: Material, rows: Rows, chosen: Ints) -> list[dict[str, Any]]:
    """Shares of the best and of the chosen tiers, and the accuracy, in ranges of the budget."""
    edges, names = bin_edges(rows.budget_ms), data.space.tiers
    place = np.digitize(rows.budget_ms, edges[1:-1])
    result = []
    for i in range(BINS):
        here = place == i
        if here.any():
            shares = [np.bincount(part[here], minlength=len(names)) / here.sum() for part in (rows.tier, chosen)]
            best, own = (dict(zip(names, map(float, part), strict=True)) for part in shares)
            ends = {"from_ms": round(edges[i], 3), "to_ms": round(edges[i + 1], 3), "rows": int(here.sum())}
            accuracy = float((chosen == rows.tier)[here].mean())
            result.append({**ends, "best": best, "chosen": own, "accuracy": accuracy})
    return result


def by_dataset(data: Material, rows: Rows, right: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Accuracy of each data set, and the share of its most common tier."""
    names = data.table.dataset[rows.question]
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
        f"accuracy {report['accuracy']:.1%} [{ends}]; a wrong tier costs {report['lost_points']:.2f} points",
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
