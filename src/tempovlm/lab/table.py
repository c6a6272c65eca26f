"""The core experiment as a decision problem: for every question what each setting answers and what it takes.

Controllers learn from it and are judged on it. Accuracy is looked up, latency is what was measured or what an
estimator predicts. Knows no policy. Shapes: `N` questions, `K` settings, `T` tiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import Workload

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

_KEY = ["dataset", "question_id"]
_ABOUT = ("dataset", "question_id", "image_id", "template")


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class DecisionTable:
    """Questions, in the order of data set and question id, by settings in the order of the knob space.

    Attributes:
        space: the settings. split: `train` or `val`.
        dataset, question_id, image_id, template: (N,) texts.
        text_tokens: (N,) tokens of the prompt that are no image features.
        vision_tokens: (N, T) image features at each tier.
        crops: (N, T, 2) rows and columns of the crops, the global one apart; 0 without a picture.
        accuracy: (N, K) from 0 to 1, complete. output_tokens: (N, K), the end token included.
        latency_ms: (N, K) median of the measured totals, NaN where latency was not measured.
        left_out: questions without an answer at every setting, which are not here.
        stamps: of the files, by path.
    """

    space: KnobSpace
    split: str
    dataset: NDArray[np.str_]
    question_id: NDArray[np.str_]
    image_id: NDArray[np.str_]
    template: NDArray[np.str_]
    text_tokens: Floats
    vision_tokens: Floats
    crops: NDArray[np.int64]
    accuracy: Floats
    output_tokens: Floats
    latency_ms: Floats
    left_out: int
    stamps: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.question_id)

    @property
    def folders(self) -> list[Path]:
        """The results directories that it is from."""
        return list(dict.fromkeys(Path(file).parent for file in self.stamps))

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> DecisionTable:
        """Some of the questions, by index or mask."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        some: dict[str, Any] = {name: v[rows] if isinstance(v, np.ndarray) else v for name, v in values.items()}
        return DecisionTable(**some)

    def with_untimed(self, more: DecisionTable) -> DecisionTable:
        """These questions and then others of the same settings, whose measured latencies do not count."""
        both: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, values in both.items():
            if isinstance(values, np.ndarray):
                both[name] = np.concatenate([values, getattr(more, name)])
        both["latency_ms"][len(self) :] = np.nan
        both["left_out"] += more.left_out
        return DecisionTable(**both)

    def median_ms(self) -> Floats:
        """(K,) median measured latency of each setting.

        Raises:
            UserError: a setting was never measured.
        """
        measured = ~np.isnan(self.latency_ms)
        if not measured.any(axis=0).all():
            missing = self.space.settings[int(np.argmin(measured.any(axis=0)))]
            raise UserError(
                f"--results_dir: no measured latency at {missing} in split {self.split}; add results that were "
                "timed, or give --latency_estimator_path"
            )
        return np.nanmedian(self.latency_ms, axis=0)

    def predicted_ms(self, estimator: Estimator, level: float = 0.5) -> Floats:
        """(N, K) latency of each question at each setting, for the answers that it gives there."""
        rows = []
        for i in range(len(self)):
            tilings = [(int(r), int(c)) if r else None for r, c in self.crops[i]]
            tokens = [int(count) for count in self.vision_tokens[i]]
            steps = self.output_tokens[i] - 1
            work = Workload.of_request(self.space, tokens, int(self.text_tokens[i]), tilings, steps)
            rows.append(estimator.predict(work).total_ms(steps, level))
        return np.stack(rows) if rows else np.empty((0, len(self.space)))


def decision_table(
    frame: pd.DataFrame, space: KnobSpace, split: str, datasets: Sequence[str] | None = None
) -> DecisionTable:
    """The table of what `store.read_results` returned.

    A question may stand in several results directories: accuracies in one, latencies in another.

    Raises:
        UserError: no question of the split was answered at every setting.
    """
    part = frame[frame["split"] == split]
    if datasets is not None:
        part = part[part["dataset"].isin(datasets)]
    index = {(k.tier, k.top_k, k.num_blocks): i for i, k in enumerate(space)}
    place = [index[key] for key in zip(part["tier"], part["top_k"], part["num_blocks"], strict=True)]
    part = part.assign(setting=place)
    answered = part[part["accuracy"].notna()].drop_duplicates([*_KEY, "setting"])
    asked = part.groupby(_KEY).ngroups
    whole = answered.groupby(_KEY).filter(lambda rows: len(rows) == len(space))
    if whole.empty:
        where = ", ".join(sorted(set(frame["source"])))
        raise UserError(f"{where}: no question of split {split} has an answer at all {len(space)} settings")
    whole = whole.sort_values([*_KEY, "setting"])
    shape = (len(whole) // len(space), len(space))
    per_tier = len(space.top_ks) * len(space.block_counts)
    first = whole.iloc[:: len(space)]
    tilings = [(0, 0) if tiling is None else tiling for tiling in whole["tiling"].iloc[::per_tier]]
    measured = part[part["T_total"].notna()].groupby([*_KEY, "setting"])["T_total"].median()
    keys = list(zip(whole["dataset"], whole["question_id"], whole["setting"], strict=True))
    return DecisionTable(
        space=space,
        split=split,
        **{name: first[name].to_numpy(dtype=str) for name in _ABOUT},
        text_tokens=first["text_tokens"].to_numpy(dtype=float),
        vision_tokens=whole["vision_tokens"].to_numpy(dtype=float)[::per_tier].reshape(shape[0], -1),
        crops=np.array(tilings, dtype=np.int64).reshape(shape[0], -1, 2),
        accuracy=whole["accuracy"].to_numpy(dtype=float).reshape(shape),
        output_tokens=whole["output_tokens"].to_numpy(dtype=float).reshape(shape),
        latency_ms=measured.reindex(keys).to_numpy(dtype=float).reshape(shape),
        left_out=asked - shape[0],
        stamps=frame.attrs.get("stamps", {}),
    )
