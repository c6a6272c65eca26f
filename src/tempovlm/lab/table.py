"""The table of questions by settings that controllers learn from and are judged on, and the door that reads it.

Accuracy is looked up; latency is what was measured or what an estimator predicts. A split by picture says which
questions are for the training, the choice of an epoch and the test. Budgets are drawn log-uniformly over what is
feasible, so that short ones are not rare.

Shapes: `N` questions, `K` settings, `T` tiers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.select import Ints, Mask
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobSpace
from tempovlm.data.catalog import folder_of, load_samples
from tempovlm.data.registry import GENERATED
from tempovlm.data.sample import Sample
from tempovlm.lab.core_exp.questions import bed_of_results, check_samples
from tempovlm.lab.core_exp.store import read_results
from tempovlm.latency.cores import LEVELS
from tempovlm.latency.estimator import Estimator, StageTimes
from tempovlm.latency.features import Workload

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Texts = NDArray[np.str_]

PARTS = ("train", "validation", "test")
"""Uses of questions: to learn from, to choose an epoch by, and to report on."""

_BINS = 10
_QUESTION, _SETTING = ["dataset", "question_id"], list(KNOBS)
_ABOUT = (*_QUESTION, "image_id", "template")
_LOOKING = ["T_preprocess", "T_vision_encoder", "T_projector"]
_TIMES = [*_SETTING, "source", "T_total", *_LOOKING]
_SAME = ("hardware", "device", "threads")
"""Fields of the stamps of timed results that must agree."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Table:
    """Questions, in the order of data set and question id, by settings in the order of the knob space.

    Attributes:
        space: the settings. split: of the data sets, `train` or `val`.
        dataset, question_id, image_id: (N,) texts. part: (N,) one of `PARTS`; empty before a split.
        template: (N,) kind of question within its data set.
        text_tokens: (N,) tokens of the prompt that are no image features.
        vision_tokens: (N, T) image features at each tier.
        crops: (N, T, 2) rows and columns of the crops, the global one apart; 0 without a picture.
        accuracy: (N, K) from 0 to 1, complete. output_tokens: (N, K), the end token included.
        measured_ms: (N, K) median of the measured totals, NaN where none was measured.
        latency_ms: (N, K) what an answer takes, as rewards and the judge count it.
        upper_ms: (N, K) what must fit a budget. look_ms: (N, T) until the picture is encoded at each tier.
        latency_source, upper_source: where these come from.
        left_out: questions without an answer at every setting, which are not here.
        stamps: of the files, by path. stamp: of the first timed file, else of the first; empty without any.
        times: the timed rows of all splits that were read; None where nothing was read.
    """

    space: KnobSpace
    split: str
    dataset: Texts
    question_id: Texts
    image_id: Texts
    template: Texts
    part: Texts
    text_tokens: Floats
    vision_tokens: Floats
    crops: Ints
    accuracy: Floats
    output_tokens: Floats
    measured_ms: Floats
    latency_ms: Floats
    upper_ms: Floats
    look_ms: Floats
    latency_source: str = "measured"
    upper_source: str = "measured"
    left_out: int = 0
    stamps: Mapping[str, Any] = field(default_factory=dict)
    stamp: Mapping[str, Any] = field(default_factory=dict)
    times: pd.DataFrame | None = None

    @classmethod
    def of(cls, space: KnobSpace, accuracy: Floats, latency_ms: Floats, **more: Any) -> Table:
        """Make a table of accuracies (N, K) and latencies (N, K) or (K,), with stand-ins for all else."""
        count, tiers = len(accuracy), len(space.tiers)
        every_ms = np.broadcast_to(latency_ms, accuracy.shape).copy()
        names = np.array([f"q{i:04d}" for i in range(count)])
        values: dict[str, Any] = {
            "split": "val",
            "dataset": np.full(count, "okvqa"),
            "question_id": names,
            "image_id": names,
            "template": np.full(count, ""),
            "part": np.full(count, "", dtype="<U10"),
            "text_tokens": np.full(count, 12.0),
            "vision_tokens": np.full((count, tiers), 100.0),
            "crops": np.ones((count, tiers, 2), dtype=np.int64),
            "output_tokens": np.full(accuracy.shape, 2.0),
            "look_ms": np.zeros((count, tiers)),
        }
        values |= dict.fromkeys(("measured_ms", "latency_ms", "upper_ms"), every_ms)
        return cls(space=space, accuracy=accuracy, **values | more)

    def __len__(self) -> int:
        return len(self.question_id)

    @property
    def folders(self) -> list[Path]:
        """The results directories that it is from."""
        return list(dict.fromkeys(Path(file).parent for file in self.stamps))

    @property
    def per_tier(self) -> int:
        """Settings of a tier."""
        return len(self.space) // len(self.space.tiers)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Data set and question id of each row."""
        return list(zip(self.dataset.tolist(), self.question_id.tolist(), strict=True))

    def rows(self, part: str) -> Ints:
        """Return the places of the questions of one of `PARTS`."""
        return np.flatnonzero(self.part == part)

    def take(self, rows: Ints | Mask) -> Table:
        """Some of the questions, by index or mask."""
        return replace(self, **{name: values[rows] for name, values in self._arrays().items()})

    def _arrays(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def with_test(self, more: Table) -> Table:
        """Add questions about other pictures, all for the test, whose measured latencies do not count.

        What settings take is still told by the first questions, so nothing that is learned depends on the test.

        Raises:
            UserError: a picture is among those that were split.
        """
        if shared := sorted(set(self.image_id) & set(more.image_id)):
            raise UserError(
                f"--test_results_dir: picture {shared[0]} is in --results_dir too ({len(shared)} are); give "
                "questions about other pictures"
            )
        own, added = self._arrays(), more._arrays()
        added["part"] = np.full(len(more), "test")
        added["measured_ms"] = np.full(more.accuracy.shape, np.nan)
        both: dict[str, Any] = {name: np.concatenate([own[name], added[name]]) for name in own}
        return replace(self, left_out=self.left_out + more.left_out, **both)

    def split_by_picture(self, train_split: float = 0.8, seed: int = 42) -> Table:
        """Give `train_split` of the pictures to the training, and the others in halves to validation and test.

        Raises:
            UserError: fewer than three pictures, or a share that is none.
        """
        if not 0 < train_split < 1:
            raise UserError(f"--train_split {train_split}: must be between 0 and 1")
        names = np.unique(self.image_id)
        if len(names) < len(PARTS):
            raise UserError(f"--results_dir: {len(names)} pictures; a split by picture needs {len(PARTS)}")
        np.random.default_rng(seed).shuffle(names)
        count = min(max(round(train_split * len(names)), 1), len(names) - 2)
        middle = count + (len(names) - count + 1) // 2
        chosen = [np.isin(self.image_id, some) for some in (names[:count], names[count:middle])]
        return replace(self, part=np.select(chosen, PARTS[:2], PARTS[2]))

    def usual_ms(self, level: float = 0.5) -> Floats:
        """(K,) quantile of each setting's measured totals: of these questions, else of all that were timed.

        Raises:
            UserError: a setting was never measured.
        """
        if not np.isnan(self.measured_ms).all(axis=0).any():
            return np.nanquantile(self.measured_ms, level, axis=0)
        known = {} if self.times is None else self.times.groupby(_SETTING)["T_total"].quantile(level).to_dict()
        totals_ms = np.array([known.get(k.values, np.nan) for k in self.space])
        if np.isnan(totals_ms).any():
            missing = self.space.settings[int(np.argmax(np.isnan(totals_ms)))]
            raise UserError(
                f"--results_dir: no measured latency (field T_total) at {missing}; add a results directory that "
                "has it, or give --latency_estimator_path"
            )
        return totals_ms

    def stages_ms(self, names: Sequence[str], stamp: Mapping[str, Any] | None = None) -> Floats:
        """(T,) median sum of measured stages at each tier, on a stamp's device if given; 0 where unmeasured."""
        if self.times is None:
            return np.zeros(len(self.space.tiers))
        times = self.times
        if stamp is not None:
            files = [path for path, own in self.stamps.items() if own and _same_device(own, stamp)]
            times = times[times["source"].isin({str(Path(path).parent) for path in files})]
        sums_ms = times[list(names)].astype(float).sum(axis=1, min_count=1)
        by_tier = sums_ms.groupby(times["tier"]).median().reindex(list(self.space.tiers))
        return np.nan_to_num(by_tier.to_numpy(dtype=float))

    def _predict(self, estimator: Estimator, row: int, steps: Floats | float) -> StageTimes:
        tilings = [(int(r), int(c)) if r else None for r, c in self.crops[row]]
        tokens = [int(count) for count in self.vision_tokens[row]]
        work = Workload.of_request(self.space, tokens, int(self.text_tokens[row]), tilings, steps)
        if estimator.space != self.space:  # which has more settings
            work = replace(work, setting=np.array([estimator.space.index(knobs) for knobs in self.space]))
        return estimator.predict(work)

    def predicted_ms(self, estimator: Estimator, level: float = 0.5, steps: float | None = None) -> Floats:
        """Predict totals (N, K) of answers of `steps` decode steps; default: as the questions' answers have."""
        rows = []
        for row in range(len(self)):
            count = self.output_tokens[row] - 1 if steps is None else steps
            rows.append(self._predict(estimator, row, count).total_ms(count, level))
        return np.stack(rows)

    def for_training(self, estimator: Estimator | None) -> Table:
        """Set what settings take by an estimator, or by measurements where there is none.

        With an estimator the upper time is that of an answer as long as 99 % of the table's, since the guard does
        not know how long an answer will be. Measured, a question's own median counts where there is one, else the
        setting's; upper times are the setting's 99 % quantile.

        Raises:
            UserError: there is no estimator, and a setting was never measured or several machines were.
        """
        top, every = LEVELS[-1], (len(self), 1)
        if estimator is None:
            self._check_device()
            return replace(
                self,
                latency_ms=np.where(np.isnan(self.measured_ms), self.usual_ms(), self.measured_ms),
                upper_ms=np.tile(self.usual_ms(top), every),
                look_ms=np.tile(self.stages_ms(_LOOKING), every),
            )
        own = self.output_tokens - 1
        seen = [self._predict(estimator, row, steps) for row, steps in enumerate(own)]
        predicted_ms = np.stack([one.total_ms(steps) for one, steps in zip(seen, own, strict=True)])
        look_ms = np.stack([one.stage_ms("vision_encoder") + one.stage_ms("projector") for one in seen])
        opening_ms = self._opening_ms(estimator, predicted_ms)
        longest = float(np.quantile(self.output_tokens, top)) - 1
        added_ms = np.repeat(opening_ms, self.per_tier)
        return replace(
            self,
            latency_ms=predicted_ms + added_ms,
            upper_ms=self.predicted_ms(estimator, top, longest) + added_ms,
            look_ms=look_ms[:, :: self.per_tier] + opening_ms,
            stamp=estimator.stamp or self.stamp,
        )

    def _opening_ms(self, estimator: Estimator, predicted_ms: Floats) -> Floats:
        """(T,) time of opening a picture and cutting its crops, which an estimator does not know.

        Where results were timed on the estimator's device: the median of what these questions' totals have beyond
        the prediction, or, where other questions were timed, the median of their preprocessing.
        """
        opening_ms = self.stages_ms(_LOOKING[:1], estimator.stamp)
        if all(_same_device(stamp, estimator.stamp) for stamp in self.stamps.values() if stamp):
            beyond_ms = (self.measured_ms - predicted_ms).reshape(len(self), len(opening_ms), -1)
            for tier in range(len(opening_ms)):
                if np.isfinite(beyond_ms[:, tier]).any():
                    opening_ms[tier] = max(float(np.nanmedian(beyond_ms[:, tier])), 0.0)
        return opening_ms

    def _check_device(self) -> None:
        """Raise a `UserError` unless the rows with latencies are of one machine."""
        timed = set() if self.times is None else set(self.times["source"])
        stamps = [stamp for path, stamp in self.stamps.items() if stamp and str(Path(path).parent) in timed]
        for name in _SAME:
            found = sorted({str(stamp[name]) for stamp in stamps})
            if len(found) > 1:
                raise UserError(
                    f"--results_dir: field {name} of the timed results differs ({', '.join(found)}); give those "
                    "of one machine, or --latency_estimator_path"
                )

    def for_judging(self, train: Table, estimator: Estimator | None, level: float) -> Table:
        """Set the latencies that policies go by, at a quantile, and those that they are charged.

        They are charged what was measured where every question was at every setting, else a median: predicted, or
        of the setting.

        Args:
            train: training questions, whose measured times stand in for all questions without an estimator.
            estimator: None where there is none.
            level: of the latency that policies go by.

        Raises:
            UserError: there is no estimator and a setting was never measured.
        """
        if estimator is None:
            times_ms = [train.usual_ms(), train.usual_ms(level)]
            sources = (
                "median of the setting over measured questions",
                f"P{100 * level:g} of the setting over measured {train.split} questions",
            )
        else:
            added_ms = np.repeat(self._stages_or_those_of(train, _LOOKING[:1]), self.per_tier)
            times_ms = [self.predicted_ms(estimator, one) + added_ms for one in (0.5, level)]
            by = f"of the latency estimator ({estimator.name}) and preparing the picture"
            sources = (f"median {by}", f"P{100 * level:g} {by}")
        if not np.isnan(self.measured_ms).any():
            times_ms[0], sources = self.measured_ms, ("measured on each question at each setting", sources[1])
        latency_ms, upper_ms = (np.broadcast_to(one, self.accuracy.shape).copy() for one in times_ms)
        return replace(
            self,
            latency_ms=latency_ms,
            upper_ms=upper_ms,
            look_ms=np.tile(self._stages_or_those_of(train, _LOOKING), (len(self), 1)),
            latency_source=sources[0],
            upper_source=sources[1],
        )

    def _stages_or_those_of(self, other: Table, names: Sequence[str]) -> Floats:
        own_ms = self.stages_ms(names)
        return own_ms if own_ms.any() else other.stages_ms(names)


def _same_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in _SAME[:2])


def read_table(
    results_dirs: Sequence[Path],
    space: KnobSpace,
    datasets: Sequence[str] | None = None,
    split: str | None = None,
    weights_hash: str | None = None,
) -> Table:
    """Read the questions of results directories of the core experiment that have an answer at every setting.

    A question may stand in several directories: accuracies in one, latencies in another. Latencies are as measured
    until `Table.for_training` or `Table.for_judging` sets them.

    Args:
        results_dirs: with the results of one model.
        space: its settings.
        datasets: which to read; None reads all that are there.
        split: of the questions; by default `train`, or what there is.
        weights_hash: hash of the model; results of another are refused. None takes any.

    Raises:
        UserError: results cannot be read, or no question of the split was answered at every setting.
    """
    frame = read_results(results_dirs, datasets, space)
    stamps = frame.attrs["stamps"]
    for path, stamp in stamps.items():
        found = (stamp or {}).get("weights")  # the predecessor's files name none
        if weights_hash is not None and found not in (None, weights_hash):
            raise UserError(f"{path}: field weights is {found}, those of --model_path are {weights_hash}")
    if split is None:
        split = "train" if (frame["split"] == "train").any() else str(frame["split"].iloc[0])
    return table_of(frame, space, split)


def answered_space(frame: pd.DataFrame, space: KnobSpace, split: str) -> KnobSpace:
    """Return the settings whose values have answers in one split of what `store.read_results` returned."""
    rows = frame[(frame["split"] == split) & frame["accuracy"].notna()]
    return space.subset({name: set(rows[name].tolist()) for name in KNOBS}) if len(rows) else space


def table_of(frame: pd.DataFrame, space: KnobSpace, split: str) -> Table:
    """Make the table of one split of what `store.read_results` returned, of the settings of a space.

    Raises:
        UserError: no question of the split was answered at every setting.
    """
    part = frame[frame["split"] == split]
    index = {k.values: i for i, k in enumerate(space)}
    part = part.assign(setting=[index.get(key, -1) for key in zip(*(part[n] for n in _SETTING), strict=True)])
    part = part[part["setting"] >= 0]
    answered = part[part["accuracy"].notna()].drop_duplicates([*_QUESTION, "setting"])
    whole = answered[answered.groupby(_QUESTION)["setting"].transform("size") == len(space)]
    if whole.empty:
        where = ", ".join(sorted(set(frame["source"])))
        raise UserError(f"{where}: no question of split {split} has an answer at all {len(space)} settings")
    whole = whole.sort_values([*_QUESTION, "setting"])
    shape, tiers = (-1, len(space)), len(space.tiers)
    first, by_tier = whole.iloc[:: len(space)], whole.iloc[:: len(space) // tiers]
    tilings = [(0, 0) if tiling is None else tiling for tiling in by_tier["tiling"]]
    is_timed = frame["T_total"].notna()
    totals_ms = part[part["T_total"].notna()].groupby([*_QUESTION, "setting"])["T_total"].median()
    keys = list(zip(whole["dataset"], whole["question_id"], whole["setting"], strict=True))
    measured_ms = totals_ms.reindex(keys).to_numpy(dtype=float).reshape(shape)
    stamps = frame.attrs.get("stamps", {})
    timed = {str(source) for source in frame.loc[is_timed, "source"]}
    known = [stamp for path, stamp in stamps.items() if stamp and str(Path(path).parent) in timed]
    return Table.of(
        space,
        whole["accuracy"].to_numpy(dtype=float).reshape(shape),
        measured_ms,
        split=split,
        **{name: first[name].fillna("").to_numpy(dtype=str) for name in _ABOUT},
        text_tokens=first["text_tokens"].to_numpy(dtype=float),
        vision_tokens=by_tier["vision_tokens"].to_numpy(dtype=float).reshape(-1, tiers),
        crops=np.array(tilings, dtype=np.int64).reshape(-1, tiers, 2),
        output_tokens=whole["output_tokens"].to_numpy(dtype=float).reshape(shape),
        left_out=part.groupby(_QUESTION).ngroups - len(first),
        stamps=stamps,
        stamp=next(filter(None, [*known, *stamps.values()]), {}),
        times=frame.loc[is_timed, _TIMES],
    )


def find_samples(table: Table, data_dir: Path | None = None) -> list[Sample]:
    """The questions of a table with their pictures, in its order.

    Args:
        table: whose questions.
        data_dir: folder of the data sets. Default: one with the test bed that the results name, drawn if it is
            missing, else that of `load_samples`.

    Raises:
        UserError: a data set is not there, lacks one of the questions, or has another of its id.
    """
    known: dict[tuple[str, str], Sample] = {}
    bed = bed_of_results(table.folders, table.split)
    drawn = folder_of(bed) if data_dir is None and bed is not None else data_dir
    for name in dict.fromkeys(table.dataset.tolist()):
        samples = load_samples(name, table.split, data_dir=drawn if name in GENERATED else data_dir)
        known |= {(name, str(sample.question_id)): sample for sample in samples}
    if lost := [key for key in table.questions if key not in known]:
        drawing = " (`tempovlm data make --output_dir DIR` draws the usual test bed)"
        if bed is not None:
            drawing = f", or leave it out to draw it (or draw it by `{bed.command()}`)"
        raise UserError(
            f"--data_dir: question {lost[0][1]} of {lost[0][0]} ({table.split}) is in the results but not in the "
            f"data ({len(lost)} of {len(table)} are missing); name the folder that the core experiment "
            f"read{drawing}"
        )
    found = [known[key] for key in table.questions]
    check_samples(table.folders, table.split, found)
    return found


def budget_range(latency_ms: Floats) -> tuple[float, float]:
    """From the median cost of the cheapest setting to that of the dearest; times (N, K)."""
    return float(np.median(latency_ms.min(axis=1))), float(np.median(latency_ms.max(axis=1)))


def draw_budgets(rng: np.random.Generator, count: int, limits_ms: tuple[float, float]) -> Floats:
    """(count,) budgets in milliseconds, log-uniform between the limits."""
    low, high = np.log(limits_ms)
    return np.exp(rng.uniform(low, high, count))


def budget_bins(budget_ms: Floats) -> Iterator[tuple[dict[str, float], Mask]]:
    """Give the ends and the members (N,) of each of ten ranges, equally wide in the logarithm, that has any."""
    edges = np.geomspace(budget_ms.min(), budget_ms.max() * (1 + 1e-9), _BINS + 1)
    place = np.digitize(budget_ms, edges[1:-1])
    for i in range(_BINS):
        if (place == i).any():
            yield {"from_ms": round(edges[i], 3), "to_ms": round(edges[i + 1], 3)}, place == i
