"""How each product of a decode step is best cut on this GPU: time and bandwidth of every kernel for some tilings.

One block of random weights at a model's sizes; each kernel runs alone, over enough copies of its weights that none
stays in the device's cache, replayed as a graph as it is in a step. The printed `Tiling` is what
`model/kernels/decode.py` should hold for this GPU. Nothing is written.

    python benchmarks/tune_decode.py --model molmoe-1b
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product

from tempovlm.engine.threads import prepare

prepare()

import torch

from engine_reference import fill
from tempovlm.core.cost import plan_cost
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.engine.capture import Recorder
from tempovlm.model.config import PRESETS
from tempovlm.model.decoder import Block
from tempovlm.model.kernels import decode
from tempovlm.model.kernels.decode import StepBuffers, Tile, Tiling
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

ROWS, COLUMNS, WARPS = (1, 2, 4, 8, 16), (512, 1024, 2048), (4, 8)
MOST_VALUES = 16384
"""Values of a program's tile beyond which registers run out."""

SPLITS, TOKENS = (8, 16, 32), (16, 32, 64)
CONTEXT = 700


def tiles() -> Iterator[Tile]:
    """The tiles worth a try."""
    for rows, columns, warps in product(ROWS, COLUMNS, WARPS):
        if 1024 <= rows * columns <= MOST_VALUES:
            yield Tile(rows, columns, warps)


def kernels_of(model: Molmo, on: StepBuffers, top_k: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Every kernel of a step, over all blocks, by its field of `Tiling`, and the bytes that it reads."""
    decoder = model.decoder
    blocks = [block for block in decoder.blocks if isinstance(block, Block)]
    size = decoder.embedding.element_size()
    D, count = model.config.width, len(blocks)
    cache = torch.zeros(2, count, model.config.num_heads, 1024, model.config.head_width, device=on.x.device)
    keys, values = cache.to(decoder.embedding.dtype)
    of_expert = model.config.expert_width * D * size * top_k * count

    def every(run: Callable[[int, Block], None]) -> Callable[[], None]:
        return lambda: [run(i, block) for i, block in enumerate(blocks)] and None

    tiling, square = on.tiling, D * D * size * count
    norm_matvec, add = decode.norm_matvec, decode.add_matvec

    def qkv(_: int, b: Block) -> None:
        norm_matvec(on.x, b.attention.norm, b.attention.qkv.weight, on.qkv, tiling.qkv)

    def attention(i: int, b: Block) -> None:
        decode.attend(b.attention, decoder.rotary, keys[i], values[i], on)

    def out(_: int, b: Block) -> None:
        add(on.mixed.unsqueeze(0), b.attention.out.weight, on.x, tiling.out)

    def router(_: int, b: Block) -> None:
        norm_matvec(on.x, b.moe.norm, b.moe.router.weight, on.router, tiling.router)

    def hidden(_: int, b: Block) -> None:
        decode.expert_hidden(b.moe, top_k, on)

    def down(_: int, b: Block) -> None:
        add(on.hidden[:top_k], b.moe.down, on.x, tiling.down, on.chosen)

    def head() -> None:
        norm_matvec(on.x, decoder.norm, decoder.head.weight, on.logits, tiling.head)

    return {
        "qkv": (every(qkv), 3 * square),
        "attention": (every(attention), 2 * CONTEXT * D * size * count),
        "out": (every(out), square),
        "router": (every(router), model.config.num_experts * D * size * count),
        "hidden": (every(hidden), 2 * of_expert),
        "down": (every(down), of_expert),
        "head": (head, decoder.head.weight.nbytes),
    }


def replayed_ms(run: Callable[[], None], recorder: Recorder | None, repeats: int) -> float:
    """Median time of a graph of `run`; without a GPU it only runs."""
    if recorder is None:
        run()
        return float("nan")
    graph = recorder.graph(run)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def candidates(name: str, tiling: Tiling) -> Iterator[Tiling]:
    """Tilings that differ from this one in one kernel's cut."""
    if name == "attention":
        for splits, tokens in product(SPLITS, TOKENS):
            yield replace(tiling, splits=splits, tokens=tokens)
        return
    for tile in tiles():
        yield replace(tiling, **{name: tile})


def tune(model: Molmo, top_k: int, repeats: int, limit: int | None) -> Tiling:
    """The fastest cut of every kernel, printed as it is found."""
    config, device = model.config, model.decoder.embedding.device
    recorder, best = Recorder.on(device), Tiling()
    for name in ("qkv", "attention", "out", "router", "hidden", "down", "head"):
        found: list[tuple[float, str, Tiling]] = []
        for tiling in (best, *list(candidates(name, best))[:limit]):
            on = StepBuffers.allocate(config, top_k, device, tiling)
            on.position.fill_(CONTEXT)
            on.x.normal_()
            on.chosen.copy_(torch.randperm(config.num_experts, device=device)[:top_k])
            run, size = kernels_of(model, on, top_k)[name]
            spent_ms = replayed_ms(run, recorder, repeats)
            cut = f"{tiling.splits}x{tiling.tokens}" if name == "attention" else str(getattr(tiling, name))
            found.append((spent_ms, f"{cut}: {spent_ms * 1e3:.1f} us, {size / spent_ms / 1e9:.2f} TB/s", tiling))
        first = found[0]
        found.sort(key=lambda one: one[0])
        print(f"{name} (all {config.num_blocks} blocks)\n  as it is {first[1]}")
        for _, text, _ in found[:3]:
            print(f"  {text}")
        best = found[0][2]
    return best


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="molmoe-1b")
    parser.add_argument("--top-k", "--top_k", type=int, default=8)
    parser.add_argument("--num-blocks", "--num_blocks", type=int, default=16, help="copies of a block")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--limit", type=int, help="candidates of a kernel; all unless told")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu times nothing")
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device; --device cpu only runs the kernels in an interpreter")
    is_cuda = flags.device == "cuda"
    config = replace(PRESETS[flags.model], num_blocks=flags.num_blocks)
    model = fill(empty_model(config, flags.device, torch.bfloat16 if is_cuda else torch.float32))
    best = tune(model, flags.top_k, flags.repeats, flags.limit)
    knobs = KnobConfig(tier="low", top_k=flags.top_k, num_blocks=flags.num_blocks)
    plan = Plan(knobs, tuple(Step(i, flags.top_k) for i in range(flags.num_blocks)))
    cost = plan_cost(plan, config.shape, 0, 0, CONTEXT, 2)
    print(f"bytes of a step with {flags.num_blocks} blocks: {cost.bytes['decode'] / 1e6:.1f} MB")
    print(f"Tiling({', '.join(f'{f.name}={getattr(best, f.name)!r}' for f in fields(best))})")


if __name__ == "__main__":
    main()
