"""Score predictions, each by the metric of its sample's data set."""

from __future__ import annotations

from collections.abc import Sequence

from tempovlm.core.errors import UserError
from tempovlm.data.metrics.choices import choice_accuracy
from tempovlm.data.metrics.rules import METRICS
from tempovlm.data.metrics.text import vqa_accuracy
from tempovlm.data.registry import DATASETS, SCORED_TOGETHER
from tempovlm.data.sample import Sample


def score(sample: Sample, prediction: str) -> float:
    """Score a prediction, from 0 to 1; samples of unknown data sets get VQA accuracy.

    Raises:
        UserError: The data set has no score for a single answer.
    """
    if sample.options:
        return choice_accuracy(prediction, sample.options, sample.answer_index)
    if sample.rule:
        return METRICS[sample.rule](prediction, sample.answers)
    metric = DATASETS[sample.dataset].metric if sample.dataset in DATASETS else vqa_accuracy
    if metric is None:
        raise UserError(
            f"{sample.dataset} is scored by CIDEr over many captions at once: use tempovlm bench or "
            "test_adaptive_inference.py"
        )
    return metric(prediction, sample.answers)


def check_scorable(samples: Sequence[Sample]) -> None:
    """Check, before anybody answers them, that these samples can be scored.

    Raises:
        UserError: There are captions, and pycocoevalcap is not installed or there are too few.
    """
    captions = sum(sample.dataset in SCORED_TOGETHER for sample in samples)
    if captions:
        from tempovlm.data.metrics.captions import check_cider

        check_cider(captions)
