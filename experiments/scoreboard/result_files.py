"""Read the repository's result files and their stamps for the results table.

A missing file is None. A file that is broken, without a stamp, or stamped with another model or machine than
listed raises a `UserError` that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.scoreboard.readings import Content
from experiments.scoreboard.targets import Source
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS
from tempovlm.core.records import STAGE_FIELDS
from tempovlm.core.stamp import Stamp
from tempovlm.data.registry import GENERATED

if TYPE_CHECKING:
    import pandas as pd

POCKET_ACCURACY = "src/tempovlm/pocket/accuracy.json"
"""File with the weights' hash of the shipped pocket."""

_SETTING = list(KNOBS)
_FIELDS = ("hardware", "weights", "knob_space", "data_source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The part of a result file's stamp that the report shows; None for missing fields."""

    hardware: str
    weights: str
    data_source: str | None
    device: str | None = None
    threads: int | None = None
    model: str | None = None
    commit: str | None = None
    torch: str | None = None
    created: str | None = None

    @property
    def machine(self) -> str:
        """The processor, and the threads of a CPU."""
        on_cpu = self.device is not None and self.device.startswith("cpu")
        return f"{self.hardware}, {self.threads} threads" if on_cpu else self.hardware


@dataclass(frozen=True, slots=True)
class ResultFile:
    """An existing result file: its content and its origin."""

    content: Content
    origin: Origin


def shipped_weights(repository: Path) -> str | None:
    """Return the hash of the pocket's weights in the repository; None if there are none.

    Raises:
        UserError: its accuracy file is broken.
    """
    path = repository / POCKET_ACCURACY
    return str(_fields(_read_json(path), path)["weights"]) if path.exists() else None


def read_result(repository: Path, source: Source, shipped: str | None) -> ResultFile | None:
    """Return a result file's content and origin, checked; None if it is missing.

    Args:
        repository: its root.
        source: which file.
        shipped: hash of the shipped pocket's weights, which identifies a pocket whatever its folder's name.

    Raises:
        UserError: it is broken, has no stamp, or is of another model or machine; names it.
    """
    path = repository / source.path
    if not path.exists():
        return None
    if path.suffix != ".json":
        content, stamps = _read_sweep(path)
    else:
        content = _read_json(path)
        if source.fields:
            own = _fields(content, path)
            return ResultFile(
                content, Origin(**{name: own[name] for name in ("hardware", "weights", "data_source")})
            )
        stamps = list(_stamps(content, path))
    origin = _origin(stamps, path)
    _check(origin, source, shipped, path)
    return ResultFile(content, origin)


def _read_json(path: Path) -> Content:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: broken, not JSON ({error})") from None


def _fields(content: Content, path: Path) -> Mapping[str, Any]:
    """Return the content, whose own fields are its stamp."""
    missing = [name for name in _FIELDS if not isinstance(content, dict) or name not in content]
    if missing:
        raise UserError(f"{path}: has no field {missing[0]}, so its machine and weights are unknown")
    return content


def _stamps(content: Content, path: Path) -> Iterable[Stamp]:
    """Return the stamp at the top, or that of each entry of a list."""
    entries = content
    if isinstance(content, dict):
        entries = [content] if "stamp" in content else content.get("models")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: has no stamp, so its machine and weights are unknown")
    for entry in entries:
        stamp = entry.get("stamp") if isinstance(entry, dict) else None
        if not isinstance(stamp, dict):
            raise UserError(f"{path}: has no stamp, so its machine and weights are unknown")
        try:
            yield Stamp.from_json(stamp)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _origin(stamps: Iterable[Stamp], path: Path) -> Origin:
    """Return the fields on which all stamps of a file agree, and the first one's weights and date."""
    first, *others = stamps
    for name in ("hardware", "device", "model"):
        differing = [stamp for stamp in others if getattr(stamp, name) != getattr(first, name)]
        if differing:
            values = f"{getattr(first, name)!r} and {getattr(differing[0], name)!r}"
            raise UserError(f"{path}: its stamps differ in {name}: {values}")
    names = ("hardware", "weights", "data_source", "device", "threads", "model", "commit", "torch", "created")
    return Origin(**{name: getattr(first, name) for name in names})


def _check(origin: Origin, source: Source, shipped: str | None, path: Path) -> None:
    """Refuse figures of another model or machine than listed."""
    model, hardware, device = str(origin.model).lower(), origin.hardware, str(origin.device)
    is_shipped = source.model == "pocket" and shipped is not None and origin.weights == shipped
    if source.model is not None and not is_shipped and not model.startswith(source.model):
        raise UserError(f"{path}: stamped with model {origin.model}, but this path is for {source.model}")
    on_it = device.startswith("cpu") if source.hardware == "cpu" else str(source.hardware or "") in hardware
    if source.hardware is not None and not on_it:
        raise UserError(f"{path}: stamped with {hardware}, {device}, but this path is for {source.hardware}")


def _read_sweep(folder: Path) -> tuple[Content, list[Stamp]]:
    """Return the counts and checks of a results directory of the core experiment, and its stamps."""
    from tempovlm.lab.core_exp.store import read_results

    frame = read_results([folder], GENERATED)
    stamps = frame.attrs["stamps"]
    for path, stamp in stamps.items():
        if stamp is None:
            raise UserError(f"{path}: has no stamp, so its machine and weights are unknown")
    return sweep_content(frame), [Stamp.from_json(stamp) for stamp in stamps.values()]


def sweep_content(frame: pd.DataFrame) -> dict[str, float | int | None]:
    """Summarise rows of the core experiment for the report.

    Args:
        frame: result of `lab.core_exp.store.read_results`.

    Returns:
        `settings` of a data set and `questions` of a data set at a setting with an accuracy, fewest of each;
        `timed_settings`, `timed_images` and `repeats` (fewest) with a latency; `fastest_ms`, the median total of
        the fastest setting; `stage_gap`, the largest relative difference between a measured total and the sum of
        its stages; `zero_decodes`, rows of two or more tokens decoded in no time.
    """
    answered, timed = frame[frame["accuracy"].notna()], frame[frame["T_total"].notna()]
    counts = answered.groupby(["dataset", *_SETTING])["question_id"].nunique()
    is_zero = (timed["output_tokens"] >= 2) & ~(timed["T_LLM_decode"] > 0)
    repeats = [laps for laps in timed["repeats"] if isinstance(laps, dict)]
    return {
        "settings": int(counts.groupby("dataset").size().min()) if len(counts) else 0,
        "questions": int(counts.min()) if len(counts) else 0,
        "timed_settings": timed[_SETTING].drop_duplicates().shape[0],
        "timed_images": int(timed[["dataset", "image_id"]].drop_duplicates().shape[0]),
        "repeats": min((len(laps["T_total"]) for laps in repeats), default=None),
        "fastest_ms": float(timed.groupby(_SETTING)["T_total"].median().min()) if len(timed) else None,
        "stage_gap": _stage_gap(repeats),
        "zero_decodes": int(is_zero.sum()) if len(timed) else None,
    }


def _stage_gap(repeats: list[dict[str, tuple[float, ...]]]) -> float | None:
    """Return the largest |sum of stages, with control / total - 1| of single measurements; None without any."""
    import numpy as np

    gaps = []
    for laps in repeats:
        total = np.asarray(laps[STAGE_FIELDS["total"]])
        parts = np.sum([laps[name] for name in laps if name != STAGE_FIELDS["total"]], axis=0)
        gaps.append(float(np.max(np.abs(parts / total - 1))))
    return max(gaps, default=None)
