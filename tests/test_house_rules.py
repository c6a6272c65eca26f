"""The house rules that a linter does not know, each as a function from a source file to its violations.

A rule is tested twice: on the repository, and on a snippet that must violate it beside one that must not, so
that a rule cannot pass by finding nothing.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from tempovlm.core.knobs import KNOBS
from tempovlm.data.registry import DATASETS

ROOT = Path(__file__).resolve().parents[1]

MAX_MODULE_LINES = 600
MAX_SCRIPT_LINES = 90
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
MAX_TRACKED_BYTES = 48_000_000
MAX_FILE_BYTES = 16_000_000

SCRIPTS = ("experiments/controller/", "experiments/core_exp/")
STATELESS = ("src/tempovlm/model/", "src/tempovlm/engine/", "src/tempovlm/control/")

# Flags and file fields that the published experiment protocol names keep their names at the boundary.
PROTOCOL_NAMES = frozenset({"latency_budget"})

TIME_WORD = re.compile(r"latency|budget|duration|elapsed|timeout|deadline|_time$")
MS_NAME = re.compile(r"_ms(_|$)")
# A share, a weight or a probability is a float beside a time, not a time.
DIMENSIONLESS = re.compile(r"_(weight|ratio|share|scale|quantile|penalty|fraction|level|error|rate)$")
VERSION_SUFFIX = re.compile(r"_(v\d+|new|old)$")
UNFINISHED = re.compile(r"TODO|FIXME|XXX|NotImplementedError|for now|placeholder")


@lru_cache(maxsize=1)
def parsed(text: str) -> ast.Module:
    """The tree of the file that all rules look at before the next one."""
    return ast.parse(text)


@lru_cache(maxsize=1)
def walked(text: str) -> tuple[ast.AST, ...]:
    """All nodes of that tree."""
    return tuple(ast.walk(parsed(text)))


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file: its path from the root, its text and its tree."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in walked(self.text) if isinstance(node, kinds))


Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[Source], list[str]]


def module_length(source: Source) -> list[str]:
    limit = MAX_SCRIPT_LINES if source.path.startswith(SCRIPTS) else MAX_MODULE_LINES
    too_long = source.num_lines > limit
    return [f"{source.path}:{limit + 1}: {source.num_lines} lines, at most {limit}"] if too_long else []


def function_length(source: Source) -> list[str]:
    found = []
    for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > limit:
            found.append(f"{source.path}:{node.lineno}: {node.name} has {length} lines, at most {limit}")
    return found


def module_docstring(source: Source) -> list[str]:
    return [] if ast.get_docstring(source.tree) else [f"{source.path}:1: the module opens with no docstring"]


LIBRARY_SWITCHES = {"fast.encode_special_tokens"}
"""Options of other people's objects that can only be assigned; each is set where the object is made."""


def no_foreign_attribute_written(source: Source) -> list[str]:
    """Only `self.x = …` and `cls.x = …`: a knob set on a live module outlives its request."""
    if not source.path.startswith(STATELESS):
        return []
    found = []
    for node in source.nodes(ast.Attribute):
        assert isinstance(node, ast.Attribute)
        is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if not isinstance(node.ctx, ast.Load) and not is_own and ast.unparse(node) not in LIBRARY_SWITCHES:
            found.append(
                f"{source.path}:{node.lineno}: writes {ast.unparse(node)}, an attribute of another object"
            )
    return found


def no_setattr(source: Source) -> list[str]:
    if not source.path.startswith(STATELESS):
        return []
    banned = ("setattr", "delattr", "__setattr__", "__delattr__")
    found = []
    for node in source.nodes(ast.Call):
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in banned:
            found.append(f"{source.path}:{node.lineno}: calls {name}")
    return found


def no_global(source: Source) -> list[str]:
    if not source.path.startswith(STATELESS):
        return []
    found = []
    for node in source.nodes(ast.Global):
        assert isinstance(node, ast.Global)
        found.append(f"{source.path}:{node.lineno}: global {', '.join(node.names)}")
    return found


def times_end_in_ms(source: Source) -> list[str]:
    """A parameter, variable or field of a time, annotated as a float, carries its unit."""
    found = []
    for node in source.nodes(ast.arg, ast.AnnAssign):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        else:
            assert isinstance(node, ast.AnnAssign)
            name = ast.unparse(node.target).rpartition(".")[2]
            annotation = node.annotation
        if annotation is None or name in PROTOCOL_NAMES or not _is_float(annotation):
            continue
        if TIME_WORD.search(name) and not MS_NAME.search(name) and not DIMENSIONLESS.search(name):
            found.append(f"{source.path}:{node.lineno}: {name} is a time in floats: end its name in _ms")
    return found


def _is_float(annotation: ast.expr) -> bool:
    text = ast.unparse(annotation).strip("'\"")
    text = text.removeprefix("Annotated[").partition(",")[0]
    text = text.removeprefix("Optional[").rstrip("]")
    return text in ("float", "float | None", "None | float")


def no_version_suffix(source: Source) -> list[str]:
    """No second version beside the first: not as a file, a function, a class or a module's name.

    Locals are free: `log_prob_old` is the old policy of a ratio, not an old version of the code.
    """
    if not source.path.startswith("src/"):
        return []
    names = [(1, part) for part in Path(source.path).with_suffix("").parts]
    for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
        assert isinstance(node, Function | ast.ClassDef)
        names.append((node.lineno, node.name))
    for statement in source.tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        names += [(t.lineno, t.id) for t in targets if isinstance(t, ast.Name)]
    return [f"{source.path}:{line}: {name} has a version suffix" for line, name in names if _is_version(name)]


def _is_version(name: str) -> bool:
    return VERSION_SUFFIX.search(name.lower()) is not None


def kernels_start_on_their_device(source: Source) -> list[str]:
    """A function that starts a kernel, as `kernel[grid](...)`, is `on_device`: Triton does not ask the tensors."""
    if not source.path.startswith("src/tempovlm/model/kernels/"):
        return []
    found = []
    for node in source.nodes(ast.FunctionDef):
        assert isinstance(node, ast.FunctionDef)
        starts = any(isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript) for n in ast.walk(node))
        if starts and "on_device" not in map(ast.unparse, node.decorator_list):
            found.append(f"{source.path}:{node.lineno}: {node.name} starts a kernel and is not on_device")
    return found


def nothing_unfinished(source: Source) -> list[str]:
    if not source.path.startswith(("src/", "experiments/")):
        return []
    lines = enumerate(source.text.splitlines(), start=1)
    return [f"{source.path}:{i}: says {match[0]!r}" for i, line in lines if (match := UNFINISHED.search(line))]


def no_list_of_data_sets(source: Source) -> list[str]:
    """Which data sets there are is said in `data`; a copy elsewhere refuses what another command takes.

    So no list, table or text names two. A module of `data/sets` names its own alone.
    """
    if source.path.startswith("src/tempovlm/data/") and not source.path.startswith("src/tempovlm/data/sets/"):
        return []
    found = []
    for node in source.nodes(ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Constant):
        if isinstance(node, ast.Constant):
            words = re.findall(r"\w+", node.value) if isinstance(node.value, str) else []
        else:
            assert isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict)
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            words = [item.value for item in items if isinstance(item, ast.Constant)]
        if len(set(words) & set(DATASETS)) > 1:
            assert isinstance(node, ast.expr)
            found.append(f"{source.path}:{node.lineno}: lists data sets: take them from tempovlm.data.registry")
    return found


def all_knobs_in_core_only(source: Source) -> list[str]:
    """Only `core/knobs.py` names all knobs at once; elsewhere code loops over its axes, or names the one it means.

    No statement in src and experiments has all three names among the texts, keywords and attributes of its own
    expressions; a statement inside it counts alone. Fields and parameters declare rows, flags and the API one at a
    time and do not count, nor do benchmarks, which run settings that they choose.
    """
    if source.path == "src/tempovlm/core/knobs.py":
        return []
    if not source.path.startswith(("src/", "experiments/")):
        return []
    found = []
    for statement in source.nodes(ast.stmt):
        assert isinstance(statement, ast.stmt)
        if set(KNOBS) <= set(_names(statement)):
            found.append(f"{source.path}:{statement.lineno}: names all knobs: loop over those of core/knobs.py")
    return found


def _names(node: ast.AST) -> Iterator[object]:
    """The texts, keywords and attributes below a node, but for those of statements inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            continue
        if isinstance(child, ast.Constant | ast.keyword | ast.Attribute):
            yield from (getattr(child, name, None) for name in ("value", "arg", "attr"))
        yield from _names(child)


@dataclass(frozen=True, slots=True)
class Case:
    """A rule with a snippet that violates it and one that does not, both at `path`."""

    rule: Rule
    path: str
    bad: tuple[str, ...]
    good: tuple[str, ...]


def _function(num_lines: int, decorator: str = "") -> str:
    return f"{decorator}def f():\n" + "    x = 1\n" * (num_lines - 1)


CASES = (
    Case(module_length, "src/tempovlm/a.py", ("x = 1\n" * 601,), ("x = 1\n" * 600,)),
    Case(module_length, "experiments/controller/a.py", ("x = 1\n" * 91,), ("x = 1\n" * 90,)),
    Case(module_length, "experiments/a.py", ("x = 1\n" * 601,), ("x = 1\n" * 600,)),
    Case(
        function_length,
        "src/tempovlm/a.py",
        (
            _function(61),
            "class A:\n    async def f(self):\n" + "        x = 1\n" * 60,
            _function(121, "@triton.jit\n"),
        ),
        (
            _function(60),
            _function(120, "@triton.jit\n"),
            _function(120, "@triton.autotune([])\n@triton.jit()\n"),
        ),
    ),
    Case(module_docstring, "src/tempovlm/a.py", ("", "x = 1\n"), ('"""What it is for."""\n',)),
    Case(
        no_foreign_attribute_written,
        "src/tempovlm/model/a.py",
        (
            "moe.top_k = 4",
            "self.moe.top_k = 4",
            "blocks[0].top_k += 1",
            "a, b.c = 1, 2",
            "x.y: int = 1",
            "for m.x in y: pass",
            "del self.a.b",
        ),
        ("self.top_k = 4", "cls.size = 1", "cache.keys[0] = 1", "x = y.z", "with no_grad(): p.copy_(q)"),
    ),
    Case(
        no_setattr,
        "src/tempovlm/engine/a.py",
        ("setattr(x, 'a', 1)", "object.__setattr__(self, 'a', 1)", "builtins.setattr(x, 'a', 1)"),
        ("getattr(x, 'a')",),
    ),
    Case(no_global, "src/tempovlm/control/a.py", ("def f():\n    global x\n    x = 1",), ("x = 1",)),
    Case(
        times_end_in_ms,
        "src/tempovlm/a.py",
        (
            "def f(budget: float): ...",
            "def f(*, latency: float | None = None): ...",
            "def f(timeout: Optional[float]): ...",
            "elapsed: float = 0.0",
            "class A:\n    decode_time: float",
            "class A:\n    def f(self):\n        self.total_latency: 'float' = 0.0",
            "class A:\n    latency: Annotated[float, arg(help='budget')]",
        ),
        (
            "def f(budget_ms: float, latency_ms_upper: float, timeout_ms: float | None): ...",
            "def f(on_deadline: str, num_budgets: int, budget: int, temperature: float): ...",
            "latency_weight: float = 0.5",
            "latency_budget: float = 170.0",
        ),
    ),
    Case(
        no_version_suffix,
        "src/tempovlm/a.py",
        ("def train_v2(): ...", "class GateOld_v3: ...", "TABLE_NEW = 1", "def load_old(): ..."),
        ("def train(): ...", "max_new_tokens = 4", "def f():\n    log_prob_old = 1"),
    ),
    Case(no_version_suffix, "src/tempovlm/trainer_v2.py", ("x = 1",), ()),
    Case(
        kernels_start_on_their_device,
        "src/tempovlm/model/kernels/a.py",
        (
            "def f(x):\n    _kernel[(1,)](x)",
            "class A:\n    @staticmethod\n    def forward(ctx, x):\n        kernels.run[(4, 2)](x, num_warps=1)",
            "@torch.no_grad()\ndef f(x):\n    with torch.cuda.device_of(x):\n        _kernel[(1,)](x)",
        ),
        (
            "@on_device\ndef f(x):\n    _kernel[(1,)](x)",
            "class A:\n    @staticmethod\n    @on_device\n    def forward(ctx, x):\n        _kernel[(1,)](x)",
            "def f(x):\n    return sizes[0] * g(x)",
        ),
    ),
    Case(
        nothing_unfinished,
        "src/tempovlm/a.py",
        ("x = 1  # TODO", "raise NotImplementedError", "# zeros for now", "text = 'placeholder'"),
        ("x = 1  # a reason",),
    ),
    Case(
        no_list_of_data_sets,
        "src/tempovlm/cli/a.py",
        (
            'NAMES = ("text_vqa", "okvqa")',
            'def f(names=["text_vqa", "st_qa"]): ...',
            'SHARES = {"text_vqa": 1, "okvqa": 2}',
            'f"python run.py --dataset text_vqa okvqa science_qa_img --seed {seed}"',
            'def f():\n    """One of okvqa, doc_qa."""',
        ),
        ('ONE = ("text_vqa",)', 'f(("text_vqa", 1), ("okvqa", 2))', "x = (1, 2, 3)"),
    ),
    Case(
        all_knobs_in_core_only,
        "src/tempovlm/lab/a.py",
        (
            'KEY = ["question_id", "tier", "top_k", "num_blocks"]',
            "knobs = KnobConfig(tier=row.a, top_k=row.b, num_blocks=row.c)",
            'text = f"{k.tier}/k{k.top_k}/b{k.num_blocks}"',
            "return_ = {(row['tier'], row['top_k'], row['num_blocks']): row for row in rows}",
            "if knobs.tier == 'low' and knobs.top_k == 4 and knobs.num_blocks == 8:\n    pass",
            "def f(names=('tier', 'top_k', 'num_blocks')): ...",
        ),
        (
            'KEY = ["question_id", *KNOBS]',
            "knobs = replace(native, top_k=4, num_blocks=8)",
            "for block in knobs.num_blocks:\n    print(knobs.tier, knobs.top_k)",
            "def f(tier: str, top_k: int, num_blocks: int): ...",
            "class Row:\n    tier: str\n    top_k: int\n    num_blocks: int",
        ),
    ),
)
RULES = tuple(dict.fromkeys(case.rule for case in CASES))


def sources() -> list[Source]:
    """Every Python file of the product, as it lies on disk."""
    paths = [p for folder in ("src", "experiments", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in paths]


def broken_rules(files: list[Source], rules: Sequence[Rule]) -> dict[Rule, list[str]]:
    """What each rule finds, file by file."""
    assert len(files) > 5
    found: dict[Rule, list[str]] = {rule: [] for rule in rules}
    for source in files:
        for rule in rules:
            found[rule] += rule(source)
    return found


@pytest.fixture(scope="module")
def broken() -> dict[Rule, list[str]]:
    return broken_rules(sources(), (*RULES, riddles, flags_come_from_dataclasses))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule: Rule, broken: dict[Rule, list[str]]) -> None:
    assert not broken[rule], "\n" + "\n".join(broken[rule])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule.__name__}-{case.path}")
def test_the_rule_detects(case: Case) -> None:
    for snippet in case.bad:
        found = case.rule(Source(case.path, snippet))
        assert found, snippet
        assert re.match(rf"{re.escape(case.path)}:\d+: ", found[0])
    for snippet in case.good:
        assert not case.rule(Source(case.path, snippet)), snippet


def test_state_rules_bind_only_where_plans_are_arguments() -> None:
    assert not no_global(Source("src/tempovlm/cli/a.py", "def f():\n    global x"))


def too_large(sizes: dict[str, int]) -> list[str]:
    """Files over the limit for one file, and the total when it is over its own."""
    found = [
        f"{path}: {size} bytes, at most {MAX_FILE_BYTES}" for path, size in sizes.items() if size > MAX_FILE_BYTES
    ]
    total = sum(sizes.values())
    return [*found, f"all: {total} bytes, at most {MAX_TRACKED_BYTES}"] if total > MAX_TRACKED_BYTES else found


def test_tracked_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing is tracked")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert not too_large({str(path.relative_to(ROOT)): path.lstat().st_size for path in paths if path.is_file()})


def test_the_size_rule_detects() -> None:
    assert too_large({"a.bin": MAX_FILE_BYTES + 1})
    assert too_large({f"{i}.bin": MAX_FILE_BYTES for i in range(4)})
    assert not too_large({"a.bin": MAX_FILE_BYTES})


RIDDLE = re.compile(
    r"^(What|Who|Where|How) |\bunless told\b|\bso (many|much)\b(?! (that|as)\b)|\blikewise\b"
    r"|\b[Kk]nows (no|neither|nothing)\b"
)
"""Forms that make readers guess: a noun clause in place of a verb, an omitted subject, a list of the absent."""


def explanations(source: Source) -> Iterator[tuple[int, str]]:
    """Docstrings, of attributes too, and comments, each with its line."""
    for node in source.nodes(ast.Expr):
        assert isinstance(node, ast.Expr)
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.removeprefix("#").strip()


def riddles(source: Source) -> list[str]:
    found = []
    for line, text in explanations(source):
        words = " ".join(text.split())
        if match := RIDDLE.search(words):
            found.append(f"{source.path}:{line}: {match[0].strip()!r}: say it plainly, verb first")
    return found


def test_explanations_are_plain(broken: dict[Rule, list[str]]) -> None:
    assert not (found := broken[riddles]), "\n" + "\n".join(found)


MAX_MODULES = 15


def crowded_folders(paths: Iterable[str]) -> list[str]:
    """Folders of more than 15 modules; `__init__.py`, which holds nothing but a docstring, is not counted."""
    modules = [Path(path) for path in paths if not path.endswith("/__init__.py")]
    counts = Counter(path.parent.as_posix() for path in modules)
    return [f"{folder}: {n} modules, at most {MAX_MODULES}" for folder, n in counts.items() if n > MAX_MODULES]


def shared_prefixes(paths: Iterable[str]) -> list[str]:
    """Modules of one folder that share a word before an underscore: they want a folder of that name.

    Names that are given are free: the published scripts', and those of data sets, each of which is its module's.
    """
    groups: dict[str, list[str]] = {}
    for path in map(Path, paths):
        prefix, underscore, _ = path.stem.partition("_")
        if prefix and underscore and path.stem not in DATASETS and not path.as_posix().startswith(SCRIPTS):
            groups.setdefault((path.parent / prefix).as_posix(), []).append(path.name)
    return [f"{place}/: {' and '.join(names)} belong there" for place, names in groups.items() if len(names) > 1]


def package_paths() -> list[str]:
    return [source.path for source in sources() if source.path.startswith(("src/", "experiments/"))]


def test_folders_are_small() -> None:
    assert not crowded_folders(package_paths())


def test_a_crowded_folder_is_found() -> None:
    some = [f"src/tempovlm/lab/{name}.py" for name in "abcdefghijklmno"]
    assert not crowded_folders([*some, "src/tempovlm/lab/__init__.py", "src/tempovlm/lab/room/p.py"])
    assert crowded_folders([*some, "src/tempovlm/lab/p.py"]) == ["src/tempovlm/lab: 16 modules, at most 15"]


def test_modules_that_share_a_prefix_are_a_folder() -> None:
    assert not shared_prefixes(package_paths())


def test_a_shared_prefix_is_found() -> None:
    assert shared_prefixes(["src/tempovlm/lab/judge_a.py", "src/tempovlm/lab/judge_b.py"])
    alone = ["src/tempovlm/lab/judge/a.py", "src/tempovlm/lab/judge/b.py", "src/tempovlm/lab/judge_c.py"]
    named = ["experiments/controller/train_a.py", "experiments/controller/train_b.py"]
    sets = [f"src/tempovlm/data/sets/{name}.py" for name in DATASETS]
    assert not shared_prefixes([*alone, *named, *sets, "src/tempovlm/a/__init__.py", "src/tempovlm/a/__main__.py"])


PARSERS = {"src/tempovlm/lab/script.py": "add_argument", "src/tempovlm/cli/console.py": "tyro.cli"}
"""The two places that make flags of dataclasses: for scripts, by the standard library, and for commands."""


def flags_come_from_dataclasses(source: Source) -> list[str]:
    """No script or command declares a flag by itself, so none can have a default that its options do not have."""
    if not source.path.startswith(("src/", "experiments/")):
        return []
    found = []
    for node in source.nodes(ast.Call):
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        word = name.rpartition(".")[2] if name.endswith(("add_argument", "ArgumentParser")) else name
        if word in ("add_argument", "ArgumentParser", "tyro.cli") and PARSERS.get(source.path) != word:
            found.append(f"{source.path}:{node.lineno}: calls {name}: declare flags as fields of a dataclass")
    return found


def repeated_flags(files: Iterable[Source]) -> list[str]:
    """Flags that two dataclasses declare alike, and fields that repeat the default of a flag of their name.

    A flag is inherited, and a default derived from its flag, as `seed: int = A.seed`. Defaults that leave
    something out, such as None and 0, are anybody's.
    """
    flags: dict[tuple[str, str], list[str]] = {}
    alike: dict[tuple[str, ...], list[str]] = {}
    plain: list[tuple[tuple[str, str], str]] = []
    for source in files:
        for one in source.nodes(ast.ClassDef):
            assert isinstance(one, ast.ClassDef)
            for node in one.body:
                if not isinstance(node, ast.AnnAssign) or node.value is None:
                    continue
                name, place = ast.unparse(node.target), f"{source.path}:{node.lineno}"
                if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("flag", "required"):
                    words = [ast.unparse(word) for word in node.value.args]
                    alike.setdefault((name, *words), []).append(place)
                    flags.setdefault((name, words[0]), []).append(place)
                elif source.path.startswith("src/tempovlm/lab/") and not isinstance(node.value, ast.Attribute):
                    plain.append(((name, ast.unparse(node.value)), place))
    twice = [f"{places[1]}: flag {key[0]} is {places[0]}'s" for key, places in alike.items() if len(places) > 1]
    return twice + [
        f"{place}: {key[0]} repeats the default at {flags[key][0]}"
        for key, place in plain
        if key in flags and not re.fullmatch(r"None|False|True|0|0\.0|\(\)|''", key[1])
    ]


def test_flags_come_from_dataclasses(broken: dict[Rule, list[str]]) -> None:
    assert not (found := broken[flags_come_from_dataclasses]), "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        '"""What a file holds."""',
        'X = 1\n"""How often one looks."""',
        '"""A clock. Knows no\nstage."""',
        "x = 1  # so many at most",
        '"""Options.\n\n    seed: likewise\n"""',
        '"""The device; the first one unless told."""',
    ],
)
def test_riddles_are_found(text: str) -> None:
    assert riddles(Source("src/tempovlm/a.py", text))


def test_plain_explanations_are_no_riddles() -> None:
    plain = '"""Return what a file holds."""\nX = 1  # so much that it fails\n"""Whether it is here."""'
    assert not riddles(Source("src/tempovlm/a.py", plain))


@pytest.mark.parametrize(
    "text",
    ["parser.add_argument('--lr', default=1e-4)", "p = argparse.ArgumentParser()", "tyro.cli(Flags)"],
)
def test_a_flag_outside_of_a_dataclass_is_found(text: str) -> None:
    assert flags_come_from_dataclasses(Source("experiments/controller/a.py", text))
    assert not flags_come_from_dataclasses(Source("benchmarks/a.py", text))


def test_no_flag_is_declared_twice() -> None:
    assert not (found := repeated_flags(sources())), "\n".join(found)


def test_a_repeated_flag_is_found() -> None:
    first = Source("src/tempovlm/lab/a.py", "class A:\n    seed: int = flag(42, 'seed of all')")
    again = Source("experiments/controller/b.py", "class B:\n    seed: int = flag(42, 'seed of all')")
    copy = Source("src/tempovlm/lab/c.py", "class C:\n    seed: int = 42")
    assert repeated_flags([first, again]) == [f"{again.path}:2: flag seed is {first.path}:2's"]
    assert repeated_flags([first, copy]) == [f"{copy.path}:2: seed repeats the default at {first.path}:2"]
    other = Source("src/tempovlm/lab/d.py", "class D:\n    seed: int = 7\n    lr: float\n    top: int = A.seed")
    assert not repeated_flags([first, other])


def test_findings_can_be_run() -> None:
    assert not [path.name for path in (ROOT / "findings").glob("*.sh") if not path.stat().st_mode & 0o100]
