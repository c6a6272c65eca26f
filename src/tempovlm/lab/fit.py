"""The loop of all trainings of controllers: epochs, a state to resume from, a log, the best epoch by validation.

Every epoch has its own random numbers, made from seed and epoch, so an interrupted and resumed training ends as if
it had never stopped. `Training` is the loop; `fit` trains on labels with it, `lab/grpo/algorithm.py` by rewards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.control.checkpoint import read_tensors, write_tensors
from tempovlm.core.errors import UserError
from tempovlm.core.progress import progress_bar
from tempovlm.lab.log import training_log
from tempovlm.lab.options import FitOptions, LoopOptions

Net = TypeVar("Net", bound=nn.Module)

LAST = "last.pt"

SCORE = "val_score"
"""The metric that decides the best epoch."""

_SCHEMA = "tempovlm.controller_training/1"
_MAX_GRAD_NORM = 1.0

_log = logging.getLogger("tempovlm")


class Training(ABC):
    """A training in progress: a network, its optimizer, the records of all epochs and the weights of the best.

    A subclass trains an epoch and says what its state file holds.
    """

    def __init__(self, net: nn.Module, options: LoopOptions, weight_decay: float = 1e-2) -> None:
        """Begin with `net`, which is on the training device; frozen parameters stay as they are."""
        self.net, self.loop = net, options
        learned = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=weight_decay)
        self.epoch, self.best_epoch, self.best_score = 0, 0, -math.inf
        self.best = _weights(net)
        self.history: list[dict[str, Any]] = []

    @abstractmethod
    def train_epoch(self) -> dict[str, Any]:
        """Train and validate epoch `self.epoch`, keep its weights if they are the best; return its record."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on."""

    def lr(self, share: float) -> float:
        """Return the learning rate after a share of all steps."""
        return self.loop.lr * lr_factor(self.loop.lr_schedule, share)

    def step(self, share: float) -> float:
        """Take a step along the gradients, after a share of all steps; return its learning rate."""
        lr = self.lr(share)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        nn.utils.clip_grad_norm_(self.net.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return lr

    def keep(self, score: float) -> None:
        """Take the present weights as the best."""
        self.best_epoch, self.best_score, self.best = self.epoch, score, _weights(self.net)

    def run(self, path: Path, title: str) -> None:
        """Train the epochs that are missing, log each, save the state to `path`, and end with the best weights.

        Raises:
            UserError: the folder of `path` cannot be written, or the training diverges. The caller holds the
                folder (`core.files.writing_to`).
        """
        with training_log(path.parent, self.history) as log, progress_bar(title) as advance:
            for epoch in range(self.epoch + 1, self.loop.num_epochs + 1):
                self.epoch = epoch
                record = self.train_epoch()
                self.history.append(record)
                log(record)
                write_tensors(path, self.state())
                advance(epoch, self.loop.num_epochs)
        self.net.load_state_dict(self.best)
        self.net.eval()


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}


class Objective(Protocol):
    """A task with labels."""

    def draw(self, rng: np.random.Generator) -> Sequence[Tensor]:
        """An epoch's rows on the training device, in random order: tensors of one length, the same every epoch."""

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean loss of some of those rows."""

    def validate(self) -> Mapping[str, float]:
        """Metrics on the validation part; `SCORE` among them."""


def seeded(seed: int, make: Callable[[], Net]) -> Net:
    """Make a network whose weights a seed gives, and leave the random numbers of others as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def fit(net: nn.Module, task: Objective, options: FitOptions, folder: Path, data: Mapping[str, Any]) -> Training:
    """Train on labels, and leave the network with the best epoch's weights, in evaluation mode.

    Args:
        net: on the training device.
        task: rows, loss and validation.
        options: of the loop.
        folder: for the log and the state, held by the caller; a state of the same options and data is taken up.
        data: plain values that identify the data.

    Raises:
        UserError: the folder cannot be written, or the training diverges.
    """
    training = _LabelTraining(net, task, options, data)
    training.resume(folder / LAST)
    with _one_thread():
        training.run(folder / LAST, "training")
    return training


class _LabelTraining(Training):
    def __init__(self, net: nn.Module, task: Objective, options: FitOptions, data: Mapping[str, Any]) -> None:
        super().__init__(net, options, options.weight_decay)
        self.task, self.options = task, options
        shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
        about = [type(net).__name__, shapes, {**asdict(options), "device": None}, dict(data)]
        self.key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()

    def train_epoch(self) -> dict[str, Any]:
        trained, lr = self._batches(self.task.draw(np.random.default_rng([self.options.seed, self.epoch])))
        if not math.isfinite(trained):
            raise UserError(
                f"--lr {self.options.lr}: the training diverged in epoch {self.epoch}; give a smaller one"
            )
        self.net.eval()
        with torch.no_grad():
            found = self.task.validate()
        if found[SCORE] > self.best_score:
            self.keep(found[SCORE])
        return {"epoch": self.epoch, "train_loss": trained, "lr": lr, **found}

    def _batches(self, rows: Sequence[Tensor]) -> tuple[float, float]:
        """Mean loss, and the learning rate of the last step."""
        options, count = self.options, len(rows[0])
        batches = math.ceil(count / options.batch_size)
        steps = math.ceil(batches / options.grad_accum)
        total, lr = torch.zeros((), device=rows[0].device), options.lr
        self.net.train()
        with torch.random.fork_rng():
            torch.manual_seed(options.seed * 100_003 + self.epoch)
            for i in range(batches):
                batch = [column[i * options.batch_size : (i + 1) * options.batch_size] for column in rows]
                loss = self.task.loss(*batch)
                (loss * share_of_step(i, count, options.batch_size, options.grad_accum)).backward()
                total += loss.detach() * len(batch[0]) / count
                if (i + 1) % options.grad_accum == 0 or i + 1 == batches:
                    done = (self.epoch - 1) * steps + i // options.grad_accum
                    lr = self.step(done / (steps * options.num_epochs))
        return total.item(), lr

    def state(self) -> dict[str, Any]:
        parts = {"epoch": self.epoch, "best_epoch": self.best_epoch, "best": self.best, "history": self.history}
        own = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"schema": _SCHEMA, "key": self.key, **parts, **own}

    def resume(self, path: Path) -> None:
        """Go on from a state file of the same key; else begin anew."""
        if not path.is_file():
            return
        try:
            record = read_tensors(path, "state of a training")
        except UserError as error:
            _log.warning("%s; starting anew", error)
            return
        if record.get("schema") != _SCHEMA or record.get("key") != self.key:
            _log.warning("%s: of other options or other data; starting anew", path)
            return
        self.net.load_state_dict(record["net"])
        self.optimizer.load_state_dict(record["optimizer"])
        self.epoch, self.best_epoch, self.best = record["epoch"], record["best_epoch"], record["best"]
        self.history = record["history"]
        self.best_score = max((past[SCORE] for past in self.history), default=-math.inf)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for networks this small, which end sooner than a second one wakes up; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lr_factor(lr_schedule: str, share: float) -> float:
    """Return the multiple of the learning rate at the start that holds after a share of all steps."""
    return 1.0 if lr_schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


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
