"""Exp 6 from samples to files: single importances, the joint search, rankings compared by depth, correlations.

All choices are made on training pictures. Validation pictures are only for comparison: whether the
importances are the same there, and the accuracy of each ranking at each depth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.core.plan import Ranking
from tempovlm.core.progress import progress_bar
from tempovlm.core.stamp import Stamp
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab.drawing import INK, new_figure, save_png, style
from tempovlm.lab.exp6_importance.consistency import Importance, correlate, cross_dataset, spearman
from tempovlm.lab.exp6_importance.measure import (
    Blocks,
    Protocol,
    Removal,
    ScoreFile,
    Scores,
    ablations,
    eliminate,
    joint_ranking,
    measure,
    single_ranking,
)
from tempovlm.lab.statistics import Floats, percentile_interval
from tempovlm.testbed.bed import Bed

SPLITS = ("train", "val")
CORRELATIONS, MERGED = "cross_dataset_correlation.json", "merged_scores.json"

PUBLISHED, READ_BY_EXP7 = Path("results/importance_validation"), Path("results/importance") / MERGED
"""Folder of the seed document's run, and where Exp 7 reads its merged scores."""


@dataclass(frozen=True, slots=True)
class Study:
    """The data, the protocol and the output of one run of Exp 6.

    Attributes:
        data: data set → split → samples.
        num_joint: training questions of each data set in the joint search; as many others compare the rankings.
        merged_file: path of a second copy of the merged scores; None writes none.
        bed: what the test bed of the samples was drawn from; None for other data.
    """

    engine: Engine
    protocol: Protocol
    data: Mapping[str, Mapping[str, Sequence[Sample]]]
    num_joint: int
    output_dir: Path
    merged_file: Path | None
    stamp: Stamp
    bed: Bed | None = None
    progress: bool = True

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return self.engine.runner.model.config.num_blocks

    def measure(
        self, name: str, dataset: str, split: str, samples: Sequence[Sample], plans: Sequence[Blocks]
    ) -> Scores:
        """Score samples under plans, from the file of that name as far as it goes."""
        base = self.protocol.base
        header = {
            "dataset": dataset,
            "split": split,
            "weights": self.stamp.weights,
            "device": self.stamp.device,
            "tier": base.tier,
            "top_k": base.top_k,
            "max_new_tokens": self.protocol.max_new_tokens,
            "plans": [list(blocks) for blocks in plans],
        }
        file = ScoreFile(self.output_dir / "scores" / f"{name}_{dataset}_{split}.jsonl", header)
        title = f"{name}, {dataset} {split}: {len(samples)} questions × {len(plans)} plans"
        with progress_bar(title, show=self.progress) as advance:
            return measure(self.engine, samples, plans, file, self.protocol, advance, influence=name == "single")


@dataclass(frozen=True, slots=True)
class Found:
    """The measurements.

    Attributes:
        single: data set → split → scores without each block. trained, held_out: importances of the two splits.
        merged, influence: (N,) means over the data sets, on training pictures.
        removals: of the joint search. rankings: by name.
        compared: split → ranking → depth → accuracy.
    """

    single: Mapping[str, Mapping[str, Scores]]
    trained: Mapping[str, Importance]
    held_out: Mapping[str, Importance]
    merged: Floats
    influence: Floats
    removals: Sequence[Removal]
    rankings: Mapping[str, Ranking]
    compared: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]

    @property
    def best(self) -> str:
        """The ranking with the highest mean accuracy over the depths on training pictures; of equals the first."""
        table = self.compared["train"]
        return max(table, key=lambda name: sum(cell["accuracy"] for cell in table[name].values()))


def second_place(output_dir: Path) -> Path | None:
    """Return where else a run's merged scores go: those of the published run to Exp 7's place, others nowhere."""
    return READ_BY_EXP7 if output_dir.resolve() == PUBLISHED.resolve() else None


def run_study(study: Study) -> dict[str, Any]:
    """Measure, write every file, and return what cross_dataset_correlation.json holds, with the main `files`.

    Raises:
        UserError: a folder cannot be written, its scores are of another run, or another process writes there.
    """
    with writing_to(study.output_dir):
        found = _measure(study)
        for name in study.data:
            _write(study, study.output_dir / f"importance_comparison_{name}.json", _comparison(name, found))
        record, merged = _correlations(study, found), _merged_record(study, found)
        _write(study, study.output_dir / CORRELATIONS, record)
        copies = [study.output_dir / MERGED, *([] if study.merged_file is None else [study.merged_file])]
        for path in copies:
            _write(study, path, merged)
        _draw(study, found)
        told = {"ranking": merged["ranking"], "ranking_method": found.best, "depths": found.compared}
        return record | told | {"files": [study.output_dir / CORRELATIONS, copies[-1]]}


def _measure(study: Study) -> Found:
    plans = ablations(study.num_blocks)
    single = {
        dataset: {
            split: study.measure("single", dataset, split, samples, plans) for split, samples in splits.items()
        }
        for dataset, splits in study.data.items()
    }
    trained = {name: Importance.of(s["train"].drops, s["train"].images) for name, s in single.items()}
    held_out = {name: Importance.of(s["val"].drops, s["val"].images) for name, s in single.items()}
    merged = np.mean([one.values for one in trained.values()], axis=0)
    influence = np.mean([s["train"].influence.mean(axis=0) for s in single.values()], axis=0)
    joint, choice = _search_samples(study)
    removals = _search(study, joint, influence)
    rankings = {
        "joint": joint_ranking(removals, merged.tolist()),
        "single": single_ranking(merged.tolist()),
        "influence": single_ranking(influence.tolist()),
        "model": study.engine.ranking,
        "even": Ranking.evenly_spaced(study.num_blocks),
    }
    compared = {
        "train": _compare(study, rankings, "train", choice),
        "val": _compare(study, rankings, "val", {n: s["val"][: study.num_joint] for n, s in study.data.items()}),
    }
    return Found(single, trained, held_out, merged, influence, removals, rankings, compared)


def _search_samples(study: Study) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """Return training samples for the search, and samples of other pictures for choosing among the rankings.

    If there are no others, the same ones serve twice.
    """
    joint, choice = {}, {}
    for name, splits in study.data.items():
        train = list(splits["train"])
        # Half at most, so that pictures remain for the choice.
        size = max(1, min(study.num_joint, len(train) // 2))
        joint[name] = train[:size]
        pictures = {sample.image_id for sample in joint[name]}
        rest = [sample for sample in train[size:] if sample.image_id not in pictures]
        choice[name] = rest[: study.num_joint] or joint[name]
    return joint, choice


def _search(study: Study, joint: Mapping[str, Sequence[Sample]], influence: Floats) -> list[Removal]:
    def evaluate(step: int, candidates: Sequence[Blocks]) -> list[float]:
        name = f"joint{step:02d}"
        found = [study.measure(name, ds, "train", samples, candidates) for ds, samples in joint.items()]
        return np.mean([one.scores.mean(axis=0) for one in found], axis=0).tolist()

    keep = study.engine.space.block_counts[0]
    return eliminate(study.num_blocks, keep, evaluate, influence.tolist())


def _compare(
    study: Study, rankings: Mapping[str, Ranking], split: str, samples: Mapping[str, Sequence[Sample]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return ranking → depth → accuracy, mean over the data sets, with its 95 % interval."""
    depths = [depth for depth in study.engine.space.block_counts if depth < study.num_blocks]
    plans = {(name, depth): ranking.blocks(depth) for name, ranking in rankings.items() for depth in depths}
    unique = sorted(set(plans.values()))
    found = [
        Importance.of(scores.scores, scores.images)
        for dataset, part in samples.items()
        for scores in [study.measure("rankings", dataset, split, part, unique)]
    ]
    values = np.mean([one.values for one in found], axis=0)
    low, high = percentile_interval(np.mean([one.draws for one in found], axis=0))
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in rankings}
    for (name, depth), blocks in plans.items():
        i = unique.index(blocks)
        cell = {"accuracy": values[i], "low": low[i], "high": high[i]}
        table[name][str(depth)] = {key: round(float(value), 5) for key, value in cell.items()}
    return table


def _named(values: Floats) -> dict[str, float]:
    return {str(block): round(float(value), 6) for block, value in enumerate(values)}


def _comparison(name: str, found: Found) -> dict[str, Any]:
    """One data set: both splits with intervals, how they agree, and the cheap measure beside them."""
    from scipy.stats import spearmanr

    train, val = found.trained[name], found.held_out[name]
    varies = np.ptp(train.values) > 0 and np.ptp(val.values) > 0
    p_value = float(spearmanr(train.values, val.values).pvalue) if varies else None
    agreement = correlate(train, val)
    record: dict[str, Any] = {
        "dataset_name": name,
        "train_scores": _named(train.values),
        "validation_scores": _named(val.values),
        "spearman_correlation": agreement["spearman_all_blocks"]["estimate"],
        "p_value": p_value,
        "train_against_validation": agreement,
    }
    for split, importance in (("train", train), ("val", val)):
        scores = found.single[name][split]
        low, high = importance.interval()
        turn = scores.influence.mean(axis=0)
        record[split] = {
            "num_samples": len(scores.images),
            "num_images": len(set(scores.images)),
            "errors": dict(scores.errors),
            "baseline_accuracy": round(float(scores.scores[:, 0].mean()), 6),
            "low": _named(low),
            "high": _named(high),
            "block_influence": _named(turn),
            "influence_agreement": correlate(
                importance, Importance(turn, np.tile(turn, (len(importance.draws), 1)), 1.0)
            ),
        }
    return record


def _correlations(study: Study, found: Found) -> dict[str, Any]:
    trained, rankings = found.trained, found.rankings
    place = {
        name: np.argsort(np.array(ranking.order)).astype(np.float64)[1:-1] for name, ranking in rankings.items()
    }
    return {
        **cross_dataset(trained),
        "train_against_validation": {name: correlate(trained[name], found.held_out[name]) for name in trained},
        "ranking_agreement": {
            name: round(float(spearman(place["joint"], other)), 5) for name, other in place.items()
        },
        "dataset_scores": {name: _named(one.values) for name, one in trained.items()},
        "merged_scores": _named(found.merged),
        "ranking": list(rankings[found.best].order),
        "stamp": study.stamp.to_json(),
    }


def _merged_record(study: Study, found: Found) -> dict[str, Any]:
    """The predecessor's fields, and beside them the rankings with their accuracy at every depth."""
    base = study.protocol.base
    return {
        "method": "mean over data sets of accuracy(all blocks) - accuracy(without the block), training pictures",
        "train_val_weight": {"train": 1.0, "validation": 0.0},
        "num_datasets": len(found.single),
        "datasets": list(found.single),
        "per_dataset_metadata": {
            name: {
                "num_samples": len(splits["train"].images),
                "baseline_accuracy": round(float(splits["train"].scores[:, 0].mean()), 6),
            }
            for name, splits in found.single.items()
        },
        "merged_scores": _named(found.merged),
        "block_influence": _named(found.influence),
        "ranking": list(found.rankings[found.best].order),
        "ranking_method": found.best,
        "ranking_rule": "highest mean accuracy over the depths on training pictures that the search did not see",
        "rankings": {name: list(ranking.order) for name, ranking in found.rankings.items()},
        "accuracy_by_depth": found.compared,
        "joint_search": [
            {"removed": r.block, "blocks": list(r.blocks), "accuracy": round(r.accuracy, 6)}
            for r in found.removals
        ],
        "tier": base.tier,
        "top_k": base.top_k,
        "data_source": study.stamp.data_source,
    }


def _write(study: Study, path: Path, record: Mapping[str, Any]) -> None:
    bed = None if study.bed is None else study.bed.to_json()
    write_whole(path, json.dumps({**record, "bed": bed, "stamp": study.stamp.to_json()}, indent=1) + "\n")


def _draw(study: Study, found: Found) -> None:
    """A bar chart for each data set, train beside validation, and one with all data sets."""
    note = f"{study.stamp.model}, {study.stamp.data_source} data, {study.stamp.device}"
    for name, train in found.trained.items():
        _bars(
            study.output_dir / f"importance_comparison_{name}.png",
            {"train": train, "validation": found.held_out[name]},
            f"{name}: importance of each block ({note})",
        )
    _bars(study.output_dir / "importance_comparison_all.png", found.trained, f"training pictures ({note})")


@style()
def _bars(path: Path, groups: Mapping[str, Importance], title: str) -> None:
    """Draws a bar a block and group, with its interval."""
    figure = new_figure(960, 400)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for i, (name, one) in enumerate(groups.items()):
        place = np.arange(len(one.values)) + (i - (len(groups) - 1) / 2) * width
        low, high = one.interval()
        bars = np.maximum((one.values - low, high - one.values), 0)
        axes.bar(place, one.values, width, yerr=bars, label=name, error_kw={"lw": 0.8, "ecolor": INK})
    axes.set_xticks(range(len(next(iter(groups.values())).values)))
    axes.set_xlabel("block")
    axes.set_ylabel("accuracy lost without it")
    axes.grid(visible=False, axis="x")
    axes.axhline(0, color=INK, lw=0.8)
    axes.legend()
    figure.suptitle(title)
    save_png(figure, path)
