"""Write the pocket model's card from measured results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.data.registry import GENERATED
from tempovlm.model.files.hub import checkpoint_files
from tempovlm.model.weights import read_config
from tempovlm.testbed.costs import SHARES

_INTRODUCTION = """\
# The pocket model

A vision-language model of {parameters:.1f} million parameters in MolmoE-1B's architecture, in bfloat16
({size_mb:.1f} MB). It makes every command of TempoVLM run on a laptop's CPU. It is elastic: trained under random
vision tiers, experts per token and depths, so that one set of weights serves all {settings} knob settings.

It is a test bed and not an assistant: it knows the generated pictures that it was trained on, about {words}
words, and nothing of photographs.

- weights `{weights}`, knob space `{knob_space}`, trained on {hardware}, {steps} steps of {batch} pictures
- data: scenes drawn by `tempovlm.testbed` while it trained (`data_source: synthetic`); validation has
  words and combinations that training never showed
- recipe: `python -m tempovlm.training.pocket`; vision on dense labels first ({vision_steps} steps, or
  those of the run that `--vision_from` named), then all
  parts, Muon and AdamW, learning rate {lr}, {dense_weight} × the dense loss, {balance_weight} × the
  load-balance term, seed {seed}; the full recipe is in `accuracy.json`
- answers: {mean} tokens on average with the end token, at most {p97} in 97 % of cases
- blocks in the order in which a depth takes them: {ranking}
"""

_LIMITS = """\
## Limits

English questions of the test bed's templates; other questions get an answer too, and it means nothing. Signs are
read in plain typefaces; small print needs the high tier, and words that training never showed are spelled with
more errors. Where a question names no options by letter, an answer is never a letter alone and never empty, unless
a deadline, a cancelled stream or a stop text cuts it; no measured reply was either. Nothing here says
anything about MolmoE-1B's accuracy.
"""


def write_card(folder: Path) -> None:
    """Write `MODEL_CARD.md` beside `accuracy.json` and the weights in `folder`."""
    record = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    space = KnobSpace.for_model(read_config(folder).shape)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    size = sum(path.stat().st_size for path in checkpoint_files(folder))
    facts = {
        **record["recipe"],
        **record["output_tokens"],
        **{name: record[name] for name in ("weights", "knob_space", "hardware", "steps")},
        "ranking": ", ".join(str(block) for block in record["ranking"]),
        "parameters": size / 2e6,
        "size_mb": size / 1e6,
        "words": sum(len(word) > 1 and not word.startswith("##") for word in vocabulary),
        "settings": len(space),
    }
    notes = "".join(f"- note: {note}\n" for note in record.get("notes", []))
    tables = _accuracy(space, record) + _costs(record) + _cpu_bfloat16(record)
    text = _INTRODUCTION.format(**facts) + notes + "\n" + tables + "\n" + _LIMITS
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def _accuracy(space: KnobSpace, record: dict[str, Any]) -> str:
    """Return accuracy in per cent: each data set, a column for each tier and a row for each top-k and depth."""
    rows = {KnobConfig.from_mapping(row): row for row in record["settings"]}
    count = record["settings"][0]["num_samples"]
    parts = [f"## Accuracy\n\nPer cent of {count} validation questions; {record['measure']}.\n"]
    for name in ("all", *GENERATED):
        parts.append(f"\n{name}:\n\n| top-k | blocks | {' | '.join(space.tiers)} |\n")
        parts.append("|---" * (2 + len(space.tiers)) + "|\n")
        for knobs in space.settings[: len(space) // len(space.tiers)]:
            cells = (rows[replace(knobs, tier=tier)] for tier in space.tiers)
            shares = (row["accuracy"] if name == "all" else row["by_dataset"][name] for row in cells)
            texts = [*map(str, knobs.values[1:]), *(f"{100 * s:.1f}" for s in shares)]
            parts.append(f"| {' | '.join(texts)} |\n")
    return "".join(parts)


def _costs(record: dict[str, Any]) -> str:
    """Return what questions of each meant cost lose at the lowest value of each knob; empty if it was not told."""
    rows = {cost: row for cost, row in record.get("by_cost", {}).items() if cost in SHARES}
    if not rows:
        return ""
    names = list(next(iter(rows.values()))["lost"])
    parts = [
        "\n## What questions cost\n\nWhat `tempovlm.testbed.costs` says an answer should cost; per cent right at "
        "the native setting, and points\nlost at the lowest value of one knob, and of all.\n\n"
        f"| cost | questions | native | {' | '.join(names)} |\n" + "|---" * (3 + len(names)) + "|\n"
    ]
    for cost, row in rows.items():
        lost = (f"{row['lost'][name]:.1f}" for name in names)
        parts.append(f"| {' | '.join((cost, str(row['questions']), format(row['native'], '.1f'), *lost))} |\n")
    return "".join(parts)


def _cpu_bfloat16(record: dict[str, Any]) -> str:
    """Return the answers that products in bfloat16 change on a CPU; empty if nobody counted them."""
    found = record.get("cpu_bfloat16")
    if found is None:
        return ""
    parts = [
        "\n## On a CPU in bfloat16\n\n"
        f"The same {found['num_samples']} questions, at the native top-k and depth of each tier, by\n"
        f"`benchmarks/accuracy_cpu.py` on one {found['hardware']}: accuracy as above, and the answers that\n"
        "differ from those in float32. `all` is the mean accuracy of the tiers and the sum of their answers.\n\n"
        "| tier | float32 | bfloat16 | answers that differ | right to wrong | wrong to right |\n"
        "|---|---|---|---|---|---|\n"
    ]
    for row in found["tiers"]:
        shares = (f"{100 * row[name]:.2f}" for name in ("accuracy_float32", "accuracy"))
        counts = (str(row[name]) for name in ("disagreements", "right_to_wrong", "wrong_to_right"))
        parts.append(f"| {' | '.join((row['tier'], *shares, *counts))} |\n")
    return "".join(parts)
