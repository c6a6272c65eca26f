"""Measured rows as arrays for the latency estimator, and their split by picture and by setting.

Rows of one picture at 75 settings, or of one setting at many pictures, are nearly the same row: a split by row
would test on training data. Here no picture of the tests is in training, some settings are only in the
last test, and choices and calibrations are judged on training pictures that a fold left out. Shapes: `n`
rows, `R` repeats, `S` stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.shape import ModelShape
from tempovlm.latency.features import STAGES, TARGETS, Floats, Ints, Workload, count_crops
from tempovlm.latency.recalibration import Measurements

if TYPE_CHECKING:
    import pandas as pd

_DECODE = STAGES.index("decode_per_token")
_NO_PICTURE = [STAGES.index("vision_encoder"), STAGES.index("projector")]

HELD_OUT_SHARE = 0.12
"""Share of the settings that only the last test sees."""

CHOICE_SHARE = 0.08
"""Share of the settings that no fold is fitted to, on which the choice among models is judged."""

FOLDS = 5
"""Number of folds of the training pictures."""


@dataclass(frozen=True, slots=True)
class Rows(Measurements):
    """Measured requests, whose `ms` are medians of repeats.

    Attributes:
        repeats: (n, R, S) single measurements, NaN where there are fewer.
        images: (n,) names of the pictures.
    """

    repeats: Floats
    images: NDArray[np.str_]

    @property
    def places(self) -> Ints:
        """The row of each measurement of `single`."""
        known = np.isfinite(self.repeats).any(axis=2)
        return np.nonzero(known)[0]

    @property
    def single(self) -> Measurements:
        """Return every repeat as a separate measurement (at most n · R)."""
        known, places = np.isfinite(self.repeats).any(axis=2), self.places
        return Measurements(self.workload.take(places), self.repeats[known], self.steps[places])


def rows_from_frame(frame: pd.DataFrame, space: KnobSpace, shape: ModelShape) -> Rows:
    """Convert the rows whose latency was measured.

    Args:
        frame: result of `lab.core_exp.store.read_results`.
        space: legal settings.
        shape: of the model, for files that have no tilings.

    Raises:
        UserError: no row was measured, a time is negative, or a setting is outside the space.
    """
    measured = frame[frame["T_total"].notna()]
    if "error" in measured:
        measured = measured[measured["error"].isna()]
    if measured.empty:
        raise UserError(
            "--results_dir: no row has a measured latency (field T_total); run the core experiment with "
            "--latency_samples"
        )
    for name in TARGETS.values():
        if (measured[name] < 0).any():
            raise UserError(f"--results_dir: field {name} is negative in row {int((measured[name] < 0).argmax())}")
    numbers = (measured[name].astype(int).tolist() for name in ("top_k", "num_blocks"))
    keys = list(zip(measured["tier"], *numbers, strict=True))
    index = {key: space.index(KnobConfig.from_values(key)) for key in set(keys)}
    vision, text = (measured[name].to_numpy(np.float64) for name in ("vision_tokens", "text_tokens"))
    tilings = zip(measured["tiling"], vision, strict=True)
    crops = np.array([_crops(tiling, tokens, shape) for tiling, tokens in tilings], dtype=np.float64)
    setting = np.array([index[key] for key in keys])
    steps = np.maximum(measured["output_tokens"].to_numpy(np.float64) - 1, 0)
    workload = Workload(setting, vision, text, crops[:, 0], crops[:, 1], steps)
    ms = np.stack([measured[name].to_numpy(np.float64) for name in TARGETS.values()], axis=1)
    repeats = _repeats(measured["repeats"], ms, steps)
    for times in (ms[:, None], repeats):
        times[steps == 0, :, _DECODE] = np.nan
        times[np.ix_(crops[:, 0] == 0, range(times.shape[1]), _NO_PICTURE)] = np.nan
        times[times <= 0] = np.nan
    return Rows(workload, ms, steps, repeats, measured["image_id"].to_numpy(np.str_))


def _crops(tiling: Any, vision_tokens: float, shape: ModelShape) -> tuple[int, int]:
    """Return crops and distinct crops; files without tilings have (crops + 1) · 144 tokens."""
    if tiling is not None and not isinstance(tiling, float):
        return count_crops((int(tiling[0]), int(tiling[1])))
    if not vision_tokens > 0:
        return 0, 0
    crops = max(2, round(vision_tokens / shape.crop_tokens_side**2))
    return crops, 1 if crops == 2 else crops


def _repeats(column: Any, ms: Floats, steps: Floats) -> Floats:
    """Convert the dictionaries of a results file to (n, R, S); a row without one has its medians."""
    fields = list(TARGETS.values())
    fields[_DECODE] = "T_LLM_decode"
    found = [one if isinstance(one, dict) and one.get("T_LLM_prefill") is not None else None for one in column]
    most = max((len(one["T_LLM_prefill"]) for one in found if one), default=1)
    result = np.full((len(ms), max(most, 1), len(STAGES)), np.nan)
    for i, one in enumerate(found):
        if not one:
            result[i, 0] = ms[i]
            continue
        for stage, name in enumerate(fields):
            laps = np.asarray(one[name] if one.get(name) is not None else (), dtype=np.float64)
            result[i, : len(laps), stage] = laps
        result[i, :, _DECODE] /= max(steps[i], 1.0)
    return result


@dataclass(frozen=True, slots=True)
class Fold:
    """Masks over the training rows: those that a model is fitted to, and those that it is judged on."""

    fitted: NDArray[np.bool_]
    judged: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows for training (also for choosing epoch and model, and for calibration) and for two tests.

    Attributes:
        train: pictures of training, at all settings but the held-out ones.
        test: other pictures, at the same settings.
        held_out: those pictures at `held_out_settings`.
        choice_settings: of training, but in no fold's fit, so that folds are judged on unseen settings too.
        folds: each leaves some of the training pictures out; every training row is judged in one fold.
    """

    train: Rows
    test: Rows
    held_out: Rows
    choice_settings: tuple[int, ...]
    held_out_settings: tuple[int, ...]
    folds: tuple[Fold, ...]

    @property
    def parts(self) -> dict[str, Rows]:
        """The three parts by name."""
        return {name: getattr(self, name) for name in ("train", "test", "held_out")}


def split_rows(rows: Rows, space: KnobSpace, *, train_split: float = 0.8, seed: int = 42) -> Split:
    """Split by picture, `train_split` of them for training and the others for the tests; and by setting.

    Settings at the corners of top-k and depth stay in training, so that the others lie between what it saw.

    Raises:
        UserError: fewer than three pictures, or a share that leaves none.
    """
    if not 0 < train_split < 1:
        raise UserError(f"--train_split {train_split}: must be between 0 and 1")
    rng = np.random.default_rng(seed)
    names = np.unique(rows.images)
    if len(names) < 3:
        raise UserError(f"--results_dir: {len(names)} pictures with measured latency; a split by picture needs 3")
    rng.shuffle(names)
    count = min(max(round(train_split * len(names)), 2), len(names) - 1)
    of_train = np.isin(rows.images, names[:count])
    unseen = _unseen_settings(rows, space, rng)
    held_out = np.isin(rows.workload.setting, unseen[1])
    train, test, last = (
        rows.take(mask) for mask in (of_train & ~held_out, ~of_train & ~held_out, ~of_train & held_out)
    )
    judged = [np.isin(train.images, names[:count][i::FOLDS]) for i in range(min(FOLDS, count))]
    is_choice = np.isin(train.workload.setting, unseen[0])
    folds = tuple(Fold(~mask & ~is_choice, mask) for mask in judged)
    if not len(test) or not all(fold.fitted.any() and fold.judged.any() for fold in folds):
        raise UserError("--results_dir: too few rows to split by picture; measure more pictures at every setting")
    return Split(train, test, last, tuple(map(int, unseen[0])), tuple(map(int, unseen[1])), folds)


def _unseen_settings(rows: Rows, space: KnobSpace, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Draw the settings for the choice among models, and those for the last test only."""
    present = np.unique(rows.workload.setting)
    top_ks, depths = ((values[0], values[-1]) for values in (space.top_ks, space.block_counts))
    settings = [(i, space.settings[i]) for i in present]
    inner = [i for i, knobs in settings if not (knobs.top_k in top_ks and knobs.num_blocks in depths)]
    order = rng.permutation(np.array(inner, dtype=np.int64))
    held_out, choice = (round(share * len(present)) for share in (HELD_OUT_SHARE, CHOICE_SHARE))
    return np.sort(order[held_out : held_out + choice]), np.sort(order[:held_out])


def thin(rows: Rows, max_samples: int | None, seed: int) -> Rows:
    """Draw at most `max_samples` rows at random; None keeps all."""
    if max_samples is None or len(rows) <= max_samples:
        return rows
    return rows.take(np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_samples]))
