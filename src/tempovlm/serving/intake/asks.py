"""From the fields of a request, whichever of the APIs it came by, to what the model is asked."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.request import Request, check_question
from tempovlm.data.styles import check_style
from tempovlm.serving.errors import ApiError, invalid, invalid_field
from tempovlm.serving.intake import remote
from tempovlm.serving.intake.budget import Budget, find_budget, split_alias
from tempovlm.serving.intake.pictures import Picture, from_data_url, look, readable
from tempovlm.serving.options import Options

if TYPE_CHECKING:
    from tempovlm.api import TempoVLM

USUAL_TOKENS = 16
"""The most tokens of an answer where the client names no number."""

_STYLE = next(str(one.default) for one in fields_of(Request) if one.name == "style")

_LETTERS_OF_TOKEN = 16
"""A question with more letters than this for each token of the context is refused before it is cut into tokens."""

_TOKENS_OF_BYTE, _TOKENS_AROUND = 11, 64
"""The most tokens for each byte of a question, whose letters may be taken apart first (compatibility decomposition
makes 33 bytes of the 3 of U+FDFA), and for those around it."""

_TIERS = {"low": 0, "high": -1, "original": -1}
"""The place, among a model's tiers, of the one that a picture's `detail` fixes; `auto` leaves it to the policy."""


@dataclass(frozen=True, slots=True)
class ImageField:
    """A picture as it was sent.

    Attributes:
        param: name of the field, for errors.
    """

    url: str
    detail: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A request in the words that both APIs share.

    Attributes:
        text_field: name of the field that holds the turns.
        turns: role and text, `system`, `user` or `assistant`.
        budget: as it was sent.
    """

    model: str | None
    text_field: str
    turns: Sequence[tuple[str, str]]
    images: Sequence[ImageField]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    budget: Any = None
    style: str | None = None
    on_deadline: str | None = None
    price_per_ms: float | None = None
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question as the model gets it.

    Attributes:
        request: checked; its picture is encoded.
        tier: fixed by the client; None lets the policy choose.
        model: the name by which it was asked.
    """

    request: Request
    budget: Budget
    picture: Picture | None
    tier: str | None
    model: str
    stream: bool = False
    include_usage: bool = False


class Intake:
    """Turns fields into questions for one model."""

    def __init__(self, model: TempoVLM, options: Options) -> None:
        run = model.engine.runner
        self._name, self._tiers, self._options = model.engine.name, model.space.tiers, options
        self._context, self._vision = run.model.config.max_sequence_length, run.model.config.vision
        self._tokenizer = run.tokenizer
        self._picture_tokens = _longest_picture(model)
        readable()  # so that no request waits for the readers to be imported

    def ask(self, fields: Fields, headers: Mapping[str, str], request_id: str) -> Ask:
        """Return the question.

        Args:
            fields: as they were sent.
            headers: by their names in small letters.
            request_id: name of the request.

        Raises:
            ApiError: a field is invalid; names it.
        """
        name, alias_ms = split_alias(fields.model or self._name)
        if name != self._name:
            raise ApiError(
                404,
                "model_not_found",
                f"this server has the model {self._name}, also as {self._name}@150ms for a budget of 150 ms",
                "model",
            )
        question, style = question_of(fields.turns), _STYLE if fields.style is None else fields.style
        try:
            check_style(style)
        except UserError as error:
            raise invalid(str(error), "style") from None
        try:
            check_question(question)
        except UserError as error:
            raise invalid(str(error), fields.text_field) from None
        asked = USUAL_TOKENS if fields.max_tokens is None else fields.max_tokens
        most = min(asked, self._room(question, style, fields, asked))
        budget = find_budget(fields.budget, headers, alias_ms, most, self._options.default_budget_ms)
        given: dict[str, Any] = {
            "request_id": request_id,
            "style": style,
            "max_new_tokens": most,
            "temperature": fields.temperature,
            "top_p": fields.top_p,
            "seed": fields.seed if fields.seed is not None or not fields.temperature else secrets.randbits(32),
            "stop": tuple(fields.stop),
            "on_deadline": fields.on_deadline or "stop",
            "price_per_ms": None if budget.budget_ms is None else fields.price_per_ms,
        }
        picture, tier = self._picture(fields.images)
        options = {key: value for key, value in given.items() if value is not None}
        images = () if picture is None else (picture.data,)
        try:
            request = Request(images=images, question=question, budget_ms=budget.budget_ms, **options)
        except UserError as error:
            raise invalid_field(error) from None
        return Ask(
            request=request,
            budget=budget,
            picture=picture,
            tier=tier,
            model=fields.model or self._name,
            stream=fields.stream,
            include_usage=fields.include_usage,
        )

    def _picture(self, images: Sequence[ImageField]) -> tuple[Picture | None, str | None]:
        """Return the picture, if there is one, and the tier that its detail fixes."""
        if not images:
            return None, None
        if len(images) > 1:
            raise invalid(f"{len(images)} images; a request takes one or none", images[1].param, "too_many_images")
        (image,) = images
        if image.url[:5].lower() == "data:":
            data = from_data_url(image.url, image.param)
        else:
            most = self._options.max_body_bytes
            data = remote.fetch(image.url, self._options.allow_remote_images, most, image.param)
        place = _TIERS.get(image.detail)
        return look(data, image.param), None if place is None else self._tiers[place]

    def _room(self, question: str, style: str, fields: Fields, asked: int) -> int:
        """Return the most tokens that an answer can have beside the question; those asked if they surely fit."""
        picture = self._picture_tokens if fields.images else 0
        most = picture + _TOKENS_OF_BYTE * (len(question.encode()) + len(style)) + _TOKENS_AROUND
        if most + asked <= self._context:
            return asked
        if len(question) > _LETTERS_OF_TOKEN * self._context:
            room = 0
        else:
            prompt, _ = self._tokenizer.stream(question, style, None, self._vision)
            room = self._context - picture - len(prompt)
        if room < 1:
            message = f"the question does not fit the context of {self._context} tokens"
            raise invalid(message, fields.text_field, "context_length_exceeded")
        return room


def question_of(turns: Sequence[tuple[str, str]]) -> str:
    """Return a conversation as one question, in the chat format that Molmo models read after their first turn.

    The texts of the system come before those of the user whose turn they precede, each on lines of its own.
    """
    said, pending = "", list[str]()
    for role, text in turns:
        if not text:
            continue
        if role == "assistant":
            said += "\n".join(pending) + f" Assistant: {text} User: "
            pending = []
        else:
            pending.append(text)
    return said + "\n".join(pending)


def _longest_picture(model: TempoVLM) -> int:
    """Return the most tokens that a picture takes."""
    from tempovlm.model.vision.tiling import grids_of

    run = model.engine.runner
    grids = (grid for tier in model.space.tiers for grid in grids_of(tier))
    return max(run.tokenizer.picture_length(grid, run.model.config.vision) for grid in grids)
