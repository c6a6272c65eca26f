"""Expected accuracies of all settings, learned from answers, and how well they are calibrated.

Shapes: `N` questions, `K` settings, `T` tiers, `L` and `V` widths of the language and of the vision feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.control.learned.networks import AccuracyNetwork, SeenAccuracyNetwork
from tempovlm.lab.drawing import new_figure, style, to_svg
from tempovlm.lab.fit import SCORE, fit, seeded
from tempovlm.lab.options import FitOptions
from tempovlm.lab.statistics import Resamples, percentile_interval
from tempovlm.lab.table import Floats, Table

BINS = 10
"""Equally wide ranges of the predicted accuracy."""


VALUE_OPTIONS = FitOptions(lr=2e-3, weight_decay=0.1, batch_size=64)
"""Options of the regression; chosen on its validation questions."""


class AccuracyObjective:
    """Whether the answers at all settings are right, question by question."""

    def __init__(self, net: nn.Module, table: Table, *features: Tensor) -> None:
        self.net, self.features = net, features
        self.accuracy = torch.tensor(table.accuracy, dtype=torch.float32)
        self.train, self.held_out = (torch.as_tensor(table.rows(part)) for part in ("train", "validation"))

    def draw(self, rng: np.random.Generator) -> Sequence[Tensor]:
        """Return the questions of training, shuffled."""
        return self._of(self.train[torch.from_numpy(rng.permutation(len(self.train)))])

    def _of(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (*(feature[rows] for feature in self.features), self.accuracy[rows])

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the mean cross-entropy, which is least where predictions are the chances."""
        *features, accuracy = batch
        return F.binary_cross_entropy_with_logits(self.net(*features), accuracy)

    def validate(self) -> Mapping[str, float]:
        """Return the cross-entropy on the validation questions."""
        loss = self.loss(*self._of(self.held_out)).item()
        return {"val_loss": loss, SCORE: -loss}


def train_values(table: Table, language: Tensor, options: FitOptions, folder: Path) -> AccuracyNetwork:
    """Fit a network to a table's part `train`; its part `validation` says which epoch is best.

    Networks of one table standardise alike, whatever its parts, so that they make an ensemble.

    Args:
        table: answers of questions that have parts.
        language: (N, L) their features.
        options: of the loop.
        folder: for the log and the state, held by the caller.
    """
    sizes = (language.shape[1], options.hidden_dim, len(table.space))
    net = seeded(options.seed, lambda: AccuracyNetwork(*sizes))
    objective = AccuracyObjective(net, table, language)
    net.fit_inputs(language, objective.accuracy[objective.train])
    _fit(net, objective, table, options, folder)
    net.fit_usual(language[torch.as_tensor(table.rows("train"))])
    return net


def train_seen_values(
    table: Table, language: Tensor, vision: Tensor, options: FitOptions, folder: Path
) -> SeenAccuracyNetwork:
    """Fit the networks that see the picture (N, T, V) at each tier, as `train_values` does."""
    widths = (language.shape[1], vision.shape[2], options.hidden_dim)
    net = seeded(options.seed, lambda: SeenAccuracyNetwork(*widths, **table.space.counts))
    objective = AccuracyObjective(net, table, language, vision)
    net.fit_inputs(language, vision, objective.accuracy[objective.train])
    _fit(net, objective, table, options, folder)
    return net


def _fit(net: nn.Module, objective: AccuracyObjective, table: Table, options: FitOptions, folder: Path) -> None:
    about = {"questions": table.question_id.tolist(), "part": table.part.tolist(), "sum": table.accuracy.sum()}
    fit(net, objective, options, folder, about)


@torch.no_grad()
def predicted(net: AccuracyNetwork, language: Tensor) -> Floats:
    """Return expected accuracies (N, K)."""
    return net(language).double().sigmoid().numpy()


def reliability(expected: Floats, table: Table) -> dict[str, Any]:
    """Compare expected accuracies (N, K) with those of a table's questions.

    Returns:
        `error`, the expected calibration error, with its interval; `brier`, the mean squared error; and `bins`:
        the ends of each, the share of pairs of question and setting in it, what was expected and what was right
        of them, and the interval of this by picture. Source: C. Guo et al., On calibration of modern neural
        networks, ICML 2017, arXiv 1706.04599.
    """
    place = np.minimum((expected * BINS).astype(np.int64), BINS - 1)
    used = np.unique(place)
    masks = [place == one for one in used]
    columns = [(mask * values).sum(axis=1) for values in (1.0, expected, table.accuracy) for mask in masks]
    sums = Resamples(table.image_id.tolist()).means(np.stack(columns, axis=1))
    count, wanted, right = np.split(sums, 3, axis=1)
    error = np.abs(wanted - right).sum(axis=1) / count.sum(axis=1)
    shares = right / np.where(count > 0, count, np.nan)
    ends = percentile_interval(shares[1:])
    bins = [
        {
            "from": float(one / BINS),
            "to": float((one + 1) / BINS),
            "share": float(count[0, i] / count[0].sum()),
            "expected": float(wanted[0, i] / count[0, i]),
            "right": float(shares[0, i]),
            "interval": [float(end[i]) for end in ends],
        }
        for i, one in enumerate(used)
    ]
    return {
        "error": float(error[0]),
        "interval": [float(end) for end in percentile_interval(error[1:])],
        "brier": float(((expected - table.accuracy) ** 2).mean()),
        "bins": bins,
    }


@style()
def draw_reliability(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw what was right against what was expected, for policies by name, as SVG."""
    figure = new_figure(520, 440)
    axes = figure.add_subplot()
    axes.plot((0, 100), (0, 100), color="0.6", lw=1, ls="--", label="calibrated")
    for i, (name, one) in enumerate(found.items()):
        rows = one["bins"]
        x, y = ([100 * row[key] for row in rows] for key in ("expected", "right"))
        axes.plot(x, y, color=f"C{i}", marker="o", label=f"{name}: off by {100 * one['error']:.1f} points")
        for at, row in zip(x, rows, strict=True):
            axes.plot((at, at), [100 * end for end in row["interval"]], color=f"C{i}", lw=1)
    axes.set_xlabel("expected accuracy, %")
    axes.set_ylabel("right, %")
    axes.legend(loc="lower right")
    return to_svg(figure, "Right answers against expected accuracy, questions that no policy learned from")
