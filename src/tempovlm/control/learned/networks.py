"""The networks of the controllers: from question, picture and budget to logits of the knobs.

Logits are over the values of each knob, in the order of the knob space. The networks see neither which settings
are allowed nor how long a setting takes. They are small: at batch 1 on a CPU a network is a few dozen operations,
because its time comes off the budget.

Shapes: `B` batch, `L` width of the language feature, `V` width of the vision feature, `H` hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tempovlm.control.learned.encoding import LatencyBudgetEncoder

HIDDEN_DIM = 128

DROPOUT = 0.4
"""Dropout on features of questions and pictures, of which there are few; budgets are drawn anew and need none."""

CLIP = 5.0
"""Standardised features are clipped to this many standard deviations from the mean."""

_TIER_WIDTH = 8


class KnobLogits(NamedTuple):
    """Logits of each knob: (B, 3), (B, 5), (B, 5) in the space of a full-size model."""

    tier: Tensor
    top_k: Tensor
    num_blocks: Tensor


class Standardiser(nn.Module):
    """Standardises features (B, F) to mean 0 and spread 1 of the training data; the identity before `fit`.

    Saved with the network, so that serving standardises as training did.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Compute mean and spread of training features (N, F); constant columns become 0."""
        spread = values.float().std(dim=0, unbiased=False)
        self.mean.copy_(values.float().mean(dim=0))
        self.scale.copy_(torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), torch.zeros_like(spread)))

    def forward(self, values: Tensor) -> Tensor:
        """Return standardised features (B, F), clipped at `CLIP` standard deviations."""
        return ((values - self.mean) * self.scale).clamp(-CLIP, CLIP)


class Feature(nn.Module):
    """Maps a standardised feature (B, F), with dropout in training, to hidden units (B, H)."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.standard = Standardiser(width)
        self.dropout = nn.Dropout(DROPOUT)
        self.linear = nn.Linear(width, hidden_dim)

    def forward(self, values: Tensor) -> Tensor:
        """Return hidden units (B, H) from features (B, W)."""
        return self.linear(self.dropout(self.standard(values)))


def _trunk(hidden_dim: int, outputs: int) -> nn.Sequential:
    """Return the layers on top of the summed hidden units."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, outputs))


class SupervisedController(nn.Module):
    """Exp 2: from the budget alone to all three knobs."""

    def __init__(
        self,
        hidden_dim: int = HIDDEN_DIM,
        num_tiers: int = 3,
        num_top_ks: int = 5,
        num_block_counts: int = 5,
    ) -> None:
        super().__init__()
        self.sizes = {
            "hidden_dim": hidden_dim,
            "num_tiers": num_tiers,
            "num_top_ks": num_top_ks,
            "num_block_counts": num_block_counts,
        }
        self.budget = LatencyBudgetEncoder(hidden_dim)
        self.trunk = _trunk(hidden_dim, num_tiers + num_top_ks + num_block_counts)
        self.heads = (num_tiers, num_top_ks, num_block_counts)

    def forward(self, budget_ms: Tensor) -> KnobLogits:
        """Return the logits of tier, top-k and number of blocks from budgets (B,)."""
        return KnobLogits(*self.trunk(self.budget(budget_ms)).split(self.heads, dim=-1))


class Knob1PredictorBudget(nn.Module):
    """Exp 3's first variant: from the budget alone to the tier."""

    def __init__(self, hidden_dim: int = HIDDEN_DIM, num_tiers: int = 3) -> None:
        super().__init__()
        self.sizes = {"hidden_dim": hidden_dim, "num_tiers": num_tiers}
        self.budget = LatencyBudgetEncoder(hidden_dim)
        self.trunk = _trunk(hidden_dim, num_tiers)

    def forward(self, budget_ms: Tensor) -> Tensor:
        """Return logits (B, 3) from budgets (B,)."""
        return self.trunk(self.budget(budget_ms))


class Knob1PredictorBudgetLanguage(nn.Module):
    """Exp 3's default variant: from question and budget to the tier."""

    def __init__(self, language_width: int, hidden_dim: int = HIDDEN_DIM, num_tiers: int = 3) -> None:
        super().__init__()
        self.sizes = {"language_width": language_width, "hidden_dim": hidden_dim, "num_tiers": num_tiers}
        self.budget = LatencyBudgetEncoder(hidden_dim)
        self.language = Feature(language_width, hidden_dim)
        self.trunk = _trunk(hidden_dim, num_tiers)

    def fit_inputs(self, language: Tensor) -> None:
        """Standardise by training features (N, L)."""
        self.language.standard.fit(language)

    def forward(self, language: Tensor, budget_ms: Tensor) -> Tensor:
        """Return logits (B, 3) from questions (B, L) and budgets (B,)."""
        return self.trunk(self.language(language) + self.budget(budget_ms))


class Knob1PredictorBudgetLanguageGlance(nn.Module):
    """Exp 3's third variant: from the pooled tokens of the global crop, question and budget to the tier."""

    def __init__(
        self, language_width: int, vision_width: int, hidden_dim: int = HIDDEN_DIM, num_tiers: int = 3
    ) -> None:
        super().__init__()
        self.sizes = {
            "language_width": language_width,
            "vision_width": vision_width,
            "hidden_dim": hidden_dim,
            "num_tiers": num_tiers,
        }
        self.budget = LatencyBudgetEncoder(hidden_dim)
        self.language = Feature(language_width, hidden_dim)
        self.glance = Feature(vision_width, hidden_dim)
        self.trunk = _trunk(hidden_dim, num_tiers)

    def fit_inputs(self, language: Tensor, glance: Tensor) -> None:
        """Standardise by training features (N, L) and (N, V)."""
        self.language.standard.fit(language)
        self.glance.standard.fit(glance)

    def forward(self, language: Tensor, budget_ms: Tensor, glance: Tensor) -> Tensor:
        """Return logits (B, 3) from questions (B, L), budgets (B,) and glances (B, V)."""
        return self.trunk(self.language(language) + self.glance(glance) + self.budget(budget_ms))


Knob1Predictor = Knob1PredictorBudget | Knob1PredictorBudgetLanguage | Knob1PredictorBudgetLanguageGlance


def tier_logits(net: Knob1Predictor, language: Tensor, budget_ms: Tensor, glance: Tensor | None) -> Tensor:
    """Return logits (B, 3) of any variant, which gets the inputs that it reads.

    Raises:
        ValueError: the variant needs a glance and got none.
    """
    if isinstance(net, Knob1PredictorBudget):
        return net(budget_ms)
    if isinstance(net, Knob1PredictorBudgetLanguage):
        return net(language, budget_ms)
    if glance is None:
        raise ValueError(f"{type(net).__name__} needs a glance at the picture")
    return net(language, budget_ms, glance)


class Knob2Knob3Predictor(nn.Module):
    """Exp 4: from picture, question and the rest of the budget to top-k and number of blocks."""

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        hidden_dim: int = HIDDEN_DIM,
        num_top_ks: int = 5,
        num_block_counts: int = 5,
        num_tiers: int = 3,
    ) -> None:
        super().__init__()
        self.sizes = {
            "vision_width": vision_width,
            "language_width": language_width,
            "hidden_dim": hidden_dim,
            "num_top_ks": num_top_ks,
            "num_block_counts": num_block_counts,
            "num_tiers": num_tiers,
        }
        self.budget = LatencyBudgetEncoder(hidden_dim)
        self.language = Feature(language_width, hidden_dim)
        self.vision = Feature(vision_width, hidden_dim)
        self.tier = nn.Embedding(num_tiers, _TIER_WIDTH)
        self.of_tier = nn.Linear(_TIER_WIDTH, hidden_dim, bias=False)
        self.trunk = _trunk(hidden_dim, num_top_ks + num_block_counts)
        self.heads = (num_top_ks, num_block_counts)

    def fit_inputs(self, vision: Tensor, language: Tensor) -> None:
        """Standardise by training features (N, V) and (N, L)."""
        self.vision.standard.fit(vision)
        self.language.standard.fit(language)

    def forward(self, vision: Tensor, language: Tensor, budget_ms: Tensor, tier: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 5), (B, 5) from pictures (B, V), questions (B, L), time left (B,) and tiers (B,)."""
        x = self.vision(vision) + self.language(language) + self.budget(budget_ms) + self.of_tier(self.tier(tier))
        top_k, num_blocks = self.trunk(x).split(self.heads, dim=-1)
        return top_k, num_blocks


class AccuracyNetwork(nn.Module):
    """From the question to the expected accuracy of every setting."""

    usual: Tensor

    def __init__(self, language_width: int, hidden_dim: int = HIDDEN_DIM, num_settings: int = 75) -> None:
        super().__init__()
        self.sizes = {"language_width": language_width, "hidden_dim": hidden_dim, "num_settings": num_settings}
        self.language = Feature(language_width, hidden_dim)
        self.trunk = _trunk(hidden_dim, num_settings)
        self.register_buffer("usual", torch.zeros(num_settings))

    @torch.no_grad()
    def fit_inputs(self, language: Tensor, accuracy: Tensor) -> None:
        """Standardise by features (N, L), and begin with the mean accuracies of all settings (M, K)."""
        self.language.standard.fit(language)
        _begin_with(self.last, accuracy)

    @torch.no_grad()
    def fit_usual(self, language: Tensor) -> None:
        """Remember the mean of what it expects of questions (N, L)."""
        self.usual.copy_(self(language).sigmoid().mean(dim=0))

    def hidden(self, language: Tensor) -> Tensor:
        """Return the last hidden units (B, H) from questions (B, L)."""
        return self.trunk[:-1](self.language(language))

    def forward(self, language: Tensor) -> Tensor:
        """Return logits (B, K) of the accuracies from questions (B, L)."""
        return self.last(self.hidden(language))

    @classmethod
    def ensemble(cls, nets: Sequence[AccuracyNetwork]) -> AccuracyNetwork:
        """Return one network whose logits are the mean of some networks', which standardise alike.

        `fit_usual` is to be called.
        """
        found = cls(**_together(nets))
        _join(found, nets)
        return found.eval().requires_grad_(False)

    def shrink(self, share: float, accuracy: Tensor) -> None:
        """Make the logits `share` of what they are, and for the rest those of mean accuracies (K,)."""
        _shrink(self.last, share, accuracy)

    @property
    def last(self) -> nn.Linear:
        """The layer that makes logits of hidden units."""
        return _layer(self.trunk, -1)


class SeenAccuracyNetwork(nn.Module):
    """From the question and its encoded picture to the expected accuracy of every setting of the picture's tier.

    A tier has a network of its own: what a picture says at one it may not say at another.
    """

    def __init__(
        self,
        language_width: int,
        vision_width: int,
        hidden_dim: int = HIDDEN_DIM,
        num_tiers: int = 3,
        num_top_ks: int = 5,
        num_block_counts: int = 5,
    ) -> None:
        super().__init__()
        self.sizes = {
            "language_width": language_width,
            "vision_width": vision_width,
            "hidden_dim": hidden_dim,
            "num_tiers": num_tiers,
            "num_top_ks": num_top_ks,
            "num_block_counts": num_block_counts,
        }
        widths = (language_width, vision_width, hidden_dim, num_top_ks * num_block_counts)
        self.tiers = nn.ModuleList(_AtTier(*widths) for _ in range(num_tiers))

    @torch.no_grad()
    def fit_inputs(self, language: Tensor, vision: Tensor, accuracy: Tensor) -> None:
        """Standardise by features (N, L) and (N, T, V), and begin with the mean accuracies (M, K)."""
        parts = zip(self.at_tiers, vision.unbind(1), accuracy.chunk(len(self.tiers), dim=1), strict=True)
        for net, seen, own in parts:
            net.language.standard.fit(language)
            net.vision.standard.fit(seen)
            _begin_with(_layer(net.trunk, -1), own)

    def forward(self, language: Tensor, vision: Tensor) -> Tensor:
        """Return logits (B, K) of the accuracies from questions (B, L) and pictures at each tier (B, T, V)."""
        seen = zip(self.at_tiers, vision.unbind(1), strict=True)
        return torch.cat([net(language, one) for net, one in seen], dim=1)

    @classmethod
    def ensemble(cls, nets: Sequence[SeenAccuracyNetwork]) -> SeenAccuracyNetwork:
        """Return one network whose logits are the mean of some networks', which standardise alike."""
        found = cls(**_together(nets))
        for place, own in enumerate(found.at_tiers):
            _join(own, [net.at_tiers[place] for net in nets])
        return found.eval().requires_grad_(False)

    def shrink(self, share: float, accuracy: Tensor) -> None:
        """Make the logits `share` of what they are, and for the rest those of mean accuracies (K,)."""
        for net, own in zip(self.at_tiers, accuracy.chunk(len(self.tiers)), strict=True):
            _shrink(_layer(net.trunk, -1), share, own)

    @property
    def at_tiers(self) -> list[_AtTier]:
        """The network of each tier."""
        return [net for net in self.tiers if isinstance(net, _AtTier)]


class _AtTier(nn.Module):
    """From question and picture at one tier to the expected accuracies of its settings."""

    def __init__(self, language_width: int, vision_width: int, hidden_dim: int, outputs: int) -> None:
        super().__init__()
        self.language = Feature(language_width, hidden_dim)
        self.vision = Feature(vision_width, hidden_dim)
        self.trunk = _trunk(hidden_dim, outputs)

    def forward(self, language: Tensor, vision: Tensor) -> Tensor:
        """Return logits (B, A) from questions (B, L) and pictures (B, V)."""
        return self.trunk(self.language(language) + self.vision(vision))


def _together(nets: Sequence[AccuracyNetwork] | Sequence[SeenAccuracyNetwork]) -> dict[str, int]:
    """Return the sizes of a network that holds some of equal inputs and outputs."""
    return nets[0].sizes | {"hidden_dim": sum(net.sizes["hidden_dim"] for net in nets)}


@torch.no_grad()
def _join(found: nn.Module, nets: Sequence[nn.Module]) -> None:
    """Give a network the mean logits of some: their hidden units side by side, and none sees another network's."""
    for name, feature in found.named_children():
        own = [net.get_submodule(name) for net in nets]
        if isinstance(feature, Feature):
            looks = [one for one in own if isinstance(one, Feature)]
            feature.standard.load_state_dict(looks[0].standard.state_dict())
            feature.linear.weight.copy_(torch.cat([one.linear.weight for one in looks]))
            feature.linear.bias.copy_(torch.cat([one.linear.bias for one in looks]))
    (middle, last), trunks = _linears(found), [_linears(net) for net in nets]
    middle.weight.copy_(torch.block_diag(*(one.weight for one, _ in trunks)))
    middle.bias.copy_(torch.cat([one.bias for one, _ in trunks]))
    last.weight.copy_(torch.cat([one.weight for _, one in trunks], dim=1) / len(nets))
    last.bias.copy_(torch.stack([one.bias for _, one in trunks]).mean(dim=0))


def _linears(net: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The layer between both rows of a network's hidden units, and the one that makes logits."""
    trunk = net.get_submodule("trunk")
    return _layer(trunk, 1), _layer(trunk, -1)


def _layer(trunk: nn.Module, place: int) -> nn.Linear:
    assert isinstance(trunk, nn.Sequential)
    layer = trunk[place]
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def _begin_with(last: nn.Linear, accuracy: Tensor) -> None:
    """Have a last layer say the mean accuracies (M, A) before training."""
    last.weight.mul_(0.1)
    last.bias.copy_(_logit(accuracy.mean(dim=0)))


@torch.no_grad()
def _shrink(last: nn.Linear, share: float, accuracy: Tensor) -> None:
    last.weight.mul_(share)
    last.bias.mul_(share).add_(_logit(accuracy), alpha=1 - share)


def _logit(accuracy: Tensor) -> Tensor:
    return torch.logit(accuracy, eps=1e-3)


class TwoStageController(nn.Module):
    """Both stages: the tier before the picture is encoded, top-k and depth after it."""

    def __init__(self, knob1: Knob1Predictor, knob2knob3: Knob2Knob3Predictor) -> None:
        super().__init__()
        self.knob1, self.knob2knob3 = knob1, knob2knob3
