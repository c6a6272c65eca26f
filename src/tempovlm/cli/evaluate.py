"""`tempovlm evaluate`: policies judged on recorded answers, as a report that a person can read in five minutes.

It parses flags, shows progress and prints; rules, statistics and drawings are in `tempovlm.lab.judge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tempovlm.cli import console
from tempovlm.cli.evaluate_inputs import Inputs, is_path
from tempovlm.core.errors import UserError
from tempovlm.core.request import check_price_per_ms

if TYPE_CHECKING:
    from rich.table import Table

    from tempovlm.lab.judge.inputs import Latencies
    from tempovlm.lab.judge.trial import Outcome, Trial

_DESCRIPTION = """\
Judge policies on results of the core experiment: what each would have chosen, answered and taken.

Compares accuracy at the mean latency that a policy really took with the best random mixture of static settings,
also with p-values corrected over the budgets, by data set and with settings that keep the budget alone, and with
an oracle that is corrected for luck by twin pictures. Writes judge.json, judge.parquet, judge.html,
frontier.svg and gain.svg to the output directory. The headline is about the first checkpoint, else about the first
policy."""

_EXAMPLES = (
    "tempovlm evaluate --results_dir results/core_val --train_results_dir results/core_train",
    "tempovlm evaluate --results_dir results/core_val --train_results_dir results/core_train \\\n"
    "      --policies checkpoints/controller/grpo/best_controller.pt table knn --budgets 60 100 150 200 300",
    "tempovlm evaluate --results_dir results/core_val --twin_results_dir results/core_twin \\\n"
    "      --latency_estimator_path checkpoints/latency_estimator/best_latency_estimator.pt",
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
        train_results_dir: Results directories of the training questions; by default split train of --results_dir.
        twin_results_dir: Results on the twin pictures of the judged questions, for the noise-corrected oracle.
        policies: Baselines (table, fixed, best_static, only_tier, only_top_k, only_num_blocks, random, knn,
            linucb, oracle), table:NAME (as tempovlm tune measured on your questions NAME) and paths of controller
            checkpoints.
        budgets: Budgets in milliseconds; by default six, evenly in log from the cheapest to the dearest setting.
        dataset_names: Data sets, or files of your own questions, to judge on; by default all that are in the
            results.
        latency_estimator_path: Checkpoint of a latency estimator; without it, measured times stand for all
            questions.
        level: Quantile of the latency that policies go by; 0.5, 0.9 or 0.99 with an estimator.
        time_price: What using the whole budget costs the baselines that score settings, in shares of right
            answers; that of the checkpoints' training makes a fair comparison.
        price_per_ms: Expected accuracy, as a share of 1, that a millisecond must buy, for policies that predict
            accuracy: table, only_*, knn, linucb and their checkpoints.
        save_policies: Folder for the policies fitted here (knn.pt, linucb.pt), to be served by --policy.
        model: Model that was measured: pocket, a folder or a hub id; its weights are loaded for checkpoints only.
        device: Where a checkpoint's features are computed: auto, cpu, cuda or cuda:N.
        data_dir: Folder of the data that the results are of, for policies that look at content.
        control_ms: Milliseconds that a checkpoint's own choices take, where latencies are of another machine;
            measured here unless told.
        shuffles: Permutations of the shuffled control; 0 leaves it out.
        ablate: Rules that are run again with one, two and three knobs; the subject and the table unless told.
        draws: Bootstrap resamples.
        seed: Of resampling, the random policy and the bandit.
        output_dir: Where the report is written.
        json: Print one line with the report object on stdout; everything else goes to stderr.
    """

    results_dir: tuple[Path, ...]
    train_results_dir: tuple[Path, ...] = ()
    twin_results_dir: tuple[Path, ...] = ()
    policies: tuple[str, ...] = BASELINE_DEFAULTS
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
    ablate: tuple[str, ...] | None = None
    draws: int = 2000
    seed: int = 0
    output_dir: Path = Path("results/evaluate")
    json: tyro.conf.FlagCreatePairsOff[bool] = False

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value cannot be."""
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
        if not 0 < self.level < 1:
            raise UserError(f"--level {self.level}: must lie between 0 and 1")
        if self.control_ms is not None and not 0 <= self.control_ms < math.inf:
            raise UserError(f"--control_ms {self.control_ms}: must be zero or a positive number of milliseconds")
        for name in self.ablate or ():
            if name not in self.policies:
                raise UserError(f"--ablate {name}: is not among --policies")

    @property
    def subject(self) -> str:
        """What the headline is about."""
        return next((name for name in self.policies if is_path(name)), self.policies[0])


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: wrong input.
    """
    from tempovlm.core.files import writing_to
    from tempovlm.lab.judge import report as judge_report

    args = console.parse(EvaluateArgs, argv, "evaluate", _DESCRIPTION, _EXAMPLES)
    args.check()
    notes = console.stderr()
    with writing_to(args.output_dir):
        inputs = Inputs(args)
        inputs.check()
        trial, report, outcomes = run(inputs)
        paths = judge_report.write(args.output_dir, report, trial, outcomes)
        if args.save_policies is not None:
            paths += inputs.known.save(args.save_policies, args.policies, inputs.weights)
    out = notes if args.json else console.stdout()
    out.print(table(report))
    out.print(budgets_that_hold(report))
    out.print(judge_report.headline(report))
    if args.json:
        from tempovlm.lab.bench.summary import rounded

        console.print_json(rounded(report, 6))
    notes.print(f"wrote {', '.join(map(str, paths))}")


def run(inputs: Inputs) -> tuple[Trial, dict[str, Any], list[Outcome]]:
    """Judge every policy, with a bar and the time left.

    Returns:
        What they were judged on, the report object, and the outcome of each policy.
    """
    from tempovlm.core.progress import progress_bar
    from tempovlm.lab.judge.inputs import LOOKING, static_mixture
    from tempovlm.lab.judge.judge import judge_all
    from tempovlm.lab.judge.offline import oracle_rule
    from tempovlm.lab.judge.trial import Trial

    args = inputs.args
    rules = inputs.rules()
    latency, trained = inputs.latencies(inputs.judged), inputs.known.train_latencies
    judged = inputs.judged.table
    trial = Trial(
        table=judged,
        decided_ms=latency.decided_ms,
        scored_ms=latency.scored_ms,
        budgets_ms=inputs.budgets_ms(latency),
        mixture=static_mixture(inputs.train, trained),
        dataset_mixtures={
            name: static_mixture(inputs.train, trained, name)
            for name in sorted(set(inputs.train.table.dataset.tolist()))
        },
        oracle=oracle_rule(inputs.twin.table if inputs.has_twin else judged),
        oracle_kind="noise-corrected" if inputs.has_twin else "plain",
        draws=args.draws,
        seed=args.seed,
    )
    looking = [name for name in rules if args.shuffles and (is_path(name) or name in LOOKING)]
    ablated = args.ablate
    if ablated is None:
        ablated = tuple(dict.fromkeys(name for name in (args.subject, "table") if name in rules))
    with progress_bar("judging policies") as advance:
        report, outcomes = judge_all(
            trial,
            rules,
            looking=looking,
            ablated=ablated,
            control_ms=inputs.control_ms(rules, latency),
            shuffles=args.shuffles,
            advance=advance,
        )
    return trial, {**about(inputs, trial, latency), **report}, outcomes


def about(inputs: Inputs, trial: Trial, latency: Latencies) -> dict[str, Any]:
    """What the report is of, and where its figures come from."""
    from tempovlm.lab.judge.judge import SCHEMA
    from tempovlm.lab.judge.trial import clusters

    args, space = inputs.args, inputs.space
    parts = inputs.parts
    stamps = {name: dict(part.table.stamps) for name, part in parts.items()}
    sources = {stamp["data_source"] for files in stamps.values() for stamp in files.values() if stamp is not None}
    return {
        "schema": SCHEMA,
        "stamp": dict(inputs.estimator.stamp if inputs.estimator else inputs.judged.stamp),
        "weights": inputs.weights,
        "subject": args.subject,
        "data_source": ", ".join(sorted(str(source) for source in sources)) or "unknown",
        "datasets": sorted(set(trial.table.dataset.tolist())),
        "num_questions": len(trial.table),
        "num_images": len(set(clusters(trial.table))),
        "budgets_ms": list(trial.budgets_ms),
        "draws": args.draws,
        "latency": {"decided_by": latency.decided_by, "scored_by": latency.scored_by},
        "knob_space": {
            "tier": list(space.tiers),
            "top_k": list(space.top_ks),
            "num_blocks": list(space.block_counts),
            "fingerprint": space.fingerprint,
        },
        "provenance": {
            "files": {name: list(files) for name, files in stamps.items()},
            "stamps": {name: _one(files) for name, files in stamps.items()},
            "left_out": {name: part.table.left_out for name, part in parts.items()},
            "questions": {name: len(part.table) for name, part in parts.items()},
            "latency": {"decided_by": latency.decided_by, "scored_by": latency.scored_by},
            "latency_estimator": inputs.estimator
            and {"path": str(args.latency_estimator_path), **inputs.estimator.stamp},
            "seed": args.seed,
            "time_price": args.time_price,
            "price_per_ms": args.price_per_ms,
        },
    }


def _one(files: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the stamps of several files, several values of a field as one text."""
    stamps = [stamp for stamp in files.values() if stamp is not None]
    names = dict.fromkeys(name for stamp in stamps for name in stamp)
    return {name: " | ".join(dict.fromkeys(str(stamp.get(name)) for stamp in stamps)) for name in names}


def table(report: Mapping[str, Any]) -> Table:
    """The report for people, a row a policy."""
    from rich.table import Table

    from tempovlm.lab.judge.figures import short

    title = f"{report['num_questions']} questions, {report['num_images']} pictures ({report['data_source']})"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    shown.add_column("policy", no_wrap=True)
    for head in ("gain", "95 % interval", "gap closed", "area", "regret"):
        shown.add_column(head, justify="right", no_wrap=True)
    points: Callable[[float], str] = lambda share: f"{100 * share:+.1f}"  # noqa: E731 - used in this table only
    for name, judged in report["policies"].items():
        gain, closed = judged["against_mixture"], judged["gap_closed"]
        low, high = gain["interval"]
        shown.add_row(
            short(name),
            points(gain["value"]),
            f"{points(low)} to {points(high)}",
            "no gap" if closed is None else f"{100 * closed['value']:.0f} %",
            f"{100 * judged['area']['value']:.1f}",
            f"{100 * judged['regret']['value']:.1f}",
        )
    shown.caption = "gain: points over the best static mixture at the same mean latency, mean over budgets"
    shown.caption_justify = "left"
    return shown


def budgets_that_hold(report: Mapping[str, Any]) -> Table:
    """For people, a row a policy: where it is above or below the static mixture after the correction."""
    from rich.table import Table

    from tempovlm.lab.judge.figures import short
    from tempovlm.lab.judge.report import holding

    shown = Table(box=None, padding=(0, 1, 0, 0))
    shown.add_column("policy", no_wrap=True)
    for head in ("above at, ms", "below at, ms"):
        shown.add_column(head)
    for name, judged in report["policies"].items():
        cells = [", ".join(f"{budget_ms:g}" for budget_ms in some) for some in holding(judged["by_budget"])]
        shown.add_row(short(name), *(cell or "none" for cell in cells))
    shown.caption = (
        "against the static mixture, after Holm's correction over the budgets of a policy (at most 5 %)"
    )
    shown.caption_justify = "left"
    return shown
