"""The public way in: `load` a model, `answer` within a budget. Ties the layers together.

Importing this module imports no torch: threads and their wait policy must be set before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.checks import checked_flag, checked_megabytes, checked_text
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.paths import exists_as, expanded
from tempovlm.core.plan import Ranking
from tempovlm.core.request import Answer, Request, request_of, requests_of
from tempovlm.core.weights import Weights
from tempovlm.engine.forks import ProcessLock
from tempovlm.engine.threads import pick_device, pick_dtype, start_torch

if TYPE_CHECKING:
    import torch

    from tempovlm.control.guard import Guard
    from tempovlm.control.policy import Policy
    from tempovlm.core.stamp import Stamp
    from tempovlm.engine.engine import Engine
    from tempovlm.engine.transcript import Token
    from tempovlm.latency.profile import LatencyProfile, OutputLength
    from tempovlm.model.card import ModelCard
    from tempovlm.model.vlm import Molmo

POLICIES = ("auto", "table", "fixed")

_LARGE_BYTES = 1 << 30
"""Weights over this take long enough to load that a bar is shown."""

_log = logging.getLogger("tempovlm")


def load(
    model: str | Path = "pocket",
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    weights: Weights = "bf16",
    policy: str | Path | Policy = "auto",
    threads: int | None = None,
    exact: bool | None = None,
    calibrate: bool = True,
    warmup: bool = True,
    progress: bool = True,
    feature_cache_mb: float = 0.0,
) -> TempoVLM:
    """Load a model and everything that it needs to answer within a budget.

    Args:
        model: `pocket`, which is part of the package, a local folder in the hub's layout, or a hub id such as
            `allenai/MolmoE-1B-0924`, which is downloaded once.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        dtype: of the weights; float32 on a CPU and bfloat16 on CUDA unless told.
        weights: what decode steps read: `bf16`, as loaded, or on CUDA copies in `fp8` or `int8`, half the bytes.
        policy: `auto` (the controller in the model's folder where it has one, else the table), `table` (the most
            accurate setting that fits), `table:my` (tuned on my.csv), `fixed` (native), a checkpoint, an object.
        threads: of a CPU operation, fixed here; unless told, as `TEMPOVLM_THREADS`, `torch.set_num_threads` or
            `OMP_NUM_THREADS` says, else at most two cores; one in a child forked where torch alone was there.
        exact: prepare pictures in float32, as published, or in uint8, within about one of 255 levels of it and
            several times faster on a CPU; the pocket is fast and any other model exact unless told. On CUDA
            pictures are always resized in float32, and exact adds the published padding rule.
        calibrate: measure this machine when the first budget comes and nothing is stored.
        warmup: answer a few times first, so that the first answer is as fast as the tenth.
        progress: show a bar on stderr while loading a large model and while measuring.
        feature_cache_mb: megabytes for features of pictures, so that none is encoded twice; 0 keeps none.

    Raises:
        UserError: no such model, device or policy, a damaged folder, another model's controller, a wrong type.
    """
    check_policy(policy)
    given: dict[str, Any] = {"exact": exact, "feature_cache_mb": feature_cache_mb, "weights": weights}
    _check_types(given | {"device": device, "calibrate": calibrate, "warmup": warmup, "progress": progress})
    folder, name = model_folder(model), "pocket" if model == "pocket" else expanded(model).name
    start_torch(threads)
    from tempovlm.engine.calibration import warm_up
    from tempovlm.engine.engine import Engine
    from tempovlm.model.card import ModelCard
    from tempovlm.model.prompt import Tokenizer
    from tempovlm.model.weights import read_config, weights_hash

    where = pick_device(device)
    dtype = pick_dtype(dtype, where)
    card = ModelCard.read(folder, KnobSpace.for_model(read_config(folder).shape))
    tokenizer = Tokenizer.load(folder / "tokenizer.json", read_config(folder))
    network = _load_weights(folder, where, dtype, name, progress=progress)
    given |= {"exact": name != "pocket" if exact is None else exact, "option_letters": card.option_letters}
    engine, hashed = Engine(network, tokenizer, name=name, ranking=card.ranking, **given), weights_hash(folder)
    chosen = _find_policy(policy, engine, folder, hashed)
    vlm = TempoVLM(engine, card, hashed, policy=chosen, may_calibrate=calibrate, progress=progress)
    if warmup:
        warm_up(engine, progress=progress)
    return vlm


class TempoVLM:
    """A loaded model with its policy and what is known about this machine; of threads one measures it for all."""

    def __init__(
        self,
        engine: Engine,
        card: ModelCard,
        weights: str,
        *,
        policy: str | Path | Policy = "auto",
        may_calibrate: bool = True,
        progress: bool = True,
    ) -> None:
        self.engine = engine
        self.card = card
        self.weights = weights
        self._wanted = policy
        self._may_calibrate, self._progress, self._lock = may_calibrate, progress, ProcessLock()
        self._profile: LatencyProfile | None = None
        self._profiled_threads: int | None = None
        self._guard: Guard | None = None

    @property
    def space(self) -> KnobSpace:
        """The legal settings."""
        return self.engine.space

    @property
    def ranking(self) -> Ranking:
        """The blocks by importance, which depth goes by."""
        return self.engine.ranking

    @property
    def profile(self) -> LatencyProfile | None:
        """What each setting takes on this machine; None until it was measured or found in the cache."""
        with self._lock:
            if self._profiled_threads != self.engine.threads:  # a fork can leave fewer
                from tempovlm.engine.calibration import stored_profile

                self._profiled_threads, self._guard = self.engine.threads, None
                self._profile = stored_profile(self.stamp(), self.space, self.output_length)
            return self._profile

    @property
    def accuracy(self) -> dict[KnobConfig, float]:
        """Expected accuracy of every setting: measured, or ranks by compute where the model has no card."""
        from tempovlm.control.policies import prior_accuracy

        return self.card.accuracy or prior_accuracy(self.space)

    @property
    def output_length(self) -> OutputLength:
        """Generated tokens that predictions assume."""
        from tempovlm.latency.profile import OutputLength

        counts = self.card.length_counts
        return OutputLength(counts) if counts else OutputLength()

    def stamp(self, data_source: str | None = None) -> Stamp:
        """What figures of this model on this machine belong to."""
        from tempovlm.engine.environment import collect_stamp

        runner = self.engine.runner
        return collect_stamp(
            model=self.engine.name,
            weights=self.weights,
            space=self.space,
            device=runner.device,
            dtype=runner.dtype,
            data_source=data_source,
            decode_weights=runner.decode_weights,
            threads=self.engine.threads,
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
                # What is stored was looked at just now, and a damaged file reported: it is not read once more.
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
        **options: Any,
    ) -> Answer:
        """Answer a question about a picture within a budget.

        Args:
            image: a path, encoded bytes, a PIL image or its pixels (H, W, 3) uint8; None asks without a picture.
            question: plain text.
            budget_ms: milliseconds from this call to the last token; None runs the native setting.
            knobs: the setting to run, whatever the budget.
            tier: a single knob. Knobs left out are native without a budget, and chosen by the policy with one.
            top_k: a single knob, likewise.
            num_blocks: a single knob, likewise.
            **options: further fields of `Request`: style, max_new_tokens, on_deadline, temperature and others.

        Raises:
            UserError: wrong input; names it.
        """
        request = request_of(image, question, budget_ms, options)
        return self.engine.answer(request, self.guard_for(request, knobs, tier, top_k, num_blocks))

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
        """As `answer`, but yields tokens as they come and the answer last; `cancel` is asked between tokens."""
        if cancel is not None and not callable(cancel):
            raise UserError(f"cancel: must be a function without arguments, not {type(cancel).__name__}")
        request = request_of(image, question, budget_ms, options)
        guard = self.guard_for(request, knobs, tier, top_k, num_blocks)
        return self.engine.stream(request, guard, cancel)

    def answer_batch(
        self, requests: Sequence[Request | tuple[Any, str]], *, knobs: KnobConfig | None = None, **options: Any
    ) -> list[Answer]:
        """Answer several requests at once, each as it would be answered alone, in order.

        Args:
            requests: `Request` values, or pairs of image and question that take `options`.
            knobs: the setting for all of them; otherwise each request's budget decides.
            **options: fields of `Request` for the pairs.
        """
        from tempovlm.engine.batching import answer_batch

        ready = requests_of(requests, options)
        budgeted = next((one for one in ready if one.budget_ms is not None), None)
        if knobs is None and budgeted is not None:
            return answer_batch(self.engine, ready, self.guard_for(budgeted))
        return answer_batch(self.engine, ready, self._fixed(knobs or self.space.native))

    def check_price(self, price_per_ms: float) -> None:
        """Raise a `UserError` if time has a price and the policy's scores cannot be weighed against it."""
        from tempovlm.control.guard import no_price
        from tempovlm.control.policy import Policy

        wanted = self._wanted
        if price_per_ms and self._chooses and isinstance(wanted, Policy) and wanted.scale != "accuracy":
            raise no_price(wanted.name, price_per_ms)

    def guard_for(
        self,
        request: Request,
        knobs: KnobConfig | None = None,
        tier: str | None = None,
        top_k: int | None = None,
        num_blocks: int | None = None,
    ) -> Guard:
        """Who decides for a request: the policy, or a fixed setting where one is given or there is no budget."""
        if knobs is not None:
            return self._fixed(knobs)
        given: dict[str, Any] = dict(zip(KNOBS, (tier, top_k, num_blocks), strict=True))
        bound = {name: value for name, value in given.items() if value is not None}
        filled = replace(self._base, **bound)
        self.space.validate(filled)
        if request.budget_ms is None or len(bound) == len(KNOBS) or not self._chooses:
            return self._fixed(filled)
        guard = self._policy_guard()
        if not bound:
            return guard
        return guard.only(i for i, one in enumerate(self.space) if replace(one, **bound) == one)

    @property
    def _base(self) -> KnobConfig:
        """The setting where nobody chooses: that of a fixed policy, else the native one."""
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
        from tempovlm.control.guard import Guard

        return Guard.fixed(knobs, self.space, self.profile)

    def _policy_guard(self) -> Guard:
        """The policy within its guard; measures the machine first if nothing is known about it."""
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
        _log.warning(
            "%s: accuracies are assumed, not measured: more compute is taken to be better; to measure them on "
            "your own questions, run `tempovlm tune`",
            self.engine.name,
        )
        return assumed_table(self.space)


def _check_types(given: dict[str, Any]) -> None:
    """Raise a `UserError` that names the first of `load`'s arguments of another type than it takes."""
    for name, value in given.items():
        if name in ("device", "weights"):
            checked_text(f"--{name}", value)
        elif name == "feature_cache_mb":
            checked_megabytes(value)
        elif name != "exact" or value is not None:
            checked_flag(name, value)


def model_folder(model: str | Path) -> Path:
    """The folder of a model's name, path or hub id; a hub id is downloaded where the hub's cache lacks it.

    Raises:
        UserError: there is no such model.
    """
    if not isinstance(model, Path):
        model = checked_text("--model", model)
    embedded = Path(str(resources.files("tempovlm") / "pocket"))
    if model == "pocket":
        if not (embedded / "config.json").is_file():
            raise UserError(f"{embedded}: the embedded model is missing; install the package again")
        return embedded
    folder = expanded(model)
    if exists_as(folder, Path.is_dir):
        return folder
    from tempovlm.model.hub import fetch, is_hub_id

    if is_hub_id(str(model)):
        return fetch(str(model))
    raise UserError(
        f"--model {model}: no such model and no such folder; use pocket, which is embedded, a hub id such as "
        "allenai/MolmoE-1B-0924, or a local folder with config.json, tokenizer.json and safetensors files"
    )


def _load_weights(folder: Path, device: torch.device, dtype: torch.dtype, name: str, *, progress: bool) -> Molmo:
    """The model of a folder; a bar is shown where that takes long."""
    from tempovlm.core.progress import progress_bar
    from tempovlm.model.hub import checkpoint_files
    from tempovlm.model.weights import load_model

    is_large = sum(path.stat().st_size for path in checkpoint_files(folder)) > _LARGE_BYTES
    with progress_bar(f"loading {name}", show=progress and is_large) as advance:
        return load_model(folder, device, dtype, advance)


def check_policy(policy: str | Path | Policy) -> None:
    """Raise a `UserError` unless the policy is one of `POLICIES`, a file or an object."""
    from tempovlm.control.policies import is_tuned
    from tempovlm.control.policy import Policy

    if is_tuned(policy):
        return
    if not isinstance(policy, str | Path | Policy):
        raise UserError(f"a {type(policy).__name__} is no policy; choose from {', '.join(POLICIES)}")
    if isinstance(policy, str | Path) and policy not in POLICIES and not exists_as(Path(policy), Path.is_file):
        raise UserError(
            f"--policy {policy}: no such policy and no such file; choose from {', '.join(POLICIES)}, or give "
            "table:NAME of questions that you tuned on, or the checkpoint of a controller"
        )


def _find_policy(policy: str | Path | Policy, engine: Engine, folder: Path, weights: str) -> str | Path | Policy:
    from tempovlm.control.shipped import Chooser, find_policy

    run = engine.runner
    parts = (folder, engine.space, run.model, run.tokenizer, weights, run.device.type)
    return find_policy(policy, Chooser(*parts))
