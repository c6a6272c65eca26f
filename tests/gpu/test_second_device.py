"""Every device works as the first one does, in any thread, while the thread's own device stays the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_model
from streams import taking_turns
from tempovlm.api import TempoVLM, load
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.request import Answer
from tempovlm.engine import calibration
from tempovlm.engine.cuda.graphs import FP8_CAPABILITY
from tempovlm.engine.transcript import Token
from timings import stages_add_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

DEVICES = ("cuda:0", "cuda:1")
QUESTIONS = ("what is the sign?", "is there a dog there?", "how many are there?", "stop")


@pytest.fixture(autouse=True)
def first_device_is_current() -> Iterator[None]:
    assert torch.cuda.current_device() == 0
    yield
    assert torch.cuda.current_device() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def models(folder: Path) -> list[TempoVLM]:
    """The tiny model in float32 on each device, with its graphs."""
    return [load(str(folder), device=device, dtype=torch.float32, progress=False) for device in DEVICES]


@pytest.fixture(scope="module")
def pockets() -> list[TempoVLM]:
    """The pocket in bfloat16 on each device, captured as it is asked."""
    return [load("pocket", device=device, policy="fixed", warmup=False, progress=False) for device in DEVICES]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(tiny_model.picture(seed, 84 + 40 * seed, 112))


def asked(model: TempoVLM) -> list[tuple[int, ...]]:
    """Tokens of several questions and settings, each twice: by kernels or by graphs."""
    settings = (model.space.cheapest, model.space.native, model.space.largest)
    return [
        model.answer(picture(i), question, knobs=knobs, max_new_tokens=12).tokens
        for i, question in enumerate(QUESTIONS[:3])
        for knobs in settings
        for _ in range(2)
    ]


def test_answers_are_those_of_the_first_device(models: list[TempoVLM]) -> None:
    before = torch.cuda.memory_allocated(0)
    second = asked(models[1])
    assert torch.cuda.memory_allocated(0) == before
    assert second == asked(models[0])
    answer = models[1].answer(picture(), QUESTIONS[0])
    assert answer.device == "cuda:1"
    assert stages_add_up(answer.timings_ms)


def test_prompts_vision_and_steps_run_by_graphs_there(pockets: list[TempoVLM]) -> None:
    """In bfloat16, in which prompts are captured: first kernel by kernel, then by what was captured behind."""
    found = []
    for model in pockets:
        run, knobs = model.engine.runner, model.space.native
        texts = [model.answer(picture(1), QUESTIONS[0], knobs=knobs).tokens for _ in range(3)]
        assert run.vision is not None
        assert run.graphs is not None
        assert run.vision.encode._graphs
        assert run.vision.project._graphs
        with run.graphs.lane() as lane:
            assert lane is not None
            assert lane.has_graph(model.engine.plan(knobs))
            assert lane.prompts._graphs
        found.append(texts)
    assert found[0] == found[1]


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_weights_of_one_byte(weights: DecodeDtype) -> None:
    if weights == "fp8" and torch.cuda.get_device_capability(1) < FP8_CAPABILITY:
        pytest.skip("this GPU cannot convert fp8")
    found = []
    for device in DEVICES:
        model = load("pocket", device=device, weights=weights, policy="fixed", warmup=False, progress=False)
        found.append([model.answer(picture(i), QUESTIONS[i]).tokens for i in range(2) for _ in range(2)])
    assert found[0] == found[1]


def test_batches(models: list[TempoVLM], pockets: list[TempoVLM]) -> None:
    pairs = [(picture(i), question) for i, question in enumerate(QUESTIONS)] + [(None, "stop")]
    for one, other in (models, pockets):
        first, second = ([answer.tokens for answer in model.answer_batch(pairs)] for model in (one, other))
        assert first == second


def leaving_the_device(stream: Iterator[Token | Answer]) -> Iterator[Token | Answer]:
    """The items; after each the thread's current device is the first one."""
    for item in stream:
        assert torch.cuda.current_device() == 0
        yield item


def test_streams_on_both_devices_take_turns(models: list[TempoVLM]) -> None:
    alone = [model.answer(picture(), QUESTIONS[0], max_new_tokens=12).tokens for model in models]
    streams = [leaving_the_device(model.stream(picture(), QUESTIONS[0], max_new_tokens=12)) for model in models]
    assert [answer.tokens for answer in taking_turns(streams)] == alone


def test_drawn_tokens(models: list[TempoVLM]) -> None:
    """Each device draws by itself; the seed decides on both."""
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "max_new_tokens": 12}
    for model in models:
        answers = [model.answer(picture(), QUESTIONS[0], **options).tokens for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]


def test_threads_on_both_devices_at_once(models: list[TempoVLM], pockets: list[TempoVLM]) -> None:
    every = [*models, *pockets]
    alone = [[asked(model) for _ in range(2)][1] for model in every]  # the first round captures
    with ThreadPoolExecutor(len(every)) as pool:
        assert list(pool.map(asked, every)) == alone


def test_a_model_loaded_and_warmed_by_another_thread(folder: Path) -> None:
    def loaded(device: str) -> list[tuple[int, ...]]:
        return asked(load(str(folder), device=device, dtype=torch.float32, progress=False))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(loaded, DEVICES))
    assert found[0] == found[1]


def test_a_controller_that_glances(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    made_up = tiny_model.make_profile().measurements
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: made_up)
    torch.manual_seed(0)
    space, width = tiny_model.SPACE, tiny_model.CONFIG.width
    networks = {"controller": LLMBasedController(width, 16, num_block_counts=len(space.block_counts))}
    path = tmp_path / "llm_based.pt"
    save_controller(path, kind="llm_based", networks=networks, space=space)
    found = []
    for device in DEVICES:
        model = load(str(folder), device=device, dtype=torch.float32, policy=path, progress=False)
        answers = [model.answer(picture(), QUESTIONS[0], budget_ms=1e5, tier=tier) for tier in space.tiers]
        assert {answer.policy for answer in answers} == {"llm_based"}
        found.append([(answer.knobs, answer.tokens) for answer in answers])
    assert found[0] == found[1]


def training() -> ModuleType:
    from tempovlm.model.kernels import training as kernels

    return kernels


CHAINS: dict[str, Callable[[str], tuple[Tensor, list[Tensor]]]] = {}


def chain(function: Callable[[str], tuple[Tensor, list[Tensor]]]) -> Callable[[str], tuple[Tensor, list[Tensor]]]:
    CHAINS[function.__name__] = function
    return function


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device).requires_grad_()


@chain
def quick_gelu(device: str) -> tuple[Tensor, list[Tensor]]:
    x = leaf(3, 70, device=device)
    return training().quick_gelu(x), [x]


@chain
def gated_swiglu(device: str) -> tuple[Tensor, list[Tensor]]:
    h, gates = leaf(9, 4 * 2 * 16, device=device), leaf(9, 4, device=device)
    return training().gated_swiglu(h, gates), [h, gates]


@chain
def norm_rotate(device: str) -> tuple[Tensor, list[Tensor]]:
    x, weight = leaf(2, 5, 48, device=device), leaf(48, device=device)
    angles = torch.arange(2 * 5 * 16, device=device).view(2, 5, 1, 16).float()
    return training().norm_rotate(x, weight, angles.cos(), angles.sin(), 1e-5), [x, weight]


@pytest.mark.parametrize("name", CHAINS)
def test_a_training_step_and_its_gradients(name: str) -> None:
    found = []
    for device in DEVICES:
        out, inputs = CHAINS[name](device)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        assert {str(value.device) for value in found[-1]} == {device}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other.cpu(), one.cpu())
