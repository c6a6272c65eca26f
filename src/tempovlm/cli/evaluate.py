"""`tempovlm evaluate`: judge policies on recorded answers and write a short report.

Rules, statistics and drawings are in `tempovlm.lab.judge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tempovlm.cli import console
from tempovlm.cli.knobs import ALL, Knobs
from tempovlm.core.checks import wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.request import check_price_per_ms
from tempovlm.lab.paper.export import Format, check_formats

if TYPE_CHECKING:
    import pandas as pd
    import rich.table

    from tempovlm.api import TempoVLM
    from tempovlm.control.policy import Sight
    from tempovlm.core.plan import Ranking
    from tempovlm.lab.judge.inputs import Content, Known, Sights
    from tempovlm.lab.judge.offline import Rule
    from tempovlm.lab.judge.trial import Outcome, Trial
    from tempovlm.lab.table import Table
    from tempovlm.latency.estimator import Estimator

_DESCRIPTION = """\
Judge policies on results of the core experiment: what each would have chosen, answered and taken.

Compares accuracy at the mean latency that a policy really took with the best random mixture of static settings,
also with p-values corrected over the budgets, by data set and with settings that keep the budget alone, and with
a rule that picks by twin pictures. Writes judge.json, judge.parquet, judge.html, frontier.svg and gain.svg to the
output directory. The headline is about the policy that gains most, or about --subject. The examples run on the
results of the repository. Policies that may look at the question or the picture need --data_dir; `tempovlm data
make` draws the pictures of these results."""

_SHIPPED = """\
tempovlm evaluate --results_dir results/core_exp_pocket_val --train_results_dir results/core_exp_pocket_train \\
      --latency_estimator_path checkpoints/latency_estimator/best_latency_estimator.pt \\
      """

_EXAMPLES = (
    f"{_SHIPPED}--policies table best_static random --output_dir runs/judged --export csv latex pdf",
    "tempovlm data make --output_dir runs/data",
    f"{_SHIPPED}--policies my_policy.py:FewBlocks table --tiers low medium \\\n"
    "      --data_dir runs/data --output_dir runs/judged",
    f"{_SHIPPED}--policies checkpoints/controller/queue/best_value.pt table knn --time_price 0.3 \\\n"
    "      --budgets 60 100 150 200 300 --data_dir runs/data --output_dir runs/judged",
)

BASELINE_DEFAULTS = (
    "table",
    "best_static",
    "only_tier",
    "only_top_k",
    "only_num_blocks",
    "random",
    "knn",
    "linucb",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Flags of `tempovlm evaluate`.

    Attributes:
        results_dir: Results directories of the judged questions (split val).
        train_results_dir: Results directories of the training questions. Default: split train of --results_dir.
        twin_results_dir: Results on the twin pictures of the judged questions, for the twin pick.
        knobs: Settings to judge on. Default: those that the results have. A ranking must be the one that they ran
            by.
        policies: Baselines (table, fixed, best_static, only_tier, only_top_k, only_num_blocks, random, knn,
            linucb, oracle), table:NAME (as tempovlm tune measured on your questions NAME), paths of controller
            checkpoints, and module:Class or file.py:Class of your own.
        subject: Policy that the headline is about, one of --policies. Default: the one that gains most.
        budgets: Budgets in milliseconds. Default: six, evenly in log from the cheapest to the most expensive
            setting.
        dataset_names: Data sets, or files of your own questions, to judge on. Default: all in the results.
        latency_estimator_path: Checkpoint of a latency estimator. Without it, each setting's measured times are
            used for all questions.
        level: How cautious policies are: with 0.9 a setting must fit in 90 % of cases. 0.5, 0.9 or 0.99 with an
            estimator.
        time_price: Penalty for using the whole budget, as a share of accuracy (0.3 = 30 points), for policies that
            predict accuracy: table, only_*, knn, linucb and their checkpoints. Checkpoints of GRPO have the price
            that they were trained with.
        price_per_ms: Expected accuracy (as a share of 1) that a millisecond must gain, for the same policies.
        save_policies: Folder for the policies that are fitted here (knn.pt, linucb.pt), for use with --policy.
        model: Model that was measured: pocket, a folder or a hub id. Its weights are loaded only for checkpoints.
        device: Device that computes a checkpoint's features: auto, cpu, cuda or cuda:N.
        data_dir: Folder of the data set behind the results, for policies that read question or picture.
        control_ms: Time a checkpoint needs to decide, in ms. Default: measured on this machine. Set it if the
            latencies come from another one.
        shuffles: Number of permutations in the shuffled control; 0 leaves it out.
        under_load: Files of experiments/serving/simulate.py, for the page's chapter on requests that share a lane.
        ablate: Policies to run again with one, two and three knobs. Default: the subject and the table.
        draws: Number of bootstrap resamples.
        seed: Seed of resampling, the random policy and the bandit.
        output_dir: Folder for the report.
        export: Files for papers, beside the report: csv (tidy tables), latex (tabulars of the package booktabs),
            pdf (the figures at a column's width). One or several.
        json: Print one line with the report object on stdout; everything else goes to stderr.
    """

    results_dir: tuple[Path, ...]
    train_results_dir: tuple[Path, ...] = ()
    twin_results_dir: tuple[Path, ...] = ()
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY [POLICY ...]")] = BASELINE_DEFAULTS
    subject: Annotated[str | None, tyro.conf.arg(metavar="POLICY")] = None
    knobs: Knobs = ALL
    budgets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MS [MS ...]")] = ()
    dataset_names: tuple[str, ...] = ()
    latency_estimator_path: Path | None = None
    level: float = 0.9
    time_price: float = 0.0
    price_per_ms: float = 0.0
    save_policies: Path | None = None
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    device: str = "auto"
    data_dir: Path | None = None
    control_ms: float | None = None
    shuffles: int = 3
    under_load: tuple[Path, ...] = ()
    ablate: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="POLICY [POLICY ...]")] = None
    draws: int = 2000
    seed: int = 0
    output_dir: Path = Path("results/evaluate")
    export: Annotated[tuple[Format, ...], tyro.conf.arg(metavar="{csv,latex,pdf} ...")] = ()
    json: tyro.conf.FlagCreatePairsOff[bool] = False

    def check(self) -> None:
        """Raise a `UserError` that names the first flag with an invalid value."""
        if not self.policies:
            raise UserError("--policies: give at least one")
        for name, value, least in (
            ("shuffles", self.shuffles, 0),
            ("draws", self.draws, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"--{name} {value}: must be at least {least}")
        if not 0 <= self.time_price < math.inf:
            raise UserError(f"--time_price {self.time_price}: must be zero or a positive number")
        check_price_per_ms(self.price_per_ms)
        check_formats(self.export)
        if not 0 < self.level < 1:
            raise UserError(f"--level {self.level}: must lie between 0 and 1")
        if self.control_ms is not None and not 0 <= self.control_ms < math.inf:
            raise UserError(f"--control_ms {self.control_ms}: must be zero or a positive number of milliseconds")
        if self.subject is not None and self.subject not in self.policies:
            raise UserError(f"--subject {self.subject}: is not among --policies")
        for name in self.ablate or ():
            if name not in self.policies:
                raise UserError(f"--ablate {name}: is not among --policies")


def is_path(name: str) -> bool:
    """Whether a policy's name is that of a file or of a class of the user's."""
    from tempovlm.control.own_policy import is_own_policy
    from tempovlm.control.policies import is_tuned

    return not is_tuned(name) and ("/" in name or name.endswith(".pt") or is_own_policy(name))


@dataclass(frozen=True)
class Inputs:
    """The files that the flags name, read on first use."""

    args: EvaluateArgs
    frames: dict[tuple[Path, ...], pd.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def whole(self) -> KnobSpace:
        """All settings of the model that was measured."""
        from tempovlm.api import model_folder
        from tempovlm.model.weights import read_config

        return KnobSpace.for_model(read_config(model_folder(self.args.model)).shape)

    @cached_property
    def space(self) -> KnobSpace:
        """Settings to judge on: of each knob the values of its flag, else those that all results have.

        Raises:
            UserError: a value does not exist, or the results have none in common.
        """
        from tempovlm.lab.table import answered_space

        common: dict[str, Any] = dict(self.whole.axes)
        for dirs, split in self._results:
            found = answered_space(self._frame(dirs), self.whole, split).axes if dirs else common
            common = {name: [value for value in values if value in found[name]] for name, values in common.items()}
        if empty := [name for name, values in common.items() if not values]:
            raise UserError(f"--results_dir: judged, training and twin results have no {empty[0]} in common")
        asked = self.args.knobs.values
        chosen = self.whole.subset(common | asked)
        for name, values in asked.items():
            if missing := [value for value in values if value not in common[name]]:
                has = ", ".join(map(str, common[name]))
                raise wrong_argument(name, missing[0], f"not in all of the results; choose from {has}")
        return chosen

    @cached_property
    def ranking(self) -> Ranking | None:
        """The ranking by which the results' blocks ran; None where they do not say.

        Raises:
            UserError: it is not that of --ranking, or they ran by several.
        """
        from tempovlm.lab.core_exp.ranking import common_ranking

        folders = [folder for dirs, _ in self._results for folder in dirs]
        return common_ranking(folders, self.args.knobs.ranking, self.whole.block_counts[-1])

    @property
    def _results(self) -> tuple[tuple[tuple[Path, ...], str], ...]:
        """Directories and split of judged, training and twin results."""
        args = self.args
        train = args.train_results_dir or args.results_dir
        return (args.results_dir, "val"), (train, "train"), (args.twin_results_dir, "val")

    def _frame(self, dirs: tuple[Path, ...]) -> pd.DataFrame:
        if dirs not in self.frames:
            from tempovlm.lab.core_exp.store import read_results

            self.frames[dirs] = read_results(dirs, self.args.dataset_names or None, self.whole)
        return self.frames[dirs]

    def _read(self, dirs: tuple[Path, ...], split: str) -> Table:
        from tempovlm.lab.table import table_of

        return table_of(self._frame(dirs), self.space, split)

    @cached_property
    def twin(self) -> Table | None:
        """Results of the judged questions on their twin pictures, if given."""
        return self._read(self.args.twin_results_dir, "val") if self.args.twin_results_dir else None

    @cached_property
    def train(self) -> Table:
        """Training questions."""
        try:
            table = self._read(self.args.train_results_dir or self.args.results_dir, "train")
        except UserError as error:
            if self.args.train_results_dir:
                raise
            raise UserError(
                f"--train_results_dir: needed, as --results_dir has no training questions ({error})"
            ) from None
        return table.for_judging(table, self.estimator, self.args.level)

    @cached_property
    def judged(self) -> Table:
        """Validation questions, those with a twin where twins are given."""
        from tempovlm.lab.judge.offline import common

        table = self._read(self.args.results_dir, "val")
        if self.twin is not None:
            table = common(table, self.twin)[0]
        return table.for_judging(self.train, self.estimator, self.args.level)

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
        return load_estimator(self.args.latency_estimator_path, self.whole)

    @cached_property
    def content(self) -> Content:
        """Words and pictures of all questions."""
        from tempovlm.lab.judge.inputs import Content

        return Content.read([self.train, self.judged], self.args.data_dir)

    @cached_property
    def model(self) -> TempoVLM:
        """The model itself, for checkpoints.

        Raises:
            UserError: it cannot be loaded, or the results are of other weights.
        """
        import tempovlm

        model = tempovlm.load(self.args.model, device=self.args.device, policy="fixed", warmup=False)
        if self.weights not in (None, model.weights_hash):
            raise UserError(
                f"--model {self.args.model}: field weights of the results is {self.weights}, this model's is "
                f"{model.weights_hash}: name the model that was measured"
            )
        return model

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Everything that was read, by what it is for.

        Raises:
            UserError: it cannot be read, or is of several models.
        """
        named = {"judged": self.judged, "train": self.train, "twin": self.twin}
        tables = {name: table for name, table in named.items() if table is not None}
        if self.args.knobs.ranking is not None:
            _ = self.ranking
        found = sorted({str(stamp["weights"]) for table in tables.values() for stamp in _known(table.stamps)})
        if len(found) > 1:
            raise UserError(
                f"--results_dir: field weights of the stamps differs ({', '.join(found)}); judged, training and "
                "twin results must be of one model"
            )
        return tables

    @property
    def weights(self) -> str | None:
        """The hash of the weights that the results are of; None where files have no stamp."""
        stamps = [stamp for table in self.tables.values() for stamp in _known(table.stamps)]
        return str(stamps[0]["weights"]) if stamps else None

    def learned(self, name: str) -> Rule:
        """The rule of a checkpoint, or of a class of the user's."""
        from tempovlm.control.own_policy import is_own_policy, own_policy
        from tempovlm.lab.judge.inputs import learned_rule, policy_rule

        prices = (self.args.time_price, self.args.price_per_ms)
        if is_own_policy(name):
            see: Callable[[Table, int, str], Sight] = lambda *row: self.sights(*row)  # noqa: E731 - loads the model
            return policy_rule(own_policy(name, self.space), self.content, see, *prices)
        path = Path(name)
        if not path.is_file():
            raise UserError(f"--policies {name}: no such file; give the path of a controller checkpoint")
        model, spaces = self.model, (self.whole, self.space)
        return learned_rule(path, *spaces, model.engine.runner, model.weights_hash, self.sights, *prices)

    @cached_property
    def sights(self) -> Sights:
        """Encoded pictures, shared by all checkpoints."""
        from tempovlm.lab.judge.inputs import Sights

        return Sights(self.model.engine.runner, self.content)

    def control_ms(self, rules: Mapping[str, Rule]) -> dict[str, float]:
        """Return the time of each checkpoint's choices: as given, or measured here."""
        from tempovlm.lab.judge.inputs import measure_ms

        named, given_ms = [name for name in rules if is_path(name)], self.args.control_ms
        if given_ms is not None:
            return dict.fromkeys(named, given_ms)
        return {name: measure_ms(rules[name], self.judged) for name in named}

    @cached_property
    def known(self) -> Known:
        """Return the material of the baselines."""
        from tempovlm.lab.judge.inputs import Known
        from tempovlm.lab.judge.offline import pick_rule

        args = self.args
        return Known(
            train=self.train,
            level=args.level,
            content=lambda: self.content,
            oracle=pick_rule(self.judged),
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
        """Return the rule of a table that was measured on your own questions.

        Raises:
            UserError: there is none for the weights that the results are of.
        """
        import numpy as np

        from tempovlm.control.policies import TUNED, named_tuned
        from tempovlm.lab.judge.offline import table_rule

        accuracy = named_tuned(name.removeprefix(TUNED), str(self.weights), self.space, self.ranking).accuracy
        scores = np.array([accuracy[knobs] for knobs in self.space])
        return table_rule(scores, self.args.time_price, self.args.price_per_ms)

    def budgets_ms(self) -> tuple[float, ...]:
        """The budgets given, else six from the cheapest to the dearest setting."""
        from tempovlm.cli.bench import read_budgets_ms

        if self.args.budgets:
            return read_budgets_ms(self.args.budgets)
        import numpy as np

        ends = np.sort(self.judged.upper_ms.mean(axis=0))[[0, -1]]
        return tuple(float(f"{budget:.3g}") for budget in np.geomspace(ends[0] * 1.1, ends[1] * 1.1, 6))


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: invalid input.
    """
    from tempovlm.core.files import writing_to
    from tempovlm.lab.judge import paper
    from tempovlm.lab.judge import report as judge_report
    from tempovlm.lab.paper import export
    from tempovlm.lab.queueing import page as load_page

    args = console.parse(EvaluateArgs, argv, "evaluate", _DESCRIPTION, _EXAMPLES)
    args.check()
    notes = console.stderr()
    with writing_to(args.output_dir):
        inputs = Inputs(args)
        simulated = [load_page.read(path) for path in args.under_load]
        trial, report, outcomes = run(inputs)
        paths = judge_report.write(args.output_dir, report, trial, outcomes, simulated)
        paths += export.write(args.output_dir, paper.export(report), args.export)
        if args.save_policies is not None:
            paths += inputs.known.save(args.save_policies, args.policies, inputs.weights)
    out = notes if args.json else console.stdout()
    out.print(table(report))
    out.print(budgets_that_hold(report))
    out.print(judge_report.headline(report))
    if args.json:
        from tempovlm.lab.bench.summary import rounded

        console.print_json(rounded(report, 6))
    if inputs.space != inputs.whole:
        values = "; ".join(f"{name} {', '.join(map(str, legal))}" for name, legal in inputs.space.axes.items())
        notes.print(f"judged on {len(inputs.space)} of the model's {len(inputs.whole)} settings: {values}")
    notes.print(f"wrote {', '.join(map(str, paths))}")


def run(inputs: Inputs) -> tuple[Trial, dict[str, Any], list[Outcome]]:
    """Judge every policy, with a bar and the time left.

    Returns:
        The trial they were judged on, the report object, and the outcome of each policy.
    """
    from tempovlm.core.progress import progress_bar
    from tempovlm.lab.judge.inputs import LOOKING, static_mixture
    from tempovlm.lab.judge.judge import judge_all
    from tempovlm.lab.judge.names import HINDSIGHT, TWIN_PICK
    from tempovlm.lab.judge.offline import pick_rule
    from tempovlm.lab.judge.trial import Trial

    args, tables, rules = inputs.args, inputs.tables, inputs.rules()
    judged, train = tables["judged"], tables["train"]
    trial = Trial(
        table=judged,
        budgets_ms=inputs.budgets_ms(),
        mixture=static_mixture(train),
        dataset_mixtures={name: static_mixture(train, name) for name in sorted(set(train.dataset.tolist()))},
        reference=pick_rule(judged if inputs.twin is None else inputs.twin),
        reference_name=HINDSIGHT if inputs.twin is None else TWIN_PICK,
        rivals=inputs.known.rivals(),
        draws=args.draws,
        seed=args.seed,
    )
    looking = [name for name in rules if args.shuffles and (is_path(name) or name in LOOKING)]
    with progress_bar("judging policies") as advance:
        report, outcomes = judge_all(
            trial,
            rules,
            subject=args.subject,
            looking=looking,
            ablated=args.ablate,
            control_ms=inputs.control_ms(rules),
            shuffles=args.shuffles,
            advance=advance,
        )
    return trial, {**about(inputs, trial), **report}, outcomes


def about(inputs: Inputs, trial: Trial) -> dict[str, Any]:
    """Return the names of the policies and the sources of the figures."""
    from tempovlm.control.checkpoint import origin
    from tempovlm.lab.judge.judge import SCHEMA
    from tempovlm.lab.judge.names import names
    from tempovlm.lab.judge.trial import clusters

    args, space, tables = inputs.args, inputs.space, inputs.tables
    checkpoints = [name for name in args.policies if is_path(name) and Path(name).is_file()]
    stamps = {name: dict(table.stamps) for name, table in tables.items()}
    latency = {"decided_by": trial.table.upper_source, "scored_by": trial.table.latency_source}
    sources = {stamp["data_source"] for files in stamps.values() for stamp in _known(files)}
    return {
        "schema": SCHEMA,
        "stamp": dict(inputs.estimator.stamp if inputs.estimator else inputs.judged.stamp),
        "weights": inputs.weights,
        "names": names(args.policies, {name: origin(Path(name)) for name in checkpoints}),
        "rivals": names(tuple(trial.rivals), {}),
        "data_source": ", ".join(sorted(str(source) for source in sources)) or "unknown",
        "datasets": sorted(set(trial.table.dataset.tolist())),
        "num_questions": len(trial.table),
        "num_images": len(set(clusters(trial.table))),
        "budgets_ms": list(trial.budgets_ms),
        "draws": args.draws,
        "latency": latency,
        "knob_space": {
            **{name: list(legal) for name, legal in space.axes.items()},
            "fingerprint": space.fingerprint,
        },
        "provenance": {
            "files": {name: list(files) for name, files in stamps.items()},
            "stamps": {name: _one(files) for name, files in stamps.items()},
            "left_out": {name: table.left_out for name, table in tables.items()},
            "questions": {name: len(table) for name, table in tables.items()},
            "latency": latency,
            "latency_estimator": inputs.estimator
            and {"path": str(args.latency_estimator_path), **inputs.estimator.stamp},
            "seed": args.seed,
            "time_price": args.time_price,
            "price_per_ms": args.price_per_ms,
        },
    }


def _known(files: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Give the stamps of files; the predecessor's have none."""
    return [stamp for stamp in files.values() if stamp is not None]


def _one(files: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the stamps of several files, several values of a field as one text."""
    stamps = _known(files)
    names = dict.fromkeys(name for stamp in stamps for name in stamp)
    return {name: " | ".join(dict.fromkeys(str(stamp.get(name)) for stamp in stamps)) for name in names}


def table(report: Mapping[str, Any]) -> rich.table.Table:
    """The report for people, a row a policy."""
    from rich.table import Table

    from tempovlm.lab.pages import points

    share = f"of the {report['reference']['name']}'s"
    title = f"{report['num_questions']} questions, {report['num_images']} pictures ({report['data_source']})"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    shown.add_column("policy", no_wrap=True)
    for head in ("gain", "95 % interval", share, "area"):
        shown.add_column(head, justify="right", no_wrap=True)
    for name, judged in report["policies"].items():
        gain, closed = judged["against_mixture"], judged["gap_closed"]
        low, high = gain["interval"]
        shown.add_row(
            report["names"][name],
            points(gain["value"]),
            f"{points(low)} to {points(high)}",
            "–" if closed is None else f"{100 * closed['value']:.0f} %",
            f"{100 * judged['area']['value']:.1f}",
        )
    shown.caption = "gain: points over the best static mixture at the same mean latency, mean over budgets"
    shown.caption_justify = "left"
    return shown


def budgets_that_hold(report: Mapping[str, Any]) -> rich.table.Table:
    """For people, a row a policy: where it is above or below the static mixture and the table, corrected."""
    from rich.table import Table

    from tempovlm.lab.judge.report import holding

    shown = Table(box=None, padding=(0, 1, 0, 0))
    shown.add_column("policy", no_wrap=True)
    for head in ("above at, ms", "below at, ms", "above the table at, ms", "below it at, ms"):
        shown.add_column(head)
    for name, judged in report["policies"].items():
        found = holding(judged["by_budget"]) + holding(judged["by_budget"], "table")
        cells = [", ".join(f"{budget_ms:g}" for budget_ms in some) for some in found]
        shown.add_row(report["names"][name], *(cell or "none" for cell in cells))
    shown.caption = "against the static mixture at equal latency, and the table at the same budgets; after Holm's"
    shown.caption += " correction over the budgets of a policy (at most 5 %)"
    shown.caption_justify = "left"
    return shown
