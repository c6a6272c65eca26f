"""The runs behind every result in the repository, each with its script, flags, inputs and outputs.

`chain` has the runs of `tempovlm reproduce`, in a folder of their own and with few samples; `published.py` has
those that made the repository's own files, at full size. The same functions of a `Setup` make both. A controller
of the CPU lies under `checkpoints`, one of a GPU at the same place under `checkpoints/gpu_DEVICE`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tempovlm.data.registry import GENERATED

TAKE = "take"
"""Command of a run that takes rows of shipped results instead of running a script."""

ANSWERS = {part: f"results/core_exp_pocket_{part}" for part in ("train", "val", "twin")}
"""Accuracies of the core experiment."""

TEST_ANSWERS = {part: f"results/core_exp_pocket_{part}" for part in ("test", "test_twin")}
"""The same on a test bed of another seed, on which nothing is selected."""

PICTURES = "results/core_exp_pocket_cpu_pictures"
"""Times of many pictures, each once at every setting, for the quantiles of Exp 1."""

ESTIMATOR = "checkpoints/latency_estimator/best_latency_estimator.pt"
SUPERVISED = "checkpoints/controller/supervised/best_supervised_controller.pt"
VALUE_STAGE = "checkpoints/two_stage_value/stage1/best_stage1_checkpoint.pt"
FIRST_STAGE = "checkpoints/two_stage_controller/stage1/best_stage1_checkpoint.pt"
SECOND_STAGE = "checkpoints/two_stage_controller/stage2/best_stage2_checkpoint.pt"
END_TO_END = "checkpoints/controller/grpo/best_controller.pt"
LLM_BASED = "checkpoints/controller/grpo_llm_based/best_controller.pt"
QUEUE = "checkpoints/controller/queue/best_value.pt"
ACCURACY = "checkpoints/controller/accuracy/best_accuracy.pt"
IMPORTANCE = "results/importance/merged_scores.json"
PROFILES = "results/profiling/exp3_importance_comparison"
LEARNED_UNDER_LOAD = "results/serving/learned.json"

GRPO_RECIPE = "--scale_rewards none --group_size 16 --lr 2e-5 --beta 0.02 --entropy_coef 0.001"
"""Flags of Exp 4 and 5 beside the price of time."""

WARM_START, GRPO_EPOCHS = 30, 20
LLM_WARM_START, LLM_EPOCHS = 8, 3
"""Epochs of regression, then of GRPO; the LLM-based controller runs blocks of the model in each."""

ACCURACY_WIDTH = 32
"""Units of a layer of the networks that expect accuracies; twice as many gain nothing."""

GPU_PLACE = "h200"
"""The GPU that has rows in the scoreboard; results of `tempovlm reproduce` on any GPU take its places."""

FULL_SIZE_BUDGETS_MS = (8, 12, 20, 30, 40)

_GPU_JUDGED_MS = (10, 11, 12, 14, 16)
"""Budgets between the guard's upper bounds on a GPU, which OS pauses push far above the usual 3.5 to 5 ms of the
pocket's settings."""

_GPU_ANSWERED_MS = (6, 7, 8, 10, 12)
"""Budgets that leave room for the time a host may lose between two launches."""

JUDGED_MS = {"cpu": (30, 40, 60, 80, 110, 150), "h200": _GPU_JUDGED_MS, "h100": _GPU_JUDGED_MS}
ANSWERED_MS = {"cpu": (30, 60, 80, 110, 150), "h200": _GPU_ANSWERED_MS, "h100": _GPU_ANSWERED_MS}
"""The budgets of Exp 8."""

TIME_PRICE = {"cpu": "0.3", "h200": "2.0", "h100": "2.0"}
"""Accuracy that a whole budget costs the judged policies that predict it, and the controllers of GPUs, whose
settings lie so close together that free time leaves nothing to choose. It costs the CPU's controllers nothing."""

RATES_MS = {
    "picture drawn": 5,
    "plan of a question": 40,
    "question at all settings": 2600,
    "question read": 8,
    "timed answer": 95,
    "picture looked at": 170,
    "answer within a budget": 110,
    "epoch": 300,
    "calibration": 60_000,
    "boosting": 45_000,
    "statistics": 90_000,
}
"""Rough time of a unit of work on two cores with the pocket, for the time left, which corrects itself."""

_REMOVED, _SEARCHED, _RANKED = 17, 84, 11
"""Plans of a question in Exp 6: whole and without each of 16 blocks, in the joint search, and by the rankings."""

_SETTINGS = 75
_TRAINED_MS = (WARM_START + GRPO_EPOCHS) * RATES_MS["epoch"]
CONTROLLER = "experiments/controller"
SWEEP = "experiments/core_exp/run_core_experiment.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sizes of a chain; of each of the four data sets unless stated otherwise.

    Attributes:
        train_pictures, val_pictures: drawn. train, val: questions whose accuracy at every setting counts.
        importance, joint: questions of Exp 6 of each split, and in its joint search.
        timed, repeats: questions that are timed at every setting, and how often. pictures: those timed once.
        requests: of Exp 8 in all, at every budget. seeds: of Exp 5. max_new_tokens: of an answer.
        epochs: of every training; None takes the experiment protocol's. budgets: drawn in Exp 2.
        draws: bootstrap resamples. shuffles: permutations of the shuffled control.
    """

    train_pictures: int = 2000
    val_pictures: int = 750
    train: int = 1000
    val: int = 750
    importance: int = 500
    joint: int = 200
    timed: int = 10
    repeats: int = 5
    pictures: int = 100
    requests: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_new_tokens: int = 16
    epochs: int | None = None
    budgets: int = 20_000
    draws: int = 2000
    shuffles: int = 3


FULL = Counts()
"""Sizes of the repository's own results."""

SHIPPED = replace(FULL, train=240, val=120, importance=16, joint=8, timed=5, repeats=3, requests=200)
"""Sizes with the accuracies in the repository: less than half an hour on two cores."""

ANEW = replace(SHIPPED, train_pictures=64, val_pictures=64, train=24, val=12, importance=12, joint=6)
"""Sizes with everything measured."""

SMOKE = replace(
    SHIPPED,
    train_pictures=2,
    val_pictures=2,
    train=2,
    val=2,
    importance=1,
    joint=1,
    timed=1,
    repeats=1,
    requests=4,
    seeds=(0, 1),
    max_new_tokens=2,
    epochs=2,
    budgets=100,
    draws=20,
    shuffles=0,
)
"""Sizes to check that every step runs; the figures have no meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of a script.

    Attributes:
        name: unique among the runs of a chain; also names its log. title: shown to the user.
        counts: its samples, as text.
        command: a script's path in the repository, `-m MODULE`, a subcommand of `tempovlm`, or `TAKE`.
        flags: of the command.
        outputs: files that are there when it is done, from the root of the repository or of the run's folder.
        about_ms: rough time on two cores; 0 if nothing waits for it.
    """

    name: str
    title: str
    command: str
    flags: tuple[str, ...]
    outputs: tuple[str, ...]
    counts: str = ""
    about_ms: float = 0.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Results and checkpoints that it reads: those that its flags name and it does not write."""
        own = {str(parent) for name in self.outputs for parent in (Path(name), *Path(name).parents)}
        named = (word for word in self.flags if word.startswith(("results/", "checkpoints/")))
        return tuple(dict.fromkeys(word for word in named if word not in own))

    @property
    def text(self) -> str:
        """The shell command."""
        is_python = self.command.endswith(".py") or self.command.startswith("-m ")
        return " ".join(["python" if is_python else "tempovlm", self.command, *self.flags])


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Settings of a chain of runs.

    Attributes:
        model: pocket, a folder or a hub id. weights: hash of its weights. device: cpu or cuda.
        place: the machine's name in paths of results.
        data_dir: of the data sets; None draws a test bed. has_shipped: whether accuracies are taken from there.
        questions: digest of those that `data_dir` has for the run; None where a test bed is drawn.
        is_published: whether the files are the repository's own.
    """

    model: str
    weights: str
    device: str
    place: str
    counts: Counts
    data_dir: Path | None
    has_shipped: bool
    questions: str | None = None
    is_published: bool = False

    @property
    def data(self) -> str:
        """Folder of the data, from the run's folder."""
        return "data" if self.data_dir is None else str(self.data_dir)

    @property
    def times(self) -> str:
        """Folder of the core experiment's times."""
        return f"results/core_exp_pocket_{self.place}"

    @property
    def is_gpus(self) -> bool:
        """Whether the files lie at a GPU's places in the repository."""
        return self.is_published and self.place != "cpu"

    @property
    def is_cpus(self) -> bool:
        """Whether the files lie at the CPU's places in the repository."""
        return self.is_published and self.place == "cpu"

    @property
    def profiles(self) -> str:
        """Folder of Exp 7."""
        return f"results/profiling/gpu_{self.place}" if self.is_gpus else PROFILES

    @property
    def price(self) -> str:
        """The flag with the price of time in the training of a GPU's controllers."""
        return f"--time_price {TIME_PRICE[self.place]}" if self.is_gpus else ""

    def conditions(self) -> dict[str, Any]:
        """Return the conditions that must not change when a run is resumed."""
        return json.loads(json.dumps(asdict(self) | {"data_dir": self.data}))

    def checkpoint(self, path: str) -> str:
        """Return this setup's path of the checkpoint that the CPU has at `path`."""
        return path.replace("checkpoints/", f"checkpoints/gpu_{self.place}/", 1) if self.is_gpus else path

    def results(self, part: str) -> str:
        """Folders of the core experiment's answers to a part of the questions, for controllers and their judge.

        They come with the setup's own times, but for the published ones of the CPU: an estimator does not know how
        long a picture takes to be prepared, which is most of an answer on a GPU and little on the CPU.
        """
        return ANSWERS[part] if self.is_cpus else f"{ANSWERS[part]} {self.times}"

    def own(self, text: str) -> str:
        """Flags that only a run in a folder of its own has."""
        return "" if self.is_published else text

    def published(self, text: str) -> str:
        """Flags that only the repository's results have."""
        return text if self.is_published else ""

    def epochs(self, flag: str) -> str:
        """The flag with the epochs, where the experiment protocol's are not taken."""
        return "" if self.counts.epochs is None else f"{flag} {self.counts.epochs}"

    def run(self, name: str, title: str, command: str, flags: str, outputs: tuple[str, ...], **more: Any) -> Run:
        """A run; a model and a data folder are put in word by word, because their names may hold spaces."""
        words = (word.replace("{model}", self.model).replace("{data}", self.data) for word in flags.split())
        return Run(name=name, title=title, command=command, flags=tuple(words), outputs=outputs, **more)


NAMES = " ".join(GENERATED)
NAMED = f"--dataset_names {NAMES} --model_path {{model}}"


def chain(setup: Setup) -> tuple[Run, ...]:
    """The runs of `tempovlm reproduce`, in the experiment protocol's order: Exp 6, 7, 1, 2, 3, 4, 5, 8."""
    return (
        *([drawing(setup)] if setup.data_dir is None else []),
        importance(setup),
        *(answering(setup, part) for part in ANSWERS),
        *(timing(setup), profiling(setup), estimator(setup), supervised(setup)),
        *(first_stage(setup), second_stage(setup), end_to_end(setup)),
        *(adaptive(setup, "", SECOND_STAGE), judge(setup)),
    )


def drawing(s: Setup) -> Run:
    """The test bed."""
    c = s.counts
    return s.run(
        *("data", "test bed", "data"),
        f"make --output_dir data --num_train {c.train_pictures} --num_val {c.val_pictures}",
        tuple(f"data/{name}" for name in GENERATED),
        counts=f"{c.train_pictures} training and {c.val_pictures} validation pictures each",
        about_ms=len(GENERATED) * (c.train_pictures + 2 * c.val_pictures) * RATES_MS["picture drawn"],
    )


def importance(s: Setup) -> Run:
    """Exp 6."""
    c, folder = s.counts, "results/importance_validation"
    plans = 2 * c.importance * (_REMOVED + _RANKED) + c.joint * _SEARCHED
    few = f"--num_joint_samples {c.joint} {s.own('--tier medium')} {s.published('--batch_size 128')}"
    return s.run(
        *("exp6", "Exp 6, importance of blocks", f"{CONTROLLER}/validate_importance_consistency.py"),
        f"{NAMED} {_placed(s)} --num_samples {c.importance} {few} --output_dir {folder}",
        (f"{folder}/cross_dataset_correlation.json", IMPORTANCE),
        counts=f"{c.importance} training and validation questions each, {c.joint} in the joint search",
        about_ms=len(GENERATED) * plans * RATES_MS["plan of a question"],
    )


def answering(s: Setup, part: str) -> Run:
    """Accuracies of a split or of the twins: taken from the repository, or measured."""
    folder, kind = ANSWERS[part], {"train": "training", "val": "validation", "twin": "twin"}[part]
    split = "train" if part == "train" else "val"
    count = s.counts.train if part == "train" else s.counts.val
    counts = f"{count} {kind} questions each at every setting"
    if s.has_shipped:
        return s.run(
            *(f"core_{part}", "core experiment, answers that are shipped", TAKE, f"{folder} {split} {count}"),
            parquet(folder),
            counts=f"at most {counts}",
            about_ms=len(GENERATED) * count * RATES_MS["question read"],
        )
    twins = "--twins" if part == "twin" else ""
    return s.run(
        *(f"core_{part}", "core experiment, answers", SWEEP),
        f"{NAMED} --output_dir {folder} --num_samples {count} --split {split} {twins} {_placed(s)}",
        parquet(folder),
        counts=counts,
        about_ms=len(GENERATED) * count * RATES_MS["question at all settings"],
    )


def testing(s: Setup, part: str) -> Run:
    """Accuracies on the test bed of another seed, which lies in `BED`, or on its twins."""
    twins = "--twins" if part == "test_twin" else ""
    folder, count = TEST_ANSWERS[part], s.counts.val
    return s.run(
        *(f"core_{part}", "core experiment, answers on the test bed of another seed", SWEEP),
        f"{NAMED} --data_dir BED --output_dir {folder} --num_samples {count} --split val {twins}",
        parquet(folder),
        counts=f"{count} questions each at every setting",
    )


def timing_pictures(s: Setup) -> Run:
    """The core experiment's times of many pictures, one answer at every setting."""
    count = s.counts.pictures
    return s.run(
        *("core_pictures", "core experiment, times of many pictures", SWEEP),
        f"{NAMED} --output_dir {PICTURES} --latency_only --device {s.device} --latency_samples {count} "
        "--repeats 1 --warmup 0",
        parquet(PICTURES),
        counts=f"{count} questions each, one answer at every setting",
    )


def timing(s: Setup) -> Run:
    """The core experiment's times of all settings."""
    c = s.counts
    return s.run(
        *("core_times", "core experiment, times", SWEEP),
        f"{NAMED} --output_dir {s.times} --latency_only {s.published(f'--device {s.device}')} "
        f"--latency_samples {c.timed} --repeats {c.repeats} "
        f"{s.own(f'--warmup 0 --num_samples {4 * c.timed}')} {_placed(s)}",
        parquet(s.times),
        counts=f"{c.timed} questions each, {c.repeats} answers at every setting",
        about_ms=len(GENERATED) * c.timed * c.repeats * _SETTINGS * RATES_MS["timed answer"],
    )


def profiling(s: Setup) -> Run:
    """Exp 7, which sums up answers and times."""
    source = f"--results_dir {ANSWERS['val']} {s.times}"
    names = GENERATED[:1] if s.is_gpus else GENERATED
    return s.run(
        *("exp7", "Exp 7, accuracy and time of every setting", f"{CONTROLLER}/profiling_with_importance.py"),
        f"--model_path {{model}} --datasets {' '.join(names)} --output_dir {s.profiles} {source}",
        tuple(f"{s.profiles}/{name}/profiling_results.json" for name in names),
        counts=f"{s.counts.val} questions each, of which {s.counts.timed} timed",
        about_ms=15_000,
    )


def estimator(s: Setup, times: str = "", file: str = "", transfer: str = "") -> Run:
    """Exp 1 on the setup's times, or on those that are named; moved to a sweep of another device where one is."""
    file = file or s.checkpoint(ESTIMATOR)
    moved = transfer and f"--transfer_results_dir {transfer}"
    own = s.own(f"--model_path {{model}} --device {s.device}")
    return s.run(
        *("exp1", "Exp 1, latency estimator", f"{CONTROLLER}/train_latency_estimator.py"),
        f"--results_dir {times or s.times} --dataset_names {NAMES} --output_dir {Path(file).parent} {own} "
        f"{s.epochs('--num_epochs')} {moved}",
        with_report(file),
        counts=f"{s.counts.timed} questions each at every setting",
        about_ms=2 * RATES_MS["boosting"],
    )


def of_pictures(s: Setup, transfer: str) -> Run:
    """Exp 1 on the times of many pictures, half of them for the test: whether its quantiles hold."""
    folder = "checkpoints/latency_estimator_pictures"
    return s.run(
        *("exp1_pictures", "Exp 1, quantiles on many pictures", f"{CONTROLLER}/train_latency_estimator.py"),
        f"--results_dir {PICTURES} --dataset_names {NAMES} --output_dir {folder} --train_split 0.5 "
        f"--transfer_results_dir {transfer}",
        with_report(f"{folder}/{Path(ESTIMATOR).name}"),
        counts=f"{s.counts.pictures} questions each at every setting",
    )


def supervised(s: Setup) -> Run:
    """Exp 2 on Exp 7's table of one data set."""
    file, budgets = s.checkpoint(SUPERVISED), s.counts.budgets
    return s.run(
        *("exp2", "Exp 2, supervised controller", f"{CONTROLLER}/train_supervised_controller.py"),
        f"--profiling_results {s.profiles}/{GENERATED[0]}/profiling_results.json --output_dir {Path(file).parent} "
        f"{s.own(f'--num_budgets {budgets} --device {s.device}')} {s.epochs('--num_epochs')}",
        with_report(file),
        counts=f"{budgets} budgets",
        about_ms=50 * RATES_MS["epoch"],
    )


def first_stage(s: Setup) -> Run:
    """Exp 3."""
    own = f"--test_results_dir {TEST_ANSWERS['test']}" if s.is_cpus else ""
    flags = f"{own} {s.epochs('--num_epochs_stage1')}"
    about_ms = _looked_ms(s.counts.train, s.counts.train_pictures) + RATES_MS["boosting"]
    return _stage(s, "exp3", "Exp 3, first stage", FIRST_STAGE, flags, about_ms)


def value_stage(s: Setup) -> Run:
    """Return the first stage by value at a price of time, which a label does not have; for a GPU's Exp 4."""
    flags = f"--knob1_loss value --knob1_label literal {s.price} --lr 1e-3 {s.epochs('--num_epochs_stage1')}"
    return _stage(s, "value_stage", "first stage by value, for Exp 4", VALUE_STAGE, flags, RATES_MS["boosting"])


def second_stage(s: Setup) -> Run:
    """Exp 4."""
    flags = (
        f"--stage1_checkpoint {s.checkpoint(VALUE_STAGE if s.is_gpus else FIRST_STAGE)} "
        f"--num_epochs_stage2 {s.counts.epochs or GRPO_EPOCHS} {_grpo(s, WARM_START)}"
    )
    return _stage(s, "exp4", "Exp 4, second stage by GRPO", SECOND_STAGE, flags, _TRAINED_MS)


def end_to_end(s: Setup) -> Run:
    """Exp 5 over several seeds, beside Exp 4's checkpoint."""
    seeds = s.counts.seeds
    flags = (
        f"--compare_with {s.checkpoint(SECOND_STAGE)} --seeds {' '.join(map(str, seeds))} "
        f"--num_epochs {s.counts.epochs or GRPO_EPOCHS} {_grpo(s, WARM_START)}"
    )
    return _joint(s, "exp5", "Exp 5, all knobs by GRPO", END_TO_END, flags, len(seeds))


def llm_based(s: Setup) -> Run:
    """Exp 5 with the LLM-based architecture."""
    flags = f"--architecture llm_based --seeds 0 --num_epochs {LLM_EPOCHS} {_grpo(s, LLM_WARM_START)}"
    return _joint(s, "exp5_llm_based", "Exp 5, LLM-based controller", LLM_BASED, flags, 1)


def expected_accuracy(s: Setup) -> Run:
    """Exp 5 with the architecture that expects accuracies."""
    seeds, epochs = s.counts.seeds, s.counts.epochs or WARM_START
    flags = (
        f"--architecture accuracy --seeds {' '.join(map(str, seeds))} --warm_start {epochs} "
        f"--hidden_dim {ACCURACY_WIDTH}"
    )
    return _joint(s, "exp5_accuracy", "Exp 5, expected accuracies", ACCURACY, flags, len(seeds))


def adaptive(
    s: Setup, name: str, controller: str, *, model: str = "{model}", budgets_ms: tuple[int, ...] = ()
) -> Run:
    """Return Exp 8 with a controller; `name` distinguishes the result files of models and controllers."""
    budgets_ms = budgets_ms or ANSWERED_MS[s.place]
    path, count = f"results/adaptive_inference/{name or 'pocket'}_{s.place}.json", s.counts.requests
    return s.run(
        *("exp8", "Exp 8, requests within budgets", f"{CONTROLLER}/test_adaptive_inference.py"),
        f"--model_path {model} --controller_path {s.checkpoint(controller)} --dataset {NAMES} "
        f"--num_samples {count} --latency_budget {' '.join(map(str, budgets_ms))} "
        f"{s.published(f'--device {s.device}')} --output_path {path} {_placed(s)}",
        (path, str(Path(path).with_suffix(".parquet"))),
        counts=f"{count} requests at each of {len(budgets_ms)} budgets",
        about_ms=RATES_MS["calibration"] + count * len(budgets_ms) * RATES_MS["answer within a budget"],
    )


def judge(s: Setup) -> Run:
    """The controllers and baselines on recorded answers, on times that the setup's estimator predicts."""
    c, folder = s.counts, f"results/evaluate/pocket_{s.place}"
    learned = " ".join(s.checkpoint(file) for file in (SECOND_STAGE, END_TO_END, SUPERVISED))
    judged, twins = s.results("val"), ANSWERS["twin"]
    if s.is_cpus:
        judged, twins = TEST_ANSWERS["test"], TEST_ANSWERS["test_twin"]
    return s.run(
        *("judge", "controllers against baselines", "evaluate"),
        f"--results_dir {judged} "
        f"--train_results_dir {s.results('train') if s.is_published else ANSWERS['train']} "
        f"--twin_results_dir {twins} --latency_estimator_path {s.checkpoint(ESTIMATOR)} "
        f"{s.own(f'--model {{model}} --device {s.device}')} "
        f"--policies {learned} {f'{ACCURACY} {QUEUE}' if s.is_cpus else ''} "
        f"table best_static {s.published('only_tier only_top_k only_num_blocks')} random knn "
        f"linucb --budgets {' '.join(map(str, JUDGED_MS[s.place]))} --time_price {TIME_PRICE[s.place]} "
        f"{f'--under_load {LEARNED_UNDER_LOAD}' if s.is_cpus else ''} "
        f"{s.own(f'--data_dir {{data}} --draws {c.draws} --shuffles {c.shuffles}')} --output_dir {folder}",
        (f"{folder}/judge.json", f"{folder}/judge.html"),
        counts=f"{c.val} questions each, {c.draws} resamples",
        about_ms=_looked_ms(c.val, c.val_pictures) + RATES_MS["statistics"],
    )


def _placed(s: Setup) -> str:
    """Flags of everything that answers questions in a folder of its own; the repository's have the defaults."""
    return s.own(f"--device {s.device} --data_dir {{data}} --max_new_tokens {s.counts.max_new_tokens}")


def _learned(s: Setup) -> str:
    """Flags of every training on the core experiment's results."""
    return (
        f"--results_dir {s.results('train')} {NAMED} --latency_estimator_path {s.checkpoint(ESTIMATOR)} "
        f"{s.own(f'--data_dir {{data}} --device {s.device}')}"
    )


def _stage(s: Setup, name: str, title: str, file: str, flags: str, about_ms: float) -> Run:
    folder = Path(s.checkpoint(file)).parent
    return s.run(
        *(name, title, f"{CONTROLLER}/train_two_stage_controller.py"),
        f"{_learned(s)} --output_dir {folder.parent} --stage {folder.name} {flags}",
        with_report(s.checkpoint(file)),
        counts=_rests_on(s.counts),
        about_ms=about_ms,
    )


def _joint(s: Setup, name: str, title: str, file: str, flags: str, seeds: int) -> Run:
    return s.run(
        *(name, title, f"{CONTROLLER}/train_controller_v2.py"),
        f"{_learned(s)} --output_dir {Path(s.checkpoint(file)).parent} {flags}",
        with_report(s.checkpoint(file)),
        counts=f"{_rests_on(s.counts)}, {seeds} seeds",
        about_ms=seeds * _TRAINED_MS,
    )


def _rests_on(c: Counts) -> str:
    return f"{c.train} questions each" + (f", {c.epochs} epochs" if c.epochs else "")


def _grpo(s: Setup, warm_start: int) -> str:
    literal = "--warm_start_values literal" if s.is_gpus else ""
    return f"{s.price} {GRPO_RECIPE} --warm_start {s.counts.epochs or warm_start} {literal}"


def _looked_ms(questions: int, pictures: int) -> float:
    return len(GENERATED) * min(questions, pictures) * RATES_MS["picture looked at"]


def with_report(file: str) -> tuple[str, ...]:
    """A checkpoint and the report beside it."""
    return (file, str(Path(file).with_name("report.json")))


def parquet(folder: str) -> tuple[str, ...]:
    """The files of a core experiment."""
    return tuple(f"{folder}/{name}.parquet" for name in GENERATED)
