"""Rows of Exp 8: requests through the whole pipeline, on time or not, and what the controller itself takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tempovlm.data.registry import GENERATED
from tempovlm.evaluation.targets import chain
from tempovlm.evaluation.targets.base import (
    NO_SEED,
    REPORTED,
    AbsentError,
    Bound,
    Content,
    Measure,
    Reading,
    Source,
    Target,
    dotted,
    extreme,
    look_up,
    number,
    value_at,
)
from tempovlm.evaluation.targets.devices import ANSWERED_MS, GPUS, HARDWARE, PLACE, suffix
from tempovlm.evaluation.targets.pocket import at_budget

EXP8 = "Exp 8"

FULL_SIZE_BUDGETS_MS = (8, 12, 20, 30, 40)


def _adaptive(
    name: str, model: str, device: str, controller: str, budgets_ms: str, trainings: Iterable[str] = ()
) -> Source:
    """Exp 8's file; its command begins with what trains the controller where no other row says it."""
    path = f"results/adaptive_inference/{name}.json"
    folder = model if model == "pocket" else f"{model}-random"
    answering = (
        f"python experiments/controller/test_adaptive_inference.py --model_path {folder} --controller_path "
        f"{controller} --dataset {' '.join(GENERATED)} --num_samples 1000 --latency_budget "
        f"{budgets_ms} --device {'cpu' if device == 'cpu' else 'cuda'} --output_path {path}"
    )
    return Source(
        path=path,
        command=" && ".join([*trainings, answering]),
        model=model,
        hardware=HARDWARE[device],
        needs_shipped_weights=model == "pocket",
    )


def _two_stage(device: str) -> Source:
    trainings = [] if device == "cpu" else [chain.estimator(device), chain.two_stage(device)]
    controller = chain.checkpoint(device, chain.STAGE2_FILE)
    return _adaptive(f"pocket_{device}", "pocket", device, controller, ANSWERED_MS[device], trainings)


def _llm_based(device: str) -> Source:
    before = [] if device == "cpu" else [chain.estimator(device)]
    controller, trainings = chain.checkpoint(device, chain.LLM_BASED_FILE), [*before, chain.llm_based(device)]
    return _adaptive(f"pocket_llm_based_{device}", "pocket", device, controller, ANSWERED_MS[device], trainings)


ADAPTIVE = {device: _two_stage(device) for device in HARDWARE}
LLM_BASED = {device: _llm_based(device) for device in HARDWARE}
FULL_SIZE = {
    gpu: _adaptive(f"molmoe_{gpu}", "molmoe-1b", gpu, "table", " ".join(map(str, FULL_SIZE_BUDGETS_MS)))
    for gpu in GPUS
}


def _check_finished(content: Content) -> None:
    """Refuse answers that were cut at their deadline, which are on time by definition."""
    if look_up(content, "on_deadline") != "finish":
        raise AbsentError("its answers were not let finish (--on_deadline finish)")


def _feasible(content: Content) -> list[Content]:
    """Entries of budgets that at least half of the requests could keep."""
    _check_finished(content)
    rows = [row for row in look_up(content, "budgets") if value_at(row, "feasible_share") >= 0.5]
    if not rows:
        raise AbsentError("it has no feasible budget")
    return rows


def _over_budgets(pick: Callable[[list[float]], float], *path: str | int, scale: float = 100) -> Measure:
    """A measure: the least or the greatest over the feasible budgets; one that has no such value is left out."""

    def measure(content: Content) -> Reading:
        rows = _feasible(content)
        values = [value_at(row, *path, scale=scale) for row in rows if look_up(row, path[0]) is not None]
        return Reading(extreme(pick, values, dotted(path)))

    return measure


def _control_share(content: Content) -> Reading:
    shares = [
        number(value_at(row, "stages_ms", "control") / value_at(row, "budget_ms"), "stages_ms.control", 100)
        for row in _feasible(content)
    ]
    return Reading(max(shares))


def _pocket(device: str) -> Iterable[Target]:
    def row(
        name: str,
        about: str,
        bound: Bound,
        unit: str,
        measure: Measure,
        seed: str = NO_SEED,
        text: str | None = None,
    ) -> Target:
        source, about = ADAPTIVE[device], f"{about} ({PLACE[device]})"
        return Target(EXP8, f"exp8_{name}_{device}", about, bound, unit, source, measure, seed=seed, text=text)

    wilson, used = (97, 65) if device == "cpu" else (99, 80)
    yield row(
        "requests",
        "requests at each feasible budget, fewest",
        Bound("≥", 1000),
        "requests",
        _over_budgets(min, "num_samples", scale=1),
    )
    yield row(
        "adherence",
        "on time at each feasible budget, upper end of the interval, least",
        Bound("≥", wilson),
        "%",
        _over_budgets(min, "adherence_wilson", 1),
        seed="> 80 %",
        text=f"Wilson interval reaches {wilson} % at every feasible budget",
    )
    yield row(
        "utilisation",
        "budget used where a slower setting existed, least",
        Bound("≥", used),
        "%",
        _over_budgets(min, "utilisation"),
    )
    if device == "cpu":
        yield row("control_cost", "controller's share of the budget, largest", Bound("≤", 1), "%", _control_share)
    else:
        control = _over_budgets(max, "stages_ms", "control", scale=1)
        yield row("control_cost", "controller's own time, largest", Bound("≤", 0.2), "ms", control)
    yield Target(
        EXP8,
        f"exp8_llm_based_cost_{device}",
        f"LLM-based controller's own time, largest ({PLACE[device]})",
        REPORTED,
        "ms",
        LLM_BASED[device],
        _over_budgets(max, "stages_ms", "control", scale=1),
    )


def _finished_at(budget_ms: float, name: str) -> Measure:
    def measure(content: Content) -> Reading:
        _check_finished(content)
        return at_budget(budget_ms, name)(content)

    return measure


def _full_size(gpu: str) -> Iterable[Target]:
    for budget_ms in FULL_SIZE_BUDGETS_MS:
        for name, about, bound in (
            ("adherence", "on time", Bound("≥", 99)),
            ("utilisation", "budget used", REPORTED),
        ):
            yield Target(
                EXP8,
                f"exp8_molmoe_{name}_{budget_ms}ms{suffix(gpu)}",
                f"{about} at {budget_ms} ms (full size, random weights, {PLACE[gpu]})",
                bound,
                "%",
                FULL_SIZE[gpu],
                _finished_at(budget_ms, name),
                seed="> 80 %" if name == "adherence" else NO_SEED,
            )


ROWS = (
    *(target for device in HARDWARE for target in _pocket(device)),
    *(target for gpu in GPUS for target in _full_size(gpu)),
)
