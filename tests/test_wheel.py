"""The wheel, alone with the core dependencies, answers a question from another folder.

Installing torch anew would take minutes, so the fresh environment gets symbolic links to exactly the
distributions that the declared core dependencies resolve to, and nothing else of the environment that runs
the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, ImageDraw, ImageFont

POCKET_FILES = ("config.json", "tokenizer.json", "MODEL_CARD.md", "accuracy.json", "controller.pt")
NOT_CORE = ("pandas", "scipy", "sklearn", "pyarrow", "tensorboard", "pytest")
ANSWER_KEYS = {
    "answer",
    "knobs",
    "budget_ms",
    "budget_met",
    "budget_feasible",
    "timings_ms",
    "ttft_ms",
    "predicted_ms",
    "finish_reason",
    "policy",
    "num_vision_tokens",
    "num_text_tokens",
    "num_output_tokens",
    "model",
    "device",
    "schema",
}
TIMING_KEYS = {"queue", "preprocess", "control", "vision_encoder", "projector", "prefill", "decode", "total"}


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with the wheel in it."""

    python: Path
    cwd: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env["PYTHONNOUSERSITE"] = "1"
        command = [str(self.python), *words]
        return subprocess.run(
            command, cwd=self.cwd, env=env, capture_output=True, text=True, timeout=300, check=False
        )


def core_distributions(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements resolve to, with all that they require in turn."""
    found: dict[str, metadata.Distribution] = {}
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        found[name] = metadata.distribution(name)
        for text in found[name].requires or ():
            needed = Requirement(text)
            extras = ("", *requirement.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                queue.append(needed)
    return found


def link(distribution: metadata.Distribution, site_packages: Path) -> None:
    """Link the top-level packages, modules and metadata of a distribution into another environment."""
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    for top in tops:
        target = site_packages / top
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(top))).resolve())


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(repo_root),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for distribution in core_distributions(project["dependencies"]).values():
        link(distribution, site_packages)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cwd = folder / "elsewhere"
    cwd.mkdir()
    return Environment(python, cwd)


def test_the_wheel_holds_the_package_the_page_and_the_pocket_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if not name.startswith("tempovlm")]
    assert "tempovlm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    pocket = [name.removeprefix("tempovlm/pocket/") for name in names if name.startswith("tempovlm/pocket/")]
    assert not set(POCKET_FILES) - set(pocket)
    assert any(name.endswith(".safetensors") for name in pocket)
    page = ("index.html", "page.css", "page.js", "live.js", "uplot/uPlot.iife.min.js", "uplot/LICENSE")
    assert {f"tempovlm/serving/static/{name}" for name in page} <= set(names)


def test_the_wheel_draws_the_demos_page(environment: Environment) -> None:
    code = """
from tempovlm.lab.bench.report import Report, render
unknown = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "accuracy", "adherence", "utilisation"))
row = {**unknown, "budget_ms": 50.0, "adherence_wilson": (0.0, 1.0), "knobs": {"low/k4/b8": 1.0}, "num_samples": 0}
bench = {"budgets": [row], "dataset": ["text_vqa"], "data_source": "synthetic"}
print(render(Report(examples=[], bench=bench, facts={"hardware": "a machine"})))
"""
    done = environment.run("-c", code)
    assert done.returncode == 0, done.stderr
    for part in ("<!doctype html>", "no request was answered", "Settings chosen, share of answers", "a machine"):
        assert part in done.stdout


def test_the_environment_holds_core_dependencies_only(environment: Environment) -> None:
    code = f"import importlib.util as u; print([n for n in {NOT_CORE} if u.find_spec(n)])"
    assert environment.run("-c", code).stdout.strip() == "[]"
    where = environment.run("-c", "import tempovlm; print(tempovlm.__file__)").stdout.strip()
    assert where.startswith(str(environment.python.parents[1]))


def test_the_command_is_installed(environment: Environment) -> None:
    script = environment.python.parent / "tempovlm"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["tempovlm"])


@pytest.mark.parametrize("words", [("report",), ("reproduce", "--output_dir", "run")])
def test_what_needs_a_checkout_says_so(environment: Environment, words: tuple[str, ...]) -> None:
    done = environment.run("-m", "tempovlm", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run this in a checkout of the repository, or give its root" in done.stderr


def test_the_wheel_answers_from_another_folder(environment: Environment) -> None:
    picture = Image.new("RGB", (448, 336), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((120, 130), "OPEN", fill="black", font=ImageFont.load_default(size=64))
    picture.save(environment.cwd / "sign.png")

    question = "what does the sign say?"
    few = ("--tier", "low", "--num_blocks", "8")  # are calibrated in a moment
    done = environment.run("-m", "tempovlm", "answer", "sign.png", question, "--budget_ms", "200", *few, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert answer.keys() >= ANSWER_KEYS
    assert answer["timings_ms"].keys() == TIMING_KEYS
    assert isinstance(answer["answer"], str)
    assert answer["budget_ms"] == 200
    assert answer["num_output_tokens"] >= 1
    assert answer["budget_met"] == (answer["timings_ms"]["total"] <= 200)
