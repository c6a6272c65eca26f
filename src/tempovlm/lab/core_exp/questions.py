"""Check, by digests in the manifest, that the rows of a results directory are about the present questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.paths import write_whole
from tempovlm.core.records import Key, SweepRow
from tempovlm.data.digest import Digests, merged, question_digests, refuse_others
from tempovlm.data.sample import Sample
from tempovlm.testbed.bed import Bed

MANIFEST = "sweep.json"
"""The manifest: values that all rows of a results directory share."""

_FIELD = "questions"
_BED = "bed"

_log = logging.getLogger("tempovlm")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a results directory's manifest; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        questions: dict[str, dict[str, str]] = record.get(_FIELD, {})
        if all(digest.count("/") == 1 for some in questions.values() for digest in some.values()):
            return dict(record)
        reason = f"field {_FIELD}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = repr(error)
    raise UserError(f"{path}: half-written or damaged ({reason})")


def bed_of_results(folders: Iterable[Path], split: str) -> Bed | None:
    """Return the test bed that the results of a split name, the largest one; None where they name none.

    Raises:
        UserError: they are about test beds of different seeds or editions, or a manifest is damaged.
    """
    found: dict[Path, Bed] = {}
    for folder in folders:
        record = read_manifest(folder) or {}
        if record.get("conditions", {}).get("split") == split and record.get(_BED):
            found[folder] = Bed.from_json(record[_BED], folder / MANIFEST)
    if not found:
        return None
    sizes = [max(getattr(one, name) for one in found.values()) for name in ("num_train", "num_val")]
    first, bed = next(iter(found.items()))
    for folder, other in found.items():
        if (other.seed, other.edition) != (bed.seed, bed.edition):
            raise UserError(
                f"{folder / MANIFEST} beside {first / MANIFEST}: field bed has another seed or edition; give "
                "results of one test bed"
            )
    return replace(bed, num_train=sizes[0], num_val=sizes[1])


def has_questions(folder: Path, dataset: str) -> bool:
    """Whether a results directory says which questions of a data set its rows are about."""
    return dataset in (read_manifest(folder) or {}).get(_FIELD, {})


def keep_questions(
    folder: Path,
    rows: Mapping[str, Mapping[Key, SweepRow]],
    questions: Mapping[str, Digests],
    bed: Bed | None = None,
) -> None:
    """Add the questions of a run and their test bed to a directory's manifest, if its rows are about the same.

    A draw of another size with the same seed begins in the same way; any other draw is refused. Questions that
    were never answered may have changed: their picture may have been repaired.

    Args:
        folder: results directory with a manifest.
        rows: all known rows, by data set.
        questions: digests of this run's questions, by data set.
        bed: that they are from; None for other data.

    Raises:
        UserError: a row is about another question.
    """
    record = read_manifest(folder) or {}
    before: dict[str, Digests] = record.get(_FIELD, {})
    path, kept = folder / MANIFEST, dict(before)
    for dataset, now in questions.items():
        own = [row for row in rows.get(dataset, {}).values() if row.is_answered]
        answered = {row.question_id for row in own}
        known = before.get(dataset)
        if known is None and answered:
            _log.warning(
                "%s: written by an earlier version, which did not record the questions of %s: they "
                "are taken for those of --data_dir",
                path,
                dataset,
            )
        _check_draw(set(known or answered), set(now), f"{path}: {dataset}")
        old = {name: digest for name, digest in (known or {}).items() if name in answered}
        refuse_others(old, now, f"{path}: {dataset}")
        kept[dataset] = merged(known or {}, now)
    named = record if bed is None else {**record, _BED: bed.to_json()}
    if kept != before or named != record:
        write_whole(path, json.dumps({**named, _FIELD: kept}, indent=2) + "\n")


def _check_draw(before: set[str], now: set[str], where: str) -> None:
    if before <= now or now <= before:
        return
    lost = before - now
    raise UserError(
        f"{where}: {len(lost)} of its {len(before)} questions, such as {min(lost)}, are not among this run's "
        f"{len(now)}: give the --data_dir that was used before, or another output"
    )


def check_samples(folders: Iterable[Path], split: str, samples: Sequence[Sample]) -> None:
    """Raise a `UserError` if rows of results directories are about other questions than samples of the same ids.

    Directories without digests are not checked; for twins, whose pictures differ, only texts count.
    """
    for folder in folders:
        record = read_manifest(folder) or {}
        conditions = record.get("conditions", {})
        if conditions.get("split") != split:
            continue
        for dataset, known in record.get(_FIELD, {}).items():
            own = [one for one in samples if one.dataset == dataset and str(one.question_id) in known]
            where = f"{folder / MANIFEST}: {dataset}"
            refuse_others(known, question_digests(own), where, pictures=not conditions.get("twins"))


def check_directories(folders: Sequence[Path]) -> None:
    """Raise a `UserError` if directories that are read together have different questions of the same ids."""
    seen: dict[tuple[str, str], tuple[Path, Digests, bool]] = {}
    for folder in folders:
        record = read_manifest(folder) or {}
        conditions = record.get("conditions", {})
        for dataset, digests in record.get(_FIELD, {}).items():
            is_twin, key = bool(conditions.get("twins")), (dataset, str(conditions.get("split")))
            other, known, was_twin = seen.setdefault(key, (folder, digests, is_twin))
            where = f"{folder / MANIFEST} beside {other / MANIFEST}: {dataset}"
            refuse_others(known, digests, where, pictures=is_twin == was_twin)
