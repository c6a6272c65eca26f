"""docs/serving.md lists every environment variable that the source reads or sets, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
NO_VARIABLES = {"MS", "PASSIVE", "HEAD", "SC_CLK_TCK", "PATH", "NUMBER", "AVX2", "AVX512"}
"""Words in capitals beside variables: values, a commit, a setting of the system, names of values in the help."""
READ_BY_LIBRARIES = {"HF_HUB_CACHE", "HF_HUB_OFFLINE"}


def variables(source: str) -> set[str]:
    """Words in capitals of a module that reads or sets its environment."""
    nodes = list(ast.walk(ast.parse(source)))
    if not any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in nodes):
        return set()
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {text for text in texts if NAME.fullmatch(text) and len(text) > 1}


def listed(document: str) -> set[str]:
    """Names in the first column of the table."""
    _, _, rest = document.partition("## Environment variables")
    rows = [line for line in rest.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_table_names_every_variable_and_no_other() -> None:
    modules = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    found = set().union(*map(variables, modules)) - NO_VARIABLES
    assert found >= {"TEMPOVLM_CACHE_DIR", "TEMPOVLM_DATA_DIR", "TEMPOVLM_THREADS"}
    table = listed((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    assert table == found | READ_BY_LIBRARIES


def test_how_a_variable_is_found() -> None:
    assert variables("import os\nX = 'MY_NAME'\nos.environ.get(X), os.environ['A_B'], 'x'") == {"MY_NAME", "A_B"}
    assert variables("import os\nos.getenv('HOME')") == {"HOME"}
    assert variables("X = 'MY_NAME'") == set()
    table = "## Environment variables\n\n| variable | meaning |\n|---|---|\n| `A`, `B_C` | `D` |\n"
    assert listed(table) == {"A", "B_C"}
