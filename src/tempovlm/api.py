"""The public entry point: `load` a model, `answer` within a budget.

Importing this module does not import torch, because threads and their wait policy must be set before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.checks import PATH_SHOWN, checked_flag, checked_megabytes, checked_text, wrong_argument
from tempovlm.core.decode_dtype import Backend, DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.paths import exists_as, expanded
from tempovlm.core.plan import Ranking, find_ranking
from tempovlm.core.request import (
    Answer,
    Request,
    check_budget_ms,
    check_waited_ms,
    log_answer,
    request_of,
    requests_of,
)
from tempovlm.core.units import now_ms
from tempovlm.data.styles import check_style
from tempovlm.engine.forks import ProcessLock
from tempovlm.engine.threads import most_of_a_stage, pick_device, pick_dtype, start_torch

if TYPE_CHECKING:
    import torch

    from tempovlm.control.guard import Guard
    from tempovlm.control.lengths import Lengths
    from tempovlm.control.policy import Policy
    from tempovlm.core.stamp import Stamp
    from tempovlm.engine.engine import Engine
    from tempovlm.engine.transcript import Token
    from tempovlm.latency.profile import LatencyProfile, OutputLength
    from tempovlm.model.family import VisionLanguageModel
    from tempovlm.model.files.card import ModelCard

POLICIES = ("auto", "table", "fixed")

_LARGE_BYTES = 1 << 30
"""Show a bar while loading weights larger than this many bytes."""

_log = logging.getLogger("tempovlm")


def load(
    model: str | Path = "pocket",
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    weights: DecodeDtype = "bf16",
    policy: str | Path | Policy = "auto",
    threads: int | None = None,
    exact: bool | None = None,
    calibrate: bool = True,
    warmup: bool = True,
    progress: bool = True,
    feature_cache_mb: float = 0.0,
    backend: Backend = "auto",
    budget_ms: float | None = None,
    space: KnobSpace | Mapping[str, Iterable[Any]] | None = None,
    ranking: str | Path | Sequence[int] | Ranking | None = None,
) -> TempoVLM:
    """Load a model and everything it needs to answer within a budget.

    Args:
        model: `pocket` (part of the package), a local folder, or a hub id, which is downloaded once.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        dtype: type of the weights. Default: float32 on a CPU, bfloat16 on CUDA.
        weights: what decode steps read: `bf16`, as loaded, or (CUDA only) one-byte copies, `fp8` or `int8`.
        policy: `auto` (the model's own controller for this kind of device, else the table), `table` (the most
            accurate that fits), `table:my` (tuned on my.csv), `fixed`, a path, `file.py:Class`, or an object.
        threads: the most of a stage on a CPU (docs/design.md has the default); a calibration finds the fastest.
        exact: True prepares pictures in float32, as published; False (the pocket's default) in uint8, much faster
            on a CPU and within about one of 255 levels. On CUDA True adds the published padding rule.
        calibrate: measure this machine at the first budget if no profile is stored.
        warmup: answer a few times first, so that the first answer is as fast as later ones.
        progress: show a bar on stderr.
        feature_cache_mb: megabytes for a cache of picture features; 0 turns it off.
        backend: `kernels` (of a CPU; in bfloat16 if it can and dtype is not given), `torch`, or `auto`, which can.
        budget_ms: the budget of every request that gives none, milliseconds.
        space: the settings to choose among, such as `{"tier": ["low", "high"]}`. Default: all of the model's.
        ranking: the blocks, the most important first, or a JSON file (docs/adding.md); accuracies are assumed.

    Raises:
        UserError: unknown model, device or policy, damaged folder, another model's controller, or wrong type.
    """
    check_policy(policy)
    given: dict[str, Any] = {"exact": exact, "feature_cache_mb": feature_cache_mb}
    rest = {"weights": weights, "device": device, "calibrate": calibrate, "warmup": warmup, "progress": progress}
    _check_types(given | rest | {"budget_ms": budget_ms, "backend": backend})
    folder, name = model_folder(model), "pocket" if model == "pocket" else expanded(model).name
    start_torch(threads)
    from tempovlm.engine.calibration import warm_up
    from tempovlm.engine.cpu.stages import check_backend

    where = pick_device(device)
    given |= {"exact": name != "pocket" if exact is None else exact, "decode_dtype": weights, "name": name}
    given |= {"backend": check_backend(backend), "dtype": dtype, "most_threads": most_of_a_stage(threads)}
    engine, card = _load_engine(folder, where, space, ranking, given, progress=progress)
    chosen = _find_policy(policy, engine, card, folder)
    vlm = TempoVLM(engine, card, policy=chosen, may_calibrate=calibrate, progress=progress, budget_ms=budget_ms)
    if warmup:
        warm_up(engine, progress=progress)
    return vlm


class TempoVLM:
    """A loaded model, its policy and this machine's latency profile. Thread-safe: one calibrates, others wait."""

    def __init__(
        self,
        engine: Engine,
        card: ModelCard,
        *,
        policy: str | Path | Policy = "auto",
        may_calibrate: bool = True,
        progress: bool = True,
        budget_ms: float | None = None,
    ) -> None:
        self.engine = engine
        self.card = card
        self.weights_hash = engine.weights_hash
        self.budget_ms = None if budget_ms is None else check_budget_ms(budget_ms)
        self._wanted = policy
        self._may_calibrate, self._progress, self._lock = may_calibrate, progress, ProcessLock()
        self._profile: LatencyProfile | None = None
        self._profiled_threads: int | None = None
        self._guard: Guard | None = None
        self._fixed_guards: dict[int, Guard] = {}

    def __repr__(self) -> str:
        run, wanted = self.engine.runner, self._wanted
        policy = wanted if isinstance(wanted, str | Path) else wanted.name
        budget = "no budget" if self.budget_ms is None else f"budget {self.budget_ms:g} ms"
        where = f"{run.device}, {str(run.dtype).removeprefix('torch.')}"
        where += "" if run.backend is None else f", backend {run.backend}"
        return f"TempoVLM({self.engine.name}, {where}, {len(self.space)} settings, policy {policy}, {budget})"

    @property
    def space(self) -> KnobSpace:
        """The legal settings."""
        return self.engine.space

    @property
    def ranking(self) -> Ranking:
        """The blocks by importance; a smaller depth drops the last ones."""
        return self.engine.ranking

    @property
    def profile(self) -> LatencyProfile | None:
        """The latency profile of this machine; None until it was measured or found in the cache."""
        with self._lock:
            if self._profiled_threads != self.engine.threads:  # a fork can leave fewer
                from tempovlm.engine.calibration import stored_profile

                self._profiled_threads, self._guard = self.engine.threads, None
                self._profile = stored_profile(self.engine, self.stamp(), self.output_length)
            return self._profile

    @property
    def accuracy(self) -> dict[KnobConfig, float]:
        """Expected accuracy of every setting: from the model card, else from a formula that prefers compute."""
        from tempovlm.control.policies import prior_accuracy

        return self.card.accuracy or prior_accuracy(self.space)

    @property
    def output_length(self) -> OutputLength:
        """Distribution of the answer's length in tokens that predictions assume."""
        from tempovlm.latency.profile import OutputLength

        counts = self.card.length_counts
        return OutputLength(counts) if counts else OutputLength()

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths that answers may have, which plans go by."""
        from tempovlm.control.lengths import Lengths
        from tempovlm.latency.profile import OutputLength

        return Lengths({style: OutputLength(counts) for style, counts in self.card.length_by_style.items()})

    def stamp(self, data_source: str | None = None) -> Stamp:
        """Return the stamp of figures measured with this model on this machine."""
        from tempovlm.engine.environment import collect_stamp

        runner = self.engine.runner
        return collect_stamp(
            model=self.engine.name,
            weights_hash=self.weights_hash,
            space=self.space,
            device=runner.device,
            dtype=runner.dtype,
            data_source=data_source,
            decode_dtype=runner.decode_dtype,
            kernels="" if runner.stages is None else runner.stages.name,
            threads=self.engine.threads,
            ranking=None if self.card.ran(self.ranking, self.space) else self.ranking.digest,
        )

    def calibrate(self, force: bool = False, pictures: Sequence[str | Path] = ()) -> LatencyProfile:
        """Measure this machine, or take what is stored unless `force` is set.

        Args:
            force: measure again, and replace what is stored.
            pictures: files to measure on, always anew; by default some are made.
        """
        from tempovlm.engine.calibration import obtain_profile

        with self._lock:
            if force or pictures or self.profile is None:
                self._profiled_threads, self._guard = self.engine.threads, None
                # `self.profile` just looked at the stored file and reported damage, so do not read it again.
                given: dict[str, Any] = {"progress": self._progress, "pictures": pictures}
                self._profile = obtain_profile(self.engine, self.stamp(), self.output_length, force=True, **given)
            assert self._profile is not None
            return self._profile

    def answer(
        self,
        image: Any,
        question: str,
        budget_ms: float | None = None,
        *,
        knobs: KnobConfig | None = None,
        tier: str | None = None,
        top_k: int | None = None,
        num_blocks: int | None = None,
        cancel: Callable[[], bool] | None = None,
        on_token: Callable[[Token], object] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question about a picture within a budget.

        Args:
            image: a path, encoded bytes, a PIL image or its pixels (H, W, 3) uint8; None asks without a picture.
            question: plain text.
            budget_ms: milliseconds from this call to the last token. Default: the model's `budget_ms`; if that is
                None too, the native setting runs.
            knobs: the setting to run, whatever the budget.
            tier: fixes this knob. The policy chooses the others if there is a budget; else they are native.
            top_k: fixes this knob.
            num_blocks: fixes this knob.
            cancel: called while waiting and between pieces of work; if it returns True, the answer ends there.
            on_token: called with each token as it comes, while others wait: it must return at once. `stream` lets
                others pass between two tokens.
            **options: other fields of `Request`: style, max_new_tokens, on_deadline, temperature and others.

        Raises:
            UserError: invalid input; the message names it.
        """
        _check_callable("cancel", cancel, "without arguments")
        _check_callable("on_token", on_token, "of a token")
        request = request_of(image, question, self._budget_ms(budget_ms), options)
        guard = self.guard_for(request, knobs, tier, top_k, num_blocks)
        return self._learn(request, self.engine.answer(request, guard, cancel, on_token))

    async def answer_async(
        self, image: Any, question: str, budget_ms: float | None = None, **options: Any
    ) -> Answer:
        """As `answer`, beside an event loop: in a thread, whose waiting counts.

        The budget runs from this call on. Requests pass one at a time, the earliest deadline first.
        """
        accepted_ms = now_ms()

        def answer() -> Answer:
            waited_ms = check_waited_ms(options.get("waited_ms", 0.0)) + now_ms() - accepted_ms
            return self.answer(image, question, budget_ms, **(options | {"waited_ms": waited_ms}))

        return await asyncio.to_thread(answer)

    def stream(
        self,
        image: Any,
        question: str,
        budget_ms: float | None = None,
        *,
        knobs: KnobConfig | None = None,
        tier: str | None = None,
        top_k: int | None = None,
        num_blocks: int | None = None,
        cancel: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Iterator[Token | Answer]:
        """Like `answer`, but yield tokens as they come and the answer last.

        `cancel` is called while waiting and between pieces of work; if it returns True, the answer ends there.
        """
        _check_callable("cancel", cancel, "without arguments")
        request = request_of(image, question, self._budget_ms(budget_ms), options)
        guard = self.guard_for(request, knobs, tier, top_k, num_blocks)
        return self._heard(request, self.engine.stream(request, guard, cancel))

    def answer_batch(
        self,
        requests: Sequence[Request | tuple[Any, str]],
        budget_ms: float | None = None,
        *,
        knobs: KnobConfig | None = None,
        tier: str | None = None,
        top_k: int | None = None,
        num_blocks: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer several requests; each answer equals that of the request alone. Returned in order.

        Those without a budget run together. Those with one join each other on CUDA where they are in time, and run
        one after another elsewhere; the earliest deadline first.

        Args:
            requests: `Request` values, or pairs of image and question, which use `budget_ms` and `options`.
            budget_ms: milliseconds from this call to a pair's last token. Default: the model's `budget_ms`, which
                is also that of a `Request` without one.
            knobs: the setting for all of them. Default: each request's own budget decides.
            tier: fixes this knob for all of them.
            top_k: fixes this knob.
            num_blocks: fixes this knob.
            **options: other fields of `Request` for the pairs.

        Raises:
            UserError: invalid input; the message names it.
        """
        from tempovlm.engine.batching import answer_batch

        default_ms = self.budget_ms
        given = requests_of(requests, self._budget_ms(budget_ms), options)
        ready = [one if one.budget_ms is not None else replace(one, budget_ms=default_ms) for one in given]
        answers = answer_batch(
            self.engine, ready, lambda request: self.guard_for(request, knobs, tier, top_k, num_blocks)
        )
        return [self._learn(request, answer) for request, answer in zip(ready, answers, strict=True)]

    def _budget_ms(self, budget_ms: float | None) -> float | None:
        return self.budget_ms if budget_ms is None else budget_ms

    def _learn(self, request: Request, answer: Answer) -> Answer:
        """Count and log an answer; return it."""
        self.lengths.observe(request, answer)
        log_answer(answer)
        return answer

    def _heard(self, request: Request, items: Generator[Token | Answer, None, None]) -> Iterator[Token | Answer]:
        with closing(items):
            for item in items:
                yield self._learn(request, item) if isinstance(item, Answer) else item

    def check_price(self, price_per_ms: float, name: str = "price_per_ms") -> None:
        """Raise a `UserError` if time has a price and the policy's scores cannot be weighed against it."""
        from tempovlm.control.guard import no_price
        from tempovlm.control.policy import Policy

        wanted = self._wanted
        if price_per_ms and self._chooses and isinstance(wanted, Policy) and wanted.scale != "accuracy":
            raise no_price(wanted.name, price_per_ms, name)

    def guard_for(
        self,
        request: Request,
        knobs: KnobConfig | None = None,
        tier: str | None = None,
        top_k: int | None = None,
        num_blocks: int | None = None,
    ) -> Guard:
        """Return the guard of a request: around the policy, or of one setting if given or without a budget."""
        check_style(request.style)
        given: dict[str, Any] = dict(zip(KNOBS, (tier, top_k, num_blocks), strict=True))
        bound = {name: value for name, value in given.items() if value is not None}
        guard = self._guard_of_any(request, knobs, bound).for_lengths(self.lengths.of(request))
        if not bound or len(guard.choices) == 1:
            return guard
        return guard.only(i for i, one in enumerate(self.space) if replace(one, **bound) == one)

    def is_quick(self, request: Request, tier: str | None = None) -> bool:
        """Whether `guard_for` has nothing to compute: tables for answers of other lengths take tens of ms."""
        bound = {} if tier is None else {"tier": tier}
        return self._guard_of_any(request, None, bound).has_lengths(self.lengths.of(request))

    def _guard_of_any(self, request: Request, knobs: KnobConfig | None, bound: Mapping[str, Any]) -> Guard:
        """Return the guard of answers of any length; of one setting, or of all, whatever knobs are bound."""
        if knobs is not None:
            return self._fixed(knobs)
        filled = self._base
        if bound:
            filled = replace(filled, **bound)
            self.space.validate(filled)
        if request.budget_ms is None or len(bound) == len(KNOBS) or not self._chooses:
            return self._fixed(filled)
        return self._policy_guard()

    @property
    def _base(self) -> KnobConfig:
        """The setting that runs without a choice: that of a fixed policy, else the native one."""
        from tempovlm.control.policies import FixedPolicy

        return self._wanted.knobs if isinstance(self._wanted, FixedPolicy) else self.space.native

    @property
    def _chooses(self) -> bool:
        from tempovlm.control.policies import FixedPolicy

        if self._wanted == "fixed" or isinstance(self._wanted, FixedPolicy):
            return False
        if not self._may_calibrate and self.profile is None:
            _log.warning("the machine is not calibrated, so no setting can be chosen; running %s", self._base)
            return False
        return True

    def _fixed(self, knobs: KnobConfig) -> Guard:
        index, profile = self.space.index(knobs), self.profile
        guard = self._fixed_guards.get(index)
        if guard is None or guard.profile is not profile:
            from tempovlm.control.guard import Guard

            guard = self._fixed_guards[index] = Guard.fixed(knobs, self.space, profile)
        return guard

    def _policy_guard(self) -> Guard:
        """Return the guard around the policy; measures the machine first if there is no profile."""
        with self._lock:
            profile = self.profile or self.calibrate()
            if self._guard is None:
                from tempovlm.engine.glance import guarded

                wanted = self._wanted
                policy = self._table() if isinstance(wanted, str | Path) else wanted
                self._guard = guarded(self.engine.runner, self.space, policy, profile)
            return self._guard

    def _table(self) -> Policy:
        """The policy that goes by the model's accuracies; warns where nobody has measured them."""
        from tempovlm.control.policies import TablePolicy, assumed_table

        if self.card.accuracy:
            return TablePolicy(self.space, self.card.accuracy)
        hint = "to measure them on your own questions, run `tempovlm tune FILE --model MODEL`"
        if not self.card.ran(self.ranking, self.space):
            hint = "the model's own are of another ranking of its blocks"
        what = "%s: accuracies are assumed, not measured: more compute is taken to be better; %s"
        _log.warning(what, self.engine.name, hint)
        return assumed_table(self.space)


def _check_callable(name: str, value: object, kind: str) -> None:
    if value is not None and not callable(value):
        raise UserError(f"{name}: must be a function {kind}, not {type(value).__name__}")


def _check_types(given: dict[str, Any]) -> None:
    """Raise a `UserError` that names the first argument of `load` that has the wrong type."""
    for name, value in given.items():
        if name in ("device", "weights", "backend"):
            checked_text(name, value)
        elif name == "feature_cache_mb":
            checked_megabytes(value)
        elif name in ("exact", "budget_ms") and value is None:
            continue
        elif name == "budget_ms":
            check_budget_ms(value)
        else:
            checked_flag(name, value)


def model_folder(model: str | Path) -> Path:
    """Return the folder of a model given by name, path or hub id; downloads a hub id that is not cached.

    Raises:
        UserError: there is no such model.
    """
    if not isinstance(model, Path):
        model = checked_text("model", model)
    embedded = Path(str(resources.files("tempovlm") / "pocket"))
    if model == "pocket":
        if not (embedded / "config.json").is_file():
            raise UserError(f"{embedded}: the embedded model is missing; install the package again")
        return embedded
    folder = expanded(model)
    if exists_as(folder, Path.is_dir):
        return folder
    from tempovlm.model.files.hub import fetch, is_hub_id

    if is_hub_id(str(model)):
        return fetch(str(model))
    raise wrong_argument(
        "model",
        str(model),
        "no such model and no such folder; use pocket, which is embedded, a hub id such as "
        "allenai/MolmoE-1B-0924, or a local folder with config.json, tokenizer.json and safetensors files",
        PATH_SHOWN,
    )


def _load_engine(
    folder: Path,
    device: torch.device,
    space: KnobSpace | Mapping[str, Iterable[Any]] | None,
    ranking: str | Path | Sequence[int] | Ranking | None,
    options: dict[str, Any],
    *,
    progress: bool,
) -> tuple[Engine, ModelCard]:
    """The engine and the card of a folder, by a subset of the settings and a ranking where they are given."""
    from tempovlm.core.progress import progress_bar
    from tempovlm.engine.cpu.stages import pick_precision, to_compile
    from tempovlm.engine.engine import Engine
    from tempovlm.model.files.card import ModelCard
    from tempovlm.model.weights import read_config, read_tokenizer, weights_hash

    config = read_config(folder)
    whole = KnobSpace.for_model(config.shape)
    card, part = ModelCard.read(folder, whole), whole if space is None else whole.subset(space)
    order = card.ranking if ranking is None else find_ranking(ranking, config.shape.num_blocks)
    tokenizer = read_tokenizer(folder, config)
    backend, dtype = options.pop("backend"), options.pop("dtype")
    network = _load_weights(folder, device, pick_dtype(dtype, device), options["name"], progress=progress)
    compiles = progress and to_compile(backend, dtype, network)
    with progress_bar("compiling the kernels for this processor, once", show=compiles):
        options["precision"] = pick_precision(backend, dtype, network)
    given = {"space": part, "ranking": order, "option_letters": card.option_letters, **options}
    engine = Engine(network, tokenizer, weights_hash=weights_hash(folder), **given)
    return engine, card.for_ranking(engine.ranking, part)


def _load_weights(
    folder: Path, device: torch.device, dtype: torch.dtype, name: str, *, progress: bool
) -> VisionLanguageModel:
    """The model of a folder; a bar is shown where that takes long."""
    from tempovlm.core.progress import progress_bar
    from tempovlm.model.files.hub import checkpoint_files
    from tempovlm.model.weights import load_model

    is_large = sum(path.stat().st_size for path in checkpoint_files(folder)) > _LARGE_BYTES
    with progress_bar(f"loading {name}", show=progress and is_large) as advance:
        return load_model(folder, device, dtype, advance)


def check_policy(policy: str | Path | Policy) -> None:
    """Raise a `UserError` unless the policy is one of `POLICIES`, a file, an object, or names a class."""
    from tempovlm.control.own_policy import is_own_policy
    from tempovlm.control.policies import is_tuned
    from tempovlm.control.policy import Policy

    if is_tuned(policy) or is_own_policy(policy):
        return
    if isinstance(policy, type):
        raise UserError(
            f"policy {policy.__name__}: a class, where an object is due; call it, or name it as "
            f"'{policy.__module__}:{policy.__name__}'"
        )
    if not isinstance(policy, str | Path | Policy):
        raise UserError(
            f"a value of type {type(policy).__name__} is no policy; choose from {', '.join(POLICIES)}, or give "
            "an object of a subclass of tempovlm.control.policy.Policy"
        )
    if isinstance(policy, str | Path) and policy not in POLICIES and not exists_as(Path(policy), Path.is_file):
        raise wrong_argument(
            "policy",
            str(policy),
            f"no such policy and no such file; choose from {', '.join(POLICIES)}, or give "
            "table:NAME of questions that you tuned on, the checkpoint of a controller, or module:Class or "
            "file.py:Class of your own",
            PATH_SHOWN,
        )


def _find_policy(
    policy: str | Path | Policy, engine: Engine, card: ModelCard, folder: Path
) -> str | Path | Policy:
    from tempovlm.control.shipped import Chooser, find_policy

    if policy == "auto" and not card.ran(engine.ranking, engine.space):
        return "table"  # a controller, too, learned from answers of other blocks
    run = engine.runner
    parts = (folder, engine.space, run.model, run.tokenizer, engine.weights_hash, run.device.type)
    return find_policy(policy, Chooser(*parts, engine.whole, engine.ranking))
