"""What a run of the tests says at its end, and the order of files where a random one was asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

EXTRAS = {"pycocoevalcap": "captions", "triton": "dev", "pandas": "experiments", "pyarrow": "experiments"}
"""Which extra of the package brings a module that tests skip without."""


def pytest_configure(config: pytest.Config) -> None:
    """Leave the files in their order, or in the one that was drawn.

    pytest-xdist would start with the files of most tests, and end with few and long ones, on one worker.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def drawn_seed(config: pytest.Config) -> str | None:
    """The seed of a random order; None where tests run in the order of their files."""
    values = [str(config.getoption(f"random_order_{name}", "default:")) for name in ("seed", "bucket")]
    asked = config.getoption("random_order_enabled", False)
    if not asked and all(value.startswith("default:") for value in values):
        return None
    return values[0].removeprefix("default:")


def skip_lines(reasons: Iterable[str]) -> list[str]:
    """What was skipped: a line for each reason with how many tests it kept, most first, and the remedy."""
    told = []
    for reason in reasons:
        text = reason.removeprefix("Skipped: ")
        absent = re.match(r"could not import '(\w+)", text)
        if absent and absent[1] in EXTRAS:
            text = f"{absent[1]} is not installed; pip install -e '.[{EXTRAS[absent[1]]}]' brings it"
        told.append(text)
    return [f"{count:5d}  {text}" for text, count in Counter(told).most_common()]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what did not run and how to run it, and in which order the rest ran."""
    reports = terminalreporter.stats.get("skipped", [])
    if lines := skip_lines(report.longrepr[2] for report in reports):
        terminalreporter.section("skipped")
        terminalreporter.write_line("\n".join(lines))
    if config.option.markexpr == "not gpu":
        terminalreporter.write_line("tests of CUDA devices are left out; pytest -m gpu tests/gpu runs them")
    if (seed := drawn_seed(config)) is not None:
        terminalreporter.write_line(f"in random order; --random-order-seed={seed} repeats it")
