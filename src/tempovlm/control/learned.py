"""Controllers as policies: from the features of a request to joint logits of the settings.

Networks run on the host in NumPy; only pooled features come from the model's device. The LLM-based controller
runs on the model's device, because it uses the model's blocks. A policy keeps no state of a
request. Shapes: `K` settings of the knob space, `G` tokens of a glance, `D` decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.baselines import LinUCB, NearestNeighbours, ScoredPolicy
from tempovlm.control.checkpoint import Part, SavedController, check_sizes, load_controller
from tempovlm.control.host import HostKnob1, HostKnob2Knob3, HostSupervised
from tempovlm.control.llm_based import LLMBasedController, Reading, glance_tokens
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
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo

Kind = TypeVar("Kind", bound=Part)


@dataclass(frozen=True)
class Reader:
    """Features of requests, from a model's tokenizer and its token embeddings."""

    model: HasDecoder
    tokenizer: Encodes

    def language(self, question: str) -> Row:
        """Return the feature (L,) of a question; the last one is cached, since both stages ask."""
        return self._remembered(question)

    @cached_property
    def _remembered(self) -> Callable[[str], Row]:
        return lru_cache(maxsize=1)(self._read)

    def _read(self, question: str) -> Row:
        return language_feature(self._vectors, question_ids(self.tokenizer, question))

    @cached_property
    def _vectors(self) -> Tensor:
        return token_vectors(self.model)


_NOTHING = np.zeros(1, np.float32)
"""Logits of a knob that a network does not score."""


@dataclass(frozen=True)
class LearnedPolicy(Policy):
    """Base class of controllers: computes one score a setting from the logits of the knobs."""

    space: KnobSpace
    name: str

    def joint(self, tier: Row, top_k: Row, num_blocks: Row) -> Row:
        """Return joint logits (K,) of the settings from those of each knob's values, or one (1,) for all of them.

        Raises:
            UserError: a logit is not finite.
        """
        space = self.space
        shape = (len(space.tiers), len(space.top_ks), len(space.block_counts))
        scores = tier[:, None, None] + top_k[:, None] + num_blocks
        if not np.isfinite(scores).all():
            raise UserError(
                f"policy {self.name}: its logits are not numbers (NaN or infinite); its checkpoint or the model's "
                "weights are damaged: copy them again, or choose --policy table"
            )
        return np.broadcast_to(scores, shape).ravel()


@dataclass(frozen=True)
class SupervisedPolicy(LearnedPolicy):
    """Exp 2: scores from the budget alone."""

    net: SupervisedController

    def look(self, question: Question, left_ms: float) -> Row:  # noqa: ARG002 - reads the budget alone
        """Return joint logits (K,)."""
        return self.joint(*self._network(left_ms))

    @cached_property
    def _network(self) -> HostSupervised:
        return HostSupervised(self.net)


@dataclass(frozen=True)
class Stage1Policy(LearnedPolicy):
    """Exp 3: the network scores the tiers; of the tier's settings, the one nearest to the trained model runs."""

    knob1: Knob1Predictor
    reader: Reader
    sees_picture = True
    tie = 1e-9  # ranks that differ only by rounding count as equal

    @property
    def sees_glance(self) -> bool:
        """Whether the network uses the global crop."""
        return isinstance(self.knob1, Knob1PredictorBudgetLanguageGlance)

    def look(self, question: Question, left_ms: float) -> Row:
        """Return the logit (K,) of each setting's tier."""
        looks: list[Row] = []
        if not isinstance(self.knob1, Knob1PredictorBudget):
            looks.append(self.reader.language(question.text))
        if self.sees_glance:
            seen, width = question.glance, self.knob1.sizes["vision_width"]
            looks.append(np.zeros(width, np.float32) if seen is None else glance_feature(seen))
        return self.joint(self._network(left_ms, *looks), _NOTHING, _NOTHING)

    @cached_property
    def _network(self) -> HostKnob1:
        return HostKnob1(self.knob1)

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return ranks (K,): the most compute, up to the trained top-k."""
        return self._prior

    @cached_property
    def _prior(self) -> Floats:
        return np.array(list(prior_accuracy(self.space).values()))


@dataclass(frozen=True)
class TwoStagePolicy(Stage1Policy):
    """Exp 3 and 4: the tier from question and budget; top-k and depth from picture, question and the time left."""

    knob2knob3: Knob2Knob3Predictor

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Row:
        """Return joint logits (K,) of top-k and depth, equal for all tiers."""
        language, place = self.reader.language(question.text), self.space.tiers.index(sight.tier)
        return self.joint(_NOTHING, *self._second(self._vision(sight), language, left_ms, place))

    def _vision(self, sight: Sight) -> Row:
        if sight.pooled is not None:
            return sight.pooled.numpy()
        if sight.vision is None:
            return np.zeros(self.knob2knob3.sizes["vision_width"], np.float32)
        return vision_feature(sight.vision)

    @cached_property
    def _second(self) -> HostKnob2Knob3:
        return HostKnob2Knob3(self.knob2knob3)


@dataclass(frozen=True)
class LLMBasedPolicy(LearnedPolicy):
    """Exp 5: the model's first blocks read glance, question and budget, and score all three knobs at once."""

    controller: LLMBasedController
    model: Molmo
    tokenizer: Tokenizer

    @property
    def sees_glance(self) -> bool:
        """True."""
        return True

    @torch.inference_mode()
    def look(self, question: Question, left_ms: float) -> Row:
        """Return joint logits (K,)."""
        reading = self._read(question.text, question.style, question.glance)
        budget_ms = torch.tensor([left_ms], device=reading.keys.device)
        logits = self.controller.decide(self.model, reading, budget_ms)
        return self.joint(*(row[0].float().cpu().numpy() for row in logits))

    @cached_property
    def _read(self) -> Callable[[str, str, Tensor | None], Reading]:
        """Read glance and question; the last result is cached, since it serves every budget."""
        model, config = self.model, self.model.config
        device = model.decoder.embedding.device

        @lru_cache(maxsize=1)
        def read(text: str, style: str, glance: Tensor | None) -> Reading:
            stream = glance_tokens(text, style, config, self.tokenizer)
            # A question without a picture may fill the context, but glance and budget need room too.
            tokens = stream[: config.max_sequence_length - 1].to(device).unsqueeze(0)
            return self.controller.read(model, glance, tokens, torch.tensor([tokens.shape[1]], device=device))

        return read


def policy_from_checkpoint(
    path: Path, space: KnobSpace, model: HasDecoder, tokenizer: Encodes, weights: str | None = None
) -> Policy:
    """Return the policy of a checkpoint of any kind.

    Args:
        path: the checkpoint.
        space: the model's settings.
        model: its token embeddings are the language feature.
        tokenizer: of the same model.
        weights: hash of its weights; None skips the check that the controller was trained on them.

    Raises:
        UserError: the file does not fit this model.
    """
    saved = load_controller(path, space, weights)
    width = int(model.decoder.embedding.shape[1])
    for name, net in saved.networks.items():
        check_sizes(path, name, net, {"language_width": width, "vision_width": vision_width(width)})
    return policy_of(saved, space, Reader(model, tokenizer), path)


def policy_of(saved: SavedController, space: KnobSpace, reader: Reader, path: Path) -> Policy:
    """Build the policy from the networks of a file.

    Raises:
        UserError: a network has the wrong class for its kind, or reads with other blocks than this model has.
    """
    name = str(saved.options.get("policy", saved.kind))
    if saved.kind == "supervised":
        return SupervisedPolicy(space, name, _of(saved, "controller", SupervisedController, path))
    if saved.kind == "nearest_neighbours":
        return ScoredPolicy(_of(saved, "scorer", NearestNeighbours, path), name)
    if saved.kind == "linucb":
        return ScoredPolicy(_of(saved, "scorer", LinUCB, path), name)
    if saved.kind == "llm_based":
        return _llm_based(_of(saved, "controller", LLMBasedController, path), space, name, reader, path)
    knob1 = saved.networks["knob1"]
    if not isinstance(knob1, Knob1Predictor):
        raise UserError(f"{path}: its knob1 is a {type(knob1).__name__}, the wrong kind of network")
    if saved.kind == "two_stage_stage1":
        return Stage1Policy(space, name, knob1, reader)
    return TwoStagePolicy(space, name, knob1, reader, _of(saved, "knob2knob3", Knob2Knob3Predictor, path))


def _llm_based(
    controller: LLMBasedController, space: KnobSpace, name: str, reader: Reader, path: Path
) -> LLMBasedPolicy:
    """Build the policy around a controller, on the model's device.

    Raises:
        UserError: the controller cannot run the blocks of this model's decoder.
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


def _of(saved: SavedController, part: str, cls: type[Kind], path: Path) -> Kind:
    net = saved.networks[part]
    if not isinstance(net, cls):
        raise UserError(f"{path}: its {part} is a {type(net).__name__}, the wrong kind of network")
    return net
