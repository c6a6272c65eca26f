"""A model that was sent to another process: sender and receiver answer as before."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_model
from tempovlm.control.learned.policies import Reader
from tempovlm.core.request import Request
from tempovlm.engine.engine import Engine
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.model.prompt import Tokenizer

ASKED = Request(images=(), question="what does the sign say?", max_new_tokens=6)


@pytest.fixture
def own(tiny_folder: Path) -> Engine:
    """An engine of its own, whose weights may move."""
    return Engine(tiny_model.build_model(), Tokenizer.load(tiny_folder / "tokenizer.json"))


def answered(engine: Engine) -> tuple[int, ...]:
    return engine.answer(ASKED).tokens


def send(engine: Engine) -> None:
    """Pickle as `multiprocessing` does, which moves tensors to shared memory, and use the memory that it left."""
    ForkingPickler.dumps(engine)
    for parameter in engine.runner.model.parameters():
        torch.full_like(parameter, torch.nan)


def test_a_sender_answers_as_before(own: Engine) -> None:
    before = answered(own)
    send(own)
    assert answered(own) == before
    assert answered(deepcopy(own)) == before


def test_a_senders_policy_reads_questions_as_before(own: Engine) -> None:
    reader = Reader(own.runner.model, own.runner.tokenizer)
    before = reader.language("what does the sign say?").copy()
    send(own)
    reader.language("something else")
    np.testing.assert_allclose(reader.language("what does the sign say?"), before)


def test_the_decoders_arrays_have_memory_of_their_own(own: Engine) -> None:
    narrow = own.runner.narrow
    assert isinstance(narrow, NarrowDecoder)
    for weight, array in ((narrow.decoder.embedding, narrow.embedding), (narrow.decoder.head.weight, narrow.head)):
        assert not np.shares_memory(weight.detach().numpy(), array)
    copied = deepcopy(narrow)
    assert copied is not None
    assert copied.decoder is not narrow.decoder
    np.testing.assert_allclose(copied.head, narrow.head)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_was_sent_a_model_answers(method: str, own: Engine) -> None:
    before = answered(own)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(answered, (own,)) == before
    assert answered(own) == before


def test_a_fork_of_a_process_that_computed_before_it_knew_of_forks_has_one_thread() -> None:
    script = """
        import os, sys, torch
        torch.randn(600, 600) @ torch.randn(600, 600)
        child = os.fork()
        if child:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        import tempovlm
        from tempovlm.engine.threads import start_torch
        try:
            start_torch(2)
        except tempovlm.UserError as error:
            print(error)
        start_torch(None)
        print(torch.get_num_threads(), flush=True)
        os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    refusal, count = done.stdout.splitlines()
    assert refusal.startswith("threads=2: this forked process has one")
    assert count == "1"
