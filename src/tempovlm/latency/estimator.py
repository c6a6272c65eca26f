"""Predicts the time of each stage of a request at any setting: median and upper quantiles, in milliseconds.

Totals compose as T_vision_encoder + T_projector + T_LLM_prefill + T_decode_per_token · output tokens, the seed
document's formula, which counts one step too many: the first token comes out of the prefill. `StageTimes.total_ms`
therefore takes the number of decode steps. The upper quantile of a total is calibrated by itself, because the sum
of stages' quantiles is not the quantile of their sum.

Shapes: `n` requests, `S` stages, `L` levels.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.core.shape import ModelShape
from tempovlm.latency.cores import LEVELS, SERVED, Arrays, Core, RooflineCore, core_from_arrays
from tempovlm.latency.features import FEATURES, STAGES, CostTable, Floats, Workload

SCHEMA = "tempovlm.latency_estimator/1"

_FIELDS = ("schema", "kind", "levels", "stages", "features", "space", "knob_space", "shape", "arrays", "stamp")
_VISION = ("vision_encoder", "projector")


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Predicted times of `n` requests.

    Attributes:
        ms: (n, S, L) milliseconds; stages as in `STAGES`, levels as in `LEVELS`.
        total_margins: (L,) added to a total's logarithm at each level; None before calibration.
    """

    ms: Floats
    total_margins: Floats | None = None

    def stage_ms(self, stage: str, level: float = LEVELS[0]) -> Floats:
        """Return the times (n,) of a stage."""
        return self.ms[:, STAGES.index(stage), LEVELS.index(level)]

    def total_ms(self, steps: Floats | float, level: float = LEVELS[0]) -> Floats:
        """Return totals (n,): vision, projector, prefill and `steps` decode steps (output tokens - 1).

        The decode time per token is that of answers as long as the workload's; pass its mean as `steps`.

        Without calibration the stages' quantiles are added, which overestimates the total if stages
        are slow independently.
        """
        i = LEVELS.index(level)
        if self.total_margins is None:
            return compose_total(self.ms[..., i], steps)
        return compose_total(self.ms[..., 0], steps) * np.exp(self.total_margins[i])


def compose_total(ms: Floats, steps: Floats | float) -> Floats:
    """Add stages (n, S) and decode steps (n,) to totals (n,)."""
    return ms[:, :-1].sum(axis=1) + ms[:, -1] * steps


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Transfers predictions to another device than that of the training, stage by stage; arrays (S,).

    Attributes:
        offset, slope: of the line `offset + slope · log` through logarithms of medians.
        weight: 0 uses the line, 1 the rates, a value between them the weighted mean of both logarithms.
        rates: the linear model fitted to the new device.
    """

    offset: Floats
    slope: Floats
    weight: Floats
    rates: RooflineCore

    def apply(self, log_ms: Floats, table: CostTable, workload: Workload) -> Floats:
        """Convert (n, S, L) to the new device; the spread above the median stays."""
        median = self.offset + self.slope * log_ms[..., 0]
        if self.weight.any():
            median += self.weight * (self.rates.log_ms(table, workload)[..., 0] - median)
        return log_ms + (median - log_ms[..., 0])[..., None]


@dataclass(frozen=True)
class Estimator:
    """A core with calibrated quantiles and an adaptation to another device.

    Attributes:
        table: costs of the model whose latency is predicted.
        margins: (S, L) added to the logarithms: conformal calibration.
        total_margins: (L,) the same for totals, above their medians.
        stamp: of the measurements.
        notes: measured qualities, for readers of the file.
    """

    table: CostTable
    core: Core
    margins: Floats = field(default_factory=lambda: np.zeros((len(STAGES), len(LEVELS))))
    total_margins: Floats | None = None
    adaptation: Adaptation | None = None
    stamp: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Kind of the core."""
        return self.core.kind

    @property
    def space(self) -> KnobSpace:
        """The knob space of its setting indices."""
        return self.table.space

    def predict(self, workload: Workload) -> StageTimes:
        """Predict the times of every request; requests without a picture have no vision stages."""
        return self.times(self.raw_log_ms(workload), workload)

    def times(self, raw_log_ms: Floats, workload: Workload) -> StageTimes:
        """Convert logarithms (n, S, L) before the margins to times."""
        ms = np.exp(np.maximum.accumulate(raw_log_ms + self.margins, axis=-1))
        blind = workload.crops == 0
        if blind.any():
            ms[np.ix_(blind, [STAGES.index(stage) for stage in _VISION])] = 0.0
        return StageTimes(ms, self.total_margins)

    def raw_log_ms(self, workload: Workload) -> Floats:
        """Predict logarithms (n, S, L) before the margins."""
        logs = self.core.log_ms(self.table, workload)
        if logs.shape[-1] == 1:
            logs = np.repeat(logs, len(LEVELS), axis=-1)
        return logs if self.adaptation is None else self.adaptation.apply(logs, self.table, workload)

    def save(self, path: Path) -> None:
        """Write a file of tensors and plain values atomically.

        Raises:
            TypeError: the core is not one of `SERVED`.
            UserError: the folder cannot be written.
        """
        import torch

        if not isinstance(self.core, SERVED):
            raise TypeError(f"a checkpoint cannot hold a core of kind {self.core.kind}")
        space = self.space
        arrays = {**self.core.arrays(), **_extra_arrays(self)}
        record = {
            "schema": SCHEMA,
            "kind": self.core.kind,
            "levels": list(LEVELS),
            "stages": list(STAGES),
            "features": list(FEATURES),
            "space": space.to_json(),
            "knob_space": space.fingerprint,
            "shape": asdict(self.table.shape),
            "arrays": {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()},
            "stamp": dict(self.stamp),
            "notes": dict(self.notes),
        }
        buffer = io.BytesIO()
        torch.save(record, buffer)
        write_whole(path, buffer.getvalue())


def _extra_arrays(estimator: Estimator) -> Arrays:
    """Return calibration and adaptation as arrays, under names that no core uses."""
    found: Arrays = {"calibration.margins": estimator.margins}
    if estimator.total_margins is not None:
        found["calibration.total_margins"] = estimator.total_margins
    if estimator.adaptation is not None:
        moved = estimator.adaptation
        found |= {f"adaptation.{name}": getattr(moved, name) for name in ("offset", "slope", "weight")}
        found |= {f"adaptation.{name}": array for name, array in moved.rates.arrays().items()}
    return found


def load_estimator(path: Path, space: KnobSpace | None = None) -> Estimator:
    """Read an estimator that `Estimator.save` wrote.

    Args:
        path: the file.
        space: knob space of the caller's indices. Default: that of the file.

    Raises:
        UserError: the file is missing, damaged, of another format, or of another knob space.
    """
    import torch

    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train_latency_estimator.py writes it") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged, or no estimator ({reason[:120]})") from None
    return _checked(record, path, space)


def _checked(record: Any, path: Path, space: KnobSpace | None) -> Estimator:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path}: field schema is not {SCHEMA}; train the estimator again")
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise UserError(f"{path}: field {missing[0]} is missing")
    for name, ours in (("levels", LEVELS), ("stages", STAGES), ("features", FEATURES)):
        if tuple(record[name]) != ours:
            raise UserError(f"{path}: field {name} is of another version of this program; train again")
    if record["kind"] not in [core.kind for core in SERVED]:
        raise UserError(
            f"{path}: field kind is {record['kind']}, a model for comparison only; train again "
            "with train_latency_estimator.py"
        )
    try:
        own = KnobSpace.from_json(record["space"])
        table = CostTable(own, ModelShape(**record["shape"]))
        arrays = {name: tensor.numpy() for name, tensor in record["arrays"].items()}
        core = core_from_arrays(record["kind"], arrays)
        estimator = Estimator(
            table,
            core,
            arrays["calibration.margins"],
            arrays.get("calibration.total_margins"),
            _adaptation(arrays),
            record["stamp"],
            record.get("notes", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged, field {error} cannot be used") from None
    for expected in (record["knob_space"], (space or own).fingerprint):
        if expected != own.fingerprint:
            raise UserError(
                f"{path}: field knob_space is {own.fingerprint}, expected {expected}: made for other settings"
            )
    return estimator


def _adaptation(arrays: Arrays) -> Adaptation | None:
    prefix = "adaptation."
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if not own:
        return None
    return Adaptation(own["offset"], own["slope"], own["weight"], RooflineCore.from_arrays(own))
