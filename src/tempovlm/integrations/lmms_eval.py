"""TempoVLM as a model of lmms-eval, which finds it by the entry point `tempovlm` of the group `lmms_eval.models`.

    pip install tempovlm lmms-eval
    lmms-eval --model tempovlm --model_args pretrained=pocket,budget_ms=150 --tasks ai2d --batch_size 1

Only lmms-eval imports this module. Questions are asked one after another, each with the whole budget. Beside the
scores its results have, as means, how the answers stood to their budgets, and the settings that ran.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest

from tempovlm.api import load
from tempovlm.core.errors import UserError, did_you_mean
from tempovlm.core.progress import progress_bar
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import s_from_ms
from tempovlm.data.styles import check_style
from tempovlm.serving.intake.asks import question_of

MANIFEST = ModelManifest("tempovlm", chat_class_path=f"{__name__}.Model")
"""Tells lmms-eval the model's name and class."""

_OPTIONS = ("max_new_tokens", "temperature", "top_p", "seed")
"""Generation options of a task that mean what the fields of a request mean."""


class Model(lmms):
    """Answers the questions of tasks within a budget."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "pocket",
        budget_ms: float | None = None,
        on_deadline: str = "finish",
        style: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: `pocket`, a local folder or a hub id.
            budget_ms: milliseconds for each question; None runs the native setting.
            on_deadline: `finish` scores late answers as if they had come in time, `stop` cuts them.
            style: prefix of all prompts; empty for none. Default: that of a request.
            batch_size: 1; a question with a budget has the model for itself.
            max_batch_size: as `batch_size`.
            device: `auto`, `cpu`, `cuda` or `cuda:1`.
            **options: other arguments of `tempovlm.load`, such as policy and weights.

        Raises:
            UserError: a wrong argument; names it.
        """
        super().__init__()
        for size in (batch_size, max_batch_size):
            if str(size) not in ("1", "None"):
                raise UserError(f"batch_size={size}: questions are asked one after another; give 1")
        known = sorted({"pretrained", "on_deadline", "style", *signature(load).parameters} - {"model"})
        for name in sorted(options.keys() - known):
            raise UserError(f"model_args: unknown {name}; {did_you_mean(name, known)}there are {', '.join(known)}")
        fields: dict[str, Any] = {"on_deadline": on_deadline, "style": style}
        self._fields = {name: value for name, value in fields.items() if value is not None}
        check_style(Request(images=(), question="what?", **self._fields).style)
        self._vlm = load(pretrained, device=device or "auto", budget_ms=budget_ms, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer the questions of one call, in order, and log how they stood to their budgets.

        Raises:
            UserError: a question has more than one picture, or something else that is no picture.
        """
        answers = list(self._answers(requests))
        if answers:
            elapsed_s = s_from_ms(sum(answer.timings_ms["total"] for answer in answers))
            num_tokens = sum(answer.num_output_tokens for answer in answers)
            log_metrics(elapsed_s, num_tokens, num_tokens / elapsed_s, columns(answers))
        return [
            GenerationResult(answer.text, TokenCounts(prompt_length(answer), answer.num_output_tokens))
            for answer in answers
        ]

    def _answers(self, requests: Sequence[Any]) -> Iterator[Answer]:
        with progress_bar("answering") as advance:
            for done, request in enumerate(requests, start=1):
                _, messages_of, options, number, task, split = request.args
                messages = messages_of(self.task_dict[task][split][number])
                image, question = asked(messages, f"{task}, question {number}")
                yield self._vlm.answer(image, question, **(self._fields | fields_of(options)))
                advance(done, len(requests))

    def generate_until_multi_round(self, _requests: Sequence[Any]) -> list[Any]:
        """Refuse tasks of several rounds."""
        raise UserError("tempovlm: tasks of several rounds are not supported; choose others with --tasks")

    def loglikelihood(self, _requests: Sequence[Any]) -> list[Any]:
        """Refuse tasks that compare likelihoods."""
        raise UserError("tempovlm: tasks that compare likelihoods are not supported; choose others with --tasks")


def asked(messages: Sequence[Mapping[str, Any]], where: str) -> tuple[Any, str]:
    """Return picture and question of a conversation in lmms-eval's form.

    Raises:
        UserError: more than one picture, or a film or sound.
    """
    parts = [(turn["role"], part) for turn in messages for part in turn["content"]]
    others = sorted({part["type"] for _, part in parts} - {"text", "image"})
    images = [part["url"] for _, part in parts if part["type"] == "image"]
    if others or len(images) > 1:
        found = ", ".join(others) or f"{len(images)} pictures"
        raise UserError(f"{where} has {found}; a question takes one picture or none: choose other --tasks")
    texts = [(role, part["text"]) for role, part in parts if part["type"] == "text"]
    return (images[0] if images else None), question_of(texts)


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a request from the generation options of a task."""
    fields = {name: options[name] for name in _OPTIONS if options.get(name) is not None}
    stop = options.get("until") or ()
    if options.get("do_sample") is False:
        fields["temperature"] = 0.0
    return fields | {"stop": (stop,) if isinstance(stop, str) else tuple(text for text in stop if text)}


def prompt_length(answer: Answer) -> int:
    """Return the tokens of a prompt, its picture among them."""
    return answer.num_vision_tokens + answer.num_text_tokens


def columns(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the means that stand beside the scores; those of budgets only where there were budgets."""
    times_ms = [answer.timings_ms["total"] for answer in answers]
    found = {
        "total_requests": len(answers),
        "latency_p50_ms": float(np.percentile(times_ms, 50)),
        "latency_p99_ms": float(np.percentile(times_ms, 99)),
        "crops": statistics.fmean(
            1 + rows * cols for rows, cols in (answer.tiling or (0, 0) for answer in answers)
        ),
        "top_k": statistics.fmean(answer.knobs.top_k for answer in answers),
        "num_blocks": statistics.fmean(answer.knobs.num_blocks for answer in answers),
    }
    limited = [(answer, answer.budget_ms) for answer in answers if answer.budget_ms is not None]
    if limited:
        found |= {
            "budget_ms": statistics.fmean(budget_ms for _, budget_ms in limited),
            "budget_met": statistics.fmean(bool(answer.budget_met) for answer, _ in limited),
            "budget_used": statistics.fmean(
                answer.timings_ms["total"] / budget_ms for answer, budget_ms in limited
            ),
            "budget_feasible": statistics.fmean(bool(answer.budget_feasible) for answer, _ in limited),
            "cut": statistics.fmean(answer.finish_reason == "deadline" for answer, _ in limited),
        }
    return found
