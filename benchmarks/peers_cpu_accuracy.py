"""The answers of the CPU's peers to the card's validation questions, beside those of torch in float32.

Every way to compute encodes the pictures and reads the prompts of the native setting. Ours and llama.cpp make the
tokens after the first one too; after OpenVINO and ONNX Runtime, whose graphs for a token are of one length, torch
makes them. A picture is encoded once for all of its questions.

Answers are kept in a folder, a line for each question and run, so that a run can be ended and continued, and
several can share the pictures. Pictures are in an order in which every beginning is spread over all of them.
"""

from __future__ import annotations

import json
import secrets
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peers_cpu_llama as llama
from accuracy_cpu import MAX_NEW_TOKENS, card_of, num_pictures, row_of, validation_scenes
from peers_cpu_stages import Peer
from tempovlm import api
from tempovlm.core.plan import Plan
from tempovlm.core.progress import progress_bar
from tempovlm.core.request import Request
from tempovlm.data.registry import DATASETS
from tempovlm.engine.runner import Decoding, Prepared, Runner
from tempovlm.engine.sampling import greedy
from tempovlm.engine.transcript import Transcript
from tempovlm.model.cache import KVCache
from tempovlm.training.pictures import full_question

POINTS = 0.2
"""Loss of accuracy, in points of a hundred, up to which a precision counts."""

REFERENCE = "ours_torch_f32"
TOGETHER = 4
"""Pictures whose questions each way answers in turn, before they are kept."""

GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture, ready for the model, and the picture's tokens (C, G, D) as torch sees them."""

    key: tuple[int, int]
    dataset: str
    right: str
    request: Request
    ready: Prepared
    vision: Tensor


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt that was read: logits (1, V) of its first token, and of the one after the tokens made so far."""

    logits: Tensor
    after: Callable[[list[int]], Tensor]


Reader = Callable[[Sequence[Asked]], Iterator[Read]]
"""Reads the prompts of questions in turn; those of a picture follow each other."""


def our_reader(run: Runner, plan: Plan) -> Reader:
    """Read and decode by a runner."""

    def read(questions: Sequence[Asked]) -> Iterator[Read]:
        crops = vision = None
        for asked in questions:
            if asked.ready.crops is not crops:
                crops = asked.ready.crops
                vision = run.project(run.encode(crops), crops)
            yield _decoded(run, run.prefill(asked.ready.prompt, vision, plan, MAX_NEW_TOKENS))

    return read


def peer_reader(peer: Peer, run: Runner, plan: Plan) -> Reader:
    """Read by a peer, to a cache of ours; its picture stages are made once for each number of crops."""
    prefill, stages = peer.prefill(plan, None), {}

    def see(ready: Prepared) -> Tensor:
        crops = ready.crops
        assert crops is not None
        for count in {len(crops.patches), len(crops.index)} - stages.keys():
            stages[count] = peer.encode(count), peer.project(count)
        features = peer.numbers(stages[len(crops.patches)][0](crops.patches)[0])[crops.index]
        return peer.numbers(stages[len(crops.index)][1](features, crops.masks)[0])

    def read(questions: Sequence[Asked]) -> Iterator[Read]:
        crops = vision = None
        for asked in questions:
            if asked.ready.crops is not crops:
                crops, vision = asked.ready.crops, see(asked.ready)
            prompt = asked.ready.prompt
            x = run.model.embed(prompt.tokens[None], vision, prompt.slots)
            logits, *past = map(peer.numbers, prefill(x))
            length = len(prompt.tokens)
            cache = KVCache.allocate(run.model.config, len(plan.steps), 1, length + MAX_NEW_TOKENS, x)
            for i, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
                cache.write(i, 0, keys, values)
            yield _decoded(run, Decoding(logits, plan, cache, length))

    return read


def llama_reader(process: llama.Llama, precision: str, run: Runner, plan: Plan, folder: Path) -> Reader:
    """Read and decode by llama.cpp, whose logits are logarithms of shares; pictures are torch's.

    A picture's tokens are words of a file, made for the questions at hand; a prompt that begins as the one before
    is read from there on.
    """
    size = run.model.config.embedding_size

    def read(questions: Sequence[Asked]) -> Iterator[Read]:
        path, words, prompts = folder / f"{questions[0].key[0]}_{precision}.gguf", [], []
        begins: dict[int, int] = {}
        for asked in questions:
            prompt = asked.ready.prompt
            assert prompt.slots is not None
            places = prompt.slots[prompt.slots >= 0].sort().values
            if asked.key[0] not in begins:
                begins[asked.key[0]] = size + sum(map(len, words))
                words.append(run.model.embed(prompt.tokens[None], asked.vision, prompt.slots)[0, places])
            tokens, begin = prompt.tokens.clone(), begins[asked.key[0]]
            tokens[places] = torch.arange(begin, begin + len(places))
            prompts.append(tokens.tolist())
        llama.write_gguf(path, run.model, plan, precision, torch.cat(words))
        rows = size + sum(map(len, words))

        def after(tokens: list[int], made: list[int]) -> Tensor:
            answer = process.ask(path, [*tokens, *made], 1, rows, reuse=True)
            return torch.tensor([llama.log_softmax(answer["log_probs"], size)])

        try:
            for tokens in prompts:
                yield Read(after(tokens, []), partial(after, tokens))
        finally:
            path.unlink()

    return read


def _decoded(run: Runner, state: Decoding) -> Read:
    return Read(state.logits, lambda made: run.decode(torch.tensor(made[-1:]), state, len(made)))


def _text(run: Runner, read: Read, request: Request) -> str:
    """Return the greedy answer."""
    limits, transcript = run.limits([request]), Transcript(request, run.tokenizer)
    token = greedy(limits(read.logits))
    transcript.add(int(token))
    while not transcript.finish:
        token = greedy(limits(read.after(transcript.tokens), token, len(transcript.tokens)))
        transcript.add(int(token))
    return transcript.text


class Kept:
    """The answers in a folder that were made by the same versions, with the same weights on the same processor.

    Attributes:
        questions: by picture and place, as `accuracy_cpu.row_of` reads them, with `errors` of the first logits.
    """

    def __init__(self, folder: Path, about: dict[str, str], versions: dict[str, str]) -> None:
        self._about, self._versions = about, versions
        self.questions: dict[tuple[int, int], dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)
        self._path = folder / f"{secrets.token_hex(4)}.jsonl"

    def _read(self, path: Path) -> None:
        first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or ["{}"]
        head = json.loads(first)
        if head.get("about") != self._about:
            return
        same = {who for who, version in head["versions"].items() if self._versions.get(who) == version}
        for line in lines:
            self._take(json.loads(line), same)

    def _take(self, question: dict[str, Any], who: Collection[str]) -> None:
        empty = {**question, "texts": {"all": {}}, "errors": {}}
        whole = self.questions.setdefault(tuple(question["key"]), empty)
        for new, own in ((question["texts"]["all"], whole["texts"]["all"]), (question["errors"], whole["errors"])):
            own.update({name: value for name, value in new.items() if name in who})

    def lacks(self, picture: int, who: str) -> bool:
        """Whether a picture's first question, which is written last, lacks an answer."""
        question = self.questions.get((picture, 0))
        return question is None or who not in question["texts"]["all"]

    def add(self, questions: Sequence[dict[str, Any]]) -> None:
        """Take the answers to questions, and append them to this run's file."""
        head = "" if self._path.exists() else json.dumps({"about": self._about, "versions": self._versions}) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(head + "".join(json.dumps(question) + "\n" for question in reversed(questions)))
        for question in questions:
            self._take(question, question["texts"]["all"])

    def row(self, who: str, pictures: set[int]) -> dict[str, Any] | None:
        """Return the result of one way to compute on some pictures; None without an answer."""
        some = [
            question
            for (picture, _), question in self.questions.items()
            if picture in pictures and {who, REFERENCE} <= question["texts"]["all"].keys()
        ]
        if not some:
            return None
        own, meant = (row_of(some, "all", name, REFERENCE) for name in (who, REFERENCE))
        largest, mean, is_equal = zip(*(question["errors"][who] for question in some), strict=True)
        points = 100 * (own["accuracy"] - meant["accuracy"])
        return {
            "who": who,
            "version": self._versions[who],
            "num_samples": len(some),
            "logit_error_max": max(largest),
            "logit_error_mean": statistics.fmean(mean),
            "equal_first_tokens": statistics.fmean(is_equal),
            "accuracy": own["accuracy"],
            "accuracy_points": points,
            "answers_that_differ": own["disagreements"],
            "right_to_wrong": own["right_to_wrong"],
            "wrong_to_right": own["wrong_to_right"],
            "counts": abs(points) <= POINTS,
        }


def pictures_of(folder: Path, num_samples: int) -> list[int]:
    """Return the pictures of about `num_samples` validation questions, in the order in which they are asked."""
    card = card_of(folder)
    every, questions = num_pictures(card), card["settings"][0]["num_samples"]
    order = sorted(range(every), key=lambda number: number * GOLDEN % 1)
    return order[: min(every, -(-num_samples * every // questions))]


def questions_of(vlm: api.TempoVLM, folder: Path, pictures: Sequence[int]) -> list[Asked]:
    """Prepare all questions of some pictures for the native setting."""
    run, tier, asked = vlm.engine.runner, vlm.space.native.tier, []
    for picture, (dataset, scene) in zip(pictures, validation_scenes(folder, pictures), strict=True):
        crops = vision = None
        for number, item in enumerate(scene.questions):
            given: dict[str, Any] = {"style": DATASETS[dataset].style, "max_new_tokens": MAX_NEW_TOKENS}
            request = Request(images=(scene.image,), question=full_question(item), **given)
            ready = run.prepare(scene.image, tier, request)
            if crops is None:
                crops = ready.crops
                vision = run.project(run.encode(crops), crops)
            assert vision is not None
            ready = Prepared(crops, ready.prompt)
            asked.append(Asked((picture, number), dataset, item.answer, request, ready, vision))
    return asked


@torch.inference_mode()
def answer(
    vlm: api.TempoVLM, folder: Path, readers: dict[str, Reader], pictures: Sequence[int], kept: Kept
) -> None:
    """Answer the questions of pictures at the native setting, as far as answers are lacking.

    Args:
        vlm: torch in float32, the reference.
        folder: of the model.
        readers: all other ways, by name.
        pictures: numbers of validation pictures.
        kept: takes the answers.
    """
    run, plan = vlm.engine.runner, vlm.engine.plan(vlm.space.native)
    pictures = [number for number in pictures if any(kept.lacks(number, who) for who in (REFERENCE, *readers))]
    with progress_bar("answering questions") as advance, vlm.engine.computing():
        for begin in range(0, len(pictures), TOGETHER):
            some = pictures[begin : begin + TOGETHER]
            asked = questions_of(vlm, folder, some)
            states = [run.prefill(one.ready.prompt, one.vision, plan, MAX_NEW_TOKENS) for one in asked]
            found: list[dict[str, Any]] = [
                {"key": one.key, "dataset": one.dataset, "right": one.right, "errors": {}}
                | {"texts": {"all": {REFERENCE: _text(run, _decoded(run, state), one.request)}}}
                for one, state in zip(asked, states, strict=True)
            ]
            for who, reader in readers.items():
                if not any(kept.lacks(number, who) for number in some):
                    continue
                for one, state, read, into in zip(asked, states, reader(asked), found, strict=True):
                    into["texts"]["all"][who] = _text(run, read, one.request)
                    into["errors"][who] = _errors(who, read.logits, state.logits)
            kept.add(found)
            advance(begin + len(some), len(pictures))


def _errors(who: str, logits: Tensor, meant: Tensor) -> tuple[float, float, bool]:
    """Largest and mean error of a first token's logits (1, V), and whether the token is the same."""
    if who.startswith(llama.NAME):
        meant = meant.log_softmax(-1)
    error = (logits - meant).abs()
    return float(error.max()), float(error.mean()), bool(logits.argmax() == meant.argmax())
