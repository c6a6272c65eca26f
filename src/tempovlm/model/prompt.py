"""From a question and a grid to the token stream that the decoder reads, and from tokens back to text.

Stream: begin token, global crop, tiles, text. Text that a user types is never read as a control token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from tempovlm.core.errors import UserError
from tempovlm.core.paths import check_file, read_json
from tempovlm.model.config import ModelConfig, VisionConfig
from tempovlm.model.vision.tiling import CROPS_OF_TIER, Grid, grids_of

END = "<|endoftext|>"
PAD = "<|padding|>"
IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COLUMN = "<im_start>", "<im_end>", "<im_patch>", "<im_col>"
_AGAIN = "copy it from the model's folder"

_RARE = "\u1200 \u13a0"
"""A letter of Ethiopic and one of Cherokee, which few word lists contain and no normaliser drops."""

_LEAST_BESIDE = 3
"""Tokens besides the picture: begin, a question, an answer."""

CONTROL_TOKENS = (PAD, END, IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COLUMN)


class Tokenizer:
    """A `tokenizer.json` with the ids of its control tokens; the end token also begins a stream."""

    control_tokens: ClassVar[tuple[str, ...]] = CONTROL_TOKENS
    end_token: ClassVar[str] = END
    pad_token: ClassVar[str] = PAD

    def __init__(self, fast: FastTokenizer) -> None:
        """Wrap a tokenizer; from then on it reads control tokens in a text as letters."""
        fast.encode_special_tokens = True
        self._fast = fast
        self.ids = {name: self._id(name) for name in self.control_tokens}
        self.end, self.pad = self.ids[self.end_token], self.ids[self.pad_token]
        unknown: str | None = getattr(fast.model, "unk_token", None)
        self.unknown = None if unknown is None else fast.token_to_id(unknown)

    @classmethod
    def load(cls, path: Path, config: ModelConfig | None = None) -> Tokenizer:
        """Read a `tokenizer.json`; text is neither cut nor padded, whatever the file says.

        Args:
            path: the file.
            config: configuration of the model, whose embedding must have a row for every token.

        Raises:
            UserError: the file cannot be read or is damaged, a control token is missing, or it does not fit the
                model.
        """
        check_file(path, _AGAIN)
        try:
            fast = FastTokenizer.from_file(str(path))
            fast.no_truncation()
            fast.no_padding()
            _check_words(fast, path)
            if config is not None:
                _check_fit(fast, path, config, cls)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json ({error})") from None
        try:
            return cls(fast)
        except UserError as error:
            raise UserError(f"{path}: {error}; {_AGAIN}") from None

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[FastTokenizer]]:
        """Wrap a copy anew: how the library reads control tokens is no part of what it copies and pickles."""
        return type(self), (self._fast,)

    def _id(self, name: str) -> int:
        token = self._fast.token_to_id(name)
        if token is None:
            raise UserError(f"control token {name} is missing")
        return token

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text; control tokens in it are read as letters."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Return the plain text of token ids, without control tokens; white space stays as in the tokens."""
        return self._fast.decode(tokens, skip_special_tokens=True)

    def stream(
        self, question: str, style: str, grid: Grid | None, vision: VisionConfig
    ) -> tuple[list[int], Tensor | None]:
        """Write a prompt: its ids, and the place among them of each pooled feature (C·G,), or -1.

        Without a picture both `grid` and the places are None.
        """
        text = self.encode(prompt_text(question, style))
        if grid is None:
            return [self.end, *text], None
        return [self.end, *image_tokens(grid, vision, self), *text], _slots_after_begin(grid, vision)

    @staticmethod
    def picture_length(grid: Grid, vision: VisionConfig) -> int:
        """Return how many tokens of a prompt are a picture's: features' places and separators."""
        return num_image_tokens(grid, vision)


def _check_words(fast: FastTokenizer, path: Path) -> None:
    """Raise a `UserError` if some text cannot be read, or an id is taken twice or differs from the file's."""
    try:
        fast.encode(_RARE, add_special_tokens=False)
    except Exception as error:  # noqa: BLE001 - as above
        raise UserError(f"{path}: field model has no token for unknown text ({error})") from None
    # The library gives an added token the number of tokens before it, whatever id the file says; where the words
    # have gaps, that may be a word's own id.
    for entry in read_json(path, _AGAIN).get("added_tokens") or ():
        if fast.token_to_id(entry["content"]) != entry["id"]:
            raise UserError(
                f"{path}: field added_tokens: {entry['content']} has id {entry['id']}, but is read as "
                f"{fast.token_to_id(entry['content'])}, the number of tokens before it; {_AGAIN}"
            )
    names: dict[int, str] = {}
    for name, token in sorted(fast.get_vocab(with_added_tokens=True).items()):
        if names.setdefault(token, name) != name:
            raise UserError(f"{path}: tokens {names[token]!r} and {name!r} have the same id {token}; {_AGAIN}")


def _check_fit(fast: FastTokenizer, path: Path, config: ModelConfig, kind: type[Tokenizer]) -> None:
    """Raise a `UserError` if a token is beyond the embedding, or a picture longer than the context."""
    rows, beside = config.embedding_size + config.additional_vocab_size, path.with_name("config.json").name
    token, name = max(((i, name) for name, i in fast.get_vocab(with_added_tokens=True).items()), default=(0, ""))
    sizes = f"embedding_size {config.embedding_size} and additional_vocab_size {config.additional_vocab_size}"
    if token >= rows:
        raise UserError(f"{path}: token {name!r} has id {token}, beyond the {rows} rows of {beside}: {sizes}")
    end = fast.token_to_id(kind.end_token)
    if end is not None and end >= config.embedding_size:
        raise UserError(
            f"{path}: control token {kind.end_token} has id {end}, which the model cannot predict: {beside} has "
            f"{sizes}"
        )
    longest = max(kind.picture_length(grid, config.vision) for tier in CROPS_OF_TIER for grid in grids_of(tier))
    if config.max_sequence_length < longest + _LEAST_BESIDE:
        raise UserError(
            f"{path.with_name(beside)}: field max_sequence_length is {config.max_sequence_length}, but a picture "
            f"takes up to {longest} tokens and a question with its answer at least {_LEAST_BESIDE}"
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token stream of a prompt.

    Attributes:
        tokens: (T,) ids. slots: flat (C·G,) place of each pooled vision token in the stream, or -1.
        num_vision_tokens: image features with a place in the stream; num_text_tokens: all other tokens.
    """

    tokens: Tensor
    slots: Tensor | None
    num_vision_tokens: int

    @property
    def num_text_tokens(self) -> int:
        """Number of tokens without an image feature: begin, image separators and text."""
        return len(self.tokens) - self.num_vision_tokens


def build_prompt(
    question: str, style: str, grid: Grid | None, config: ModelConfig, tokenizer: Tokenizer, reserve: int
) -> Prompt:
    """Return the stream for a question; `reserve` tokens of the context stay free for the answer.

    Raises:
        UserError: the stream and the answer do not fit the context.
    """
    stream, slots = tokenizer.stream(question, style, grid, config.vision)
    length, limit = len(stream), config.max_sequence_length
    if length + reserve > limit:
        raise UserError(
            f"the question: {length} tokens with the image and {reserve} for the answer exceed the context "
            f"of {limit}; shorten the question or lower max_new_tokens"
        )
    return Prompt(torch.from_numpy(np.array(stream)), slots, 0 if slots is None else _num_places(slots))


@lru_cache(maxsize=64)
def _num_places(slots: Tensor) -> int:
    """Count the features that have a place; kept for prompts with the same tensor of places, those of one grid."""
    return int((slots >= 0).sum())


def glance_tokens(question: str, style: str, config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """The stream (T,) of the global crop's places and the question; the places are the same for every question.

    It is cut to leave room for one more token: a question without a picture may fill the context.
    """
    side = config.vision.pooled
    picture = _rows(side, side, tokenizer)
    tokens = [tokenizer.end, *picture, *tokenizer.encode(prompt_text(question, style))]
    return torch.tensor(tokens[: config.max_sequence_length - 1])


def glance_places(config: ModelConfig) -> Tensor:
    """(G,) where the glance's tokens stand in the stream of `glance_tokens`."""
    cell = torch.arange(config.vision.pooled)
    return (2 + (len(cell) + 1) * cell[:, None] + cell[None, :]).flatten()


def prompt_text(question: str, style: str) -> str:
    """Return the question in the published chat format with its style prefix, which sets the answer's form.

    The question is not stripped: the line end after the last option of a multiple choice belongs to the format.
    """
    prefix = f"{style}: " if style else ""
    return f" User: {prefix}{question} Assistant:"


def image_tokens(grid: Grid, vision: VisionConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of the image part: the global crop's rows, then the tiles' rows, each between start and end."""
    side = vision.pooled
    return _rows(side, side, tokenizer) + _rows(*grid.kept(vision), tokenizer)


def _rows(rows: int, cols: int, tokenizer: Tokenizer) -> list[int]:
    """Ids of a grid's places, row by row, between start and end."""
    start, end, patch, column = (
        tokenizer.ids[name] for name in (IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COLUMN)
    )
    return [start, *([patch] * cols + [column]) * rows, end]


def num_image_tokens(grid: Grid, vision: VisionConfig) -> int:
    """Return the length of `image_tokens`: the features' places and the separators."""
    parts = ((vision.pooled, vision.pooled), grid.kept(vision))
    return sum(2 + rows * (cols + 1) for rows, cols in parts)


def feature_slots(grid: Grid, vision: VisionConfig) -> Tensor:
    """Return the position (C·G,) of each pooled token in the image part of the stream, -1 in an overlap."""
    side = vision.pooled
    first, last = (margin // vision.pool for margin in vision.margins)
    window = vision.window // vision.pool
    cell = torch.arange(side)
    whole = 1 + (side + 1) * cell[:, None] + cell[None, :]
    offset = side * (side + 1) + 2 + 1
    row_length = grid.kept(vision)[1] + 1
    slots = [whole]
    for i in range(grid.rows):
        for j in range(grid.cols):
            keep_rows = _kept(cell, i, grid.rows, first, side - last)
            keep_cols = _kept(cell, j, grid.cols, first, side - last)
            place = offset + (window * i + cell[:, None]) * row_length + (window * j + cell[None, :])
            slots.append(torch.where(keep_rows[:, None] & keep_cols[None, :], place, -1))
    return torch.stack(slots).flatten()


@lru_cache(maxsize=64)
def _slots_after_begin(grid: Grid, vision: VisionConfig) -> Tensor:
    """Return `feature_slots` in a stream that has one token before the image."""
    with torch.inference_mode(mode=False):
        slots = feature_slots(grid, vision)
        return torch.where(slots >= 0, slots + 1, slots)


def _kept(cell: Tensor, index: int, count: int, first: int, last: int) -> Tensor:
    """Return which cells along one side of crop `index` of `count` are its own and not its neighbour's."""
    lower = cell >= (0 if index == 0 else first)
    return lower & (cell < last) if index < count - 1 else lower
