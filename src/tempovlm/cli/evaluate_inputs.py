"""What the flags of `tempovlm evaluate` name: tables, latencies, a model and rules, read when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.data.registry import check_datasets

if TYPE_CHECKING:
    from tempovlm.api import TempoVLM
    from tempovlm.cli.evaluate import EvaluateArgs
    from tempovlm.lab.judge.inputs import Content, Known, Latencies, Part, Sights
    from tempovlm.lab.judge.offline import Rule
    from tempovlm.latency.estimator import Estimator


def is_path(name: str) -> bool:
    """Whether a policy's name is that of a file."""
    from tempovlm.control.policies import is_tuned

    return not is_tuned(name) and ("/" in name or name.endswith(".pt"))


@dataclass(frozen=True)
class Inputs:
    """What the flags name, read when it is asked for."""

    args: EvaluateArgs

    @cached_property
    def space(self) -> KnobSpace:
        """Settings of the model that was measured."""
        from tempovlm.api import model_folder
        from tempovlm.model.weights import read_config

        return KnobSpace.for_model(read_config(model_folder(self.args.model)).shape)

    @cached_property
    def judged(self) -> Part:
        """Validation questions, those with a twin where twins are given."""
        part = self._part(self.args.results_dir, "val")
        if not self.has_twin:
            return part
        from dataclasses import replace

        from tempovlm.lab.judge.offline import common

        return replace(part, table=common(part.table, self.twin.table)[0])

    @cached_property
    def twin(self) -> Part:
        """The same questions on their twin pictures."""
        return self._part(self.args.twin_results_dir, "val")

    @cached_property
    def train(self) -> Part:
        """Training questions."""
        try:
            return self._part(self.args.train_results_dir or self.args.results_dir, "train")
        except UserError as error:
            if self.args.train_results_dir:
                raise
            raise UserError(
                f"--train_results_dir: needed, as --results_dir has no training questions ({error})"
            ) from None

    def _part(self, dirs: Sequence[Path], split: str) -> Part:
        from tempovlm.lab.judge.inputs import read_part

        return read_part(dirs, self.space, split, check_datasets(self.args.dataset_names, "dataset_names") or None)

    @cached_property
    def estimator(self) -> Estimator | None:
        """The latency estimator, where one is named."""
        if self.args.latency_estimator_path is None:
            return None
        from tempovlm.latency.cores import LEVELS
        from tempovlm.latency.estimator import load_estimator

        if self.args.level not in LEVELS:
            known = ", ".join(map(str, LEVELS))
            raise UserError(f"--level {self.args.level:g}: the estimator predicts {known}; choose one of them")
        return load_estimator(self.args.latency_estimator_path, self.space)

    def latencies(self, part: Part) -> Latencies:
        """Latencies of a part's questions."""
        from tempovlm.lab.judge.inputs import latencies

        return latencies(part, self.train, self.estimator, self.args.level)

    @cached_property
    def content(self) -> Content:
        """Words and pictures of all questions."""
        from tempovlm.lab.judge.inputs import Content

        return Content.read([self.train.table, self.judged.table], self.args.data_dir)

    @cached_property
    def model(self) -> TempoVLM:
        """The model itself, for checkpoints.

        Raises:
            UserError: it cannot be loaded, or the results are of other weights.
        """
        import tempovlm

        model = tempovlm.load(self.args.model, device=self.args.device, policy="fixed", warmup=False)
        if self.weights not in (None, model.weights):
            raise UserError(
                f"--model {self.args.model}: field weights of the results is {self.weights}, this model's is "
                f"{model.weights}: name the model that was measured"
            )
        return model

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Everything that was read, by what it is for."""
        return {"judged": self.judged, "train": self.train} | ({"twin": self.twin} if self.has_twin else {})

    @property
    def has_twin(self) -> bool:
        """Whether results on twin pictures are given."""
        return bool(self.args.twin_results_dir)

    @cached_property
    def _all_weights(self) -> list[str]:
        stamps = [stamp for part in self.parts.values() for stamp in part.table.stamps.values()]
        return sorted({str(stamp["weights"]) for stamp in stamps if stamp is not None})

    @property
    def weights(self) -> str | None:
        """The hash of the weights that the results are of; None where files have no stamp."""
        return next(iter(self._all_weights), None)

    def check(self) -> None:
        """Read the results.

        Raises:
            UserError: they cannot be read, or are of several models.
        """
        found = self._all_weights
        if len(found) > 1:
            raise UserError(
                f"--results_dir: field weights of the stamps differs ({', '.join(found)}); judged, training and "
                "twin results must be of one model"
            )

    def learned(self, name: str) -> Rule:
        """The rule of a checkpoint."""
        from tempovlm.lab.judge.learned import learned_rule

        path = Path(name)
        if not path.is_file():
            raise UserError(f"--policies {name}: no such file; give the path of a controller checkpoint")
        looking_ms = self.judged.looking_ms if self.judged.looking_ms.any() else self.train.looking_ms
        runner, weights = self.model.engine.runner, self.model.weights
        return learned_rule(path, self.space, runner, weights, self.sights, looking_ms, self.args.price_per_ms)

    @cached_property
    def sights(self) -> Sights:
        """Encoded pictures, shared by all checkpoints."""
        from tempovlm.lab.judge.inputs import Sights

        return Sights(self.model.engine.runner, self.content)

    def control_ms(self, rules: Mapping[str, Rule], latency: Latencies) -> dict[str, float]:
        """What each checkpoint's choices take: as told, or measured here."""
        from tempovlm.lab.judge.learned import measure_ms

        named, given_ms = [name for name in rules if is_path(name)], self.args.control_ms
        if given_ms is not None:
            return dict.fromkeys(named, given_ms)
        return {name: measure_ms(rules[name], self.judged.table, latency.decided_ms) for name in named}

    @cached_property
    def known(self) -> Known:
        """What baselines are made from."""
        from tempovlm.lab.judge.inputs import Known
        from tempovlm.lab.judge.offline import oracle_rule

        args = self.args
        return Known(
            train=self.train,
            train_latencies=self.latencies(self.train),
            level=args.level,
            content=lambda: self.content,
            oracle=oracle_rule(self.judged.table),
            seed=args.seed,
            time_price=args.time_price,
            price_per_ms=args.price_per_ms,
        )

    def rules(self) -> dict[str, Rule]:
        """The policies by name, in the order given."""
        return {name: self._rule(name) for name in self.args.policies}

    def _rule(self, name: str) -> Rule:
        from tempovlm.control.policies import is_tuned

        if is_path(name):
            return self.learned(name)
        return self.tuned(name) if is_tuned(name) else self.known.rule(name)

    def tuned(self, name: str) -> Rule:
        """The rule of a table that was measured on your own questions.

        Raises:
            UserError: there is none for the weights that the results are of.
        """
        import numpy as np

        from tempovlm.control.policies import TUNED, named_tuned
        from tempovlm.lab.judge.offline import table_rule

        accuracy = named_tuned(name.removeprefix(TUNED), str(self.weights), self.space).accuracy
        scores = np.array([accuracy[knobs] for knobs in self.space])
        return table_rule(scores, self.args.time_price, self.args.price_per_ms)

    def budgets_ms(self, latency: Latencies) -> tuple[float, ...]:
        """The budgets given, else six from the cheapest to the dearest setting."""
        from tempovlm.cli.bench import read_budgets_ms

        if self.args.budgets:
            return read_budgets_ms(self.args.budgets)
        import numpy as np

        ends = np.sort(latency.decided_ms.mean(axis=0))[[0, -1]]
        return tuple(float(f"{budget:.3g}") for budget in np.geomspace(ends[0] * 1.1, ends[1] * 1.1, 6))
