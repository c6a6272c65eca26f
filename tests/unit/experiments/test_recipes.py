"""The commands that made the repository's results: each once, and each one that its script takes."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from experiments.published import commands, made_by, published
from experiments.recipes import GPU_PLACE, Run
from experiments.reproduce import command

from tempovlm.cli import console
from tempovlm.cli.checkout import find_checkout, import_experiments
from tempovlm.core.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


class ParsedError(Exception):
    """Ends a subcommand whose flags were right."""


def parse(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the flags to the parser of the run's script or subcommand; those of benchmarks are looked up."""
    if run.command.startswith("experiments/"):
        command(run.command, ROOT).__globals__["flags"]().parse_args(list(run.flags))
    elif run.command.startswith("-m "):
        import_module(run.command.removeprefix("-m ")).flags().parse_args(list(run.flags))
    elif run.command.endswith(".py"):
        text = (ROOT / run.command).read_text(encoding="utf-8")
        assert not [word for word in run.flags if word.startswith("--") and f'"{word}"' not in text], run.text
    else:
        real = console.parse

        def stop(*words: Any, **more: Any) -> None:
            real(*words, **more)
            raise ParsedError

        monkeypatch.setattr(console, "parse", stop)
        with pytest.raises(ParsedError):
            command(run.command, ROOT)(list(run.flags))


@pytest.mark.parametrize("run", published(), ids=lambda run: run.outputs[0])
def test_its_script_takes_its_flags(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(run, monkeypatch)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("co*/*.py")), ids=lambda path: path.stem)
def test_the_examples_of_its_help_can_be_run(path: Path) -> None:
    """Each has flags that the script takes, reads files that are here, and writes to a folder of the reader's."""
    name = str(path.relative_to(ROOT))
    parser = command(name, ROOT).__globals__["flags"]()
    examples = parser.format_help().partition("\nexamples:\n")[2].replace("\\\n", " ").strip().splitlines()
    assert examples
    for words in map(shlex.split, examples):
        if words[:2] == ["tempovlm", "data"]:
            continue
        assert words[:2] == ["python", name]
        parser.parse_args(words[2:])
        read = [word for word in words if word.startswith(("results/", "checkpoints/"))]
        assert not [word for word in read if not (ROOT / word).exists()]
        assert [word for word in words if word.startswith("runs/")]


def test_the_chain_of_the_cpu_is_written_down() -> None:
    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    block = text.partition("## The commands of the CPU's results")[2].split("```")[1]
    written = [" ".join(line.split()) for line in block.replace("\\\n", " ").splitlines()[1:]]
    runs = published()
    first, last = (next(i for i, run in enumerate(runs) if run.name == name) for name in ("exp6", "judge"))
    assert written[:2] == ["tempovlm data make --output_dir runs/data", "export TEMPOVLM_DATA_DIR=$PWD/runs/data"]
    assert written[2:] == [run.text for run in runs[first : last + 1]]


def test_no_file_is_made_twice_and_no_command_stands_twice() -> None:
    runs = published()
    outputs = [name for run in runs for name in run.outputs]
    assert len(outputs) == len(set(outputs))
    assert len({run.text for run in runs}) == len(runs)


def test_every_input_is_made_by_a_run() -> None:
    assert not [(run.text, name) for run in published() for name in run.inputs if made_by(name) is None]


def test_a_command_comes_with_those_that_make_what_it_lacks(tmp_path: Path) -> None:
    path = f"results/evaluate/pocket_{GPU_PLACE}/judge.json"
    chain = commands(path, tmp_path).split(" && ")
    assert len(chain) == len(set(chain)) == 11
    made: list[str] = []
    for text in chain:
        run = next(run for run in published() if run.text == text)
        assert all(f"{name}/".startswith(tuple(made)) or _is_in(name, made) for name in run.inputs), text
        assert not [w for w in run.flags if w.startswith("checkpoints/") and f"gpu_{GPU_PLACE}" not in w], text
        made += run.outputs
    assert commands(path, ROOT) == chain[-1]
    assert commands("results/of/nobody.json", tmp_path) == ""


def _is_in(folder: str, names: list[str]) -> bool:
    return any(name.startswith(f"{folder}/") for name in names)


def test_a_checkout_of_another_version_is_told(tmp_path: Path) -> None:
    assert find_checkout(ROOT) == ROOT
    with pytest.raises(UserError, match=r"experiments\.nowhere is not there; the checkout has another version"):
        import_experiments(ROOT, "nowhere")
    with pytest.raises(UserError, match="no folder experiments/controller there"):
        find_checkout(tmp_path)
