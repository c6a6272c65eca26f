"""Counts the answers that a CPU's back ends change: on the pocket's validation questions, those of its model card.

Every question is answered at the native top-k and depth of each tier, by every back end, through the program's own
preprocessing and decoding. The first back end is the reference. Shards answer every N-th picture, each with one
thread, so that many run at once; `--merge` joins their files, and `--card` writes the figures into the card.

    for i in $(seq 0 14); do python benchmarks/accuracy_cpu.py --shard $i/15 --json shard_$i.json & done; wait
    python benchmarks/accuracy_cpu.py --merge shard_*.json --json OUT --card src/tempovlm/pocket
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from output import write_json
from tempovlm import api
from tempovlm.core.errors import UserError
from tempovlm.core.paths import read_json
from tempovlm.core.progress import progress_bar
from tempovlm.data.registry import DATASETS
from tempovlm.engine.threads import start_torch

if TYPE_CHECKING:
    from tempovlm.testbed.scene import Scene

BACKENDS = ("kernels:float32", "kernels:auto", "torch:float32")
CACHE_MB = 64.0
"""Room for the features of one picture's tiers: its other questions need not encode it again."""

MAX_NEW_TOKENS = 16
COUNTS = ("disagreements", "right_to_wrong", "wrong_to_right")
REMEDY = "answer this shard again"


def load_all(model: str, backends: Sequence[str]) -> dict[str, api.TempoVLM]:
    """Each back end by its name `backend:type`, with one thread; `auto` is its own choice of type."""
    start_torch(1)
    import torch

    quick: dict[str, Any] = {"calibrate": False, "warmup": False, "progress": False, "device": "cpu", "threads": 1}
    loaded = {}
    for name in backends:
        backend, _, kind = name.partition(":")
        dtype = torch.float32 if kind == "float32" else None
        loaded[name] = api.load(model, backend=backend, dtype=dtype, feature_cache_mb=CACHE_MB, **quick)
    return loaded


def card_of(folder: Path) -> dict[str, Any]:
    """Return a pocket model's `accuracy.json`."""
    card: dict[str, Any] = read_json(folder / "accuracy.json", "give the folder of a pocket model")
    return card


def num_pictures(card: dict[str, Any]) -> int:
    """Return the number of validation pictures."""
    return int(card["recipe"]["batch"] * card["recipe"]["validation_batches"])


def validation_scenes(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[str, Scene]]:
    """Draw validation pictures of the recipe in `accuracy.json`, each with the name of its data set."""
    from tempovlm.training.pictures import Pictures

    recipe = card_of(folder)["recipe"]
    batch, count = recipe["batch"], recipe["validation_batches"]
    pictures = Pictures(folder / "tokenizer.json", "val", batch, recipe["validation_seed"], 0, count)
    names = [pictures.mixture(index)[1] for index in range(count)]
    for number in numbers:
        index, row = divmod(number, batch)
        yield names[index][row], pictures.scene(index, row, names[index][row])


def answer_shard(model: str, backends: Sequence[str], first: int, step: int) -> dict[str, Any]:
    """The right answer and all given ones of every question of a shard, with the stamps of the back ends."""
    loaded = load_all(model, backends)
    from tempovlm.training.pictures import full_question

    tiers = next(iter(loaded.values())).space.tiers
    questions = []
    folder = api.model_folder(model)
    scenes = list(validation_scenes(folder, range(first, num_pictures(card_of(folder)), step)))
    with progress_bar("answering questions") as advance:
        for done, (dataset, scene) in enumerate(scenes, 1):
            for item in scene.questions:
                texts: dict[str, dict[str, str]] = {tier: {} for tier in tiers}
                asked: dict[str, Any] = {"style": DATASETS[dataset].style, "max_new_tokens": MAX_NEW_TOKENS}
                for tier in tiers:
                    for name, one in loaded.items():
                        answer = one.answer(scene.image, full_question(item), tier=tier, **asked)
                        texts[tier][name] = answer.text
                questions.append({"dataset": dataset, "right": item.answer, "texts": texts})
            advance(done, len(scenes))
    stamps = {name: one.stamp("synthetic").to_json() for name, one in loaded.items()}
    return {"stamps": stamps, "shard": [first, step], "questions": questions}


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Join the files of all shards into the result.

    Raises:
        UserError: a file cannot be read, a shard is missing or there twice, or two differ in weights or back ends.
    """
    shards = [read_json(path, REMEDY) for path in paths]
    stamps, step = shards[0]["stamps"], shards[0]["shard"][1]
    for path, shard in zip(paths, shards, strict=True):
        if kind_of(shard) != kind_of(shards[0]):
            raise UserError(f"{path}: not of the same model, machine and shards as {paths[0]}; {REMEDY}")
    there = sorted(shard["shard"][0] for shard in shards)
    if there != list(range(step)):
        lost = next((number for number in range(step) if there.count(number) != 1), step)
        raise UserError(f"--merge: shard {lost}/{step} is there {there.count(lost)} times; give each file once")
    questions = [question for shard in shards for question in shard["questions"]]
    return {"stamps": stamps, "num_questions": len(questions), "rows": table(questions, list(stamps))}


def kind_of(shard: dict[str, Any]) -> tuple[Any, ...]:
    """The fields in which all shards agree: their number, and of each back end the weights and the machine."""
    alike = ("weights", "hardware", "device", "torch", "commit")
    return shard["shard"][1], [(name, *(s[field] for field in alike)) for name, s in shard["stamps"].items()]


def table(questions: Sequence[dict[str, Any]], backends: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each tier and back end, and rows `all` of the tiers together; the first is the reference."""
    tiers = list(questions[0]["texts"])
    rows = [row_of(questions, tier, name, backends[0]) for tier in tiers for name in backends]
    for name in backends:
        mine = [row for row in rows if row["backend"] == name]
        means = {key: statistics.fmean(row[key] for row in mine) for key in ("accuracy", "accuracy_plain")}
        counts = {key: sum(row[key] for row in mine) for key in COUNTS}
        rows.append({"tier": "all", "backend": name, **means, **counts})
    return [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def row_of(questions: Sequence[dict[str, Any]], tier: str, backend: str, reference: str) -> dict[str, Any]:
    """One row: accuracy as the mean over the data sets and over the questions, and the answers that differ."""
    right: dict[str, list[bool]] = {}
    differ = lost = gained = 0
    for question in questions:
        text, expected = (question["texts"][tier][name] for name in (backend, reference))
        hit, meant = text == question["right"], expected == question["right"]
        right.setdefault(question["dataset"], []).append(hit)
        differ += text != expected
        lost += meant and not hit
        gained += hit and not meant
    return {
        "tier": tier,
        "backend": backend,
        "accuracy": statistics.fmean(statistics.fmean(hits) for hits in right.values()),
        "accuracy_plain": statistics.fmean(hit for hits in right.values() for hit in hits),
        "disagreements": differ,
        "right_to_wrong": lost,
        "wrong_to_right": gained,
    }


def update_card(folder: Path, result: dict[str, Any]) -> None:
    """Write the figures of the back end in bfloat16 to `accuracy.json`, and the model's card anew.

    Raises:
        UserError: the card is of other weights or questions, or no back end computed in bfloat16.
    """
    from tempovlm.training.model_card import write_card

    path = folder / "accuracy.json"
    record = card_of(folder)
    stamps, count = result["stamps"], result["num_questions"]
    reference, fast = next(iter(stamps)), next((n for n, s in stamps.items() if "bfloat16" in s["device"]), None)
    if fast is None or fast == reference:
        raise UserError(
            f"--card {folder}: no answers in float32 and then in bfloat16; use a CPU that computes in both"
        )
    if (stamps[fast]["weights"], count) != (record["weights"], record["settings"][0]["num_samples"]):
        raise UserError(
            f"--card {folder}: {path} is of other weights or questions; merge the shards of this model"
        )
    rows = {(row["backend"], row["tier"]): row for row in result["rows"]}
    tiers = [
        {"tier": tier, "accuracy_float32": rows[reference, tier]["accuracy"]}
        | {key: row[key] for key in ("accuracy", *COUNTS)}
        for (name, tier), row in rows.items()
        if name == fast
    ]
    record["cpu_bfloat16"] = {"hardware": stamps[fast]["hardware"], "num_samples": count, "tiers": tiers}
    write_json(record, path)
    write_card(folder)


def shard_of(text: str) -> tuple[int, int]:
    """Read `I/N`."""
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text}: must be I/N with I from 0 to N - 1, such as 0/15")
    return int(first), int(step)


def backend_of(text: str) -> str:
    """Check `backend:type`."""
    if text.partition(":")[2] not in ("float32", "auto"):
        raise argparse.ArgumentTypeError(f"{text}: must be a back end and float32 or auto, such as torch:float32")
    return text


def main() -> None:
    """Answer or merge, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or the folder of one that was trained")
    parser.add_argument(
        "--backends",
        nargs="+",
        type=backend_of,
        default=list(BACKENDS),
        metavar="BACKEND:TYPE",
        help="the reference first",
    )
    parser.add_argument(
        "--shard", type=shard_of, default=(0, 1), metavar="I/N", help="answer pictures I, I + N, …"
    )
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="join these files of shards instead")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    parser.add_argument("--card", type=Path, help="model folder whose card gets the merged figures")
    flags = parser.parse_args()
    if flags.card and not flags.merge:
        parser.error(f"--card {flags.card}: only with --merge")
    try:
        result = merge(flags.merge) if flags.merge else answer_shard(flags.model, flags.backends, *flags.shard)
        write_json(result, flags.json)
        if flags.card:
            update_card(flags.card, result)
    except UserError as error:
        sys.exit(f"error: {error.flagged}")


if __name__ == "__main__":
    main()
