"""Exp 5 in a queue: values by regression, GRPO over episodes, and a judgement on arrivals that neither has seen.

Of the training questions the part `train` fits the values, `validation` says which epoch of them is best and is
asked in GRPO's episodes, and `test` says which epoch of GRPO is best. Of a trace the first half is learned from,
and of this the last quarter says which epoch is best; the second half is judged, and so are Poisson arrivals, with
other questions. What serves is the ensemble of the values of all seeds, each of which has seen other parts.

Shapes: `N` questions, `K` settings, `L` width of the language feature, `n` requests, `S` seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.baselines import NearestNeighbours
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.forecast import Forecast
from tempovlm.control.learned.networks import AccuracyNetwork
from tempovlm.control.learned.observation import language_feature, question_ids, token_vectors
from tempovlm.control.queue import Schedule
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.core.progress import progress_bar
from tempovlm.lab.drawing import can_draw
from tempovlm.lab.exp5.values import VALUE_OPTIONS, draw_reliability, predicted, reliability, train_values
from tempovlm.lab.grpo.algorithm import STATE
from tempovlm.lab.grpo.environment import GrpoJob
from tempovlm.lab.judge.inputs import Content
from tempovlm.lab.options import GrpoOptions, QueueFlags
from tempovlm.lab.queue_grpo.algorithm import Corrected, QueueTraining
from tempovlm.lab.queue_grpo.episodes import MANY, Source, chooser_of
from tempovlm.lab.queueing.arrivals import POISSON, gaps_of
from tempovlm.lab.queueing.choosers import KIND, TABLE, Chooser, named
from tempovlm.lab.queueing.shares import blocks_of
from tempovlm.lab.queueing.simulate import simulate
from tempovlm.lab.queueing.study import budgets_of
from tempovlm.lab.queueing.world import World, about_training, draw_traffic, read_world
from tempovlm.lab.statistics import percentile_interval, spread
from tempovlm.lab.table import Floats, Table, find_samples

SCHEMA = "tempovlm.queue_report/1"
VALUE, LEARNED, ENSEMBLE = "value", "learned", "ensemble"
CHECKPOINTS = {ENSEMBLE: "best_value.pt", LEARNED: "best_controller.pt"}

_LEARNED_FROM = 0.75
"""Of the first half of the arrivals; the rest chooses GRPO's epoch."""

_DRAWN = 2000
"""Poisson requests that are judged at most."""

_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class QueueJob(QueueFlags, GrpoJob):
    """Exp 5 in a queue.

    Attributes:
        seeds: of the trainings, which the regression's start, order and split depend on too.
    """

    seeds: Sequence[int] = (GrpoOptions.seed,)

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        GrpoJob.check(self)
        self.check_queue()
        if not self.options.regression_epochs:
            raise UserError("--warm_start 0: a queue's policy begins with regression; give some 40 epochs")


@dataclass(frozen=True, eq=False, slots=True)
class _Run:
    seed: int
    nets: Mapping[str, AccuracyNetwork]
    trained: QueueTraining


@dataclass(frozen=True, eq=False, slots=True)
class _Material:
    """A world with the features (N, L) of its questions, and gaps between arrivals by half."""

    world: World
    language: Tensor
    judged_language: Tensor
    halves: tuple[Floats, Floats]
    budgets_ms: Sequence[float]


def run_job(job: QueueJob) -> dict[str, Any]:
    """Train every seed, judge, and write everything; returns the report.

    Raises:
        UserError: wrong input, or the folder cannot be written or another process trains in it.
    """
    job.check()
    world = read_world(job.results_dirs, job.engine.space, job.datasets)
    language, judged = (language_of(job, table) for table in (world.train, world.judged))
    given = _Material(world, language, judged, halves_of(job), budgets_of(job.budgets_ms, world))
    with writing_to(job.output_dir) as folder:
        runs = [_train(job, given, seed, folder / f"seed_{seed}") for seed in job.seeds]
        best = {ENSEMBLE: ensemble_of(given, runs), LEARNED: _best(runs).nets[LEARNED]}
        report = _report(job, given, runs, best)
        _save(job, given, best, report)
    return report


def language_of(job: QueueJob, table: Table) -> Tensor:
    """Return the features (N, L) of a table's questions."""
    model, tokenizer = job.engine.runner.model, job.engine.runner.tokenizer
    vectors = token_vectors(model)
    ids = [question_ids(tokenizer, one.question) for one in find_samples(table, job.data_dir)]
    return torch.as_tensor(np.stack([language_feature(vectors, one) for one in ids]))


def halves_of(job: QueueJob) -> tuple[Floats, Floats]:
    """Return gaps of the first and of the second half of the arrivals, each with a mean of 1."""
    assert job.arrivals is not None
    every = gaps_of(job.arrivals, 0, None, job.options.seed)
    middle = len(every) // 2
    return every[:middle] / every[:middle].mean(), gaps_of(job.arrivals, middle, None, job.options.seed)


def _train(job: QueueJob, given: _Material, seed: int, folder: Path) -> _Run:
    options = replace(job.options, seed=seed)
    table = given.world.train.split_by_picture(job.train_split, seed)
    fitting = replace(VALUE_OPTIONS, num_epochs=options.regression_epochs, hidden_dim=job.hidden_dim, seed=seed)
    net = train_values(table, given.language, fitting, folder / VALUE)
    world, own = replace(given.world, train=table), given.language[torch.as_tensor(table.rows("train"))]
    asked, chosen = (table.rows(part) for part in ("validation", "test"))
    every = np.concatenate([asked, chosen])
    policy = Corrected(net, given.language[torch.as_tensor(every)], own, world.usual_ms)
    first, middle = given.halves[0], round(_LEARNED_FROM * len(given.halves[0]))
    source, judge = (
        Source(
            world=about_training(world, part),
            gaps=gaps,
            loads=job.loads,
            budgets_ms=given.budgets_ms,
            length=job.episode_length,
            offset=offset,
        )
        for part, gaps, offset in (("validation", first[:middle], 0), ("test", first[middle:], len(asked)))
    )
    trained = QueueTraining(policy, source, judge, options, job.exploration)
    trained.resume(folder / STATE)
    trained.run(folder / STATE, f"queue, seed {seed}")
    return _Run(seed, {VALUE: net, LEARNED: policy.folded(own)}, trained)


def ensemble_of(given: _Material, runs: Sequence[_Run]) -> AccuracyNetwork:
    """Return the network that expects the mean of what the values of all seeds do."""
    net = AccuracyNetwork.ensemble([run.nets[VALUE] for run in runs])
    net.fit_usual(given.language)
    return net


def _report(
    job: QueueJob, given: _Material, runs: Sequence[_Run], best: Mapping[str, AccuracyNetwork]
) -> dict[str, Any]:
    rows = judge(given, runs, best[ENSEMBLE], job)
    gains = [run.trained.best_score - run.trained.start_reward for run in runs]
    report = {
        "schema": SCHEMA,
        "verdict": verdict(rows),
        "rows": rows,
        "reliability": _reliabilities(job, given, best),
        "seeds": [
            {
                "seed": run.seed,
                "best_epoch": run.trained.best_epoch,
                "reward": {"start": run.trained.start_reward, "best": run.trained.best_score},
                "weight": run.trained.policy.weight.tolist(),
            }
            for run in runs
        ],
        "validation_gain": spread(gains),
        "conditions": {
            **{name: getattr(job, name) for name in ("loads", "episode_length", "exploration", "train_split")},
            "arrivals": Path(str(job.arrivals)).name,
            "requests": [len(half) for half in given.halves],
            "budgets_ms": list(given.budgets_ms),
            "native_ms": given.world.native_ms,
            "options": asdict(job.options),
        },
        "knob_space": given.world.space.fingerprint,
        "stamp": dict(given.world.judged.stamp),
    }
    return report


def judge(
    given: _Material, runs: Sequence[_Run], ensemble: AccuracyNetwork, job: QueueJob
) -> list[dict[str, Any]]:
    """Return shares of right answers in time at every load: of the table, of the learned policies, and gains.

    Those of learned policies are means over the seeds, request by request, and all intervals are by blocks of
    requests: of the same policies under other arrivals.
    """
    second, seed = given.halves[1], job.options.seed
    drawn = min(_DRAWN, len(second))
    every = {Path(str(job.arrivals)).name: second, POISSON: gaps_of(POISSON, 0, drawn, seed)}
    known: dict[str, list[Chooser]] = {TABLE: [named(TABLE, given.world)]}
    for name in (VALUE, LEARNED):
        known[name] = [_chooser(name, run.nets[name], given) for run in runs]
    known[ENSEMBLE] = [_chooser(ENSEMBLE, ensemble, given)]
    total = len(every) * len(job.loads) * sum(map(len, known.values()))
    rows, done = [], 0
    with progress_bar("judging") as advance:
        for arrivals, gaps in every.items():
            for load in job.loads:
                traffic = draw_traffic(given.world, gaps, load, given.budgets_ms, seed)
                right = {}
                for name, choosers in known.items():
                    found = []
                    for one in choosers:
                        found.append(simulate(given.world, traffic, one, _schedule).right_on_time)
                        done += 1
                        advance(done, total)
                    right[name] = np.stack(found, axis=1)
                rows.append({"arrivals": arrivals, "load": load, "requests": len(traffic), **compare(right)})
    return rows


def _chooser(name: str, net: AccuracyNetwork, given: _Material) -> Chooser:
    return chooser_of(name, predicted(net, given.judged_language), net.usual.double().numpy())


def _schedule() -> Schedule:
    return Schedule(most_waiting=MANY, most_of_owner=MANY, forecast=Forecast())


def compare(right: Mapping[str, Floats]) -> dict[str, Any]:
    """Compare policies by what each request earned (n, S) under each seed.

    Returns:
        `right_on_time` of each policy, and `gains`, each with its interval and, over several seeds, `over_seeds`.
    """
    blocks = blocks_of(len(next(iter(right.values()))))
    shares = {name: _share(values.mean(axis=1), blocks) for name, values in right.items()}
    gains = {}
    for name, over in ((VALUE, TABLE), (LEARNED, VALUE), (LEARNED, TABLE), (ENSEMBLE, TABLE), (ENSEMBLE, VALUE)):
        off = right[name] - right[over]
        gains[f"{name} over {over}"] = _share(off.mean(axis=1), blocks) | {
            "over_seeds": spread(off.mean(axis=0).tolist())
        }
    return {"right_on_time": shares, "gains": gains}


def _share(values: Floats, blocks: Any) -> dict[str, Any]:
    means = blocks.means(values[:, None])[:, 0]
    return {"mean": float(means[0]), "interval": [float(end) for end in percentile_interval(means[1:])]}


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in a sentence a row whether GRPO gains anything over the regression at the same derived price."""
    lines = []
    for row in rows:
        gain = row["gains"][f"{LEARNED} over {VALUE}"]
        low, high = (100 * end for end in gain["interval"])
        seeds = gain["over_seeds"]["interval"]
        word = "gains nothing that shows"
        if low > 0 and (seeds is None or seeds[0] > 0):
            word = "gains"
        elif high < 0 and (seeds is None or seeds[1] < 0):
            word = "loses"
        lines.append(
            f"{row['arrivals']} at load {row['load']:g}: GRPO {word}, {100 * gain['mean']:+.2f} points "
            f"[{low:+.2f}, {high:+.2f}]"
        )
    return "; ".join(lines)


def _reliabilities(job: QueueJob, given: _Material, best: Mapping[str, AccuracyNetwork]) -> dict[str, Any]:
    """Return how calibrated policies are on the judged questions: those that are kept, and others."""
    world = given.world
    content = Content.read([world.train, world.judged], job.data_dir)
    train = content.features_of(world.train)
    neighbours = NearestNeighbours.fit(train, world.train.accuracy, world.train.image_id.tolist())
    expected = {
        TABLE: np.broadcast_to(world.train.accuracy.mean(axis=0), world.judged.accuracy.shape),
        KIND: named(KIND, world).scores[0],
        "nearest neighbours": neighbours.scores(content.features_of(world.judged)),
        **{name: predicted(net, given.judged_language) for name, net in best.items()},
    }
    return {name: reliability(values, world.judged) for name, values in expected.items()}


def _best(runs: Sequence[_Run]) -> _Run:
    """Return the seed of GRPO with the highest reward over its own start."""
    return max(runs, key=lambda run: run.trained.best_score - run.trained.start_reward)


def _save(job: QueueJob, given: _Material, best: Mapping[str, AccuracyNetwork], report: Mapping[str, Any]) -> None:
    folder = job.output_dir
    for name, net in best.items():
        save_controller(
            folder / CHECKPOINTS[name],
            kind="value",
            networks={"accuracy": net},
            space=given.world.space,
            weights_hash=job.weights_hash,
            stamp=given.world.judged.stamp,
            options={"policy": name, "seeds": list(job.seeds), **report["conditions"]},
            metrics={"reliability": report["reliability"][name]["error"]},
        )
    write_whole(folder / "report.json", json.dumps(_rounded(report), indent=1) + "\n")
    if can_draw():
        shown = {name: report["reliability"][name] for name in (TABLE, "nearest neighbours", ENSEMBLE)}
        write_whole(folder / "reliability.svg", draw_reliability(shown))


def _rounded(report: Mapping[str, Any]) -> Any:
    from tempovlm.lab.bench.summary import rounded

    return rounded(report, _DIGITS)


def render(report: Mapping[str, Any]) -> str:
    """Render what was judged as text."""
    names = (TABLE, VALUE, LEARNED, ENSEMBLE)
    lines = [f"{'arrivals':<26}{'load':>5}" + "".join(f"{name:>10}" for name in names)]
    for row in report["rows"]:
        shares = "".join(f"{100 * one['mean']:>10.1f}" for one in row["right_on_time"].values())
        lines.append(f"{row['arrivals'][-25:]:<26}{row['load']:>5g}{shares}")
        for name, gain in row["gains"].items():
            low, high = (100 * end for end in gain["interval"])
            lines.append(f"    {name:<22}{100 * gain['mean']:+7.2f} [{low:+.2f}, {high:+.2f}]")
    for name, one in report["reliability"].items():
        low, high = (100 * end for end in one["interval"])
        lines.append(
            f"{name:<20} calibration error {100 * one['error']:.1f} points [{low:.1f}, {high:.1f}], "
            f"squared error {one['brier']:.4f}"
        )
    return "\n".join([*lines, *report["verdict"].split("; ")]) + "\n"
