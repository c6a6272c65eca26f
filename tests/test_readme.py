"""Every command and Python example of the README runs, and those of serving.md and of most of adding.md.

A block under `<!-- no-test: reason -->` is exempt. Of the other commands, those that run the tests themselves
or fetch weights are left out.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from preloaded import Preloaded
from tempovlm.data.styles import STYLES

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

BLOCK = re.compile(
    r"^(?:<!-- no-test(?P<reason>[^\n]*?)-->\n+)?```(?P<language>bash|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LEFT_OUT = re.compile(r"^make test$|allenai/|^git clone ")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and why it is exempt (None where it is not)."""

    language: str
    body: str
    exempt: str | None


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        reason = match["reason"]
        found.append(Block(match["language"], match["body"], reason and reason.strip(" :")))
    return found


def commands(text: str) -> list[str]:
    """The shell commands to run, continued lines joined."""
    bodies = [block.body for block in blocks(text) if block.language == "bash" and block.exempt is None]
    lines = "".join(bodies).replace("\\\n", " ").splitlines()
    lines = [line.strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#") and not LEFT_OUT.search(line)]


def examples(text: str) -> list[str]:
    """The Python examples to run."""
    return [block.body for block in blocks(text) if block.language == "python" and block.exempt is None]


NAMES = ("README.md", "docs/adding.md", "docs/serving.md")
README, ADDING, SERVING = ((ROOT / name).read_text(encoding="utf-8") for name in NAMES)
ADDED = ADDING.partition("## Fewer settings")[2].partition("## A knob")[0]
EXAMPLES = examples(README) + examples(ADDED) + examples(SERVING)
SHOWN = re.compile(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's working directory: the pictures that the README names, and nothing of the source tree."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "docs" / "figures", path / "docs" / "figures")
    for name, text in SHOWN.findall(ADDED):
        (path / name).write_text(text, encoding="utf-8")
    return path


SHELL = set("|&;<>$`")


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs commands as they are typed, in a folder."""

    folder: Path
    preloaded: Preloaded
    env: Mapping[str, str]

    def run(self, command: str) -> None:
        """By a shell where it takes one; else a script's path and its words are all there is to know."""
        name, *words = shlex.split(command)
        scripts = {"tempovlm": [BIN / "tempovlm"], "python": []}
        if name in scripts and not SHELL & set(command):
            script, *words = [*scripts[name], *words]
            done = self.preloaded.run(self.folder / script, *words, cwd=self.folder, env=self.env)
        else:
            outer = self.preloaded.env | self.env
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.folder, env=outer, capture_output=True, text=True, timeout=600
            )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def shell(folder: Path, preloaded: Preloaded, few_pictures: Path) -> Shell:
    """On a machine that is calibrated and has pictures."""
    shell = Shell(folder, preloaded, {"TEMPOVLM_DATA_DIR": str(few_pictures)})
    shell.run("tempovlm calibrate")
    return shell


@pytest.mark.parametrize("command", commands(README))
def test_command(command: str, shell: Shell) -> None:
    if command == "make demo":
        # -o takes the environment as set up: the demo itself runs, its installation does not.
        demo = shell.folder / "demo"
        few = "DEMO_FLAGS='--num_samples 2'"
        shell.run(f"make -C {ROOT} -o .venv/.installed demo BIN={BIN} DEMO_DIR={demo} {few}")
        assert (demo / "report.html").is_file()
    else:
        for part in command.split(" && "):
            shell.run(part)


RUN_ALL = """\
import json, sys
from pathlib import Path

for example in json.loads(Path("examples.json").read_text()):
    print(example)
    exec(compile(example, "example", "exec"), {"__name__": "__main__"})
"""


def test_python_examples(folder: Path, shell: Shell) -> None:
    """All in one process, each with names of its own."""
    assert len(EXAMPLES) > 8
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    (folder / "run_all.py").write_text(RUN_ALL)
    shell.run("python run_all.py")


def test_commands_of_fewer_settings_and_own_policies(folder: Path, shell: Shell) -> None:
    (folder / "experiments").symlink_to(ROOT / "experiments")
    found = commands(ADDED)
    assert len(found) == 8
    for command in found:
        shell.run(command)
    judged = json.loads((folder / "results" / "evaluate" / "judge.json").read_text())
    assert list(judged["policies"]) == ["few_blocks.py:FewBlocks", "table"]
    assert judged["knob_space"]["tier"] == ["low", "high"]
    benched = json.loads((folder / "bench_out" / "bench.json").read_text())
    assert benched["chosen_by"] == ["few_blocks"]


def test_exemptions_give_a_reason() -> None:
    assert not [block.body for block in blocks(README) if block.exempt == ""]


def test_links_to_files_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def first_cells(text: str, head: str) -> list[str]:
    """The code in the first column of the table whose first column is called `head`."""
    rows = text.partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_extra_and_every_style_is_described() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert first_cells(README, "extra") == list(extras)
    described = first_cells(ADDING.partition("## Prompt styles")[2], "style")
    assert sorted(described) == sorted(STYLES)


def test_the_two_commands_are_shown() -> None:
    (first, *_) = (block.body for block in blocks(README))
    assert first.split("\n") == ["make demo", "make test", ""]


def test_extraction() -> None:
    text = (
        "```bash\na \\\n  b\n# a comment\nmake test\nx allenai/y\n```\n\n"
        "<!-- no-test: needs a GPU -->\n```bash\nc\n```\n\n"
        "<!-- no-test -->\n```python\nd\n```\n\n"
        "```python\ne\n```\n\n```text\nf\n```\n"
    )
    assert [command.split() for command in commands(text)] == [["a", "b"]]
    assert examples(text) == ["e\n"]
    assert [block.exempt for block in blocks(text)] == [None, "needs a GPU", "", None]
