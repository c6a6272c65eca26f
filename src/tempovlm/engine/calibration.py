"""Measures the latency of every setting on this machine, once for each machine and model, and stores it.

It times whole answers of the engine, as they are served, on generated pictures, with the settings in a
shuffled order so that a slow moment does not affect one setting alone.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.machine import machine_lock, warn_if_busy
from tempovlm.core.paths import cache_dir
from tempovlm.core.progress import Advance, progress_bar, silent
from tempovlm.core.request import Request
from tempovlm.core.stamp import Stamp
from tempovlm.core.units import now_ms
from tempovlm.engine.cpu.thread_choice import choose_threads
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import fingerprint
from tempovlm.latency.clock import stage_clock
from tempovlm.latency.profile import (
    IN_FLIGHT,
    LatencyProfile,
    Measurement,
    OutputLength,
    SharedMeasurement,
    load_profile,
)

PASSES = 4
"""Timed answers for each setting."""

LIMIT_MS = 55_000.0
"""No pass begins that would end later than this."""

MIN_PASSES = 2
"""Fewer passes leave no residuals to compute a quantile of."""

WARM_UP_ROUNDS = 2

SHARED_BURSTS = 4
"""Timed bursts of each number of requests at once."""

PICTURE_SIZES = ((448, 336), (336, 448), (448, 336), (448, 448), (512, 384), (448, 256))
"""Widths and heights of the test bed's pictures, and of typical pictures from phones and the web."""

QUESTIONS = (
    "what does the sign say?",
    "what color is the car?",
    "how many people are there in the picture?",
    "is there a dog to the left of the house?",
    "which of these is shown? (A) circle (B) square (C) triangle",
    "what is the price of the largest item on the label next to the door?",
)

FAR_MS = 1e9
"""A budget within which every answer ends."""

_log = logging.getLogger("tempovlm")


def obtain_profile(
    engine: Engine,
    stamp: Stamp,
    output: OutputLength,
    *,
    force: bool = False,
    progress: bool = True,
    pictures: Sequence[Any] = (),
) -> LatencyProfile:
    """Load the profile of this machine and model, or measure one and store it if the cache is writable.

    One process measures at a time; one that waited uses the stored result, unless it measures on own `pictures`.
    """
    stored = None if force else stored_profile(engine, stamp, output)
    if stored is not None:
        return stored
    with machine_lock() as waited:
        stored = stored_profile(engine, stamp, output) if waited and not pictures else None
        if stored is not None:
            return stored
        busy = warn_if_busy(
            "the calibration will be slow and wide, run `tempovlm calibrate --force` when it is idle"
        )
        with progress_bar("measuring what each setting takes on this machine", show=progress) as advance:
            threads = choose_threads(engine, sample_requests(0, output.upper, pictures))
            measurements = measure(engine, output, advance=advance, pictures=pictures)
        about = (busy, stamp.to_json(), threads, measure_shared(engine, output, pictures=pictures))
        profile = LatencyProfile(fingerprint(stamp), engine.space, output, measurements, *about)
        try:
            profile.save(profile_path(stamp))
        except UserError as error:
            _log.warning("%s; the calibration is kept in memory", error)
    return profile


def stored_profile(engine: Engine, stamp: Stamp, output: OutputLength) -> LatencyProfile | None:
    """Load the profile in the cache, with tables for an output length; None if there is none to use.

    The engine has its threads from then on. For a subset of the settings that was not measured by itself, its part
    of the profile of all is taken.
    """
    space, whole = engine.space, engine.whole
    found = load_profile(profile_path(stamp), space, fingerprint(stamp), output)
    if found is None and whole != space:
        of_whole = replace(stamp, knob_space=whole.fingerprint)
        larger = load_profile(profile_path(of_whole), whole, fingerprint(of_whole), output)
        found = None if larger is None else larger.part(space)
    if found is not None and engine.runner.stages is not None:
        engine.runner.stages.crew.use(found.threads)
    return found


def profile_path(stamp: Stamp) -> Path:
    """Return the file that holds the profile of this machine and model."""
    return cache_dir() / "profiles" / f"{fingerprint(stamp)}.json"


def measure(
    engine: Engine,
    output: OutputLength,
    *,
    passes: int = PASSES,
    limit_ms: float = LIMIT_MS,
    seed: int = 0,
    advance: Advance = silent,
    pictures: Sequence[Any] = (),
) -> tuple[Measurement, ...]:
    """Run one warm-up pass and up to `passes` timed passes over all settings; at least `MIN_PASSES`.

    On `pictures`; without any, on some that are made.
    """
    start_ms, pass_ms = now_ms(), 0.0
    order, requests = random.Random(seed), sample_requests(seed, output.upper, pictures)
    indices = list(range(len(engine.space)))
    measured: list[Measurement] = []
    total = len(indices) * (passes + 1)
    for number in range(passes + 1):
        late = now_ms() - start_ms + pass_ms > limit_ms
        if late and number > MIN_PASSES:
            break
        pass_start_ms = now_ms()
        order.shuffle(indices)
        for done, index in enumerate(indices):
            measurement = measure_once(engine, next(requests), index)
            if number:
                measured.append(measurement)
            advance(number * len(indices) + done + 1, total)
        pass_ms = now_ms() - pass_start_ms
    return tuple(measured)


def measure_once(engine: Engine, request: Request, index: int) -> Measurement:
    """Time one answer at a setting, with a deadline far away: it waits for the device where such answers do."""
    request = replace(request, budget_ms=FAR_MS)
    clock = stage_clock(engine.device)
    engine.runner.open(request)
    open_ms = clock.elapsed_ms()
    with engine.runner.measured():
        answer = engine.answer(request, Guard.fixed(engine.space.settings[index], engine.space))
    timings_ms = answer.timings_ms
    total_ms = timings_ms["total"] - timings_ms["queue"]
    return Measurement(
        setting=index,
        total_ms=total_ms,
        prefix_ms=total_ms - timings_ms["prefill"] - timings_ms["decode"],
        open_ms=open_ms,
        step_ms=answer.step_ms,
        num_output_tokens=answer.num_output_tokens,
    )


def measure_shared(
    engine: Engine, output: OutputLength, *, seed: int = 0, pictures: Sequence[Any] = ()
) -> tuple[SharedMeasurement, ...]:
    """Time requests that are answered at once, at the cheapest and the native setting; nothing without rows."""
    company, space = engine.company, engine.space
    if company is None or not company.has_rows:
        return ()
    requests, found = sample_requests(seed, max(output.upper, 2), pictures), []
    for knobs in dict.fromkeys((space.cheapest, space.native)):
        for in_flight in IN_FLIGHT * (SHARED_BURSTS + 1):
            guard = Guard.fixed(knobs, space)
            with engine.runner.measured():
                answers = company.answer_all([(next(requests), guard) for _ in range(in_flight)])
            steps_ms = [step for one in answers for step in one.step_ms]
            first_ms = max(one.ttft_ms or 0.0 for one in answers) / in_flight
            step_ms = float(np.median(steps_ms)) if steps_ms else 0.0
            found.append(
                SharedMeasurement(
                    setting=space.index(knobs), in_flight=in_flight, first_ms=first_ms, step_ms=step_ms
                )
            )
    per_setting = len(IN_FLIGHT) * (SHARED_BURSTS + 1)
    return tuple(one for i, one in enumerate(found) if i % per_setting >= len(IN_FLIGHT))  # the first ones warm up


def warm_up(engine: Engine, *, progress: bool = False) -> None:
    """Answer at the cheapest and the native setting, so that later answers include no first-time work.

    On CUDA the graphs of all settings are captured first.
    """
    if engine.device.type == "cuda":
        with progress_bar("capturing graphs", show=progress) as advance:
            engine.warmup(advance=advance)
    requests = sample_requests(seed=1, max_new_tokens=3)
    for _ in range(WARM_UP_ROUNDS):
        for knobs in (engine.space.cheapest, engine.space.native):
            engine.answer(next(requests), Guard.fixed(knobs, engine.space))


def sample_requests(seed: int, max_new_tokens: int, pictures: Sequence[Any] = ()) -> Iterator[Request]:
    """Yield questions about pictures without end; answers end by themselves or at the cap.

    Where no pictures are given they are made, of the usual sizes, each once in a process.
    """
    draw = random.Random(seed)
    while True:
        if pictures:
            picture = draw.choice(pictures)
        else:
            i = draw.randrange(len(PICTURE_SIZES))
            picture = smooth_noise(PICTURE_SIZES[i], seed + i, "PNG" if i % 2 else "JPEG")
        yield Request(images=(picture,), question=draw.choice(QUESTIONS), max_new_tokens=max_new_tokens)


@cache
def smooth_noise(size: tuple[int, int], seed: int, encoding: str) -> bytes:
    """Encode a picture of coloured blobs under fine noise, which takes about as long to decode as a photo."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noise = rng.integers(-3, 4, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(blobs, dtype=np.int64) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoding, compress_level=1)  # slower levels take as long to decode
    return buffer.getvalue()
