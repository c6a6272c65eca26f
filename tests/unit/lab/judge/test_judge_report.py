"""The judge's page and files: what they say, that they carry everything, and that names cannot break them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from decision_worlds import COST_MS, SPACE, K, content_world, parity

from tempovlm.control.baselines import NearestNeighbours
from tempovlm.control.checkpoint import Origin
from tempovlm.core.errors import UserError
from tempovlm.lab.judge import figures as judge_figures
from tempovlm.lab.judge import judge, offline
from tempovlm.lab.judge import report as judge_report
from tempovlm.lab.judge import trial as judge_trial
from tempovlm.lab.judge.names import names
from tempovlm.lab.queueing import page as load_page

ROOT = Path(__file__).resolve().parents[4]
BUDGETS = (14.0, 24.0, 40.0)
NAME = "some/<folder>/best&.pt"


@pytest.fixture(scope="module")
def made() -> tuple[judge_trial.Trial, dict[str, Any], list[judge_trial.Outcome]]:
    """A policy that reads content, with an awkward name, and the cheapest setting, on two data sets."""
    world = replace(content_world(80), dataset=np.tile(np.repeat(["okvqa", "text_vqa"], 2), 20))
    trial = judge_trial.Trial(
        table=world,
        budgets_ms=BUDGETS,
        mixture=offline.StaticMixture.fit(world.accuracy.mean(axis=0), COST_MS),
        reference=offline.pick_rule(world),
        reference_name="twin pick",
        draws=200,
    )
    neighbours = NearestNeighbours.fit(parity(world), world.accuracy, world.image_id.tolist(), counts=(5,))
    rules = {"cheap": offline.Static(0), NAME: offline.Scored(lambda part: neighbours.scores(parity(part)))}
    report, outcomes = judge.judge_all(trial, rules, looking=[NAME], ablated=None)
    about = {
        "names": names(list(rules), {NAME: Origin("two_stage", {"policy": "grpo"})}),
        "data_source": "synthetic",
        "datasets": ["okvqa", "text_vqa"],
        "num_questions": len(world),
        "num_images": len(world),
        "budgets_ms": list(BUDGETS),
        "draws": 200,
        "latency": {"decided_by": "a <clock>", "scored_by": "a clock"},
        "knob_space": {"tier": SPACE.tiers, "top_k": SPACE.top_ks, "num_blocks": SPACE.block_counts},
        "provenance": {"stamps": {"judged": {"hardware": "a <fake> machine"}}},
    }
    return trial, {**about, **report}, outcomes


@pytest.fixture(scope="module")
def page(made: Any) -> str:
    return judge_report.render(made[1])


class Tags(HTMLParser):
    """Checks that tags close in order, and notes whatever would be fetched."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.fetched += [link for link in links if not link.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


def test_the_page_is_whole_and_fetches_nothing(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched == []
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")
    assert "prefers-color-scheme:dark" in page
    assert "a &lt;fake&gt; machine" in page
    assert "a &lt;clock&gt;" in page
    assert "<folder>" not in page
    for part in ("Shuffled", "One, two and three knobs", "twin pick", "data source: synthetic"):
        assert part in page


def test_simulated_traffic_is_a_chapter(made: Any, page: str) -> None:
    simulated = load_page.read(ROOT / "results" / "serving" / "bursts.json")
    loaded = judge_report.render(made[1], [simulated])
    tags = Tags()
    tags.feed(loaded)
    assert tags.open == []
    assert "<h2>Under load</h2>" in loaded
    assert "table, derived price" in loaded
    assert "Under load" not in page


def test_headline_says_who_wins_by_how_much_and_what_is_closed(made: Any) -> None:
    text = judge_report.headline(made[1])
    # Only at 40 ms does the dearest setting fit, and there half of the questions gain.
    assert "+16.7 points" in text
    assert "above it at 1 of 3 budgets (1 after Holm's correction)" in text
    assert text.startswith("End to end beats the best static mixture")
    assert text.endswith("that is 100 % of what the twin pick gains at that latency.")


def test_headline_says_plainly_where_a_policy_does_not_win(made: Any) -> None:
    report = {**made[1], "subject": "cheap"}
    text = judge_report.headline(report)
    assert "does not differ from" in text
    assert "above it at 0 of 3 budgets" in text
    losing = json.loads(json.dumps(report))
    losing["policies"]["cheap"]["against_mixture"] = {"value": -0.05, "interval": [-0.07, -0.02]}
    losing["policies"]["cheap"]["by_budget"][0]["against_mixture"]["interval"] = [-0.2, -0.1]
    losing["policies"]["cheap"]["gap_closed"] = None
    text = judge_report.headline(losing)
    assert "loses to" in text
    assert "below it at 1" in text
    assert "itself gains nothing" in text


def rows_of(page: str, table: str) -> list[list[str]]:
    """Texts of the cells of each row of the table with this id."""
    html = page[page.index(f'<table id="{table}">') :].partition("</table>")[0]
    rows = ElementTree.fromstring(f"{html}</table>").iter("tr")
    return [["|".join(text.strip() for text in cell.itertext()) for cell in row] for row in rows]


def test_budgets_that_hold_are_those_left_after_the_correction(made: Any) -> None:
    rows = made[1]["policies"][NAME]["by_budget"]
    assert judge_report.holding(rows) == (pytest.approx([40.0]), [])
    weaker = [{**row, "against_mixture": dict(row["against_mixture"])} for row in rows]
    weaker[2]["against_mixture"]["holm_p_value"] = 0.051
    weaker[0]["against_mixture"] |= {"holm_p_value": 0.05, "value": -0.1}
    assert judge_report.holding(weaker) == ([], pytest.approx([14.0]))


def test_the_subjects_budgets_stand_beside_both_mixtures(made: Any, page: str) -> None:
    head, tight, _, loose = rows_of(page, "budgets")
    assert head[:2] == ["budget", "gain"]
    assert tight[2:5] == ["1.000", "1.000", "no difference"]
    # Of 201 resamples, the sample among them, none is at or below zero; three budgets are tested.
    assert loose[2:5] == ["0.010", "0.030", "above"]
    assert loose[1].startswith("+50.0")
    assert loose[5].startswith("+50.0")
    assert (tight[6], loose[6]) == ("low/k4/b8", "low/k4/b8")
    mixtures = [{"settings": ["low/k4/b8"], "fits": False}, {"settings": ["a", "b", "c"], "fits": True}]
    static = {**made[1]["static"], "feasible_mixtures": [*mixtures, mixtures[1]]}
    changed = {**made[1], "static": static}
    shown = [row[6] for row in rows_of(judge_report.render(changed), "budgets")]
    assert shown == ["it mixes", "nothing fits: low/k4/b8", "3 settings up to c", "3 settings up to c"]
    assert "settings that miss the deadline" in page
    assert "above the best static mixture at 40 ms and below it at no budget" in page
    cells = rows_of(page, "policies")
    assert cells[2][1].startswith("50.0 %|")
    low, high = (100 * end for end in made[1]["policies"][NAME]["by_budget"][2]["against_mixture"]["interval"])
    assert f'title="{low:+.1f} to {high:+.1f} points, 95 % interval"' in page
    assert cells[2][3] == "100.0 %|+50.0 *"


def test_each_data_set_has_a_row_and_every_policy_is_folded_below(made: Any, page: str) -> None:
    head, first, second = rows_of(page, "datasets")
    assert head == ["data set, questions", "14 ms", "24 ms", "40 ms"]
    assert (first[0], second[0]) == ("okvqa, 40", "text_vqa, 40")
    assert first[3] == "100.0 %|+50.0"
    assert "95 % interval; 24.5 ms on average" in page
    firsts = [row[0] for row in rows_of(page, "policies_by_dataset")]
    policies = ["cheap", "end to end"]
    questions = "40 questions on 40 pictures"
    assert firsts == ["policy", f"okvqa: {questions}", *policies, f"text_vqa: {questions}", *policies]
    alone = {**made[1], "by_dataset": {"okvqa": made[1]["by_dataset"]["okvqa"]}}
    less = judge_report.render(alone)
    assert 'id="datasets"' not in less
    assert "There is one data set only" in less


def test_figures_are_xml_and_show_every_policy(made: Any) -> None:
    for draw in (judge_figures.frontier, judge_figures.gaps):
        root = ElementTree.fromstring(draw(made[1]))
        texts = " ".join("".join(node.itertext()) for node in root.iter())
        assert "cheap" in texts
        assert "end to end" in texts
        assert not re.search(r"\bnan\b", draw(made[1]))


def test_nothing_timed_is_one_sentence_and_no_table(made: Any, page: str) -> None:
    assert 'id="timeliness"' in page
    report = json.loads(json.dumps(made[1]))
    for row in report["policies"][NAME]["by_budget"]:
        row |= {"num_measured": 0, "adherence": None, "adherence_wilson": None, "latency_over_budget": None}
    untimed = judge_report.render(report)
    assert 'id="timeliness"' not in untimed
    assert "Not timed in this run" in untimed


def test_sources_are_said_in_words() -> None:
    stamp = {"hardware": "a GPU", "device": "cuda/bfloat16", "created": "2026-11-24T00:15:46+00:00"}
    about = {
        "stamps": {"judged": stamp, "train": {}},
        "questions": {"judged": 12},
        "left_out": {"judged": 2, "train": 0},
        "latency_estimator": {"path": "est.pt", "hardware": "two cores"},
        "time_price": 0.3,
    }
    facts = judge_report.sources({"provenance": about, "latency": {"decided_by": "P90", "scored_by": "median"}})
    assert facts["judged answers computed on"] == "a GPU, cuda/bfloat16, on 2026-11-24T00:15:46; 12 questions"
    assert facts["latencies measured on"] == "two cores"
    assert facts["price of time"] == "using a whole budget costs 30 points of accuracy"
    assert facts["questions without answers at all settings"] == "2 of the judged answers"
    assert "training answers computed on" not in facts
    assert not any("." in name or "_" in name for name in facts)


def test_the_chart_names_few_lines_and_marks_the_subjects_budgets(made: Any) -> None:
    text = judge_figures.frontier(made[1])
    assert "40 ms" in text
    policies = made[1]["policies"]
    blind = dict.fromkeys(("random", "only_tier", "best_static"), policies["cheap"])
    more = {**made[1], "policies": {**policies, **blind}, "names": {**names([*blind], {}), **made[1]["names"]}}
    texts = {
        "".join(node.itertext()).strip() for node in ElementTree.fromstring(judge_figures.frontier(more)).iter()
    }
    assert {"end to end", "cheap", "other baselines", "twin pick"} <= texts
    assert "random setting" not in texts


def test_figures_for_papers_are_as_wide_as_a_column(made: Any) -> None:
    for draw in (judge_figures.frontier_pdf, judge_figures.gaps_pdf):
        page = draw(made[1])
        assert page.startswith(b"%PDF")
        width = re.search(rb"/MediaBox \[ 0 0 (\d+)", page)
        assert width is not None
        assert int(width[1]) == 236
        assert page == draw(made[1])


def test_rows_hold_every_choice(made: Any) -> None:
    trial, report, outcomes = made
    rows = pd.read_parquet(io.BytesIO(judge_report.rows_as_parquet(trial, outcomes)))
    assert len(rows) == 2 * len(BUDGETS) * len(trial.table)
    reader = rows[(rows["policy"] == NAME) & np.isclose(rows["budget_ms"], 40.0)].set_index("question_id")
    assert reader.loc["q0000", "setting"] == str(SPACE.cheapest)
    assert reader.loc["q0001", "setting"] == str(SPACE.settings[K - 1])
    by_budget = report["policies"][NAME]["by_budget"]
    assert reader["accuracy"].mean() == pytest.approx(by_budget[-1]["accuracy"]["value"])


def test_files_are_written_and_a_folder_that_cannot_be_is_named(made: Any, tmp_path: Path) -> None:
    trial, report, outcomes = made
    paths = judge_report.write(tmp_path / "out", report, trial, outcomes)
    assert {p.name for p in paths} == {p.name for p in (tmp_path / "out").iterdir()}
    stored = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert stored["headline"] == judge_report.headline(report)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        judge_report.write(tmp_path / "file", report, trial, outcomes)
