from __future__ import annotations

import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_fakes import SPACE, FakeModel, sample
from PIL import Image

from tempovlm.cli import answer, console
from tempovlm.core.request import STAGES
from tempovlm.lab import charts, drawing, pages
from tempovlm.lab.bench import bench, report, showcase, summary
from tempovlm.lab.bench.showcase import Example, Shown

NASTY = "<script>alert(\"x\")</script> & 'co' $1 to $2"
VOID = {"meta", "img", "image"}


@pytest.fixture
def result() -> dict[str, Any]:
    model = FakeModel()
    plan = bench.BenchPlan(
        budgets_ms=(50.0, 120.0, 200.0),
        fixed=SPACE.native,
        slower_existed=bench.slower_than(SPACE, model.profile),
        max_new_tokens=16,
    )
    records = list(bench.measure(model, [sample(i) for i in range(6)], plan))
    about = {"model": NASTY, "device": "cpu", "data_source": "synthetic", "dataset": ["text_vqa"]}
    return {**summary.summarise(records), **about}


@pytest.fixture
def shown(tmp_path: Path) -> tuple[Example, tuple[Shown, ...]]:
    path = tmp_path / "nasty.jpg"
    path.write_bytes(showcase.jpeg(Image.new("RGB", (64, 48), (200, 30, 30))))
    example = Example(
        name="nasty",
        caption=NASTY,
        path=path,
        question=NASTY,
        truth=NASTY,
        sample=sample(0, str(path), options=(NASTY, "b"), answer_index=0),
    )
    ((_, answers),) = showcase.answer_examples(FakeModel(), [example], (50.0, 120.0, 200.0))
    return example, tuple(
        Shown(budget_ms=s.budget_ms, answer=s.answer, score=s.score, spoken=NASTY) for s in answers
    )


def test_drawings_are_well_formed(result: dict[str, Any], shown: tuple[Example, tuple[Shown, ...]]) -> None:
    for text in (charts.trade_off(result), report.answer_figure(shown[0], shown[1], NASTY)):
        tree = ElementTree.fromstring(text)
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        assert not [node for node in tree.iter() if node.tag.endswith("script")]
        assert NASTY in "".join(tree.itertext())
        assert (tree.attrib["role"], tree[0].text) == ("img", tree.attrib["aria-label"])
        assert not re.search(r"\bnan\b", text)


def test_trade_off_labels_every_budget(result: dict[str, Any]) -> None:
    words = list(ElementTree.fromstring(charts.trade_off(result)).itertext())
    for label in ("50 ms budget", "120 ms budget", "200 ms budget", f"fixed {SPACE.native}"):
        assert label in words
    assert "measured latency of an answer, ms" in words
    tips = [word for word in words if word.startswith("120 ms budget · ")]
    row = result["budgets"][1]
    assert tips == [
        f"120 ms budget · 100 % on time: {100 * row['accuracy']:.1f} ({100 * row['accuracy_interval'][0]:.1f} to "
        f"{100 * row['accuracy_interval'][1]:.1f}), {row['p50_ms']:.1f} ms"
    ]


def test_settings_chosen_are_labelled_where_a_label_fits(result: dict[str, Any]) -> None:
    shares = {"low/k4/b8": 0.97, "medium/k4/b8": 0.03}
    rows = [{**row, "knobs": shares} for row in result["budgets"]]
    words = list(ElementTree.fromstring(charts.knobs({"budgets": rows})).itertext())
    assert words.count("low · 97 %") == len(rows)
    assert words.count("medium: 3 %") == len(rows)
    assert "medium · 3 %" not in words
    assert "medium" not in words


def test_a_plot_is_the_same_each_time_and_carries_no_date(result: dict[str, Any]) -> None:
    text = charts.trade_off(result)
    assert text == charts.trade_off(result)
    assert "<metadata" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}
    found = re.findall(r' id="([^"]+)"', text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(found)
    assert not [name for name in found if re.fullmatch(r"[a-z]\w*_\d+", name)]


def test_a_plot_has_colours_for_light_and_dark(result: dict[str, Any]) -> None:
    text = charts.trade_off(result)
    light, dark = drawing.THEME["ink"]
    assert f"--ink:{light}" in text
    assert f"--ink:{dark}" in text
    assert "var(--ink)" in text
    inline = charts.trade_off(result, theme=False)
    assert "prefers-color-scheme" not in inline
    for name in ("ink", "muted", "faint", "grid", "paper", "reference"):
        assert f"var(--{name})" in inline
        assert drawing.THEME[name][0] not in inline


@pytest.mark.parametrize(
    ("low", "high", "marks"), [(3.4, 4.9, (3.5, 4, 4.5)), (26, 160, (30, 60, 100, 150)), (2, 900, (5, 20, 500))]
)
def test_a_logarithmic_axis_has_round_marks(low: float, high: float, marks: tuple[float, ...]) -> None:
    axes = drawing.new_figure(600, 300).add_subplot()
    axes.plot((low, high), (0, 1))
    axes.set_xscale("log")
    drawing.mark_log(axes.xaxis)
    ends = axes.get_xlim()
    found = [value for value in axes.get_xticks() if ends[0] <= value <= ends[1]]
    assert 3 <= len(found) <= 10
    for mark in marks:
        assert any(value == pytest.approx(mark) for value in found)


def test_without_matplotlib_the_page_lacks_its_plot_only(
    result: dict[str, Any],
    shown: tuple[Example, tuple[Shown, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda _: None)
    page = report.render(report.Report(examples=[shown], bench=result, facts={}))
    assert [record.getMessage() for record in caplog.records] == [
        "matplotlib is not installed: no figures; pip install matplotlib"
    ]
    assert "<figure>" not in page
    assert '<table id="bench">' in page


def test_trade_off_without_answers(result: dict[str, Any]) -> None:
    empty = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "accuracy"))
    rows = [{**row, **empty, "knobs": {}} for row in result["budgets"]]
    ElementTree.fromstring(charts.trade_off({**result, "budgets": rows, "fixed": None}))


def test_stage_bar_fills_its_share() -> None:
    timings_ms = dict.fromkeys(STAGES, 10.0) | {"queue": 0.0, "total": 60.0}
    parts = report.stage_parts(timings_ms, 120.0, 90.0)
    assert sum(part["width"] for part in parts) == pytest.approx(50, abs=0.01)
    assert [part["left"] for part in parts] == pytest.approx([100 * i / 12 for i in range(6)], abs=0.01)
    assert not any(part["label"] for part in parts)
    (part,) = report.stage_parts({"prefill": 60.0}, 120.0, 90.0)
    assert part["label"] == "prefill 60"
    (part,) = report.stage_parts({"prefill": 60.0}, 120.0, 30.0)
    assert part["label"] == ""


class Reader(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_escapes_and_carries_everything(
    result: dict[str, Any], shown: tuple[Example, tuple[Shown, ...]]
) -> None:
    facts = {"model": NASTY, "versions": {"torch": "2.13", NASTY: None}, "hardware": "<b>"}
    page = report.render(report.Report(examples=[shown], bench=result, facts=facts))
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    tags = [tag for tag, _ in reader.seen]
    assert "script" not in tags
    assert "b" not in tags
    assert "versions, torch" in page
    sources = [attrs["src"] or "" for tag, attrs in reader.seen if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    outside = re.findall(r"https?://[^\"' <]+", page)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}


def test_the_page_says_in_words_what_was_right_and_how_to_ask(
    result: dict[str, Any], shown: tuple[Example, tuple[Shown, ...]]
) -> None:
    example = replace(shown[0], question="what is it?", sample=replace(shown[0].sample, question="what's it?"))
    rows = tuple(replace(one, score=float(i > 0)) for i, one in enumerate(shown[1]))
    page = report.render(report.Report(examples=[(example, rows)], bench=result, facts={"hardware": "a fake"}))
    texts = " ".join(re.sub(r"<[^>]+>", " ", page.partition("<main>")[2]).split())
    assert "50 ms: wrong · 120 ms: right · 200 ms: right" in texts
    assert "✗ wrong" in texts
    assert all(re.search(rf"{word} \d+\.\d ms", texts) for word in ("vision", "projector", "prefill", "decode"))
    for word in ("preprocess", "control", "queue", "deadline"):
        assert word in page.partition('class="key"')[2].partition("</div>")[0]
    words = shlex.split(unescape(page.partition("<pre>")[2].partition("</pre>")[0]))
    assert words[:4] == ["tempovlm", "answer", str(example.path), "what's it?"]
    assert words[4:6] == ["--budget_ms", "200"]
    flags = console.parse(answer.Flags, words[2:], "answer", "", ())
    assert (flags.question, flags.style) == ("what's it?", example.sample.style)
    assert "times its median (p99 / p50)" in texts
    assert {"records.jsonl", "bench.json"} <= set(re.findall(r'href="([^"]+)"', page))
    assert "machine a fake" in texts
    assert 'class="narrow"' in page


def test_on_a_phone_every_cell_of_the_bench_has_its_name(
    result: dict[str, Any], shown: tuple[Example, tuple[Shown, ...]]
) -> None:
    page = report.render(report.Report(examples=[shown], bench=result, facts={}))
    cells = re.findall(r"<td([^>]*)>([^<]*)", page.partition('<table id="bench">')[2].partition("</table>")[0])
    assert len(cells) == 9 * (len(result["budgets"]) + 1)
    assert all("data-label" in about for about, text in cells if text)


def test_a_figure_for_papers_is_as_wide_as_a_column(result: dict[str, Any]) -> None:
    page = charts.trade_off_pdf(result)
    assert re.search(rb"/MediaBox \[ 0 0 236 \d+", page)
    assert charts.trade_off_pdf({**result, "fixed": None}).startswith(b"%PDF")


def test_flatten() -> None:
    assert pages.flatten({"a": {"b": 1, "c": None}, "d": [1, 2]}) == {"a, b": "1", "d": "1, 2"}


def test_examples_are_what_they_claim(tmp_path: Path) -> None:
    examples = showcase.make_examples(tmp_path)
    assert [e.path.name for e in examples] == [f"{w.name}.jpg" for w in showcase.WANTED]
    assert all(e.path.stat().st_size <= 40_000 for e in examples)
    small = next(wanted for wanted in showcase.WANTED if wanted.name == "small_print")
    assert small.lettering is not None
    _, scene, question = next(showcase.find_scenes(small, 0))
    height = showcase.lettering(scene, question.answer)
    assert height is not None
    assert small.lettering[0] <= height <= small.lettering[1]
    assert showcase.lettering(scene, "") is None


def test_large_pictures_become_small_files() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    assert len(showcase.jpeg(Image.fromarray(noise))) <= 40_000


def test_budgets_follow_the_machine() -> None:
    # Cheapest 58 ms, upper 63.8, with a margin 70.2; native 186, 204.6, 225.1; their middle is 125.7.
    assert showcase.choose_budgets_ms(SPACE, FakeModel()) == pytest.approx((71.0, 130.0, 230.0))
    assert showcase.choose_budgets_ms(SPACE, None) == showcase.FIXED_BUDGETS_MS


def test_telling(shown: tuple[Example, tuple[Shown, ...]]) -> None:
    tight, _, loose = shown[1]
    wrong, right = (
        Shown(budget_ms=1.0, answer=tight.answer, score=0.0, spoken=""),
        Shown(budget_ms=2.0, answer=loose.answer, score=1.0, spoken=""),
    )
    assert showcase.is_telling((wrong, right))
    assert not showcase.is_telling((right, right))
