"""Our words of captions against those of the official evaluation's tokenizer, a Java program.

The stored lines need no Java. Where the extra `captions` and Java are installed, the program itself is the judge,
of these lines and of many put together at random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from tempovlm.data.metrics.treebank import words

ROWS: list[dict[str, str]] = json.loads(Path(__file__).with_name("caption_words.json").read_text(encoding="utf-8"))
CAPTIONS = [row["caption"] for row in ROWS]

Judge = Callable[[Sequence[str]], list[str]]


def test_there_are_lines_of_every_kind() -> None:
    assert len(set(CAPTIONS)) >= 150
    assert len({row["kind"] for row in ROWS}) >= 20


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in ROWS}))
def test_words_are_those_of_the_official_program(kind: str) -> None:
    # Cut all together: at the end of a line, the next one matters to that program.
    for row, ours in zip(ROWS, words(CAPTIONS), strict=True):
        if row["kind"] == kind:
            assert ours == row["words"], row["caption"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("2 o'clock", "2 o'clock"),
        ("cannot", "can not"),
        ("-5", "-5"),
        ("8:00-9:00", "8:00 -9:00"),
        ("wow!!", "wow !!"),
        ("gonna", "gon na"),
        ("ma'am", "ma'am"),
        ("2 1/2 cups, £5", "2\u00a01/2 cups # 5"),
        ("A (red) dog's bone\nisn't 'ere.", "a -lrb- red -rrb- dog 's bone is n't ere"),
        ("", ""),
        ("\u2028 a\rb\x85c 😀", "a b c"),
    ],
)
def test_words_of_one_caption(caption: str, expected: str) -> None:
    assert words([caption]) == [expected]


def test_the_next_caption_matters_to_a_single_letter() -> None:
    assert words(["vitamin c.", "The end", "vitamin c.", "the end"]) == [
        "vitamin c",
        "the end",
        "vitamin c.",
        "the end",
    ]


def test_captions_stay_apart() -> None:
    assert words(["can", "not", "", "2", "1/2"]) == ["can", "not", "", "2", "1/2"]
    assert words([]) == []


@pytest.fixture
def judge() -> Judge:
    tokenizer = pytest.importorskip(
        "pycocoevalcap.tokenizer.ptbtokenizer", reason="needs pycocoevalcap: pip install 'tempovlm[captions]'"
    )
    if shutil.which("java") is None:
        pytest.skip("needs java, which runs the official tokenizer of pycocoevalcap")

    def cut(captions: Sequence[str]) -> list[str]:
        # One more line, because the program takes the last one for unfinished.
        lines = {i: [{"caption": text}] for i, text in enumerate([*captions, "the end"])}
        found = tokenizer.PTBTokenizer().tokenize(lines)
        return [found[i][0] for i in range(len(captions))]

    return cut


def test_the_program_says_what_is_stored(judge: Judge) -> None:
    assert judge(CAPTIONS) == [row["words"] for row in ROWS]


@pytest.mark.parametrize("seed", range(3))
def test_words_of_random_captions(judge: Judge, seed: int) -> None:
    random = Random(seed)
    pieces = [piece for caption in CAPTIONS for piece in caption.split(" ")]
    gaps = (" ", " ", " ", "", "", ".", ",", "-", "'", "/", '"', "!", ": ", ". ")
    captions = [
        "".join(random.choice(pieces) + random.choice(gaps) for _ in range(random.randint(1, 6))).strip() or "a"
        for _ in range(3000)
    ]
    differ = [(c, a, b) for c, a, b in zip(captions, judge(captions), words(captions), strict=True) if a != b]
    assert not differ, differ[:3]
