"""`tempovlm answer`: one question about one picture, within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tempovlm.api import TempoVLM, load
from tempovlm.cli import console
from tempovlm.cli.knobs import ALL, Knobs
from tempovlm.core.decode_dtype import Backend, DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import AXES
from tempovlm.core.paths import expanded
from tempovlm.core.request import STAGES, Answer, check_budget_ms, check_price_per_ms
from tempovlm.data.styles import STYLES, check_style
from tempovlm.model.vision.image import open_image

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = "Answer a question about a picture within a budget in milliseconds, and show where the time went."

EXAMPLES = (
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150',
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150 --json',
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150 --price_per_ms 0.0005',
    'tempovlm answer street.png "describe the picture" --style long_caption --max_new_tokens 60',
    'tempovlm answer street.png "what color is the car?" --tier high --top_k 8 --num_blocks 16',
    'tempovlm answer street.png "what color is the car?" --budget_ms 150 --tiers low medium',
)

_STYLE = f"Style of the answer, the prompt's prefix; the default asks for a short one. Known: {', '.join(STYLES)}."

_MANY = (
    "tempovlm answer takes one picture and one question in quotes; for several pictures, repeat the command, "
    "write them into a file for tempovlm bench, or call answer_batch in Python"
)

_BAR_WIDTH = 40
_SHOWN_MS = 0.05

Text = tyro.conf.Positional[str]


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags of `tempovlm answer`."""

    image: Text
    """Picture: PNG, JPEG or another common format, at most 50 million pixels."""
    question: Text
    """Question, in quotes."""
    budget_ms: Annotated[str | None, tyro.conf.arg(metavar="MS")] = None
    """Milliseconds from accepting the request to the last token. Without it the native setting runs."""
    model: str = "pocket"
    """`pocket` (part of the package), a local model folder, or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    weights: DecodeDtype = "bf16"
    """Weights for decoding on CUDA: bf16 (as loaded), or one-byte copies, fp8 or int8."""
    backend: Backend = "auto"
    """Runs the model on a CPU: kernels, fast and in bfloat16 where the processor can, torch, or auto: the
    kernels where they can run."""
    knobs: Knobs = ALL
    """Settings to choose among: one value fixes a knob, several restrict it, and a knob that is left out is chosen
    if there is a budget, and native without."""
    max_new_tokens: int = 16
    """Maximum number of generated tokens."""
    style: Annotated[str, tyro.conf.arg(help=_STYLE)] = "vqa2"
    policy: str = "auto"
    """Policy that chooses the setting. auto: the model's own controller for this kind of device if it has one,
    else the table. table: of the settings that fit, the one that was most accurate on test questions.
    table:NAME: the same, by accuracies that tempovlm tune measured on your questions NAME. fixed: native.
    Or the path of a checkpoint, or module:Class or file.py:Class of your own."""
    price_per_ms: float = 0.0
    """Expected accuracy (as a share of 1) that a millisecond must gain; 0 may use the whole budget.
    For policies that predict accuracy: table, nearest neighbours, LinUCB."""
    on_deadline: Literal["finish", "stop", "reject"] = "finish"
    """finish: let the answer run over its budget. stop: end it at the deadline. reject: refuse at once what is not
    expected to fit."""
    json: console.Json = False
    """Print one JSON object on one line of stdout, and nothing else there."""


def main(argv: list[str]) -> None:
    """Answer and print.

    Raises:
        UserError: invalid input.
    """
    flags = console.parse(Flags, argv, "answer", DESCRIPTION, EXAMPLES, surplus=_MANY)
    budget_ms = console.number("budget_ms", flags.budget_ms)
    if budget_ms is not None:
        check_budget_ms(budget_ms)
    if check_price_per_ms(flags.price_per_ms) and budget_ms is None:
        raise UserError(f"--price_per_ms {flags.price_per_ms:g}: needs a budget; give --budget_ms too")
    check_style(flags.style)
    # Check before the model is loaded and the machine is measured, which can take a minute.
    pixels = open_image(flags.image)
    given = {"weights": flags.weights, "backend": flags.backend, **flags.knobs.chosen}
    model = load(flags.model, device=flags.device, policy=flags.policy, **given)
    answer = model.answer(
        flags.image if expanded(flags.image).is_file() else pixels,  # a pipe can be read only once
        flags.question,
        budget_ms,
        knobs=model.space.cheapest if len(model.space) == 1 else None,
        max_new_tokens=flags.max_new_tokens,
        style=flags.style,
        on_deadline=flags.on_deadline,
        price_per_ms=flags.price_per_ms,
    )
    if flags.json:
        console.print_json(answer.to_json())
    else:
        show(answer, model)


def show(answer: Answer, model: TempoVLM) -> None:
    """Print the answer, the setting, the stages and the budget for readers."""
    from rich.markup import escape

    out, knobs, native = console.stdout(), answer.knobs, model.engine.whole.native
    if answer.finish_reason == "rejected":
        out.print(verdict(answer))
        return
    out.print(f"[bold]{escape(answer.text) or '(no text)'}[/bold]")
    full = " [dim](native)[/dim]" if knobs == native else ""
    tiles = "" if answer.tiling is None else f" ({answer.tiling[0]} × {answer.tiling[1]} crops)"
    parts = [
        f"{knob.label} {value}" + (tiles if name == "tier" else f" of {most}")
        for (name, knob), value, most in zip(AXES.items(), knobs.values, native.values, strict=True)
    ]
    out.print(f"{' · '.join(parts)} · policy {answer.policy}{full}")
    out.print(stage_table(answer))
    out.print(verdict(answer))
    if answer.finish_reason == "length":
        out.print(f"[yellow]cut at its cap on tokens, {answer.num_output_tokens}[/yellow]")
    elif answer.finish_reason != "stop":
        where = f", during {answer.stopped_at}" if answer.stopped_at else ""
        out.print(f"[yellow]ended early: {answer.finish_reason}{where}[/yellow]")


def stage_table(answer: Answer) -> Table:
    """Return a table with a row for each stage and a bar at its place in the whole."""
    from rich.table import Table

    total_ms = answer.timings_ms["total"]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    before_ms = 0.0
    for stage in STAGES:
        stage_ms = answer.timings_ms[stage]
        if stage == "queue" and stage_ms < _SHOWN_MS:
            continue
        start = round(_BAR_WIDTH * before_ms / total_ms)
        before_ms += stage_ms
        length = round(_BAR_WIDTH * before_ms / total_ms) - start
        table.add_row(stage, f"{stage_ms:.1f} ms", " " * start + f"[cyan]{'█' * length or '▏'}[/cyan]")
    table.add_row("[bold]total[/bold]", f"[bold]{total_ms:.1f} ms[/bold]", "")
    return table


def verdict(answer: Answer) -> str:
    """Return whether the budget was met, and the prediction."""
    expected = answer.predicted
    note = "" if expected is None else f" (expected {expected.p50_ms:.0f} ms, at most {expected.upper_ms:.0f})"
    if answer.budget_ms is None:
        return f"no budget{note}"
    if answer.finish_reason == "rejected":
        return f"[yellow]refused: no setting was expected to fit {answer.budget_ms:g} ms[/yellow]"
    met = "[green]met[/green]" if answer.budget_met else "[red]missed[/red]"
    text = f"budget {answer.budget_ms:g} ms {met}{note}"
    if answer.budget_feasible is False:
        fixed = answer.policy == "fixed"
        why = "this setting was" if fixed else "even the cheapest of the allowed settings, which ran, was"
        text += f"\n[yellow]{why} not expected to fit the budget[/yellow]"
    return text
