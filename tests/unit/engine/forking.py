"""Run by `test_forks.py`: forks in many ways after computing, and prints what became of each as one JSON object.

A child that says nothing within the limit is killed and counts as hanging.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

import tempovlm
from tempovlm import UserError
from tempovlm.engine import calibration, forks
from tempovlm.engine.forks import FORKS

LIMIT_S = 20.0
PICTURE = np.zeros((480, 640, 3), np.uint8)
PICTURE[100:300, 150:500] = (200, 40, 40)

small = {"tier": ["medium"], "num_blocks": [8]}
model = tempovlm.load("pocket", device="cpu", threads=2, progress=False, calibrate=False, space=small)
few = {"tier": ["low", "high"], "top_k": [4], "num_blocks": [3, 6]}
other = tempovlm.load(sys.argv[1], device="cpu", threads=2, progress=False, warmup=False, space=few)
asked = "what color is it?"


def ask(_: int = 0) -> str:
    """An answer about several crops, which more than one thread computes."""
    return model.answer(PICTURE, asked).text


def in_child(work: Callable[[], Any]) -> Any:
    """What the work returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found: Any = work()
        except UserError as error:
            found = f"refused: {error}"
        except BaseException as error:  # noqa: BLE001 - told to the parent
            found = f"failed: {error!r}"
        os.write(writer, pickle.dumps(found))
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], LIMIT_S)
    found = pickle.loads(os.read(reader, 1 << 16)) if ready else "hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return found


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def in_pool() -> Any:
    with mp.get_context("fork").Pool(2) as pool:
        try:
            return sorted(set(pool.map_async(ask, range(4)).get(LIMIT_S)))
        except mp.TimeoutError:
            return "hangs"


def in_executor() -> Any:
    pool = ProcessPoolExecutor(2, mp_context=mp.get_context("fork"))
    try:
        return sorted({one.result(LIMIT_S) for one in [pool.submit(ask) for _ in range(4)]})
    except TimeoutError:
        for process in pool._processes.values():
            process.kill()
        return "hangs"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def batch() -> list[str]:
    return [one.text for one in model.answer_batch([(PICTURE, asked)] * 2)]


def stream() -> str:
    *_, answer = model.stream(PICTURE, asked)
    return answer.text


def load(**options: Any) -> list[Any]:
    """A model loaded, warmed up and asked in the child."""
    fresh = tempovlm.load("pocket", device="cpu", progress=False, space=small, **options)
    return [fresh.answer(PICTURE, asked).text, fresh.engine.threads]


def calibrate() -> int:
    return len(other.calibrate(force=True).measurements)


def beside_a_thread(work: Callable[[], Any]) -> Any:
    """What the work returns in a child that is forked while another thread computes."""
    reached, released = threading.Event(), threading.Event()

    def cancel() -> bool:
        reached.set()
        return not released.wait(3 * LIMIT_S)

    thread = threading.Thread(target=lambda: list(other.stream(PICTURE, "what?", cancel=cancel)))
    thread.start()
    reached.wait(LIMIT_S)
    try:
        return in_child(work)
    finally:
        released.set()
        thread.join()


def beside_a_lock() -> Any:
    """What a child sees whose parent's other thread was looking for the calibration."""
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        with model._lock:
            held.set()
            released.wait(3 * LIMIT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(LIMIT_S)
    try:
        return in_child(lambda: model.profile is None)
    finally:
        released.set()
        thread.join()


def without_pause() -> dict[str, Any]:
    """As where OpenMP's workers cannot be sent home."""
    original, forks._pause = forks._pause, lambda: False
    try:
        threads = lambda: [model.engine.threads, model.stamp().threads, FORKS.one_thread]  # noqa: E731
        return {
            "one thread answers": in_child(ask),
            "one thread in a pool": in_pool(),
            "one thread loads": in_child(load),
            "two threads load": in_child(lambda: load(threads=2)),
            "one thread counts": in_child(threads),
            "one thread in a child's child": in_child(lambda: in_child(ask)),
        }
    finally:
        forks._pause = original


def main() -> None:
    calibration.measure = partial(calibration.measure, passes=1)
    calibration.WARM_UP_ROUNDS = 1
    begun = model.stream(PICTURE, asked)
    first = next(begun)
    found = {
        "parent": ask(),
        "child": in_child(ask),
        "child's child": in_child(lambda: in_child(ask)),
        "child of a thread": in_thread(lambda: (ask(), in_child(ask))[1]),
        "thread of a child": in_child(lambda: in_thread(ask)),
        "pool": in_pool(),
        "executor": in_executor(),
        "batch": in_child(batch),
        "stream": in_child(stream),
        "stream that was begun": in_child(lambda: [*begun][-1].text),
        "load": in_child(partial(load, threads=2)),
        "calibrate": in_child(calibrate),
        "threads": in_child(lambda: model.engine.threads),
        "beside a thread": beside_a_thread(ask),
        "load beside a thread": beside_a_thread(load),
        "beside a lock": beside_a_lock(),
        **without_pause(),
        "parent again": ask(),
    }
    assert first.index == 0
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
