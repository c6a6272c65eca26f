"""The loop of controllers that learn from labels: epochs, a state to resume from, a log, the best by validation.

Every epoch has random numbers of its own, made from seed and epoch, so a training that was interrupted ends as if
it had not been. Knows no controller: a `Lesson` draws rows, says what is wrong and judges.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.control.checkpoint import read_tensors, write_tensors
from tempovlm.control.networks import HIDDEN_DIM
from tempovlm.core.errors import UserError
from tempovlm.core.progress import progress_bar
from tempovlm.lab.log import training_log

LAST = "last.pt"
SCHEDULES = ("cosine", "constant")

SCORE = "val_score"
"""The metric that the best epoch has most of."""

_SCHEMA = "tempovlm.controller_training/1"
_MAX_GRAD_NORM = 1.0

_log = logging.getLogger("tempovlm")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How to train; the first three are the seed document's.

    Attributes:
        grad_accum: batches whose gradients make one step.
        lr_schedule: `cosine` ends at zero.
    """

    batch_size: int = 64
    num_epochs: int = 50
    lr: float = 1e-4
    hidden_dim: int = HIDDEN_DIM
    weight_decay: float = 1e-2
    grad_accum: int = 1
    lr_schedule: str = "cosine"
    seed: int = 42
    device: str = "cpu"

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        for name in ("batch_size", "num_epochs", "hidden_dim", "grad_accum"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr {self.lr}: must be a positive number")
        if self.lr_schedule not in SCHEDULES:
            raise UserError(f"--lr_schedule {self.lr_schedule}: choose from {', '.join(SCHEDULES)}")

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at a step of so many."""
        if self.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


class Lesson(Protocol):
    """What is learned."""

    def draw(self, rng: np.random.Generator) -> Sequence[Tensor]:
        """An epoch's rows on the training device, in random order: tensors of one length, the same every epoch."""

    def loss(self, *batch: Tensor) -> Tensor:
        """Of some of those rows."""

    def judge(self) -> Mapping[str, float]:
        """Metrics on the validation part; `SCORE` among them."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What the training found: the best epoch, and a record of each."""

    best_epoch: int
    history: Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class _State:
    """Everything that the next epoch depends on."""

    epoch: int
    best_epoch: int
    best: dict[str, Tensor]
    history: list[dict[str, Any]]


def fit(net: nn.Module, lesson: Lesson, options: FitOptions, folder: Path, data: Mapping[str, Any]) -> Fitted:
    """Train, and leave the network with the best epoch's weights, in evaluation mode.

    Args:
        net: on the training device.
        lesson: what to learn.
        options: how.
        folder: for the log and the state, held by the caller; a state of the same options and data is taken up.
        data: plain values that identify the data.

    Raises:
        UserError: the folder cannot be written, or the training diverges.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    key = _key(net, options, data)
    state = _resumed(folder / LAST, key, net, optimizer)
    with training_log(folder, state.history) as log, progress_bar("training") as advance, _one_thread():
        for epoch in range(state.epoch + 1, options.num_epochs + 1):
            trained, lr = _epoch(net, lesson, optimizer, options, epoch)
            if not math.isfinite(trained):
                raise UserError(f"--lr {options.lr}: the training diverged in epoch {epoch}; give a smaller one")
            net.eval()
            with torch.no_grad():
                judged = lesson.judge()
            record = {"epoch": epoch, "train_loss": trained, "lr": lr, **judged}
            most = max((past[SCORE] for past in state.history), default=-math.inf)
            if judged[SCORE] > most:
                state.best, state.best_epoch = copy.deepcopy(net.state_dict()), epoch
            state.epoch = epoch
            state.history.append(record)
            log(record)
            _save(folder / LAST, key, state, net, optimizer)
            advance(epoch, options.num_epochs)
    net.load_state_dict(state.best)
    net.eval()
    return Fitted(state.best_epoch, tuple(state.history))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for networks this small, which end sooner than a second one wakes up; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _epoch(
    net: nn.Module, lesson: Lesson, optimizer: torch.optim.Optimizer, options: FitOptions, epoch: int
) -> tuple[float, float]:
    """Mean loss, and the learning rate of the last step."""
    net.train()
    rows = lesson.draw(np.random.default_rng([options.seed, epoch]))
    count = len(rows[0])
    batches = math.ceil(count / options.batch_size)
    steps = math.ceil(batches / options.grad_accum)
    total, lr = torch.zeros((), device=rows[0].device), options.lr
    with torch.random.fork_rng():
        torch.manual_seed(options.seed * 100_003 + epoch)
        for i in range(batches):
            batch = [column[i * options.batch_size : (i + 1) * options.batch_size] for column in rows]
            loss = lesson.loss(*batch)
            (loss * share_of_step(i, count, options.batch_size, options.grad_accum)).backward()
            total += loss.detach() * len(batch[0]) / count
            if (i + 1) % options.grad_accum == 0 or i + 1 == batches:
                done = (epoch - 1) * steps + i // options.grad_accum
                lr = options.lr * options.factor(done, steps * options.num_epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                nn.utils.clip_grad_norm_(net.parameters(), _MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
    return total.item(), lr


def share_of_step(batch: int, rows: int, batch_size: int, grad_accum: int) -> float:
    """Share of a batch in the mean over its step's rows; the last step of an epoch may have fewer than others.

    Args:
        batch: index within the epoch.
        rows: of the epoch.
        batch_size: rows of every batch but the last.
        grad_accum: batches of every step but the last.
    """
    first = batch // grad_accum * grad_accum
    own = min(batch_size, rows - batch * batch_size)
    return own / min(grad_accum * batch_size, rows - first * batch_size)


def _key(net: nn.Module, options: FitOptions, data: Mapping[str, Any]) -> str:
    """Changes with the network's form, the options and the data; not with the device."""
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    about = [type(net).__name__, shapes, {**asdict(options), "device": None}, dict(data)]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


def _resumed(path: Path, key: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    """The state of a training of the same key, which network and optimizer are set to; else the beginning."""
    fresh = _State(0, 0, copy.deepcopy(net.state_dict()), [])
    if not path.is_file():
        return fresh
    try:
        record = read_tensors(path, "state of a training")
    except UserError as error:
        _log.warning("%s; starting anew", error)
        return fresh
    if record.get("schema") != _SCHEMA or record.get("key") != key:
        _log.warning("%s: of other options or other data; starting anew", path)
        return fresh
    net.load_state_dict(record["net"])
    optimizer.load_state_dict(record["optimizer"])
    return _State(record["epoch"], record["best_epoch"], record["best"], record["history"])


def _save(path: Path, key: str, state: _State, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parts = {"epoch": state.epoch, "best_epoch": state.best_epoch, "best": state.best, "history": state.history}
    own = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    write_tensors(path, {"schema": _SCHEMA, "key": key, **parts, **own})
