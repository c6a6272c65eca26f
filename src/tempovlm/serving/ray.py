"""Several servers of one model on Ray Serve: `serve run tempovlm.serving.ray:app`.

Each replica is a whole server in a process of its own, on a GPU or a pair of cores. Its queue is ours: Ray lets
all requests in, so that they are ordered by their deadlines. One front reads them; `Routes` says where they go.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import RequestRouter

from tempovlm.control.queue import Discipline
from tempovlm.core.checks import check_names, checked_integer
from tempovlm.core.units import now_ms
from tempovlm.serving.front import Front, LostError, Message, Routes, Task, answered
from tempovlm.serving.options import Options

LET_IN = 10_000
"""Requests that Ray lets in at once: with one at a time it idles between them, and loses their order."""

FAILED = "failed_share"
MOST_FAILED = 0.02
"""Share of requests refused or late above which one more replica is wanted."""

STATE_S = 1.0
"""Seconds between two reports of a replica."""

CORES = 2


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of `serve run`.

    Attributes:
        model, policy, device: as of `tempovlm serve`; a GPU is asked for with `device=cuda` alone.
        min_replicas, max_replicas: between which their number follows the refused and late share.
        cores: of a replica.
        options: those of the server, by their names in `serving/options.py`.
    """

    model: str = "pocket"
    policy: str = "auto"
    device: str = "cpu"
    min_replicas: int = 1
    max_replicas: int = 1
    cores: int = CORES
    options: Options = field(default_factory=Options)


class Replica:
    """One server, which answers tasks of the front."""

    def __init__(self, given: Arguments) -> None:
        from tempovlm.api import load
        from tempovlm.serving.app import create_app

        threads = None if given.device == "cuda" else given.cores
        model = load(given.model, policy=given.policy, device=given.device, threads=threads, progress=False)
        self._app = create_app(model, given.options)
        self._desk, self._lanes = self._app.state.desk, model.engine.door.lanes

    async def ask(self, task: Task) -> AsyncIterator[Message]:
        """Yield the messages of the response, and its time."""
        async for message in answered(self._app, task):
            yield message

    def record_routing_stats(self) -> dict[str, float]:
        """Tell the least time of an answer, and the lanes."""
        return {"need_ms": self._desk.least_ms()[0], "lanes": float(self._lanes)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell the share of the last minutes' requests that were refused or late."""
        return {FAILED: self._desk.metrics.recent.failed_share(now_ms())}


class ByCompletion(RequestRouter):
    """Routes a task to a replica that is expected to complete it before its deadline."""

    def initialize_state(self, discipline: Discipline, **_: Any) -> None:
        """Begin without requests, at replicas that let in by a discipline."""
        self._routes = Routes(discipline)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Return the replicas, the best one first."""
        found = {one.replica_id.unique_id: one for one in candidate_replicas}
        if pending_request is None or not isinstance(pending_request.args[0], Task):
            return [candidate_replicas]
        self._routes.tell(found, {name: one.routing_stats for name, one in found.items()})
        number = pending_request.metadata.internal_request_id
        return [[found[name]] for name in self._routes.ranked(number, pending_request.args[0], now_ms())]

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:  # noqa: ARG002 - Ray's names
        """Forget a request."""
        self._routes.ended(internal_request_id, now_ms())


def wanted(failed: Mapping[Any, float], num_replicas: int, num_requests: float) -> int:
    """Return how many replicas are wanted.

    Args:
        failed: of each replica, the share of requests that it refused or answered late.
        num_replicas: that there are.
        num_requests: that run or wait.
    """
    share = fmean(failed.values()) if failed else 0.0
    if share > MOST_FAILED:
        return num_replicas + 1
    return num_replicas - (share == 0 and num_requests < num_replicas - 1)


def by_failed_share(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas for Ray's autoscaler, and no state."""
    failed = (context.aggregated_metrics or {}).get(FAILED, {})
    return wanted(failed, context.current_num_replicas, context.total_num_requests), {}


def app(args: dict[str, Any]) -> Any:
    """Return the application of `serve run tempovlm.serving.ray:app NAME=VALUE …`.

    Raises:
        UserError: an argument is unknown or invalid.
    """
    given = arguments_of(args)
    gpu = {"num_gpus": 1} if given.device == "cuda" else {}
    scaling = AutoscalingConfig(
        min_replicas=given.min_replicas,
        max_replicas=given.max_replicas,
        policy=AutoscalingPolicy(policy_function=by_failed_share),
    )
    replicas = serve.deployment(
        Replica,
        max_ongoing_requests=LET_IN,
        autoscaling_config=scaling,
        request_router_config=RequestRouterConfig(
            request_router_class=ByCompletion,
            request_router_kwargs={"discipline": given.options.discipline},
            request_routing_stats_period_s=STATE_S,
        ),
        ray_actor_options={"num_cpus": given.cores, **gpu},
    ).bind(given)

    def front() -> Front:
        handle = serve.get_deployment_handle(Replica.__name__, serve.get_replica_context().app_name)
        return Front(_Asking(handle), given.options)

    ingress = serve.ingress(front)(_Ingress)
    many = {"max_ongoing_requests": LET_IN, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(ingress, name="Front", **many).bind(replicas)


class _Ingress:
    """Holds the replicas, so that they are part of the application."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas


class _Asking:
    """Sends tasks by Ray."""

    def __init__(self, handle: Any) -> None:
        self._ask = handle.options(stream=True, method_name="ask")

    async def __call__(self, task: Task) -> AsyncIterator[Message]:
        """Yield the messages of a replica."""
        messages = self._ask.remote(task)
        is_over = False
        try:
            async for message in messages:
                yield message
            is_over = True
        except (RayError, RayServeException):
            is_over = True
            raise LostError from None
        finally:
            if not is_over:
                messages.cancel()


def arguments_of(args: Mapping[str, Any]) -> Arguments:
    """Return the arguments of `serve run`, whose values are texts.

    Raises:
        UserError: one is unknown or invalid.
    """
    own = [name for name in Arguments.__dataclass_fields__ if name != "options"]
    check_names(args, [*own, *Options.__dataclass_fields__])
    values: dict[str, Any] = {name: _value(text) for name, text in args.items()}
    options = Options(**{name: value for name, value in values.items() if name not in own})
    found = Arguments(**{name: values[name] for name in own if name in values}, options=options)
    checked_integer("cores", found.cores, 1)
    checked_integer("max_replicas", found.max_replicas, checked_integer("min_replicas", found.min_replicas, 1))
    return found


def _value(text: Any) -> Any:
    """Return an argument's value: JSON, or a text as it is."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = text
    return tuple(found) if isinstance(found, list) else found
