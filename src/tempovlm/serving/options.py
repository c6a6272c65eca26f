"""The options of a server, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tempovlm.control.price import DERIVED, Price, parse_price
from tempovlm.control.queue import DISCIPLINES, MOST_WAITING, Discipline
from tempovlm.core.checks import checked_integer, checked_number, checked_texts, wrong_argument
from tempovlm.core.request import check_budget_ms, check_weight

BYTES_OF_MB = 1_000_000

MOST_QUEUE = MOST_WAITING - 16
"""The model's door takes a few more than wait: those whose lanes are free, on their way in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a server; `tempovlm serve --help` explains them.

    Attributes:
        aliases_ms: budgets whose aliases `/v1/models` lists; any other one works too.
        price: of lane time: `derived`, 0, or accuracy per ms.
        discipline: who is let in first.
        key_weights: how much right answers of each key count; 1 for those that are left out.
        body_timeout_ms: in which a request's body must have come.
    """

    default_budget_ms: float | None = None
    max_queue: int = 64
    api_keys: tuple[str, ...] = ()
    price: str | float = DERIVED
    discipline: Discipline = "edf"
    key_weights: tuple[float, ...] = ()
    max_body_mb: float = 32.0
    body_timeout_ms: float = 30_000.0
    allow_remote_images: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_calibrate: bool = False
    log_json: bool = False
    aliases_ms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: a value is invalid; names its flag.
        """
        if self.default_budget_ms is not None:
            check_budget_ms(self.default_budget_ms, "default_budget_ms")
        checked_integer("max_queue", self.max_queue, 1, MOST_QUEUE)
        for name in ("max_body_mb", "body_timeout_ms"):
            checked_number(name, getattr(self, name), "a positive number", lambda number: number > 0)
        for name, plural in (("api_key", "api_keys"), *((one, one) for one in _HOSTS)):
            checked_texts(name, getattr(self, plural))
        for host in self.allow_remote_images:
            if not _HOST.fullmatch(host):
                raise wrong_argument(
                    "allow_remote_images", host, "must be a host's name alone, such as images.example.com"
                )
        for origin in self.allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise wrong_argument(
                    "allow_origins", origin, "must be a page's scheme and host, such as https://example.com"
                )
        parse_price(self.price)
        if self.discipline not in DISCIPLINES:
            raise wrong_argument("discipline", self.discipline, f"choose from {', '.join(DISCIPLINES)}")
        if len(self.key_weights) > len(self.api_keys):
            count = len(self.api_keys)
            raise wrong_argument(
                "key_weights", self.key_weights, f"give one for each --api_key, of which {count} are"
            )
        for weight in self.key_weights:
            check_weight(weight, "key_weights")

    @property
    def lane_price(self) -> Price:
        """The price of lane time."""
        return parse_price(self.price)

    def weight_of(self, owner: str) -> float:
        """Return the weight of a key by its number, empty where none is needed."""
        place = int(owner or 0)
        return self.key_weights[place] if place < len(self.key_weights) else 1.0

    @property
    def max_body_bytes(self) -> int:
        """The most bytes of a request's body."""
        return int(self.max_body_mb * BYTES_OF_MB)


_HOST, _ORIGIN = re.compile(r"[\w.-]+"), re.compile(r"[a-zA-Z][\w+.-]*://[^/\s]+")

_HOSTS = ("allow_remote_images", "allow_origins")
