"""Asks a running server as programs with OpenAI's Python package do, and prints a table of what came back.

The package is no dependency of this repository; install it in the environment that runs this:

    tempovlm serve &
    pip install openai
    python benchmarks/serving_clients.py --base_url http://127.0.0.1:8000/v1

Each row is a check; the exit status is 1 if one fails. The server should have nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openai

SIGN = Path(__file__).parents[1] / "docs" / "figures" / "sign.jpg"
QUESTION = "what does the purple sign say?"
BURST = 32


@dataclass(frozen=True)
class Server:
    """A server's address and key."""

    base_url: str
    api_key: str

    def client(self, **options: Any) -> openai.OpenAI:
        """Return a client that does not ask again, unless the options say so."""
        return openai.OpenAI(base_url=self.base_url, api_key=self.api_key, **{"max_retries": 0, **options})

    @cached_property
    def model(self) -> str:
        """The model's own name."""
        return self.client().models.list().data[0].id

    def question(self, **fields: Any) -> dict[str, Any]:
        """Return the arguments of a chat completion about a picture."""
        picture = base64.b64encode(SIGN.read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}
        parts = [{"type": "text", "text": QUESTION}, image]
        return {"model": self.model, "messages": [{"role": "user", "content": parts}], **fields}

    def count(self, name: str, label: str = "") -> float:
        """Return one of the server's metrics, summed over the lines that have a text among their labels."""
        root = self.base_url.rstrip("/").removesuffix("/v1")
        with urllib.request.urlopen(f"{root}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line
        )

    def aborted(self) -> float:
        """Return how many answers ended because their clients had left."""
        return self.count("vllm:request_success_total", 'finished_reason="abort"')

    def is_idle(self, patience_s: float = 10.0) -> bool:
        """Wait until nothing runs; say whether that came."""
        end_s = time.monotonic() + patience_s
        while self.count("vllm:num_requests_running") + self.count("vllm:num_requests_waiting"):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.01)
        return True


def expect(is_right: bool, found: str) -> str:
    """Return what was found, which is an error where it is wrong."""
    if not is_right:
        raise AssertionError(found)
    return found


def refusal(ask: Callable[[], Any]) -> openai.APIStatusError:
    """Return the error status with which a question ends."""
    try:
        ask()
    except openai.APIStatusError as error:
        return error
    raise AssertionError("answered, not refused")


def models(server: Server) -> str:
    """List the models, and look at one by an alias that is not listed."""
    listed = [one.id for one in server.client().models.list()]
    alias = f"{server.model}@137ms"
    return expect(server.client().models.retrieve(alias).id == alias, f"{len(listed)} names; {alias} is another")


def whole(server: Server) -> str:
    """Ask without a budget."""
    answer = server.client().chat.completions.create(**server.question())
    text, told = answer.choices[0].message.content, answer.tempovlm
    return expect(bool(text) and told["budget_ms"] is None, f"{text!r}, {told['timings_ms']['total']:.0f} ms")


def extra_body(server: Server) -> str:
    """Give the budget by `extra_body`."""
    answer = server.client().chat.completions.create(**server.question(extra_body={"latency_budget_ms": 150}))
    told = answer.tempovlm
    place, knobs = told["budget_source"], told["knobs"]
    return expect((told["budget_ms"], place) == (150, "latency_budget_ms"), f"{told['deadline']} at {knobs}")


def extra_headers(server: Server) -> str:
    """Give the budget by `extra_headers`."""
    headers = {"x-tempovlm-budget-ms": "120"}
    told = server.client().chat.completions.create(**server.question(extra_headers=headers)).tempovlm
    return expect(told["budget_ms"] == 120, f"{told['deadline']}, from {told['budget_source']}")


def alias(server: Server) -> str:
    """Give the budget by the model's name."""
    name = f"{server.model}@150ms"
    answer = server.client().chat.completions.create(**server.question(model=name))
    told = answer.tempovlm
    return expect(
        (told["budget_ms"], answer.model) == (150, name), f"{told['deadline']}, from {told['budget_source']}"
    )


def several(server: Server) -> str:
    """Ask eight at once from an event loop."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0) as client:
            return await asyncio.gather(*(client.chat.completions.create(**server.question()) for _ in range(8)))

    texts = [answer.choices[0].message.content for answer in asyncio.run(ask())]
    return expect(len(set(texts)) == 1 and bool(texts[0]), f"8 answers, all {texts[0]!r}")


def stream(server: Server) -> str:
    """Read a stream with its usage, and compare it with the whole answer."""
    client = server.client()
    right = client.chat.completions.create(**server.question())
    chunks = list(
        client.chat.completions.create(**server.question(stream=True, stream_options={"include_usage": True}))
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    told = [chunk.tempovlm for chunk in chunks if hasattr(chunk, "tempovlm")]
    is_right = "".join(pieces) == right.choices[0].message.content and chunks[-1].usage == right.usage
    return expect(
        is_right and len(told) == 1, f"{len(chunks)} chunks, {chunks[-1].usage.completion_tokens} tokens"
    )


def stream_async(server: Server) -> str:
    """Read a stream in an event loop, under a budget."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0) as client:
            fields = server.question(stream=True, extra_body={"latency_budget_ms": 150})
            return [chunk async for chunk in await client.chat.completions.create(**fields)]

    chunks = asyncio.run(ask())
    end = chunks[-1]
    return expect(end.choices[0].finish_reason in ("stop", "length"), f"{end.tempovlm['deadline']}")


def cancel(server: Server) -> str:
    """Open eight streams at once; leave one at its first text, and the others while they wait."""
    before = server.aborted()

    async def leave() -> int:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0) as client:

            async def first_text() -> None:
                async with await client.chat.completions.create(**server.question(stream=True)) as chunks:
                    async for chunk in chunks:
                        if chunk.choices[0].delta.content:
                            return

            asked = [asyncio.create_task(first_text()) for _ in range(8)]
            _, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for one in waiting:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            return len(waiting)

    num_waiting = asyncio.run(leave())
    is_idle = server.is_idle()
    aborted = server.aborted() - before
    return expect(is_idle and aborted >= num_waiting, f"{aborted:.0f} of 8 ended early, and the server is idle")


def timeout_and_budget(server: Server) -> str:
    """Set a time-out of 400 ms and a budget of 5000 ms: the time-out, which the client sends, caps the budget."""
    fields = server.question(extra_body={"latency_budget_ms": 5000})
    told = server.client(timeout=0.4).chat.completions.create(**fields).tempovlm
    is_right = (told["budget_ms"], told["budget_source"]) == (400, "x-stainless-read-timeout")
    return expect(is_right, f"{told['deadline']}, {told['timings_ms']['total']:.0f} of {told['budget_ms']:g} ms")


def timeout(server: Server) -> str:
    """Set a time-out of 20 ms without a budget, and let the client ask again twice: all end when it leaves."""
    before = server.aborted()
    try:
        server.client(timeout=0.02, max_retries=2).chat.completions.create(**server.question())
    except openai.APITimeoutError:
        is_idle = server.is_idle()
        return expect(is_idle and server.aborted() - before == 3, f"{server.aborted() - before:.0f} ended early")
    raise AssertionError("answered in 20 ms")


def infeasible(server: Server) -> str:
    """Give a budget that nothing fits to a client that asks again up to five times: it asks once."""
    client = server.client(max_retries=5)
    fields = server.question(extra_body={"latency_budget_ms": 1})
    error = refusal(lambda: client.chat.completions.create(**fields))
    retries = error.request.headers["x-stainless-retry-count"]
    is_right = (error.code, error.status_code, retries) == ("budget_infeasible", 429, "0")
    return expect(is_right, f"{error.status_code} {error.code}, {retries} retries")


def burst(server: Server, max_retries: int) -> tuple[int, list[str], int]:
    """Ask many at once with a budget for a few of them; return answers, codes of refusals and the most retries."""
    least_ms = server.client().chat.completions.create(**server.question()).tempovlm["timings_ms"]["total"]
    fields = server.question(extra_body={"latency_budget_ms": 4 * least_ms})

    async def ask() -> list[Any]:
        options = {"base_url": server.base_url, "api_key": server.api_key, "max_retries": max_retries}
        async with openai.AsyncOpenAI(**options) as client:
            asked = (client.chat.completions.with_raw_response.create(**fields) for _ in range(BURST))
            return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask())
    answers = [one for one in found if not isinstance(one, BaseException)]
    codes = [getattr(one, "code", type(one).__name__) for one in found if isinstance(one, BaseException)]
    return len(answers), codes, max((one.retries_taken for one in answers), default=0)


def queue_full(server: Server) -> str:
    """Ask 32 at once with a budget for a few: the others are refused; a client that asks again is answered."""
    once, codes, _ = burst(server, 0)
    again, others, retries = burst(server, 30)
    is_right = set(codes) == {"queue_full"} and not others and retries > 0
    tail = f"with retries {again}, after {retries} at most" + (f", others {sorted(set(others))}" if others else "")
    return expect(is_right, f"{once} answered and {len(codes)} {'/'.join(sorted(set(codes)))}; {tail}")


def responses(server: Server) -> str:
    """Ask by the responses API, whole and as a stream."""
    parts = server.question()["messages"][0]["content"]
    content = [{"type": "input_text", "text": QUESTION}]
    content += [{"type": "input_image", "image_url": parts[1]["image_url"]["url"], "detail": "auto"}]
    fields: dict[str, Any] = {"model": server.model, "input": [{"role": "user", "content": content}]}
    whole = server.client().responses.create(**fields, extra_body={"latency_budget_ms": 1000})
    with server.client().responses.stream(**fields, extra_body={"latency_budget_ms": 1000}) as events:
        kinds = [event.type for event in events]
        streamed = events.get_final_response()
    is_right = whole.output_text == streamed.output_text != "" and kinds[-1] == "response.completed"
    return expect(is_right, f"{whole.output_text!r}, {len(kinds)} events")


def wrong(server: Server) -> str:
    """Send a broken picture, and name a model that is not there."""
    fields = server.question()
    fields["messages"][0]["content"][1]["image_url"]["url"] = "data:image/png;base64,aGVsbG8="
    client = server.client(max_retries=2)
    picture = refusal(lambda: client.chat.completions.create(**fields))
    model = refusal(lambda: client.chat.completions.create(**server.question(model="another")))
    kinds = isinstance(picture, openai.BadRequestError), isinstance(model, openai.NotFoundError)
    return expect(all(kinds), f"{picture.status_code} {picture.code}, {model.status_code} {model.code}")


CHECKS = (
    *(models, whole, extra_body, extra_headers, alias, several, stream, stream_async, cancel),
    *(timeout_and_budget, timeout, infeasible, queue_full, responses, wrong),
)


def main() -> None:
    """Run all checks and print the table."""
    parser = argparse.ArgumentParser(description="Ask a running server with OpenAI's Python package.")
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", default="none")
    args = parser.parse_args()
    server = Server(args.base_url, args.api_key)
    try:
        print(f"openai {openai.__version__} asks {server.model} at {server.base_url}\n")
    except openai.APIConnectionError:
        sys.exit(f"no server at --base_url {server.base_url}; start one with: tempovlm serve")
    print("| what was done | result |\n|---|---|")
    num_failed = 0
    for check in CHECKS:
        try:
            found = check(server)
        except (AssertionError, openai.OpenAIError) as error:
            found, num_failed = f"FAILED: {error or type(error).__name__}", num_failed + 1
        print(f"| {(check.__doc__ or '').splitlines()[0].rstrip('.')} | {found} |", flush=True)
    sys.exit(min(1, num_failed))


if __name__ == "__main__":
    main()
