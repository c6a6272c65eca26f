"""OpenAI's responses API, as far as one question needs it: nothing is stored, and there are no tools."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from tempovlm.core.request import Answer
from tempovlm.serving.errors import invalid
from tempovlm.serving.intake.asks import Ask, Fields, ImageField
from tempovlm.serving.openai.account import FINISH, metrics, told, usage
from tempovlm.serving.openai.chat import MOST_TURNS, Common, Count, Model, Url, event


class InputText(Model):
    """A text in a turn."""

    type: Literal["input_text"]
    text: str


class OutputText(Model):
    """A text in an earlier answer."""

    type: Literal["output_text"]
    text: str


class InputImage(Model):
    """A picture in a turn."""

    type: Literal["input_image"]
    image_url: Url
    detail: Literal["auto", "low", "high", "original"] | None = None


class Turn(Model):
    """One turn of a conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | OutputText | InputImage, Field(discriminator="type")]]


class ResponsesRequest(Common):
    """The body of `POST /v1/responses`."""

    input: str | Annotated[list[Turn], Field(max_length=MOST_TURNS)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    previous_response_id: Annotated[str | None, WithJsonSchema({"type": "null"})] = None

    def fields(self) -> Fields:
        """Return what is asked.

        Raises:
            ApiError: it goes on from a response that would have to be stored.
        """
        if self.previous_response_id is not None:
            raise invalid("no responses are stored; send all turns in input", "previous_response_id")
        given = [Turn(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        turns, images = [("system", self.instructions or "")], list[ImageField]()
        for place, turn in enumerate(given):
            texts = [turn.content] if isinstance(turn.content, str) else []
            for number, part in enumerate(() if isinstance(turn.content, str) else turn.content):
                if not isinstance(part, InputImage):
                    texts.append(part.text)
                else:
                    param = f"input.{place}.content.{number}.image_url"
                    images.append(ImageField(part.image_url, part.detail or "auto", param))
            turns.append((turn.role, "\n".join(texts)))
        return Fields(
            **self.common(), text_field="input", turns=turns, images=images, max_tokens=self.max_output_tokens
        )


class ResponsesReply:
    """Writes one answer as a response."""

    def __init__(self, ask: Ask) -> None:
        self._ask, self._number = ask, -1
        self._id, self._item, self._created = (
            f"resp_{uuid.uuid4().hex}",
            f"msg_{uuid.uuid4().hex}",
            int(time.time()),
        )

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the whole response."""
        is_whole, tokens = FINISH[answer.finish_reason] == "stop", usage(answer)
        counts = {
            "input_tokens": tokens["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens["total_tokens"],
        }
        return self._response("completed" if is_whole else "incomplete") | {
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._message(answer.text)],
            "usage": counts,
            "metrics": metrics(answer),
            "tempovlm": told(answer, self._ask),
        }

    def opening(self) -> Iterator[str]:
        """Yield the events before the first token."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))
        item = self._message("") | {"status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place(), part=_part(""))

    def piece(self, text: str) -> Iterator[str]:
        """Yield the events of a piece of text."""
        if text:
            yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def closing(self, answer: Answer) -> Iterator[str]:
        """Yield the events after the last token."""
        text = answer.text
        yield self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(text))
        whole = self.whole(answer)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _response(self, status: str) -> dict[str, Any]:
        request = self._ask.request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": request.max_new_tokens,
            "model": self._ask.model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }

    def _message(self, text: str) -> dict[str, Any]:
        about = {"id": self._item, "type": "message", "role": "assistant", "status": "completed"}
        return about | {"content": [_part(text)]}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **values}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
