"""The metrics of a server: under vLLM's names where they mean the same, under our own elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tempovlm.core.request import Answer
from tempovlm.core.units import now_ms, s_from_ms
from tempovlm.serving.openai.account import FINISH, deadline_of
from tempovlm.serving.recent import Recent

_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_MOST_S = 86_400.0
"""Longer times and budgets count as a day: a budget of 1e300 ms would drown all others in a sum for good."""

_TIMES = {
    "vllm:e2e_request_latency_seconds": "From a request's headers to its last token.",
    "vllm:time_to_first_token_seconds": "From a request's headers to its first token.",
    "vllm:inter_token_latency_seconds": "Mean time of a token after the first, of each answer.",
    "vllm:request_time_per_output_token_seconds": "Mean time of a token after the first, of each answer.",
    "vllm:request_queue_time_seconds": "Reading the body and waiting.",
    "vllm:request_inference_time_seconds": "All of an answer but its waiting.",
    "vllm:request_prefill_time_seconds": "Reading the prompt.",
    "vllm:request_decode_time_seconds": "Decoding.",
    "tempovlm:request_budget_seconds": "The budgets of admitted requests.",
}


class Live(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, model: str, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self._model, self._gauges = model, gauges

    def collect(self) -> list[GaugeMetricFamily]:
        """Return the values of now."""
        found = []
        for name, (meaning, read) in self._gauges.items():
            family = GaugeMetricFamily(name, meaning, labels=["model_name"])
            family.add_metric([self._model], read())
            found.append(family)
        return found


class Metrics:
    """Counts the requests of one model.

    Attributes:
        registry: all figures since the start, for Prometheus.
        recent: those of the last minutes, for the page.
    """

    def __init__(self, model: str, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        """Make a registry; `gauges` are names with their meanings and the functions that read them."""
        self._model, self.registry, self.recent = model, CollectorRegistry(), Recent()
        self.registry.register(Live(model, gauges))
        self._times = {
            name: Histogram(name, text, ["model_name"], registry=self.registry, buckets=_BUCKETS).labels(model)
            for name, text in _TIMES.items()
        }
        self._tokens = {
            name: self._counter(f"vllm:{name}", f"{name.capitalize().replace('_', ' ')}.").labels(model)
            for name in ("prompt_tokens", "generation_tokens")
        }
        self._ended = self._counter("vllm:request_success", "Answers by their end.", "finished_reason")
        self._deadlines = self._counter(
            "tempovlm:deadlines", "Answers with a budget: met, missed or cut.", "deadline"
        )
        self._refused = self._counter("tempovlm:requests_refused", "Errors by error.code.", "code")
        self._settings = self._counter("tempovlm:settings", "Answers by the setting that ran.", "setting")
        self._price = Gauge(
            "tempovlm:price_per_ms", "The last request's price of time.", ["model_name"], registry=self.registry
        )

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, ["model_name", *labels], registry=self.registry)

    def observe(self, answer: Answer, price_per_ms: float) -> None:
        """Count an answer; one that its client left counts for its end alone."""
        is_left = answer.finish_reason == "cancelled"
        self._ended.labels(self._model, "abort" if is_left else FINISH[answer.finish_reason]).inc()
        if is_left:
            return
        times_ms = answer.timings_ms
        self._settings.labels(self._model, str(answer.knobs)).inc()
        self._price.labels(self._model).set(price_per_ms)
        deadline = deadline_of(answer)
        self.recent.answered(answer, deadline, price_per_ms, now_ms())
        if deadline is not None:
            self._deadlines.labels(self._model, deadline).inc()
        self._tokens["prompt_tokens"].inc(answer.num_vision_tokens + answer.num_text_tokens)
        self._tokens["generation_tokens"].inc(answer.num_output_tokens)
        values_ms = (
            times_ms["total"],
            answer.ttft_ms,
            answer.tpot_ms,
            answer.tpot_ms,
            times_ms["queue"],
            times_ms["total"] - times_ms["queue"],
            times_ms["prefill"],
            times_ms["decode"],
            answer.budget_ms,
        )
        for histogram, value_ms in zip(self._times.values(), values_ms, strict=True):
            if value_ms is not None and math.isfinite(value_ms):  # one NaN would spoil a sum for good
                histogram.observe(min(s_from_ms(value_ms), _MOST_S))

    def refused(self, code: str) -> None:
        """Count a request that got an error."""
        self._refused.labels(self._model, code).inc()
        self.recent.refused(code, now_ms())

    def text(self) -> bytes:
        """Return all in Prometheus's text format."""
        return generate_latest(self.registry)
