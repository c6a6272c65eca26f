"""The runs that made the repository's own results, each once, at full size."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from experiments.recipes import (
    ACCURACY,
    ANSWERS,
    CONTROLLER,
    ESTIMATOR,
    FULL,
    FULL_SIZE_BUDGETS_MS,
    LLM_BASED,
    NAMED,
    NAMES,
    QUEUE,
    SECOND_STAGE,
    SWEEP,
    TEST_ANSWERS,
    TIME_PRICE,
    WARM_START,
    Run,
    Setup,
    adaptive,
    answering,
    end_to_end,
    estimator,
    expected_accuracy,
    first_stage,
    importance,
    judge,
    llm_based,
    of_pictures,
    parquet,
    profiling,
    second_stage,
    supervised,
    testing,
    timing,
    timing_pictures,
    value_stage,
    with_report,
)

TRACE = "AzureLLMInferenceTrace_code.csv"
"""Arrivals of a public trace of 2023 (docs/serving_under_load.md links it), in the folder of the repository."""

POCKET_RUN = "--output_dir RUN --recipe 32x24-spread-more --minutes 25 --total_minutes 18.5 --resume --device cuda"
"""Options of the training of the shipped pocket, after the vision side of a run of its own (`--vision_from`,
docs/adding.md)."""


def published_setup(place: str) -> Setup:
    """That of the repository's own results of a device."""
    device = "cpu" if place == "cpu" else "cuda"
    about: dict[str, Any] = {"model": "pocket", "weights": "", "data_dir": None, "has_shipped": False}
    return Setup(**about, device=device, place=place, counts=FULL, is_published=True)


@cache
def published() -> tuple[Run, ...]:
    """The runs that made the repository's own results, each once."""
    cpu, *gpus = map(published_setup, TIME_PRICE)
    return (
        *_benchmarks(),
        importance(cpu),
        *(answering(cpu, part) for part in ANSWERS),
        *(testing(cpu, part) for part in TEST_ANSWERS),
        *(timing(cpu), timing_pictures(cpu), profiling(cpu)),
        *(estimator(cpu, transfer=gpus[0].times), of_pictures(cpu, gpus[0].times)),
        *(supervised(cpu), *_of_controllers(cpu)),
        *(in_queue(cpu), *under_load(), _judged_evenly(), judge(cpu)),
        *(run for gpu in gpus for run in _of_gpu(gpu)),
    )


def _of_controllers(s: Setup) -> Iterable[Run]:
    yield from (value_stage(s) if s.is_gpus else first_stage(s), second_stage(s), end_to_end(s), llm_based(s))
    yield from (adaptive(s, "", SECOND_STAGE), adaptive(s, "pocket_llm_based", LLM_BASED))
    if not s.is_gpus:
        yield from (expected_accuracy(s), adaptive(s, "pocket_accuracy", ACCURACY))


def in_queue(s: Setup) -> Run:
    """Exp 5 in a queue: values by regression, and GRPO over episodes."""
    return s.run(
        *("queue", "Exp 5 in a queue", f"{CONTROLLER}/train_controller_v2.py"),
        f"--environment queue --arrivals {TRACE} --results_dir {ANSWERS['train']} {ANSWERS['val']} {s.times} "
        f"{NAMED} --seeds {' '.join(map(str, s.counts.seeds))} --warm_start {WARM_START} --num_epochs 8 "
        "--batch_size 4 --lr 0.03 --group_size 8 --scale_rewards none --hidden_dim 64 "
        f"--output_dir {Path(QUEUE).parent}",
        with_report(QUEUE),
    )


def _judged_evenly() -> Run:
    """The default beside the table, at budgets spread evenly between the guard's bounds."""
    folder = "results/evaluate/pocket_cpu_evenly"
    flags = (
        f"--results_dir {TEST_ANSWERS['test']} --train_results_dir {ANSWERS['train']} "
        f"--twin_results_dir {TEST_ANSWERS['test_twin']} --latency_estimator_path {ESTIMATOR} "
        f"--policies {ACCURACY} table best_static --budgets 45.8 65.1 84.5 103.8 123.1 --output_dir {folder}"
    )
    title = "the default at evenly spread budgets"
    outputs = (f"{folder}/judge.json",)
    return Run(name="judge_evenly", title=title, command="evaluate", flags=tuple(flags.split()), outputs=outputs)


def under_load() -> Iterable[Run]:
    """Simulations of requests that share a lane, on the trace's second half and on Poisson arrivals."""
    second, every = f"{TRACE} --first_request 4409", "native native_sheds greedy slackfit table kind"
    known = f"{every} clairvoyant:table clairvoyant --price derived waiting 0 0.0005 0.001 0.002 0.004"
    serving = f"greedy table {ACCURACY} {QUEUE}"
    for name, arrivals, loads, policies in (
        ("bursts", second, "0.5 1.0 1.7", known),
        ("poisson", "poisson", "0.1 1.0 1.7", known),
        (
            *("budgets", f"{second} --budgets_ms 80 160 320 --discipline edf fcfs slack", "1.0"),
            "native_sheds greedy table kind clairvoyant",
        ),
        ("learned", f"{TRACE} poisson --first_request 4409", "0.1 0.5 1.0 1.7", f"{serving} clairvoyant:{QUEUE}"),
        ("loads", second, "0.1 0.3 0.5 0.75 1.0 1.35 1.7 2.2", f"native native_sheds {serving}"),
    ):
        file = f"results/serving/{name}.json"
        flags = f"--arrivals {arrivals} --loads {loads} --policies {policies} --json {file}".split()
        title, script = f"under load: {name}", "experiments/serving/simulate.py"
        yield Run(name=f"load_{name}", title=title, command=script, flags=tuple(flags), outputs=(file,))


def _of_gpu(gpu: Setup) -> Iterable[Run]:
    """A GPU's sweeps, its own controllers of the pocket, and MolmoE-1B's shapes with random weights."""
    c, model, times = gpu.counts, "molmoe-1b-random", f"results/core_exp_molmoe_{gpu.place}"
    yield timing(gpu)
    yield gpu.run(
        *("core_times", "core experiment, times at full size", SWEEP),
        f"--dataset_names {NAMES} --model_path {model} --output_dir {times} --latency_only --device {gpu.device} "
        f"--latency_samples 25 --repeats {c.repeats} --max_new_tokens 1 2 4 8 16 32",
        parquet(times),
    )
    full = f"checkpoints/latency_estimator_molmoe_{gpu.place}/{Path(ESTIMATOR).name}"
    yield estimator(gpu, times, full, transfer=gpu.times)
    yield from (estimator(gpu), profiling(gpu), supervised(gpu), *_of_controllers(gpu), judge(gpu))
    yield adaptive(gpu, "molmoe", "table", model=model, budgets_ms=FULL_SIZE_BUDGETS_MS)


def _benchmarks() -> Iterable[Run]:
    """The pocket's training and the runs that are no experiment; `FILE` stands for the output."""
    full = "--model molmoe-1b --random-weights"
    for command, flags, name in (
        ("bench", "--budgets 30 60 80 110 150 --num_samples 200 --fresh_processes 10", "pocket_cpu"),
        ("benchmarks/load.py", "", "load"),
        ("benchmarks/preprocess.py", "--json FILE", "preprocess"),
        ("benchmarks/parity.py", "--device cpu --json FILE", "parity_cpu"),
        ("benchmarks/parity.py", "--device cuda --json FILE", "parity_h200"),
        ("benchmarks/engine.py", f"{full} --json FILE", "engine_h200"),
        ("benchmarks/engine.py", f"{full} --json FILE", "engine_h100"),
        ("benchmarks/engine.py", f"{full} --weights fp8 --json FILE", "engine_fp8_h200"),
        ("benchmarks/engine.py", f"{full} --weights fp8 --json FILE", "engine_fp8_h100"),
        ("benchmarks/engine.py", "--model pocket --device cpu --json FILE", "engine_cpu"),
        ("benchmarks/quantised.py", "--model pocket --num_samples 200 --json FILE", "quantised_pocket"),
        ("-m tempovlm.training.pocket", POCKET_RUN, "src/tempovlm/pocket/accuracy.json"),
    ):
        file = name if name.endswith(".json") else f"benchmarks/results/{name}.json"
        words = flags.replace("FILE", file).split()
        yield Run(name=name, title=name, command=command, flags=tuple(words), outputs=(file,))


def made_by(path: str) -> Run | None:
    """Return the run that makes a file, or the files in a folder, of the repository; None where none does."""
    return next((run for run in published() if any(f"{one}/".startswith(f"{path}/") for one in run.outputs)), None)


def commands(path: str, repository: Path) -> str:
    """Return the shell commands that make a file, after those that make what they read and is not there.

    Args:
        path: from the root of the repository.
        repository: its root.
    """
    run = made_by(path)
    if run is None:
        return ""
    before = [commands(name, repository) for name in run.inputs if not (repository / name).exists()]
    each = [one for text in before if text for one in text.split(" && ")]
    return " && ".join(dict.fromkeys([*each, run.text]))
