"""Prompt styles: the prefixes that Molmo models were trained with, which set the form and length of an answer."""

from __future__ import annotations

from tempovlm.core.checks import checked_text, wrong_argument
from tempovlm.core.errors import did_you_mean

STYLES = (
    "vqa2", "text_vqa", "okvqa", "a_okvqa_da", "a_okvqa_mc", "chart_qa", "doc_qa", "info_qa", "st_qa", "tally_qa",
    "science_qa", "ai2_diagram", "ai2_diagram_no_letter", "tabwmp_da", "dv_qa", "figure_qa", "plot_qa", "clocks",
    "android_control", "scifi_charts_qa", "scifi_table_qa", "scifi_diagram_qa", "scifi_document_qa",
    "coco_captioning", "long_caption", "transcript", "user_qa", "synthetic_qa", "pointing", "point_count",
    "point_qa",
)  # fmt: skip
"""Those of the academic data sets and of PixMo in Molmo's training mixtures (github.com/allenai/molmo, olmo/data).

The pocket was trained with those of the generated data sets alone. A data set with another style adds it here.
"""


def check_style(style: str) -> None:
    """Raise a `UserError` that names the nearest style unless this one is known; an empty one writes no prefix."""
    if checked_text("the style", style) and style not in STYLES:
        fault = f"unknown; {did_you_mean(style, STYLES)}choose from {', '.join(STYLES)}"
        raise wrong_argument("style", style, fault)
