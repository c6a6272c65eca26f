"""The way out: an answer's setting, times and verdict, in the words of vLLM where it has them."""

from __future__ import annotations

from typing import Any

from tempovlm.core.request import Answer
from tempovlm.core.units import s_from_ms
from tempovlm.serving.intake.asks import Ask

FINISH = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop", "rejected": "stop"}
"""OpenAI's reasons for an end, by ours; an answer that was cut also says so in `tempovlm.deadline`."""


def deadline_of(answer: Answer) -> str | None:
    """Say how an answer stands to its deadline: `met`, `missed` or `cut`; None without one."""
    if answer.budget_ms is None:
        return None
    if answer.finish_reason == "deadline":
        return "cut"
    return "met" if answer.budget_met else "missed"


def usage(answer: Answer) -> dict[str, int]:
    """Return the tokens of a prompt, its picture among them, and of the answer."""
    prompt = answer.num_vision_tokens + answer.num_text_tokens
    output = answer.num_output_tokens
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def metrics(answer: Answer) -> dict[str, float | None]:
    """Return the times of one answer under vLLM's names."""
    times_ms = answer.timings_ms
    inside_s = s_from_ms(times_ms["total"] - times_ms["queue"])
    found = {
        "time_to_first_token_ms": answer.ttft_ms,
        "generation_time_ms": times_ms["decode"],
        "queue_time_ms": times_ms["queue"],
        "mean_itl_ms": answer.tpot_ms,
        "tokens_per_second": answer.num_output_tokens / inside_s if inside_s > 0 else None,
    }
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


_TOLD = ("knobs", "timings_ms", "budget_ms", "budget_met", "budget_feasible", "predicted_ms", "policy", "margin")


def told(answer: Answer, ask: Ask) -> dict[str, Any]:
    """Return the object `tempovlm` of a reply."""
    record = answer.to_json()
    return {name: record[name] for name in _TOLD} | {
        "price": ask.request.price_per_ms,
        "budget_source": ask.budget.source or None,
        "deadline": deadline_of(answer),
        "stopped_at": answer.stopped_at,
        "request_id": answer.request_id,
    }
