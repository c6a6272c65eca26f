"""Controllers as policies: from the features of a request to joint logits of the settings.

Networks run on the host in NumPy; only pooled features come from the model's device. The LLM-based controller
runs on the model's device, because it uses the model's blocks. A policy keeps no state of a
request. Shapes: `K` settings of the knob space, `G` tokens of a glance, `D` decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.baselines import LinUCB, NearestNeighbours, ScoredPolicy
from tempovlm.control.checkpoint import Part, SavedController, check_sizes, fingerprint, load_controller
from tempovlm.control.learned.host import HostNetwork, added
from tempovlm.control.learned.llm_based import FirstBlocks, LLMBasedController, Reading
from tempovlm.control.learned.networks import (
    AccuracyNetwork,
    Knob1Predictor,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SeenAccuracyNetwork,
    SupervisedController,
)
from tempovlm.control.learned.observation import (
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
from tempovlm.control.own_policy import narrowed
from tempovlm.control.policies import prior_accuracy
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats, Ints
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace

Kind = TypeVar("Kind", bound=Part)

QUESTIONS = 32
"""Questions whose features are kept: requests in flight together make their choices in turn."""


@dataclass(frozen=True)
class Reader:
    """Features of requests, from a model's tokenizer and its token embeddings."""

    model: HasDecoder
    tokenizer: Encodes

    def language(self, question: str) -> Row:
        """Return the feature (L,) of a question; the last ones are cached, since both stages ask."""
        return self._remembered(question)

    @cached_property
    def _remembered(self) -> Callable[[str], Row]:
        return lru_cache(maxsize=QUESTIONS)(self._read)

    def _read(self, question: str) -> Row:
        return language_feature(self._vectors, question_ids(self.tokenizer, question))

    @cached_property
    def _vectors(self) -> Tensor:
        return token_vectors(self.model)


@dataclass(frozen=True)
class LearnedPolicy(Policy):
    """Base class of controllers: computes one score a setting from the logits of the knobs."""

    space: KnobSpace
    name: str

    def joint(self, logits: Row, places: Ints | None = None) -> Row:
        """Return joint logits (K,) of the settings, the sums of those of their knobs' values.

        Args:
            logits: of the values of tier, top-k and number of blocks, one knob after the other.
            places: (knobs, K) or (K,) of each setting's values among them; None where all three knobs are there.

        Raises:
            UserError: a logit is not finite.
        """
        if not math.isfinite(logits.dot(logits)):
            raise UserError(
                f"policy {self.name}: its logits are not numbers (NaN or infinite); its checkpoint or the model's "
                "weights are damaged: copy them again, or choose the policy table"
            )
        scores: Row = logits.take(self._places if places is None else places)
        return scores if scores.ndim == 1 else np.add.reduce(scores, axis=0)

    @cached_property
    def _places(self) -> Ints:
        """(3, K) places of each setting's values among the logits of all knobs."""
        space = self.space
        counts = (len(space.tiers), len(space.top_ks), len(space.block_counts))
        places: Ints = np.indices(counts).reshape(3, -1)
        return places + np.array([[0], [counts[0]], [counts[0] + counts[1]]])


@dataclass(frozen=True)
class SupervisedPolicy(LearnedPolicy):
    """Exp 2: scores from the budget alone."""

    net: SupervisedController

    def look(self, question: Question, left_ms: float) -> Row:  # noqa: ARG002 - reads the budget alone
        """Return joint logits (K,)."""
        return self.joint(self._network(left_ms))

    @cached_property
    def _network(self) -> HostNetwork:
        return HostNetwork(self.net)


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
        seen = self._asked(question.text)
        if self.sees_glance:
            glance, width = question.glance, self.knob1.sizes["vision_width"]
            row = np.zeros(width, np.float32) if glance is None else glance_feature(glance)
            seen = seen + self._network.inputs["glance"](row)
        return self.joint(self._network(left_ms, seen), self._of_tiers)

    @cached_property
    def _asked(self) -> Callable[[str], Row | float]:
        """Add a question to the first stage; the last ones are kept, since they serve every budget."""
        read = self._network.inputs.get("language")
        return lru_cache(maxsize=QUESTIONS)(lambda text: 0.0 if read is None else read(self.reader.language(text)))

    @cached_property
    def _of_tiers(self) -> Ints:
        return self._places[0]

    @cached_property
    def _network(self) -> HostNetwork:
        return HostNetwork(self.knob1)

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
        seen = self._second.inputs["vision"](self._vision(sight)) + self._known(question.text, sight.tier)
        return self.joint(self._second(left_ms, seen), self._of_compute)

    def _vision(self, sight: Sight) -> Row:
        seen = seen_at(sight)
        return np.zeros(self.knob2knob3.sizes["vision_width"], np.float32) if seen is None else seen

    @cached_property
    def _known(self) -> Callable[[str, str], Row]:
        """Add question and tier to the second stage; those of the last questions are kept."""
        net, tiers, read = self.knob2knob3, self.space.tiers, self._second.inputs["language"]
        of_tier = added((net.tier.weight @ net.of_tier.weight.T).T.detach().cpu().numpy()).T

        @lru_cache(maxsize=QUESTIONS * len(tiers))
        def known(text: str, tier: str) -> Row:
            return read(self.reader.language(text)) + of_tier[tiers.index(tier)]

        return known

    @cached_property
    def _of_compute(self) -> Ints:
        return self._places[1:] - len(self.space.tiers)

    @cached_property
    def _second(self) -> HostNetwork:
        return HostNetwork(self.knob2knob3)


@dataclass(frozen=True)
class ValuePolicy(LearnedPolicy):
    """The expected accuracy of every setting from the question alone, so that a door can ask it too.

    What it expects of two settings differs with the question, also by little, so there are no ties.
    """

    net: AccuracyNetwork
    reader: Reader
    scale = "accuracy"

    @cached_property
    def usual(self) -> Floats:
        """(K,) expected accuracies over the training questions."""
        return self.net.usual.double().numpy()

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - every budget expects the same
        """Return expected accuracies (K,)."""
        return self._expected(question.text)

    @cached_property
    def _expected(self) -> Callable[[str], Floats]:
        """Expect accuracies of a question; those of the last ones are kept: the door asks, then the guard."""

        @lru_cache(maxsize=QUESTIONS)
        def expected(text: str) -> Floats:
            seen = self._network.inputs["language"](self.reader.language(text))
            logits = self.joint(self._network(0.0, seen), self._every)
            accuracy: Floats = 1 / (1 + np.exp(-logits.astype(np.float64)))
            accuracy.setflags(write=False)
            return accuracy

        return expected

    @cached_property
    def _every(self) -> Ints:
        return np.arange(len(self.space))

    @cached_property
    def _network(self) -> HostNetwork:
        return HostNetwork(self.net)


@dataclass(frozen=True)
class SeenValuePolicy(ValuePolicy):
    """The expected accuracy of every setting from the question; at the chosen tier from the picture, too."""

    seen: SeenAccuracyNetwork
    sees_picture = True

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        """Return expected accuracies (K,), those of the picture's tier for all; from the question without one."""
        picture, place = seen_at(sight), self.space.tiers.index(sight.tier)
        if picture is None:
            return self.look(question, left_ms)
        network = self._at_tiers[place]
        known = network.inputs["vision"](picture) + self._words(question.text, place)
        logits = self.joint(network(left_ms, known), self._compute)
        return np.tile(1 / (1 + np.exp(-logits.astype(np.float64))), len(self.space.tiers))

    @cached_property
    def _words(self) -> Callable[[str, int], Row]:
        """Add a question to a tier's network; those of the last questions are kept."""

        @lru_cache(maxsize=QUESTIONS * len(self.space.tiers))
        def words(text: str, place: int) -> Row:
            return self._at_tiers[place].inputs["language"](self.reader.language(text))

        return words

    @cached_property
    def _compute(self) -> Ints:
        return np.arange(len(self.space) // len(self.space.tiers))

    @cached_property
    def _at_tiers(self) -> list[HostNetwork]:
        return [HostNetwork(net) for net in self.seen.at_tiers]


def seen_at(sight: Sight) -> Row | None:
    """Return the feature (V,) of an encoded picture; None without a picture, and where a choice is foreseen."""
    if sight.pooled is not None:
        return sight.pooled.numpy()
    return None if sight.vision is None else vision_feature(sight.vision)


@dataclass(frozen=True)
class LLMBasedPolicy(LearnedPolicy):
    """Exp 5: the model's first blocks read glance, question and budget, and score all three knobs at once."""

    controller: LLMBasedController
    model: FirstBlocks
    tokenizer: Encodes

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
        return self.joint(torch.cat([row[0].float() for row in logits]).cpu().numpy())

    @cached_property
    def _read(self) -> Callable[[str, str, Tensor | None], Reading]:
        """Reads glance and question; the last reading is kept, since it serves every budget."""
        device = self.controller.token.weight.device

        @lru_cache(maxsize=1)
        def read(text: str, style: str, glance: Tensor | None) -> Reading:
            tokens = self.model.glance_tokens(text, style, self.tokenizer).to(device).unsqueeze(0)
            lengths = torch.tensor([tokens.shape[1]], device=device)
            return self.controller.read(self.model, glance, tokens, lengths)

        return read


def policy_from_checkpoint(
    path: Path,
    space: KnobSpace,
    model: HasDecoder,
    tokenizer: Encodes,
    weights_hash: str | None = None,
    whole: KnobSpace | None = None,
) -> Policy:
    """Return the policy of a checkpoint of any kind.

    Args:
        path: the checkpoint.
        space: the settings to choose among.
        model: its token embeddings are the language feature.
        tokenizer: of the same model.
        weights_hash: hash of its weights; None skips the check that the controller was trained on them.
        whole: all its settings, which a controller may score too. Default: `space`.

    Raises:
        UserError: the file does not fit this model.
    """
    scored = space if whole in (None, space) or fingerprint(path).knob_space == space.fingerprint else whole
    assert scored is not None
    saved = load_controller(path, scored, weights_hash)
    width = int(model.decoder.embedding.shape[1])
    for name, net in saved.networks.items():
        check_sizes(path, name, net, {"language_width": width, "vision_width": vision_width(width)})
    return narrowed(policy_of(saved, scored, Reader(model, tokenizer), path), scored, space)


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
    if saved.kind == "value":
        return ValuePolicy(space, name, _of(saved, "accuracy", AccuracyNetwork, path), reader)
    if saved.kind == "seen_value":
        nets = _of(saved, "accuracy", AccuracyNetwork, path), reader, _of(saved, "seen", SeenAccuracyNetwork, path)
        return SeenValuePolicy(space, name, *nets)
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
    model = reader.model
    if not isinstance(model, FirstBlocks):
        raise UserError(
            f"{path}: an LLM-based controller reads with a model's first blocks, which this family of models does "
            "not offer; choose another policy"
        )
    width, blocks = model.config.width, model.config.num_blocks
    if controller.sizes["width"] != width or controller.num_blocks > blocks:
        raise UserError(
            f"{path}: trained to read with {controller.num_blocks} blocks of width {controller.sizes['width']}, "
            f"this model has {blocks} of width {width}; train a controller for this model"
        )
    return LLMBasedPolicy(
        space, name, controller.to(reader.model.decoder.embedding.device), model, reader.tokenizer
    )


def _of(saved: SavedController, part: str, cls: type[Kind], path: Path) -> Kind:
    net = saved.networks[part]
    if not isinstance(net, cls):
        raise UserError(f"{path}: its {part} is a {type(net).__name__}, the wrong kind of network")
    return net
