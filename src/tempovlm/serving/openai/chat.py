"""OpenAI's chat completions: their fields, their answers whole, and their answers as a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from tempovlm.core.request import MOST_PRICE_PER_MS, Answer
from tempovlm.data.styles import STYLES
from tempovlm.serving.errors import invalid
from tempovlm.serving.intake.asks import Ask, Fields, ImageField
from tempovlm.serving.openai.account import FINISH, metrics, told, usage

MOST_TURNS = 256
MOST_STOPS = 16


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
"""JSON may write an integer as 3.0. It comes last in a type: the bounds before it are told in the schema then."""

Count = Annotated[int, Field(ge=1), _WHOLE]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64), _WHOLE]
Stop = Annotated[str, Field(min_length=1)]


class Model(BaseModel):
    """Fields of a JSON object; others are ignored, as the real API does."""

    model_config = ConfigDict(strict=True, extra="ignore")


Url = Annotated[str, Field(json_schema_extra={"format": "uri"})]


class TextPart(Model):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Model):
    """The address of a picture, a data URL as a rule, and how closely to look at it."""

    url: Url
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Model):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None


class StreamOptions(Model):
    """Options of a stream."""

    include_usage: bool | None = None


class Common(Model):
    """Fields of both APIs: OpenAI's, and those of this server."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    latency_budget_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Milliseconds from the request's headers to the last token."""
    style: Annotated[str | None, WithJsonSchema({"enum": [*STYLES, "", None]})] = None
    """Style of the answer, the prompt's prefix."""
    on_deadline: Literal["stop", "finish", "reject"] | None = None
    """stop cuts the answer at its deadline, finish lets it run on, reject refuses what is not expected to fit."""
    price_per_ms: float | None = Field(None, ge=0, le=MOST_PRICE_PER_MS, allow_inf_nan=False)
    """Expected accuracy, as a share of 1, that a millisecond must gain."""

    def common(self) -> dict[str, Any]:
        """Return the values of `Fields` that both APIs name alike."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "budget": self.latency_budget_ms,
            "style": self.style,
            "on_deadline": self.on_deadline,
            "price_per_ms": self.price_per_ms,
            "stream": bool(self.stream),
        }


class ChatRequest(Common):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_TURNS)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[Count | None, WithJsonSchema({"enum": [1, None]})] = None
    stream_options: StreamOptions | None = None

    def fields(self) -> Fields:
        """Return what is asked.

        Raises:
            ApiError: more than one answer is asked for.
        """
        if self.n not in (None, 1):
            raise invalid("n must be 1: a request has one answer", "n")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        turns, images = list[tuple[str, str]](), list[ImageField]()
        for place, message in enumerate(self.messages):
            parts = message.content if isinstance(message.content, list) else []
            texts = [message.content] if isinstance(message.content, str) else []
            for number, part in enumerate(parts):
                if isinstance(part, TextPart):
                    texts.append(part.text)
                else:
                    param = f"messages.{place}.content.{number}.image_url"
                    images.append(ImageField(part.image_url.url, part.image_url.detail or "auto", param))
            turns.append((message.role, "\n".join(texts)))
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return Fields(
            **self.common(),
            text_field="messages",
            turns=turns,
            images=images,
            max_tokens=most,
            seed=self.seed,
            stop=stops,
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
        )


class ChatReply:
    """Writes one answer as a chat completion."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": ask.model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the whole completion."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": FINISH[answer.finish_reason],
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(answer),
            "service_tier": "default",
            **self._account(answer),
        }

    def opening(self) -> Iterator[str]:
        """Yield the events before the first token."""
        yield self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> Iterator[str]:
        """Yield the events of a piece of text."""
        if text:
            yield self._chunk({"content": text})

    def closing(self, answer: Answer) -> Iterator[str]:
        """Yield the events after the last token."""
        yield self._chunk({}, FINISH[answer.finish_reason], **self._account(answer))
        if self._ask.include_usage:
            head = {**self._head, "object": "chat.completion.chunk"}
            yield event({**head, "choices": [], "usage": usage(answer)})
        yield "data: [DONE]\n\n"

    def _account(self, answer: Answer) -> dict[str, Any]:
        return {"metrics": metrics(answer), "tempovlm": told(answer, self._ask)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage_of_each = {"usage": None} if self._ask.include_usage else {}
        head = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return event(head | usage_of_each | more)


def event(record: dict[str, Any], name: str = "") -> str:
    """Return one event of a stream."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(record)}\n\n"
