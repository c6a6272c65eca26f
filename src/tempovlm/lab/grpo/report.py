"""Judges a GRPO training beside a table, the best fixed setting and the oracle, and draws its figures.

All are judged on the same questions under the same budgets, with the latencies that the reward counted; measured
adherence is the judge's business.

Shapes: `N` questions, `B` questions under budgets, `K` settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tempovlm.control.select import TIE, best
from tempovlm.core.knobs import KNOBS
from tempovlm.lab.drawing import can_draw, describe, mark_log, new_figure, save_png, style
from tempovlm.lab.grpo.algorithm import GrpoTraining, Rollout, evaluate, every_reward, measures, outcome
from tempovlm.lab.grpo.environment import Batch, Environment, GrpoJob, Task, limits_ms
from tempovlm.lab.options import GrpoOptions
from tempovlm.lab.statistics import clustered_bootstrap, utilisation, wilson_interval
from tempovlm.lab.table import PARTS

BUDGET_BINS = 5

_LATE_SHARE = 10
"""The reward at the end is the mean of the last tenth of the epochs."""


def judge(policy: nn.Module, task: Task, trained: GrpoTraining) -> dict[str, Any]:
    """The best weights on the validation questions, beside what needs no learning.

    Returns:
        `policies` (name → measures), `by_budget`, `gain` over the table and the best fixed setting with intervals,
        `reward` of the validation untrained, when GRPO starts and in its last epochs (those of the training differ
        from epoch to epoch by their budgets), `best_epoch`.
    """
    batch, options = task.validation, task.options
    table, env = task.env.table, Environment(task.env.table)
    free = task.env.batch(batch.rows, batch.budget_ms, mask=False)
    found = {
        "policy": evaluate(policy, task.env, batch, options),
        "policy, nothing masked": evaluate(policy, task.env, free, options),
        "table": _of(env, batch, table_choice(task.rows, env, batch, options.time_price), options),
        "fixed": _of(env, batch, fixed_choice(task, env, batch), options),
        "oracle": _of(env, batch, oracle_choice(env, batch, options), options),
    }
    images = table.image_id[batch.rows.numpy()].tolist()
    rewards = [record["val"]["reward"] for record in trained.history]
    last = rewards[-max(1, len(rewards) // _LATE_SHARE) :]
    return {
        "best_epoch": trained.best_epoch,
        "reward": {
            "untrained": trained.untrained_reward,
            "start": trained.start_reward,
            "end": float(np.mean(last)),
        },
        "policies": {name: _measures(task.env, one) for name, one in found.items()},
        "by_budget": by_budget(found, batch),
        "gain": {name: gain(found["policy"], found[name], images) for name in ("table", "fixed", "oracle")},
    }


def _of(env: Environment, batch: Batch, settings: Tensor, options: GrpoOptions) -> Rollout:
    return outcome(env, batch, settings, torch.zeros(settings.shape), options)


def table_choice(train: NDArray[np.int64], env: Environment, batch: Batch, time_price: float = 0.0) -> Tensor:
    """(B, 1) of the allowed settings the one most accurate in training, the cheaper one of a tie.

    Time has the price that it has in the reward, so that the table is after the same thing as the policy.
    """
    accuracy = env.table.accuracy[train].mean(axis=0)
    cost_ms = env.latency_ms[torch.as_tensor(train)].median(dim=0).values.numpy()
    allowed = env.allowed(batch.rows, batch.budget_ms).numpy()
    price_per_ms = time_price / batch.budget_ms.unsqueeze(1).numpy()
    return torch.from_numpy(best(accuracy, allowed, cost_ms, price_per_ms, TIE)).unsqueeze(1)


def fixed_choice(task: Task, env: Environment, batch: Batch) -> Tensor:
    """(B, 1) the one setting whose mean reward in training was highest, whatever the budget."""
    rows = torch.as_tensor(task.rows)
    budgets = torch.as_tensor(task.draw(task.rows, np.random.default_rng(task.options.seed)), dtype=torch.float64)
    mean = every_reward(env, env.batch(rows, budgets, mask=False), task.options).mean(dim=0)
    return mean.argmax().expand(len(batch.rows), 1)


def oracle_choice(env: Environment, batch: Batch, options: GrpoOptions) -> Tensor:
    """(B, 1) of the allowed settings the one of the highest reward, which only hindsight knows."""
    rewards = every_reward(env, batch, options).numpy()
    fits = np.ones(rewards.shape, bool) if batch.allowed is None else batch.allowed.numpy()
    return torch.from_numpy(best(rewards, fits, env.latency_ms[batch.rows].numpy())).unsqueeze(1)


def _measures(env: Environment, found: Rollout) -> dict[str, Any]:
    """Means, knob shares, and adherence where the cheapest setting fits, with its interval (Wilson, 95 %).

    Utilisation is over the requests for which a slower setting existed.
    """
    feasible = env.latency_ms[found.batch.rows].amin(dim=1) <= found.batch.budget_ms
    in_time = int(found.in_time[feasible].sum())
    count = int(feasible.sum())
    rows, taken = found.batch.rows, found.latency_ms.flatten()
    slower = (taken < env.latency_ms[rows].amax(dim=1)).tolist()
    return measures(env, [found]) | {
        "utilisation": utilisation(taken.tolist(), found.batch.budget_ms.tolist(), slower),
        "requests": len(feasible),
        "feasible_requests": count,
        "feasible_adherence": in_time / count if count else None,
        "feasible_adherence_interval": list(wilson_interval(in_time, count)) if count else None,
    }


def gain(policy: Rollout, other: Rollout, images: Sequence[str]) -> dict[str, Any]:
    """Mean differences, question by question, with 95 % intervals clustered by picture.

    By `accuracy_in_time` a late answer is worth nothing.
    """
    result: dict[str, Any] = {}
    for name, ours, theirs in (
        ("accuracy", policy.accuracy, other.accuracy),
        ("accuracy_in_time", policy.accuracy * policy.in_time, other.accuracy * other.in_time),
        ("reward", policy.rewards, other.rewards),
    ):
        difference = (ours - theirs).flatten().tolist()
        interval = clustered_bootstrap(difference, images)
        result[name] = {"mean": float(np.mean(difference)), "interval": list(interval)}
    return result


def by_budget(found: Mapping[str, Rollout], batch: Batch) -> list[dict[str, Any]]:
    """Accuracy, latency and adherence of every policy in equally many requests from tight to wide budgets."""
    order = batch.budget_ms.argsort()
    result = []
    for part in order.tensor_split(min(BUDGET_BINS, len(order))):
        budgets = batch.budget_ms[part]
        row: dict[str, Any] = {"budget_ms": [float(budgets.min()), float(budgets.max())], "requests": len(part)}
        for name, one in found.items():
            row[name] = {
                "accuracy": float(one.accuracy[part].mean()),
                "latency_ms": float(one.latency_ms[part].mean()),
                "adherence": float(one.in_time[part].double().mean()),
            }
        result.append(row)
    return result


def render(report: Mapping[str, Any]) -> str:
    """Return the policies' and the budgets' tables and the reward's rise, as text."""
    lines = [f"{'policy':<24} {'reward':>8} {'accuracy':>9} {'latency ms':>11} {'in time':>8} {'of budget':>10}"]
    for name, one in report["policies"].items():
        lines.append(
            f"{name:<24} {one['reward']:>8.4f} {one['accuracy']:>9.4f} {one['latency_ms']:>11.2f} "
            f"{one['adherence']:>8.1%} {_percent(one['utilisation']):>10}"
        )
    for name, one in report["gain"].items():
        gained = one["accuracy_in_time"]
        low, high = gained["interval"]
        lines.append(f"right in time less that of {name}: {gained['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    lines += ["", f"{'budget ms':<20} {'policy':>8} {'table':>8} {'oracle':>8} {'in time':>8}   (accuracy)"]
    for row in report["by_budget"]:
        low, high = row["budget_ms"]
        cells = " ".join(f"{row[name]['accuracy']:>8.4f}" for name in ("policy", "table", "oracle"))
        lines.append(f"{f'{low:.1f} to {high:.1f}':<20} {cells} {row['policy']['adherence']:>8.1%}")
    rise = ", ".join(f"{name} {report['reward'][name]:.4f}" for name in ("untrained", "start", "end"))
    return "\n".join([*lines, "", f"validation reward: {rise}"]) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def finish(job: GrpoJob, env: Environment, judged: Mapping[str, Any], schema: str) -> dict[str, Any]:
    """The report: what was judged and what it was made with."""
    return {
        "schema": schema,
        **judged,
        "questions": {name: len(env.table.rows(name)) for name in PARTS},
        "budgets_ms": list(limits_ms(env)),
        "latency": "estimator" if job.latency_estimator_path else "measured",
        "options": {**job.options.record(), "train_split": job.train_split},
        "smoothing": env.smoothing and env.smoothing.record(),
        "knob_space": env.space.fingerprint,
        "stamp": dict(env.table.stamp),
    }


def draw(folder: Path, history: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Writes `training.png`, `knobs.png` and `trade_off.png`; says so and does not without matplotlib.

    Args:
        folder: that exists.
        history: an epoch's record each.
        report: with `by_budget`, `policies` and the stamp.
    """
    if not can_draw():
        return
    panels: tuple[tuple[str, int, Callable[[Any], None]], ...] = (
        ("training", 1100, lambda figure: _training(figure, history)),
        ("knobs", 1100, lambda figure: _knobs(figure, history)),
        ("trade_off", 640, lambda figure: _trade_off(figure, report)),
    )
    for name, width, fill in panels:
        with style():
            figure = new_figure(width, 400)
            fill(figure)
            figure.suptitle(describe(report["stamp"]))
            save_png(figure, folder / f"{name}.png")


def _training(figure: Any, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = [record["epoch"] for record in history]
    reward, entropy, groups = figure.subplots(1, 3)
    reward.plot(epochs, [record["train"]["reward"] for record in history], label="draws, training")
    reward.plot(epochs, [record["val"]["reward"] for record in history], label="best choices, validation")
    reward.set_ylabel("reward")
    entropy.plot(epochs, [record["entropy"] for record in history])
    entropy.set_ylabel("entropy, nats")
    groups.plot(epochs, [record["flat_groups"] for record in history], label="groups without spread")
    groups.plot(epochs, [record["clip_fraction"] for record in history], label="clipped choices")
    groups.plot(epochs, [1 - record["train"]["adherence"] for record in history], label="late draws")
    groups.set_ylabel("share")
    for axes in (reward, groups):
        axes.legend()
    for axes in (reward, entropy, groups):
        axes.set_xlabel("epoch")


def _knobs(figure: Any, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = [record["epoch"] for record in history]
    for axes, knob in zip(figure.subplots(1, len(KNOBS), sharey=True), KNOBS, strict=True):
        values = list(history[0]["val"]["knobs"][knob])
        axes.stackplot(
            epochs, [[r["val"]["knobs"][knob][value] for r in history] for value in values], labels=values
        )
        axes.set_title(knob.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=len(values))


def _trade_off(figure: Any, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    for name in ("policy", "table", "oracle"):
        points = [(row[name]["latency_ms"], row[name]["accuracy"]) for row in report["by_budget"]]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
    axes.set_xscale("log")
    mark_log(axes.xaxis)
    axes.set_xlabel("mean latency of a fifth of the budgets, ms")
    axes.set_ylabel("accuracy")
    axes.legend()
