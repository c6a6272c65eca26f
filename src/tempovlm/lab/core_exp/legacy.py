"""Convert rows to the older JSON layout, one file for each data set and setting, and back.

Written with the fields that its consumers read and a few more, so that nothing is lost on the way back; its own
files, which lack those, are read too. Its `T_vision_total` covers encoder and projector, so a file without the
single times gives `T_vision_encoder` the whole, `T_projector` 0 and no `T_preprocess`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig
from tempovlm.core.paths import read_json, write_whole
from tempovlm.core.plan import Ranking
from tempovlm.core.records import SweepRow
from tempovlm.core.stamp import Stamp
from tempovlm.model.vision.tiling import CROPS_OF_TIER

PATTERN = "*_imgsizetier-*_crops*_topk*_blocks*.json"

_FIELDS = tuple({"num_blocks": "num_active_blocks"}.get(name, name) for name in KNOBS)
"""The knobs' names in these files."""
_STEMS = {"top_k": "topk", "num_blocks": "blocks"}
"""Their names in the names of the files."""

_SUMMARISED = ("T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_total", "T_decode_per_token")
_OWN = ("T_preprocess", "T_vision_encoder", "T_projector")
_SHARED = ("T_LLM_prefill", "T_LLM_decode", "T_decode_per_token", "T_total")


@dataclass(frozen=True, slots=True)
class LegacyFile:
    """Return the rows of one file, and its stamp as a JSON object, if it has one."""

    rows: list[SweepRow]
    stamp: dict[str, Any] | None


def write_folder(
    folder: Path, dataset: str, rows: Iterable[SweepRow], stamp: Stamp, ranking: Ranking
) -> list[Path]:
    """Write a file for each setting into `{folder}/{data set with hyphens}` and return their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    groups: dict[KnobConfig, list[SweepRow]] = defaultdict(list)
    for row in rows:
        groups[row.knobs].append(row)
    name, paths = dataset.replace("_", "-"), []
    for knobs, group in groups.items():
        crops = [row.tiling[0] * row.tiling[1] for row in group if row.tiling is not None]
        stem = f"{name}_imgsizetier-{knobs.tier}"
        others = (
            f"{_STEMS.get(field, field)}{value}" for field, value in knobs.as_dict().items() if field != "tier"
        )
        tail = f"{'_'.join(others)}.json"
        path = folder / name / f"{stem}_crops{int(np.mean(crops)) if crops else 0}_{tail}"
        record = _file(knobs, group, stamp, ranking, crops)
        write_whole(path, json.dumps(record, ensure_ascii=False) + "\n")
        # The mean number of crops in the name changes with the number of samples.
        for stale in path.parent.glob(f"{stem}_crops*_{tail}"):
            if stale != path:
                stale.unlink()
        paths.append(path)
    return paths


def _file(
    knobs: KnobConfig, rows: Sequence[SweepRow], stamp: Stamp, ranking: Ranking, crops: Sequence[int]
) -> dict[str, Any]:
    least, most = CROPS_OF_TIER[knobs.tier]
    samples = [_sample(row, least, most) for row in rows]
    scores = [row.accuracy for row in rows if row.accuracy is not None]
    tokens = [row.vision_tokens for row in rows if row.vision_tokens is not None]
    return {
        **dict(zip(_FIELDS, knobs.values, strict=True)),
        "tier_range": {"min_crops": least, "max_crops": most},
        "max_crops": most,
        "selected_crops_distribution": {str(n): count for n, count in sorted(Counter(crops).items())},
        **_moments("selected_crops", crops),
        **_moments("actual_vision_tokens", tokens),
        "num_total_blocks": len(ranking.order),
        "active_block_indices": list(ranking.blocks(knobs.num_blocks)),
        "num_samples": len(scores),
        "accuracy": float(np.mean(scores)) if scores else None,
        "accuracy_std": float(np.std(scores)) if scores else None,
        "latency_stats": _latency_stats(samples),
        "per_sample_results": [one for one, row in zip(samples, rows, strict=True) if row.error is None],
        "failed_samples": [one for one, row in zip(samples, rows, strict=True) if row.error is not None],
        "stamp": stamp.to_json(),
    }


def _moments(name: str, values: Sequence[int]) -> dict[str, float | None]:
    mean, std = (float(np.mean(values)), float(np.std(values))) if values else (None, None)
    return {f"{name}_mean": mean, f"{name}_std": std}


def _latency_stats(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    stats: dict[str, float] = {}
    for name in _SUMMARISED:
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        if values:
            p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99))
            numbers = (np.mean(values), np.std(values), p50, p95, p99)
            names = ("mean", "std", "p50", "p95", "p99")
            stats |= {f"{name}_{kind}": float(x) for kind, x in zip(names, numbers, strict=True)}
    return stats


def _sample(row: SweepRow, least: int, most: int) -> dict[str, Any]:
    known = row.vision_tokens is not None and row.text_tokens is not None
    record: dict[str, Any] = {
        "sample_id": row.question_id,
        **dict(zip(_FIELDS, row.knobs.values, strict=True)),
        "tier_range": {"min_crops": least, "max_crops": most},
        "output_tokens": row.output_tokens,
        "actual_num_crops": None if row.tiling is None else row.tiling[0] * row.tiling[1],
        "actual_tiling": None if row.tiling is None else list(row.tiling),
        "actual_vision_tokens": row.vision_tokens,
        "actual_text_tokens": row.text_tokens,
        "total_sequence_length": (row.vision_tokens or 0) + (row.text_tokens or 0) if known else None,
        "accuracy": row.accuracy,
        "pred": row.prediction,
        "metadata": {"question_id": row.question_id, "image_id": row.image_id, "template": row.template},
        "split": row.split,
    }
    if row.is_measured:
        both_ms = (row.T_vision_encoder or 0.0) + (row.T_projector or 0.0)
        record |= {name: getattr(row, name) for name in (*_OWN, *_SHARED)} | {"T_vision_total": both_ms}
        record |= {"repeats": row.repeats, "T_decode_per_step": _by_position(row.step_ms)}
    return record if row.error is None else record | {"error": row.error}


def _by_position(step_ms: Sequence[Sequence[float]] | None) -> list[list[float]] | None:
    """[run][position] to [position][run]; greedy answers are equally long at every run."""
    return None if step_ms is None else [list(laps) for laps in zip(*step_ms, strict=True)]


def read_file(path: Path, dataset: str) -> LegacyFile:
    """Read one file of this layout, written by this or by the older program.

    Raises:
        UserError: damaged, or a field is missing; names file and field.
    """
    record = read_json(path, "half-written or damaged: measure it again")
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object")
    samples = _get(record, "per_sample_results", path)
    if not isinstance(samples, list):
        raise UserError(f"{path}: field per_sample_results is no list")
    failed = record.get("failed_samples") or []
    if not isinstance(failed, list):
        raise UserError(f"{path}: field failed_samples is no list")
    places = enumerate([*samples, *failed])
    rows = [_row(one, record, dataset, path, f"per_sample_results[{i}]") for i, one in places]
    return LegacyFile(rows, _stamp(record.get("stamp"), path))


def _stamp(record: Any, path: Path) -> dict[str, Any] | None:
    try:
        return None if record is None else Stamp.from_json(record).to_json()
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: field stamp: {error}") from None


def _get(record: Any, name: str, path: Path, where: str = "") -> Any:
    if not isinstance(record, Mapping) or name not in record:
        raise UserError(f"{path}: field {f'{where}.' if where else ''}{name} is missing")
    return record[name]


def _row(one: Any, record: Mapping[str, Any], dataset: str, path: Path, where: str) -> SweepRow:
    def get(name: str) -> Any:
        return _get(one, name, path, where)

    about = one.get("metadata") if isinstance(one, Mapping) else None
    about = about if isinstance(about, Mapping) else {}
    # The predecessor counts samples anew in each process: its sample ids repeat, the place in the file does not.
    question = about.get("question_id", about.get("example_id", f"{path.stem}/{where}"))
    tiling, steps, repeats = get("actual_tiling"), one.get("T_decode_per_step"), one.get("repeats")
    try:
        return SweepRow(
            dataset=dataset,
            split=one.get("split", "val"),
            question_id=str(question),
            image_id=str(about.get("image_id", question)),
            template=str(about.get("template", about.get("question_type", "")) or ""),
            tiling=None if tiling is None else (int(tiling[0]), int(tiling[1])),
            vision_tokens=_whole(get("actual_vision_tokens")),
            text_tokens=_whole(get("actual_text_tokens")),
            output_tokens=_whole(get("output_tokens")),
            accuracy=_number(get("accuracy")),
            prediction=one.get("pred"),
            repeats=None if repeats is None else {name: tuple(laps) for name, laps in repeats.items()},
            step_ms=None if steps is None else _by_run(steps, repeats),
            error=one.get("error"),
            **(KnobConfig.from_values(_get(record, name, path) for name in _FIELDS).as_dict() | _times(one)),
        )
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(f"{path}: {where} cannot be read ({error})") from None


def _times(one: Mapping[str, Any]) -> dict[str, float | None]:
    times = {name: _number(one.get(name)) for name in (*_OWN, *_SHARED)}
    if times["T_vision_encoder"] is None and one.get("T_vision_total") is not None:
        times |= {"T_vision_encoder": float(one["T_vision_total"]), "T_projector": 0.0}
    if one.get("output_tokens") == 1:
        # No step follows a single token; the predecessor writes 0.
        times["T_decode_per_token"] = None
    return times


def _by_run(steps: Sequence[Sequence[float]], repeats: Mapping[str, Any] | None) -> tuple[tuple[float, ...], ...]:
    """[position][run] to [run][position]; without positions one empty run for each repeat."""
    if not steps:
        return ((),) * (len(repeats["T_total"]) if repeats else 0)
    return tuple(zip(*steps, strict=True))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)
