"""The house rules that bind the tests: verdicts that are the same on every machine.

A rule is tested twice, as those in test_house_rules.py are: on the tests, and on snippets.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from test_house_rules import ROOT, Case, Rule, Source, broken_rules

# Calls that hand their arguments on as values to be compared.
BUILDERS = {
    "array",
    "asarray",
    "dict",
    "float",
    "float32",
    "float64",
    "frozenset",
    "full",
    "list",
    "set",
    "sorted",
    "stack",
    "tensor",
    "tuple",
    "DataFrame",
    "Series",
}
EXACT = {"array_equal", "assert_array_equal", "assert_equal", "equal"}
CLOSE = {"allclose", "assert_allclose", "assert_close", "isclose", "approx"}
CLOCKS = {
    "monotonic",
    "monotonic_ns",
    "now_ms",
    "perf_counter",
    "perf_counter_ns",
    "process_time",
    "sleep",
    "time",
    "time_ns",
}
EQUALITY = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)

EXACT_FLOATS: dict[tuple[str, str], str] = {}
"""Comparisons of floats that are meant to be exact, as (path, the comparison's source), each with the reason."""

CLOCK_READERS = {
    "tests/unit/testbed/test_testbed.py": "gives up after a minute where a process that it kills never starts",
    "tests/unit/experiments/test_core_experiment.py": "gives up after two minutes, likewise",
    "tests/unit/lab/test_sweep_processes.py": "gives up likewise, and dates files as of an earlier run",
}
"""Tests that read a clock, each with the reason why no verdict on the product hangs on it."""


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def has_float(node: ast.AST) -> bool:
    """Whether a float is written in the value of an expression: not in a call's arguments, not in an approx."""
    match node:
        case ast.Constant():
            return isinstance(node.value, float)
        case ast.Call():
            return name_of(node) in BUILDERS and any(map(has_float, node.args))
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            return has_float(node.elt)
        case ast.DictComp():
            return has_float(node.value)
        case ast.IfExp():
            return has_float(node.body) or has_float(node.orelse)
        case ast.UnaryOp() | ast.BinOp() | ast.Tuple() | ast.List() | ast.Set() | ast.Dict() | ast.Starred():
            return any(map(has_float, ast.iter_child_nodes(node)))
    return False


def exact_comparisons(source: Source) -> Iterator[ast.Compare | ast.Call]:
    for node in source.nodes(ast.Compare, ast.Call):
        if isinstance(node, ast.Compare):
            operands = (node.left, *node.comparators)
            if any(isinstance(op, EQUALITY) for op in node.ops) and any(map(has_float, operands)):
                yield node
        elif isinstance(node, ast.Call):
            zero = {word.arg for word in node.keywords if ast.unparse(word.value) in ("0", "0.0")}
            no_tolerance = name_of(node) in CLOSE and len(zero & {"rtol", "atol", "rel", "abs"}) == 2
            if no_tolerance or (name_of(node) in EXACT and any(map(has_float, node.args))):
                yield node


def no_exact_float(source: Source) -> list[str]:
    """A computed float depends on the order of its sums, and so on the machine: pytest.approx or a tolerance."""
    return [
        f"{source.path}:{node.lineno}: {text}: compares floats exactly: use pytest.approx"
        for node in exact_comparisons(source)
        if (source.path, text := ast.unparse(node)) not in EXACT_FLOATS
    ]


def no_clock(source: Source) -> list[str]:
    """What a machine takes is no verdict: see timings.Ticks."""
    return [] if source.path in CLOCK_READERS else clock_calls(source)


def clock_calls(source: Source) -> list[str]:
    """Calls that read a clock, or wait for some time: a thread's `join` with a number too."""
    found = []
    for node in source.nodes(ast.Call):
        assert isinstance(node, ast.Call)
        limits = [*node.args, *(word.value for word in node.keywords)] if name_of(node) == "join" else []
        if name_of(node) in CLOCKS or any(map(is_number, limits)):
            found.append(f"{source.path}:{node.lineno}: calls {ast.unparse(node.func)}: see timings.Ticks")
    return found


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


CASES = (
    Case(
        no_exact_float,
        "tests/test_a.py",
        (
            "assert 0.5 == x",
            "assert 0.1 != x",
            "assert -1.0 == x",
            "assert (a, b) == ('q', [0.5, 1])",
            "assert found == {'accuracy': 0.2}",
            "assert 0.2 == a == b",
            "assert x.tolist() == [0.0] * 5",
            "assert x in (0.0, 1.0)",
            "assert {row['ms'] for row in rows} == {13.0}",
            "assert all(1.0 == score(i) for i in range(3))",
            "assert 1.0 == x == pytest.approx(1)",
            "assert torch.equal(x, torch.tensor([0.5]))",
            "np.testing.assert_array_equal(x, [0.5, 1])",
            "torch.testing.assert_close(x, y, rtol=0, atol=0)",
            "assert x == pytest.approx(y, rel=0, abs=0.0)",
        ),
        (
            "assert x == pytest.approx(0.5)",
            "assert (a, b) == ('q', pytest.approx([0.5, 1]))",
            "assert x == 3",
            "assert choose(guard, 40.0) == SPACE.native",
            "assert x < 0.5",
            "assert torch.equal(x, y)",
            "torch.testing.assert_close(x, y, rtol=0, atol=1e-6)",
        ),
    ),
    Case(
        no_clock,
        "tests/test_a.py",
        (
            "time.perf_counter()",
            "start = time.monotonic()",
            "sleep(1)",
            "now_ms()",
            "time.sleep(0.1)",
            "other.join(0.2)",
            "other.join(timeout=2)",
        ),
        ("ticks.wait(3.0)", "took_ms = answer.timings_ms['total']", "other.join()", "' '.join(words)"),
    ),
)
RULES = tuple(dict.fromkeys(case.rule for case in CASES))


def sources_of_tests() -> list[Source]:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.fixture(scope="module")
def broken() -> dict[Rule, list[str]]:
    return broken_rules(sources_of_tests(), RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tests_keep(rule: Rule, broken: dict[Rule, list[str]]) -> None:
    assert not broken[rule], "\n" + "\n".join(broken[rule])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule.__name__)
def test_the_rule_detects(case: Case) -> None:
    for snippet in case.bad:
        assert case.rule(Source(case.path, snippet)), snippet
    for snippet in case.good:
        assert not case.rule(Source(case.path, snippet)), snippet


def test_exceptions_are_needed() -> None:
    seen, clock_readers = set(), set()
    for source in sources_of_tests():
        seen |= {(source.path, ast.unparse(node)) for node in exact_comparisons(source)}
        if clock_calls(source):
            clock_readers.add(source.path)
    assert set(EXACT_FLOATS) <= seen
    assert set(CLOCK_READERS) <= clock_readers
