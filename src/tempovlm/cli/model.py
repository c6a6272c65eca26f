"""`tempovlm model`: sizes and costs of a model, and random checkpoints for benchmarks.

Sizes come from the configuration, costs from `core.cost`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tempovlm.cli import console
from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded

if TYPE_CHECKING:
    from tempovlm.model.config import ModelConfig

_PICTURE = (480, 640)
_TEXT_TOKENS = 20
_OUTPUT_TOKENS = 4
_TENSOR_BYTES = 2

_INFO = """\
Show a model's architecture, its parameters, the GPU memory that serving it needs, and what its cheapest,
native and largest setting cost.

Costs are for a picture of 640 × 480 pixels, 20 tokens of text and an answer of 4 tokens, in bfloat16. A preset
(pocket, molmoe-1b) needs no weights."""

_INFO_EXAMPLES = (
    "tempovlm model info pocket",
    "tempovlm model info molmoe-1b --json",
    "tempovlm model info ~/models/MolmoE-1B-0924",
)

_RANDOM = """\
Write a checkpoint of random weights in the published layout: it answers nonsense, as fast as a real one.

The full molmoe-1b takes 14.4 GB of disk and a few minutes, less if a GPU draws it (--device)."""

_RANDOM_EXAMPLES = (
    "tempovlm model random --output_dir /tmp/tiny --config pocket",
    "tempovlm model random --output_dir /tmp/random --config molmoe-1b --num_layers 2 --tokenizer ~/MolmoE-1B",
    "tempovlm model random --output_dir /tmp/molmoe-1b-random --config molmoe-1b --device cuda --tokenizer pocket",
)


@dataclass(frozen=True, slots=True)
class InfoFlags:
    """Flags of `tempovlm model info`."""

    model: tyro.conf.Positional[str]
    """`pocket`, `molmoe-1b`, a local model folder or a hub id."""
    json: console.Json = False
    """Print one JSON object on one line of stdout, and nothing else there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomFlags:
    """Flags of `tempovlm model random`."""

    output_dir: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """Folder to make; it must not exist, or be empty."""
    config: Literal["molmoe-1b", "pocket"]
    """Sizes of the model."""
    num_layers: int | None = None
    """Number of decoder blocks, if fewer than in the configuration; the vision side stays whole."""
    tokenizer: Path | None = None
    """Folder whose tokenizer.json, which answers need, is copied; `pocket` names the embedded one, with which a
    question has a few tokens more. Default: for pocket that one."""
    seed: int = 0
    """The same seed writes the same weights."""
    device: str = "cpu"
    """Draws them: cpu, cuda or cuda:N, which is much faster; its values are others."""


def info(argv: list[str]) -> None:
    """Show a model's sizes and the costs of its settings."""
    flags = console.parse(InfoFlags, argv, "model info", _INFO, _INFO_EXAMPLES)
    record = describe(flags.model)
    if flags.json:
        console.print_json(record)
    else:
        show(record)


def random(argv: list[str]) -> None:
    """Write a checkpoint of random weights."""
    flags = console.parse(RandomFlags, argv, "model random", _RANDOM, _RANDOM_EXAMPLES)
    from tempovlm.api import model_folder
    from tempovlm.core.progress import progress_bar
    from tempovlm.engine.threads import pick_device
    from tempovlm.model.config import PRESETS
    from tempovlm.model.weights import write_random

    config = PRESETS[flags.config]
    if flags.num_layers is not None:
        if not 1 <= flags.num_layers <= config.num_blocks:
            raise UserError(f"--num_layers {flags.num_layers}: must be from 1 to {config.num_blocks}")
        config = replace(config, num_blocks=flags.num_layers)
    if not -(1 << 63) <= flags.seed < 1 << 64:
        raise UserError(f"--seed {flags.seed}: must fit 64 bits")
    out, tokenizer = expanded(flags.output_dir), flags.tokenizer
    if tokenizer == Path("pocket") or (tokenizer is None and flags.config == "pocket"):
        tokenizer = model_folder("pocket")
    with progress_bar("writing random weights") as advance:
        where = pick_device(flags.device)
        write_random(out, config, seed=flags.seed, tokenizer=tokenizer, device=where, advance=advance)
    sys.stderr.write(f"wrote a random {flags.config} with {config.num_blocks} decoder blocks to {out}\n")
    if tokenizer is None:
        sys.stderr.write(
            "without a tokenizer.json it cannot answer: give --tokenizer, or copy one into the folder\n"
        )


_COMMANDS: dict[str, Callable[[list[str]], None]] = {"info": info, "random": random}


def main(argv: list[str]) -> None:
    """Run `tempovlm model …`.

    Raises:
        UserError: unknown command, or an error of the command itself.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<6}  {(command.__doc__ or '').splitlines()[0]}" for name, command in _COMMANDS.items()]
        examples = [f"  {example}" for example in (_INFO_EXAMPLES[0], _RANDOM_EXAMPLES[0])]
        text = ("usage: tempovlm model COMMAND [--help]", "", *lines, "", "examples:", *examples, "")
        sys.stdout.write("\n".join(text))
        return
    name, *rest = argv
    if name not in _COMMANDS:
        raise UserError(f"unknown command 'model {name}'; choose one of {', '.join(_COMMANDS)}")
    _COMMANDS[name](rest)


def describe(model: str) -> dict[str, Any]:
    """Return the object that `tempovlm model info --json` prints.

    Raises:
        UserError: no such model, or a folder whose weights do not match its configuration.
    """
    config, files = _configuration(model)
    from tempovlm.core.cost import image_parameters
    from tempovlm.engine.memory import serving_bytes
    from tempovlm.model.weights import expected_shapes

    shapes = expected_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    vision = config.vision
    cache_bytes = 2 * config.num_blocks * config.kv_heads * config.head_width * _TENSOR_BYTES
    return {
        "model": model,
        "architecture": {
            "decoder": {
                name: getattr(config, name)
                for name in ("num_blocks", "width", "num_heads", "num_experts", "top_k", "expert_width")
            },
            "vision": {
                name: getattr(vision, name)
                for name in ("num_blocks", "width", "num_heads", "crop_size", "patch_size")
            },
            "vocabulary": config.embedding_size,
            "context": config.max_sequence_length,
        },
        "parameters": {"total": total, "image": image_parameters(config.shape)},
        "tensors": len(shapes),
        "memory_bytes": {"weights_bf16": total * _TENSOR_BYTES, "cache_per_token_bf16": cache_bytes},
        "serving_bytes": serving_bytes(config, total),
        "files": files,
        "settings": _settings(config),
        "picture": {"height": _PICTURE[0], "width": _PICTURE[1]},
        "text_tokens": _TEXT_TOKENS,
        "output_tokens": _OUTPUT_TOKENS,
    }


def _configuration(model: str) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Return the sizes of a model and of its files; None for a preset without weights."""
    from tempovlm.model.config import PRESETS

    if model in PRESETS and model != "pocket":
        return PRESETS[model], None
    from contextlib import ExitStack

    from tempovlm.api import model_folder
    from tempovlm.model.files.hub import checkpoint_files, open_weights
    from tempovlm.model.weights import check_tensors, expected_shapes, read_config

    folder = model_folder(model)
    config, paths = read_config(folder), checkpoint_files(folder)
    with ExitStack() as stack:
        sources = [stack.enter_context(open_weights(path)) for path in paths]
        check_tensors(sources, expected_shapes(config), folder)
        stored = [one for source in sources for one in source.tensors.values()]
        types = sorted({str(one.dtype).removeprefix("torch.") for one in stored})
    size = sum(path.stat().st_size for path in paths)
    return config, {"folder": str(folder), "count": len(paths), "bytes": size, "dtypes": types}


def _settings(config: ModelConfig) -> dict[str, Any]:
    """Return cost by stage and parameters per token for the cheapest, native and largest setting."""
    from tempovlm.core.cost import active_parameters, plan_cost
    from tempovlm.core.knobs import KnobSpace
    from tempovlm.core.plan import Plan, Ranking
    from tempovlm.model.vision.tiling import choose_grid

    space, shape, vision = KnobSpace.for_model(config.shape), config.shape, config.vision
    found = {}
    for name in ("cheapest", "native", "largest"):
        knobs = getattr(space, name)
        grid = choose_grid(knobs.tier, *_PICTURE, vision)
        plan = Plan.build(knobs, Ranking.evenly_spaced(config.num_blocks), shape)
        tokens = grid.num_tokens(vision)
        distinct = 1 if grid.num_crops == 2 else grid.num_crops
        cost = plan_cost(
            plan, shape, grid.num_crops, tokens, _TEXT_TOKENS, _OUTPUT_TOKENS, distinct_crops=distinct
        )
        found[name] = {
            **knobs.as_dict(),
            "active_parameters": active_parameters(plan, shape),
            "num_crops": grid.num_crops,
            "vision_tokens": tokens,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "total_flops": cost.total_flops,
            "total_bytes": cost.total_bytes,
        }
    return found


def show(record: dict[str, Any]) -> None:
    """Print the record for readers."""
    from rich import box
    from rich.table import Table

    from tempovlm.core.knobs import KnobConfig

    out, parts, files = console.stdout(), record["architecture"], record["files"]
    decoder, vision, memory = parts["decoder"], parts["vision"], record["memory_bytes"]
    out.print(f"[bold]{record['model']}[/bold]")
    out.print(
        f"decoder     {decoder['num_blocks']} blocks of width {decoder['width']}, {decoder['num_heads']} heads, "
        f"{decoder['num_experts']} experts of width {decoder['expert_width']}, top-{decoder['top_k']}"
    )
    out.print(
        f"vision      {vision['num_blocks']} blocks of width {vision['width']}, "
        f"crops of {vision['crop_size']} px, patches of {vision['patch_size']} px"
    )
    out.print(f"vocabulary  {parts['vocabulary']} tokens; context {parts['context']}")
    out.print(f"parameters  {_si(record['parameters']['total'])} in {record['tensors']} tensors")
    needed = record["serving_bytes"]
    cache, a_token = needed["cache"], memory["cache_per_token_bf16"]
    out.print(
        f"GPU memory  {_si(sum(needed.values()))}B to serve it in bfloat16 (estimate): weights "
        f"{_si(needed['weights'])}B,\n            cache {_si(cache)}B ({_si(a_token)}B a token), graphs and "
        f"activations {_si(needed['graphs_and_activations'])}B, CUDA context {_si(needed['cuda_context'])}B"
    )
    if files is not None:
        kinds = ", ".join(files["dtypes"])
        out.print(f"files       {files['count']} in {files['folder']}: {_si(files['bytes'])}B, {kinds}")
    table = Table("", *record["settings"], box=box.SIMPLE, padding=(0, 1, 0, 0))
    settings = list(record["settings"].values())
    table.add_row("setting", *(str(KnobConfig.from_mapping(s)) for s in settings))
    table.add_row("parameters a token", *(_si(s["active_parameters"]) for s in settings))
    table.add_row("crops", *(f"{s['num_crops']}: {s['vision_tokens']} tokens" for s in settings), end_section=True)
    table.add_row("[bold]stage[/bold]", *["[bold]FLOP, bytes read[/bold]"] * len(settings))
    for stage in settings[0]["flops"]:
        table.add_row(stage, *(f"{_si(s['flops'][stage])}, {_si(s['bytes'][stage])}B" for s in settings))
    totals = (f"{_si(s['total_flops'])}, {_si(s['total_bytes'])}B" for s in settings)
    table.add_row("whole answer", *totals)
    out.print(table)
    height, width = record["picture"]["height"], record["picture"]["width"]
    out.print(
        f"whole answer: picture {width} × {height}, {record['text_tokens']} text tokens, "
        f"{record['output_tokens']} output tokens, weights in bfloat16\n"
        "bytes read: traffic, which takes time; each pass over the model reads its weights again"
    )


def _si(count: float) -> str:
    """Format a number with three digits and a decimal prefix: 7.22 G."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}"
    return f"{count:.3g} "
