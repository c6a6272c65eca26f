"""Summarises the rows of the core experiment by setting: means with their uncertainty, quantiles, counts.

The unit of analysis is the picture: questions about one picture are correlated, so standard errors and intervals
are clustered by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig
from tempovlm.core.plan import Ranking
from tempovlm.core.records import STAGE_FIELDS
from tempovlm.lab.statistics import Resamples, clustered_mean, percentile_interval

if TYPE_CHECKING:
    import pandas as pd

LEVELS = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
TOTAL_VISION = "T_vision_total"
"""Encoder and projector together, a field of older files."""

SUMMARISED = (*STAGE_FIELDS.values(), TOTAL_VISION, "T_decode_per_token")

_SETTING = list(KNOBS)
_DIGITS = 5


def summarise(
    frame: pd.DataFrame, dataset: str, split: str, ranking: Ranking, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Summarise each setting of a data set, in the order of their appearance.

    Args:
        frame: result of `store.read_results`, of one or several results directories.
        dataset: one of its data sets.
        split: one of its splits.
        ranking: ranking of the blocks.
        seed: seed of the bootstrap.

    Raises:
        UserError: the directories are of different models, or their latencies of different machines, or there
            are no answers or no latencies.
    """
    part = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
    stamp = _one_stamp(frame, part, dataset)
    answered = part[part["accuracy"].notna()].drop_duplicates(["question_id", *_SETTING])
    measured = part[part["T_total"].notna()]
    for rows, field in ((answered, "accuracy"), (measured, "T_total")):
        if rows.empty:
            where = ", ".join(sorted(set(frame["source"])))
            raise UserError(f"{where}: {dataset} ({split}) has no row with field {field}")
    intervals = _intervals(answered, seed)
    failed = part[part["error"].notna()].drop_duplicates(["question_id", *_SETTING]).groupby(_SETTING).size()
    timed = dict(list(measured.groupby(_SETTING, sort=False)))
    records = []
    for key, rows in answered.groupby(_SETTING, sort=False):
        knobs = KnobConfig.from_values(key)
        mean, error = clustered_mean(rows["accuracy"].to_numpy(), rows["image_id"].to_numpy())
        records.append(
            {
                **knobs.as_dict(),
                "selected_blocks": list(ranking.blocks(knobs.num_blocks)),
                "dataset": dataset,
                "split": split,
                "num_samples": len(rows),
                "num_images": int(rows["image_id"].nunique()),
                "num_failed": int(failed.get(key, 0)),
                "accuracy": _rounded(mean),
                "accuracy_se": _rounded(error),
                "accuracy_interval": [_rounded(end) for end in intervals[knobs]],
                **{f: _rounded(rows[f].mean()) for f in ("vision_tokens", "text_tokens", "output_tokens")},
                **_latency(timed.get(key)),
                "data_source": stamp["data_source"] if stamp else None,
                "stamp": stamp,
            }
        )
    return records


def _one_stamp(frame: pd.DataFrame, part: pd.DataFrame, dataset: str) -> dict[str, Any] | None:
    """Return the stamp of the latencies after checking that all rows are of one model and one machine."""
    timed = set(part.loc[part["T_total"].notna(), "source"])
    stamps = {p: s for p, s in frame.attrs["stamps"].items() if Path(p).name.partition(".")[0] in _names(dataset)}
    clocks = {path: stamp for path, stamp in stamps.items() if stamp and str(Path(path).parent) in timed}
    for field, some in (("weights", stamps), ("hardware", clocks), ("device", clocks)):
        values = {path: stamp[field] for path, stamp in some.items() if stamp}
        if len(set(values.values())) > 1:
            first, second = sorted(values)[:2]
            raise UserError(f"{first} and {second}: field {field} of their stamps differs; give results of one")
    return next(iter((clocks or stamps).values()), None)


def _names(dataset: str) -> tuple[str, str]:
    return dataset, dataset.replace("_", "-")


def _latency(rows: pd.DataFrame | None) -> dict[str, Any]:
    """Return the mean of the questions' medians with its standard error, and quantiles of single measurements."""
    if rows is None:
        empty = dict.fromkeys(f"{field}{tail}" for field in SUMMARISED for tail in ("", "_se", *_tails()))
        return {"num_latency_samples": 0, "num_latency_repeats": 0, **empty}
    images = rows["image_id"].to_numpy()
    record: dict[str, Any] = {
        "num_latency_samples": len(rows),
        "num_latency_repeats": sum(
            len(laps["T_total"]) if isinstance(laps, Mapping) else 1 for laps in rows["repeats"]
        ),
    }
    for field in SUMMARISED:
        medians = rows["T_vision_encoder"] + rows["T_projector"] if field == TOTAL_VISION else rows[field]
        known = medians.notna().to_numpy()
        mean, error = clustered_mean(medians.to_numpy()[known], images[known])
        single = _single(rows, field) or list(medians[known])
        spread = np.quantile(single, list(LEVELS.values())) if single else [None] * len(LEVELS)
        record |= {field: _rounded(mean), f"{field}_se": _rounded(error)}
        record |= {f"{field}{tail}": _rounded(x) for tail, x in zip(_tails(), spread, strict=True)}
    return record


def _tails() -> list[str]:
    return [f"_{name}" for name in LEVELS]


def _single(rows: pd.DataFrame, field: str) -> list[float]:
    """Return every single measurement of a field; none if the files have only medians."""
    if field == "T_decode_per_token":
        return [lap for runs in rows["step_ms"] if isinstance(runs, tuple) for laps in runs for lap in laps]
    found: list[float] = []
    for laps in rows["repeats"]:
        if isinstance(laps, Mapping) and field == TOTAL_VISION:
            found += [a + b for a, b in zip(laps["T_vision_encoder"], laps["T_projector"], strict=True)]
        elif isinstance(laps, Mapping):
            found += laps.get(field, ())
    return found


def _intervals(answered: pd.DataFrame, seed: int) -> dict[KnobConfig, tuple[float, float]]:
    """Return intervals of each setting's accuracy over resampled pictures, the same ones for all settings."""
    table = answered.pivot(index=["image_id", "question_id"], columns=_SETTING, values="accuracy")
    means = Resamples(table.index.get_level_values(0), seed=seed, by="counts").means(table.to_numpy(np.float64))
    return {
        KnobConfig.from_values(key): (low, high)
        for key, low, high in zip(table.columns, *percentile_interval(means[1:]), strict=True)
    }


def frontier(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Select the settings that no other one beats in both median total and accuracy, from fast to slow."""
    ordered = sorted(
        (one for one in records if one["T_total_p50"] is not None),
        key=lambda o: (o["T_total_p50"], -o["accuracy"]),
    )
    best: list[Mapping[str, Any]] = []
    for one in ordered:
        if not best or one["accuracy"] > best[-1]["accuracy"]:
            best.append(one)
    return best


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), _DIGITS)
