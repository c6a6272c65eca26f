"""`tempovlm answer`: one question about one picture, within a budget. Parses, calls the library, prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tempovlm.api import TempoVLM, load
from tempovlm.cli import console
from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded
from tempovlm.core.request import STAGES, Answer, check_budget_ms, check_price_per_ms
from tempovlm.core.weights import Weights
from tempovlm.model.vision.image import open_image

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = "Answer a question about a picture within a budget in milliseconds, and show where the time went."

EXAMPLES = (
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150',
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150 --json',
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150 --price_per_ms 0.0005',
    'tempovlm answer street.png "what color is the car?" --tier high --top_k 8 --num_blocks 16',
)

_BAR_WIDTH = 40

Text = tyro.conf.Positional[str]


@dataclass(frozen=True, slots=True)
class Flags:
    """The command's flags."""

    image: Text
    """Picture: PNG, JPEG or another common format, at most 50 million pixels."""
    question: Text
    """Question, in quotes."""
    budget_ms: Annotated[str | None, tyro.conf.arg(metavar="MS")] = None
    """Milliseconds from accepting the request to the last token. Without it the native setting runs."""
    model: str = "pocket"
    """`pocket`, which is embedded, a local model folder or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    weights: Weights = "bf16"
    """What decoding reads on CUDA: bf16, as loaded, or copies of half the bytes, fp8 or int8."""
    tier: str | None = None
    """Vision tier: low, medium or high. Knobs left out are native without a budget, and chosen with one."""
    top_k: int | None = None
    """Experts that each token visits."""
    num_blocks: int | None = None
    """Decoder blocks that run."""
    max_new_tokens: int = 16
    """Cap on generated tokens."""
    style: str = "vqa2"
    """Style prefix of the prompt; the default asks for a short answer."""
    policy: str = "auto"
    """Who chooses: auto (the trained controller that the model's folder has for this kind of device, else the
    table), table (the most accurate setting that fits), table:NAME (the same as tempovlm tune measured on your
    questions NAME), fixed (native), or a controller checkpoint's path."""
    price_per_ms: float = 0.0
    """Expected accuracy, as a share of 1, that a millisecond must buy within the budget; 0 spends all of it. For
    policies that predict accuracy: table, nearest neighbours, LinUCB."""
    on_deadline: Literal["finish", "stop"] = "finish"
    """Let an answer run over its budget, or stop it there."""
    json: bool = False
    """Print one JSON object on one line of stdout, and nothing else there."""


def main(argv: list[str]) -> None:
    """Answer and print.

    Raises:
        UserError: wrong input.
    """
    flags = console.parse(Flags, argv, "answer", DESCRIPTION, EXAMPLES)
    budget_ms = console.number("budget_ms", flags.budget_ms)
    if budget_ms is not None:
        check_budget_ms(budget_ms)
    if check_price_per_ms(flags.price_per_ms) and budget_ms is None:
        raise UserError(f"--price_per_ms {flags.price_per_ms:g}: needs a budget; give --budget_ms too")
    # Told before the model is loaded and the machine is measured, which can take a minute.
    pixels = open_image(flags.image)
    model = load(flags.model, device=flags.device, policy=flags.policy, weights=flags.weights)
    answer = model.answer(
        flags.image if expanded(flags.image).is_file() else pixels,  # a pipe can be read once only
        flags.question,
        budget_ms,
        tier=flags.tier,
        top_k=flags.top_k,
        num_blocks=flags.num_blocks,
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
    """The answer, the setting, the stages and the budget, for people."""
    from rich.markup import escape

    out, knobs, native = console.stdout(), answer.knobs, model.space.native
    out.print(f"[bold]{escape(answer.text) or '(no text)'}[/bold]")
    full = "  [dim](native)[/dim]" if knobs == native else ""
    tiles = "" if answer.tiling is None else f" ({answer.tiling[0]} × {answer.tiling[1]} crops)"
    out.print(
        f"tier {knobs.tier}{tiles} · top-k {knobs.top_k} of {native.top_k} · "
        f"blocks {knobs.num_blocks} of {native.num_blocks} · policy {answer.policy}{full}"
    )
    out.print(stage_table(answer))
    out.print(verdict(answer))
    if answer.finish_reason != "stop":
        out.print(f"[yellow]ended early: {answer.finish_reason}[/yellow]")


def stage_table(answer: Answer) -> Table:
    """A row for each stage, its bar where it lies in the whole."""
    from rich.table import Table

    total_ms = answer.timings_ms["total"]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    before_ms = 0.0
    for stage in STAGES:
        stage_ms = answer.timings_ms[stage]
        start = round(_BAR_WIDTH * before_ms / total_ms)
        before_ms += stage_ms
        length = round(_BAR_WIDTH * before_ms / total_ms) - start
        table.add_row(stage, f"{stage_ms:.1f} ms", " " * start + f"[cyan]{'█' * length or '▏'}[/cyan]")
    table.add_row("[bold]total[/bold]", f"[bold]{total_ms:.1f} ms[/bold]", "")
    return table


def verdict(answer: Answer) -> str:
    """Whether the budget was met, and what was expected."""
    expected = answer.predicted
    note = "" if expected is None else f" (expected {expected.p50_ms:.0f} ms, at most {expected.upper_ms:.0f})"
    if answer.budget_ms is None:
        return f"no budget{note}"
    met = "[green]met[/green]" if answer.budget_met else "[red]missed[/red]"
    text = f"budget {answer.budget_ms:g} ms {met}{note}"
    if answer.budget_feasible is False:
        text += "\n[yellow]no setting was expected to fit this budget; the cheapest ran[/yellow]"
    return text
