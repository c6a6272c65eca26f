"""Trains the latency estimator: an MLP with quantile heads on top of a linear roofline.

The network sees standardised features and learns only the factor by which the roofline is wrong, so that between
and beyond the measured settings it falls back to arithmetic. Shapes: `B` batch, `R` repeats, `S` stages, `L`
levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.core.errors import UserError
from tempovlm.lab.exp1_estimator.data import Rows, Split
from tempovlm.lab.fit import lr_factor, seeded, share_of_step
from tempovlm.lab.log import Log
from tempovlm.lab.options import EstimatorOptions
from tempovlm.latency.conformal import margins
from tempovlm.latency.cores import LEVELS, Core, MlpCore, RooflineCore
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import STAGES, CostTable, Floats
from tempovlm.latency.recalibration import total_margins

_FIRST_SPREAD = -4.0
"""softplus(-4) = 0.018: a level starts 2 % above the one before."""


class _Net(nn.Module):
    """From features (B, F) to logarithms (B, S, L), ascending over the levels, given the roofline's (B, S)."""

    def __init__(self, width: int, options: EstimatorOptions) -> None:
        super().__init__()
        sizes = [width, *[options.hidden_dim] * options.num_layers, len(STAGES) * len(LEVELS)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.view(len(STAGES), len(LEVELS)).fill_(_FIRST_SPREAD)[:, 0] = 0.0

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        out = self.layers[-1](x).view(-1, len(STAGES), len(LEVELS))
        steps = torch.cat((out[..., :1] + base[..., None], F.softplus(out[..., 1:])), dim=-1)
        return steps.cumsum(dim=-1)


@dataclass(frozen=True, slots=True)
class _Data:
    """Tensors of rows: standardised features (n, F), the roofline's logarithms (n, S), the repeats' (n, R, S)."""

    x: Tensor
    base: Tensor
    y: Tensor

    @classmethod
    def of(cls, rows: Rows, table: CostTable, core: MlpCore, device: torch.device) -> _Data:
        x = (table.features(rows.workload) - core.centre) / core.spread
        base = core.roofline.log_ms(table, rows.workload)[..., 0]
        arrays = (x, base, np.log(rows.repeats))
        return cls(*(torch.as_tensor(array, dtype=torch.float32, device=device) for array in arrays))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model fitted to all training rows and calibrated by models that had not seen a row's picture.

    Attributes:
        left_out: (n, S, L) logarithms for the training rows before the margins, each by the model of its fold.
    """

    estimator: Estimator
    left_out: Floats

    @classmethod
    def of(
        cls, table: CostTable, split: Split, core: Core, parts: Sequence[Core], stamp: Mapping[str, Any]
    ) -> Candidate:
        """Calibrate the core of all training rows by those of the folds."""
        rows, left_out = split.train, np.full((len(split.train), len(STAGES), len(LEVELS)), np.nan)
        for fold, part in zip(split.folds, parts, strict=True):
            left_out[fold.judged] = part.log_ms(table, rows.workload.take(fold.judged))
        return cls(calibrated(table, core, rows, stamp, left_out), left_out)


def cross_fit(table: CostTable, split: Split, fit: Callable[[Rows], Core], stamp: Mapping[str, Any]) -> Candidate:
    """Fit to the rows of all training pictures, and once more without each fold."""
    parts = [fit(split.train.take(fold.fitted)) for fold in split.folds]
    return Candidate.of(table, split, fit(split.train), parts, stamp)


class _Trainer:
    """One network, its rows and its optimizer."""

    def __init__(self, table: CostTable, rows: Rows, options: EstimatorOptions) -> None:
        self.options, self.device = options, torch.device(options.device)
        features = table.features(rows.workload)
        spread = np.maximum(features.std(axis=0), 1e-6)
        self.empty = MlpCore(RooflineCore.fit(table, rows.workload, rows.ms), features.mean(axis=0), spread, ())
        self.data = _Data.of(rows, table, self.empty, self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.net = seeded(options.seed, lambda: _Net(features.shape[1], options)).to(self.device)
        self.loss_of = _loss(options, self.data)
        self.batches = math.ceil(len(self.data.x) / options.batch_size)
        steps = options.num_epochs * math.ceil(self.batches / options.grad_accum)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(options.lr_schedule, step / steps)
        )

    def epoch(self) -> float:
        """Pass once over the rows in a new order; return the mean loss."""
        data, options, trained = self.data, self.options, 0.0
        order = torch.randperm(len(data.x), generator=self.generator).to(self.device)
        for i, rows in enumerate(order.split(options.batch_size)):
            loss = self.loss_of(self.net(data.x[rows], data.base[rows]), data.y[rows])
            (loss * share_of_step(i, len(order), options.batch_size, options.grad_accum)).backward()
            trained += loss.item() * len(rows) / len(order)
            if (i + 1) % options.grad_accum == 0 or i + 1 == self.batches:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
        return trained

    def judge(self, other: _Data) -> tuple[float, Floats]:
        """Return the loss on other rows, and their predicted medians (n, S) in milliseconds."""
        with torch.no_grad():
            predicted = self.net(other.x, other.base)
            return self.loss_of(predicted, other.y).item(), predicted[..., 0].double().exp().cpu().numpy()


def train_mlp(
    table: CostTable, split: Split, options: EstimatorOptions, log: Log, stamp: Mapping[str, Any]
) -> Candidate:
    """Train the network of all training pictures, and one for each fold, together.

    All are those of the epoch with the least mean loss on the pictures that each fold leaves out; `log` gets a
    record of every epoch.

    Raises:
        UserError: the training diverges.
    """
    options.check()
    rows, folds = split.train, split.folds
    whole = _Trainer(table, rows, options)
    parts = [_Trainer(table, rows.take(fold.fitted), options) for fold in folds]
    others = [
        _Data.of(rows.take(fold.judged), table, part.empty, part.device)
        for fold, part in zip(folds, parts, strict=True)
    ]
    cores: list[MlpCore] = []
    least, medians = math.inf, np.full(rows.ms.shape, np.nan)
    for epoch in range(1, options.num_epochs + 1):
        trained, value = whole.epoch(), 0.0
        for fold, part, other in zip(folds, parts, others, strict=True):
            part.epoch()
            loss, medians[fold.judged] = part.judge(other)
            value += loss * len(other.x) / len(rows)
        if not math.isfinite(trained + value):
            raise UserError(f"--lr {options.lr}: the training diverged in epoch {epoch}; give a smaller one")
        if value < least or not cores:
            cores, least = [_as_core(one.empty, one.net) for one in (whole, *parts)], value
        rate = whole.schedule.get_last_lr()[0]
        record = {"epoch": epoch, "train_loss": trained, "val_loss": value, "lr": rate}
        log(record | {"stages": stage_metrics(rows.ms, medians)})
    return Candidate.of(table, split, cores[0], cores[1:], stamp)


def _loss(options: EstimatorOptions, data: _Data) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of predictions (B, S, L) for logarithms of times (B, R, S); NaN is ignored."""
    levels = torch.tensor(LEVELS, device=data.y.device)
    known = ~torch.isnan(data.y)
    times = torch.where(known, data.y, torch.zeros_like(data.y)).exp()
    # Each stage in units of its own mean, or the slowest one would be the only one.
    scale = (times * known).sum(dim=(0, 1)) / known.sum(dim=(0, 1)).clamp(min=1)
    scale = scale.clamp(min=1e-6)[None, None, :, None]

    def loss(predicted: Tensor, logs: Tensor) -> Tensor:
        mask = ~torch.isnan(logs)[..., None]
        target, guess = torch.nan_to_num(logs)[..., None], predicted[:, None]
        if options.loss == "mse":
            target, guess = target.exp() / scale, guess.exp() / scale
        error = target - guess
        value = torch.maximum(levels * error, (levels - 1) * error)
        if options.loss == "mse":
            value = torch.cat((error[..., :1] ** 2, value[..., 1:]), dim=-1)
        return (value * mask).sum() / mask.sum().clamp(min=1)

    return loss


def _as_core(empty: MlpCore, net: _Net) -> MlpCore:
    layers = []
    for layer in net.layers:
        assert isinstance(layer, nn.Linear)
        weight, bias = (p.detach().cpu().numpy().astype(np.float32).copy() for p in (layer.weight, layer.bias))
        layers.append((np.ascontiguousarray(weight.T), bias))
    return MlpCore(empty.roofline, empty.centre, empty.spread, tuple(layers))


def stage_metrics(observed: Floats, predicted: Floats) -> dict[str, dict[str, float | int | None]]:
    """Compute `error_metrics` of each stage from medians (n, S) in milliseconds; NaN does not count."""
    known = np.isfinite(observed)
    return {
        stage: error_metrics(observed[known[:, i], i], predicted[known[:, i], i]) for i, stage in enumerate(STAGES)
    }


def error_metrics(observed: Floats, predicted: Floats) -> dict[str, float | int | None]:
    """Compute absolute errors, R² and relative errors of predictions (n,) in milliseconds; None without rows."""
    names = ("mae_ms", "rmse_ms", "r2", "median_ape", "p95_ape")
    if not len(observed):
        return {"count": 0, **dict.fromkeys(names)}
    error = predicted - observed
    spread = float(((observed - observed.mean()) ** 2).sum())
    relative = np.abs(error) / observed
    values = (
        float(np.abs(error).mean()),
        float(np.sqrt((error**2).mean())),
        1 - float((error**2).sum()) / spread if spread > 0 else None,
        float(np.median(relative)),
        float(np.quantile(relative, 0.95)),
    )
    return {"count": len(observed), **dict(zip(names, values, strict=True))}


def calibrated(
    table: CostTable, core: Core, rows: Rows, stamp: Mapping[str, Any], left_out: Floats | None = None
) -> Estimator:
    """Calibrate a core so that its quantiles, of stages and of totals, hold on single measurements.

    Args:
        table: costs of the measured model.
        core: the model to calibrate.
        rows: measured; the core must not have seen them unless `left_out` is given.
        left_out: (n, S, L) predictions by cores that were fitted without the row's picture (cross-conformal
            prediction: Vovk 2015; its relation to the jackknife+ in Barber et al. 2021, arXiv 1905.02928). Pooling
            the errors of all pictures is valid for a measurement of a new picture as the number of pictures grows
            (Dunn, Wasserman and Ramdas 2018, arXiv 1809.07441); with few pictures it is a rough estimate.
        stamp: of the measurements.
    """
    raw, single, places = Estimator(table, core, stamp=stamp), rows.single, rows.places
    logs = raw.raw_log_ms(single.workload) if left_out is None else left_out[places]
    honest = replace(raw, margins=margins(single.log_ms, logs, LEVELS))
    return replace(honest, total_margins=total_margins(honest.times(logs, single.workload), single))
