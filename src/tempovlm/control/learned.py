"""Learned controllers as policies: features of the request, logits, and the best of the settings still allowed.

What the guard masked is never chosen: the heads' joint is maximised over the allowed settings only, not each head
by itself. Networks run on the host, in NumPy; only pooled features come from the model's device. The LLM-based one
runs where the model is, because the model's blocks are a part of it. A policy holds nothing of any
request. Shapes: `K` settings of the knob space, `G` tokens of a glance, `D` decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.control.checkpoint import SavedController, check_sizes, load_controller
from tempovlm.control.host import HostKnob1, HostKnob2Knob3, HostSupervised
from tempovlm.control.llm_based import LLMBasedController, glance_tokens
from tempovlm.control.networks import (
    Knob1Predictor,
    Knob1PredictorBudget,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.control.observation import (
    Encodes,
    HasDecoder,
    Row,
    glance_feature,
    language_feature,
    question_ids,
    token_vectors,
    vision_feature,
    vision_width,
)
from tempovlm.control.policies import prior_accuracy
from tempovlm.control.policy import Features, Policy, Question
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Reader:
    """Features of requests, from a model's tokenizer and its token embeddings."""

    model: HasDecoder
    tokenizer: Encodes

    def language(self, question: str) -> Row:
        """(L,) of a question; of the one that was asked for last it is known, since both stages ask."""
        return self._remembered(question)

    @cached_property
    def _remembered(self) -> Callable[[str], Row]:
        return lru_cache(maxsize=1)(self._read)

    def _read(self, question: str) -> Row:
        return language_feature(self._vectors, question_ids(self.tokenizer, question))

    @cached_property
    def _vectors(self) -> Row:
        return token_vectors(self.model)


@dataclass(frozen=True)
class LearnedPolicy:
    """What the learned policies share: a knob space, and where each setting's knobs stand in it."""

    space: KnobSpace
    name: str

    def best_tier(self, logits: Row, choices: Sequence[KnobConfig]) -> str:
        """The tier of the highest logit (3,) among those that a choice has."""
        score = dict(zip(self.space.tiers, self._numbers(logits), strict=False))
        return max(dict.fromkeys([knobs.tier for knobs in choices]), key=score.__getitem__)

    def best_compute(self, top_k: Row, num_blocks: Row, choices: Sequence[KnobConfig]) -> KnobConfig:
        """The choice of the highest joint logit of (5,) and (5,); the first of equals."""
        return self.best((np.zeros(len(self.space.tiers), np.float32), top_k, num_blocks), choices)

    def best(self, logits: Sequence[Row | Tensor], choices: Sequence[KnobConfig]) -> KnobConfig:
        """The choice of the highest joint logit of all three knobs; the first of equals, which is the cheapest.

        Args:
            logits: (3,), (5,) and (5,) of tier, top-k and depth.
            choices: what is allowed.
        """
        space, (tiers, top_ks, blocks) = self.space, [self._numbers(row) for row in logits]
        of_tier = dict(zip(space.tiers, tiers, strict=False))
        of_top_k = dict(zip(space.top_ks, top_ks, strict=False))
        of_blocks = dict(zip(space.block_counts, blocks, strict=False))
        scores = [of_tier[k.tier] + of_top_k[k.top_k] + of_blocks[k.num_blocks] for k in choices]
        return choices[scores.index(max(scores))]

    def _numbers(self, logits: Row | Tensor) -> list[float]:
        """Logits as they are compared.

        Raises:
            UserError: they are no numbers.
        """
        values: list[float] = logits.tolist()
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"policy {self.name}: its logits are not numbers (NaN or infinite); its checkpoint or the model's "
                "weights are damaged: copy them again, or choose --policy table"
            )
        return values


@dataclass(frozen=True)
class SupervisedPolicy(LearnedPolicy):
    """Exp 2: the budget decides everything; both choices are parts of one answer to the whole budget."""

    net: SupervisedController

    def choose_tier(self, question: Question, budget_ms: float) -> str:
        """The tier of the best setting."""
        return self._choose(question.choices, budget_ms).tier

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:
        """Top-k and depth of the best setting of the tier, for the budget that the first choice knew."""
        if features is None:
            choices = tuple(knobs for knobs in self.space if knobs.tier == tier)
        else:
            choices, first_ms = features.choices, features.question.budget_ms
            budget_ms = budget_ms if first_ms is None else first_ms
        knobs = self._choose(choices, budget_ms)
        return knobs.top_k, knobs.num_blocks

    def _choose(self, choices: Sequence[KnobConfig], budget_ms: float) -> KnobConfig:
        return self.best(self._logits(budget_ms), choices)

    @cached_property
    def _logits(self) -> Callable[[float], list[Row]]:
        """Those of the last budget are known, since both choices ask."""
        return lru_cache(maxsize=1)(HostSupervised(self.net))


@dataclass(frozen=True)
class Stage1Policy(LearnedPolicy):
    """Exp 3: the network chooses the tier; of the tier's settings, the one nearest to the trained model runs."""

    knob1: Knob1Predictor
    reader: Reader

    @property
    def glances(self) -> bool:
        """Whether the network looks at the global crop."""
        return isinstance(self.knob1, Knob1PredictorBudgetLanguageGlance)

    def choose_tier(self, question: Question, budget_ms: float) -> str:
        """The most likely tier of those that are allowed."""
        looks: list[Row] = []
        if not isinstance(self.knob1, Knob1PredictorBudget):
            looks.append(self.reader.language(question.text))
        if self.glances:
            seen, width = question.glance, self.knob1.sizes["vision_width"]
            looks.append(np.zeros(width, np.float32) if seen is None else glance_feature(seen))
        return self.best_tier(self._network(budget_ms, *looks), question.choices)

    @cached_property
    def _network(self) -> HostKnob1:
        return HostKnob1(self.knob1)

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:  # noqa: ARG002
        """The most compute that is allowed, up to the trained top-k."""
        choices = features.choices if features else tuple(knobs for knobs in self.space if knobs.tier == tier)
        knobs = max(choices, key=self._prior.__getitem__)
        return knobs.top_k, knobs.num_blocks

    @cached_property
    def _prior(self) -> dict[KnobConfig, float]:
        return prior_accuracy(self.space)


@dataclass(frozen=True)
class TwoStagePolicy(Stage1Policy):
    """Exp 3 and 4: the tier by question and budget, top-k and depth by picture, question and what is left."""

    knob2knob3: Knob2Knob3Predictor

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:
        """The most likely pair of those that are allowed; without features, as stage 1 alone."""
        if features is None:
            return super().choose_compute(features, tier, budget_ms)
        tokens, width = features.sight.vision, self.knob2knob3.sizes["vision_width"]
        vision = np.zeros(width, np.float32) if tokens is None else vision_feature(tokens)
        language, place = self.reader.language(features.question.text), self.space.tiers.index(tier)
        knobs = self.best_compute(*self._second(vision, language, budget_ms, place), features.choices)
        return knobs.top_k, knobs.num_blocks

    @cached_property
    def _second(self) -> HostKnob2Knob3:
        return HostKnob2Knob3(self.knob2knob3)


@dataclass(frozen=True)
class LLMBasedPolicy(LearnedPolicy):
    """Exp 5: the model's first blocks read glance, question and budget, and all three knobs are chosen at once."""

    controller: LLMBasedController
    model: Molmo
    tokenizer: Tokenizer

    @property
    def glances(self) -> bool:
        """Always."""
        return True

    def choose_setting(self, question: Question, budget_ms: float) -> KnobConfig:
        """The most likely of the settings that are allowed."""
        return self._choose(question, question.choices, budget_ms)

    def choose_tier(self, question: Question, budget_ms: float) -> str:
        """The tier of the most likely setting."""
        return self.choose_setting(question, budget_ms).tier

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:
        """Top-k and depth of the tier's most likely setting, for the budget that the first choice knew.

        Raises:
            ValueError: there are no features, and so no question to read.
        """
        if features is None:
            raise ValueError(f"at tier {tier} the LLM-based policy needs the question")
        first_ms = features.question.budget_ms
        knobs = self._choose(features.question, features.choices, budget_ms if first_ms is None else first_ms)
        return knobs.top_k, knobs.num_blocks

    @torch.inference_mode()
    def _choose(self, question: Question, choices: Sequence[KnobConfig], budget_ms: float) -> KnobConfig:
        model, config = self.model, self.model.config
        device = model.decoder.embedding.device
        stream = glance_tokens(question.text, question.style, config, self.tokenizer)
        # A question without a picture may fill the context, where glance and budget need room too.
        tokens = stream[: config.max_sequence_length - 1].to(device).unsqueeze(0)
        lengths = torch.tensor([tokens.shape[1]], device=device)
        logits = self.controller(model, question.glance, tokens, lengths, torch.tensor([budget_ms], device=device))
        return self.best([row[0] for row in logits], choices)


def policy_from_checkpoint(
    path: Path, space: KnobSpace, model: HasDecoder, tokenizer: Encodes, weights: str | None = None
) -> Policy:
    """The policy of a checkpoint, whatever its kind.

    Args:
        path: of the checkpoint.
        space: the model's settings.
        model: whose token embeddings are the language feature.
        tokenizer: of the same model.
        weights: hash of its weights; None does not ask whether the controller was trained on them.

    Raises:
        UserError: the file cannot be used with this model.
    """
    saved = load_controller(path, space, weights)
    width = int(model.decoder.embedding.shape[1])
    for name, net in saved.networks.items():
        check_sizes(path, name, net, {"language_width": width, "vision_width": vision_width(width)})
    return policy_of(saved, space, Reader(model, tokenizer), path)


def policy_of(saved: SavedController, space: KnobSpace, reader: Reader, path: Path) -> Policy:
    """The policy around the networks of a file.

    Raises:
        UserError: a network is not of the class that its kind has, or reads with other blocks than this model's.
    """
    name = str(saved.options.get("policy", saved.kind))
    if saved.kind == "supervised":
        return SupervisedPolicy(space, name, _of(saved, "controller", SupervisedController, path))
    if saved.kind == "llm_based":
        return _llm_based(_of(saved, "controller", LLMBasedController, path), space, name, reader, path)
    knob1 = saved.networks["knob1"]
    if not isinstance(knob1, Knob1Predictor):
        raise UserError(f"{path}: its knob1 is a {type(knob1).__name__}, which does not belong there")
    if saved.kind == "two_stage_stage1":
        return Stage1Policy(space, name, knob1, reader)
    return TwoStagePolicy(space, name, knob1, reader, _of(saved, "knob2knob3", Knob2Knob3Predictor, path))


def _llm_based(
    controller: LLMBasedController, space: KnobSpace, name: str, reader: Reader, path: Path
) -> LLMBasedPolicy:
    """The policy around a controller, on the model's device.

    Raises:
        UserError: the model's decoder is not one whose blocks the controller can run.
    """
    model, tokenizer = reader.model, reader.tokenizer
    if not (isinstance(model, Molmo) and isinstance(tokenizer, Tokenizer)):
        raise UserError(f"{path}: an LLM-based controller reads with a model's blocks; give a loaded model")
    width, blocks = model.config.width, len(model.decoder.blocks)
    if controller.sizes["width"] != width or controller.num_blocks > blocks:
        raise UserError(
            f"{path}: trained to read with {controller.num_blocks} blocks of width {controller.sizes['width']}, "
            f"this model has {blocks} of width {width}; train a controller for this model"
        )
    return LLMBasedPolicy(space, name, controller.to(model.decoder.embedding.device), model, tokenizer)


def _of(saved: SavedController, part: str, cls: type[Net], path: Path) -> Net:
    net = saved.networks[part]
    if not isinstance(net, cls):
        raise UserError(f"{path}: its {part} is a {type(net).__name__}, which does not belong there")
    return net
