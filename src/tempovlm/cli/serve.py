"""`tempovlm serve`: OpenAI's HTTP API with a budget in milliseconds for each request."""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from tempovlm.api import load
from tempovlm.cli import console
from tempovlm.cli.calibrate import any_request, round_budgets_ms
from tempovlm.cli.knobs import ALL, Knobs
from tempovlm.control.price import DERIVED
from tempovlm.control.queue import Discipline
from tempovlm.core.decode_dtype import Backend, DecodeDtype
from tempovlm.core.request import check_budget_ms

DESCRIPTION = """\
Serve a model over HTTP as OpenAI's API, with a deadline for each request.
  paths    POST /v1/chat/completions and /v1/responses, GET /v1/models, /health, /ready,
           /version and /metrics; the page at / asks questions, and shows the last minutes
  budget   in the body (latency_budget_ms), in a header (x-tempovlm-budget-ms), or by the
           model's name (pocket@150ms); docs/serving.md lists the others
  refused  at once, with status 429, what cannot be answered in time
  SIGTERM  new requests get 503, and the server ends when the admitted ones have"""

EXAMPLES = (
    "tempovlm serve",
    "tempovlm serve --port 9000 --default_budget_ms 300",
    "tempovlm serve --host 0.0.0.0 --api_key $KEY --max_queue 128 --log_json",
    "tempovlm serve --api_key $MINE $THEIRS --key_weights 1 2 --price derived --discipline edf",
    "tempovlm serve --allow_remote_images images.example.com --allow_origins https://app.example.com",
)

KEY_VARIABLE = "TEMPOVLM_API_KEY"


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags of `tempovlm serve`."""

    model: str = "pocket"
    """`pocket` (part of the package), a local model folder, or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 for this machine alone, 0.0.0.0 for all that reach it; set a key then."""
    port: int = 8000
    """Port to listen at; 0 takes a free one, which the log names."""
    default_budget_ms: Annotated[str | None, tyro.conf.arg(metavar="MS")] = None
    """Budget of requests that bring none. Without it those run at the native setting, however long that takes."""
    policy: str = "auto"
    """Policy that chooses the setting: auto, table, table:NAME, fixed, the path of a checkpoint, or
    module:Class or file.py:Class of your own."""
    max_queue: int = 64
    """Most requests that wait, 1 to 240; more are refused."""
    api_key: tuple[str, ...] = ()
    """Keys, of which requests must bring one; each may take an even share of the places to wait. The environment
    variable TEMPOVLM_API_KEY, which no list of processes shows, is one more."""
    key_weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="W [W ...]")] = ()
    """Weights of the keys, in their order: a right answer of a key counts as its weight where time is short;
    1 by default."""
    price: Annotated[str, tyro.conf.arg(metavar="derived|0|NUMBER")] = DERIVED
    """Price of lane time: derived from the deadlines of those who wait, 0 for an equal share for each, or the
    accuracy (as a share of 1) that a millisecond must gain. For policies that predict accuracy."""
    discipline: Discipline = "edf"
    """Order of service: earliest deadline first (edf), first come first served (fcfs), or least slack first."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    weights: DecodeDtype = "bf16"
    """Weights for decoding on CUDA: bf16 (as loaded), or one-byte copies, fp8 or int8."""
    backend: Backend = "auto"
    """Runs the model on a CPU: kernels, fast and in bfloat16 where the processor can, torch, or auto: the
    kernels where they can run."""
    knobs: Knobs = ALL
    """Settings to choose among."""
    max_body_mb: float = 32.0
    """Largest body of a request in megabytes; base64 makes a picture a third larger."""
    body_timeout_ms: float = 30_000.0
    """Milliseconds in which a body must have come."""
    allow_remote_images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST [HOST ...]")] = ()
    """Hosts whose pictures are fetched over https; by default pictures come in the request alone, as data URLs."""
    allow_origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ORIGIN [ORIGIN ...]")] = ()
    """Origins of web pages that may ask (CORS); by default none."""
    allow_calibrate: bool = False
    """Let POST /calibrate measure the machine anew, and the server by itself once it is idle and answers have
    taken other times than calibrated; requests are refused meanwhile."""
    root_path: str = ""
    """Path under which a proxy shows the server, and which it takes off."""
    log_json: bool = False
    """Write the access log as a JSON object a line."""


def main(argv: list[str]) -> None:
    """Serve until a signal comes.

    Raises:
        UserError: invalid input, or the port cannot be opened.
    """
    flags = console.parse(Flags, argv, "serve", DESCRIPTION, EXAMPLES)
    default_ms = console.number("default_budget_ms", flags.default_budget_ms)
    if default_ms is not None:
        check_budget_ms(default_ms, "default_budget_ms")
    from tempovlm.serving.app import create_app
    from tempovlm.serving.intake.asks import USUAL_TOKENS
    from tempovlm.serving.options import Options
    from tempovlm.serving.server import bind, check_root_path, run

    given = {name: getattr(flags, name) for name in _SAME}
    keys = (*flags.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)]))
    weights = tuple(float(console.number("key_weights", one) or 0) for one in flags.key_weights)
    options = Options(default_budget_ms=default_ms, api_keys=keys, key_weights=weights, **given)
    check_root_path(flags.root_path)
    port = bind(flags.host, flags.port)
    _log_to_stderr()
    kind: dict[str, Any] = {"device": flags.device, "weights": flags.weights, "backend": flags.backend}
    model = load(flags.model, policy=flags.policy, **kind, **flags.knobs.chosen)
    budgets_ms = model.guard_for(any_request(USUAL_TOKENS)).budgets_ms()
    least_ms, most_ms = float(budgets_ms.min()), float(budgets_ms.max())
    is_known = math.isfinite(least_ms) and math.isfinite(most_ms)
    if is_known:
        options = replace(options, aliases_ms=tuple(round_budgets_ms(least_ms, most_ms)))
    app = create_app(model, options)

    def on_start(address: str) -> None:
        fits = f"from {least_ms:.0f} ms, all settings from {most_ms:.0f} ms" if is_known else "unknown"
        default = "none" if default_ms is None else f"{default_ms:g} ms"
        name = model.engine.name
        _log.info("%s serves %s; feasible budgets: %s; default budget: %s", address, name, fits, default)

    run(app, port, on_start, flags.root_path)


_SAME = (
    "max_queue", "max_body_mb", "body_timeout_ms", "allow_remote_images", "allow_origins", "allow_calibrate",
    "log_json", "price", "discipline",
)  # fmt: skip
"""Flags that are options of the server by the same name."""

_log = logging.getLogger("tempovlm.serving")


def _log_to_stderr() -> None:
    """Write the server's own log and the access log, whose lines in JSON stay as they are, to stderr."""
    plain = logging.StreamHandler(sys.stderr)
    access = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, handler in (("tempovlm.serving", plain), ("tempovlm.access", access), ("uvicorn.error", plain)):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if name == "uvicorn.error" else logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False
