"""Simulated pairs whose loss has its optimum where no small batch points, and noise that leaves it there.

N   pairs        D   width of the clean features        K   kinds of features

A model has one weight per kind and tower: `v_i = (w_1 x_i1, …, w_K x_iK) / |w|` of unit parts x_ik, texts likewise with
weights u. So scores depend on the products `w_k u_k / (|w| |u|)`, the model's shares.

Half of the pairs come in twins, and half are one crowd. The first kind of features tells twins from all others, and is
the same for both, as it is for all of the crowd; the second tells twins apart, the third those of the crowd. What is
hard for an anchor is thus one other out of N - 1, or every second one. In the loss over all pairs each anchor counts by
the logarithm of what is hard for it. In a small batch twins hardly meet, and the crowd always does.
"""

import dataclasses
import functools
import math

import torch
from scipy.special import gammaln, ive
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..global_loss import global_loss

PAIRS = 128
WIDTHS = (16, 8, 8)  # of the kinds of features
LIKENESS = (0.9, 0.6, 0.6)  # cosine of the two sides of a pair, per kind
SCALE = 12.0  # inverse temperature
NUISANCE = 16  # dimensions of the noise


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Clean features and which kind each of their dimensions is of.

    Attributes:
        image, text: (N, D), each kind's part of unit norm.
        kind: (D,).
    """

    image: Tensor
    text: Tensor
    kind: Tensor

    def encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, (2, N, D), by weights (2, K)."""
        weights = normalize(weights, dim=1)[:, self.kind]
        return weights[0] * self.image, weights[1] * self.text


@functools.cache
def simulate(seed: int = 0) -> Pairs:
    """The pairs; always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def directions(count: int, width: int) -> Tensor:
        return normalize(torch.randn(count, width, generator=generator), dim=1)

    half = PAIRS // 2
    group = (torch.arange(PAIRS) // 2).clamp_max(half // 2)  # twins by twins, and the crowd last
    groups, in_twins = int(group.max()) + 1, torch.arange(PAIRS)[:, None] < half
    apart, twins, crowds = WIDTHS
    parts = [
        directions(groups, apart)[group],
        torch.where(in_twins, directions(PAIRS, twins), directions(groups, twins)[group]),
        torch.where(in_twins, directions(groups, crowds)[group], directions(PAIRS, crowds)),
    ]
    texts = [at_cosine(part, cosine, generator) for part, cosine in zip(parts, LIKENESS, strict=True)]
    kind = torch.arange(len(WIDTHS)).repeat_interleave(torch.tensor(WIDTHS))
    return Pairs(torch.cat(parts, dim=1), torch.cat(texts, dim=1), kind)


def at_cosine(directions: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """Random unit rows that have this cosine with the given ones, (…, D)."""
    other = torch.randn(directions.shape, generator=generator, dtype=directions.dtype)
    other -= (other * directions).sum(-1, keepdim=True) * directions
    return cosine * directions + math.sqrt(1 - cosine**2) * normalize(other, dim=-1)


def shares(weights: Tensor) -> Tensor:
    """What scores depend on, (…, K), of weights (…, 2, K)."""
    return normalize(weights, dim=-1).prod(-2)


@functools.cache
def optimum(decoupled: bool) -> Tensor:
    """Shares (K,) at the least noiseless loss over all pairs, in float64 by L-BFGS.

    The loss is `mean_i log sum_{j != i} r_ij`, r_ij = exp(s_ij - s_ii), directions averaged; `mean_i log(1 + sum r)`
    where the positive is in the denominator.
    """
    pairs = simulate()
    clean = Pairs(pairs.image.double(), pairs.text.double(), pairs.kind)
    weights = nn.Parameter(torch.ones(2, len(WIDTHS), dtype=torch.float64))
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = global_loss(*clean.encode(weights), SCALE, decoupled)
        value.backward()
        return value

    optimizer.step(loss)
    return shares(weights.detach())


@dataclasses.dataclass(frozen=True)
class Noise:
    """Nuisance that each side of a pair carries anew on every visit, and which leaves the loss over all pairs as it is.

    Both sides get a random unit direction, drawn anew, whose product times `concentration` is added to scores. For the
    two sides of different pairs it is independent, so their ratios are multiplied by noise whose mean is the same for
    all: C. The two sides of one pair have the cosine `log C / concentration`, so that the positive's score rises by
    log C, and the mean of the noise in `r_ij = exp(s_ij - s_ii)` is 1. A loss that is a sum over pairs is thus right on
    average; one that takes a logarithm of a batch's sum is not.

    Attributes:
        deviation: about the standard deviation of the noise of a score, in logits; 0: there is none.
    """

    deviation: float

    @property
    def concentration(self) -> float:
        return self.deviation * math.sqrt(NUISANCE)

    @property
    def cosine(self) -> float:
        """Of the two sides of a pair."""
        return _log_mean_exp(self.concentration, NUISANCE) / self.concentration if self.concentration else 0.0

    def add(
        self, image: Tensor, text: Tensor, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, float]:
        """Unit features with nuisance beside them, (n, D + 16), and the scale that keeps clean scores as they were."""
        if not self.deviation:
            return image, text, scale
        whole = scale + self.concentration
        of_image = normalize(torch.randn(len(image), NUISANCE, generator=generator), dim=1)
        of_text = at_cosine(of_image, self.cosine, generator)
        clean, noise = math.sqrt(scale / whole), math.sqrt(self.concentration / whole)
        return torch.cat([clean * image, noise * of_image], 1), torch.cat([clean * text, noise * of_text], 1), whole


def _log_mean_exp(concentration: float, width: int) -> float:
    """`log E exp(c <x, y>)` over uniform unit x in `width` dimensions, y fixed: the von Mises-Fisher normaliser."""
    order = width / 2 - 1
    bessel = math.log(ive(order, concentration)) + concentration
    return float(gammaln(width / 2)) + order * math.log(2 / concentration) + bessel
