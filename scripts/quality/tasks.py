"""What is learned: pairs to train on, to choose a learning rate on, and to score once; and two small towers."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics

Files = Sequence[str]  #: What a task is read from; empty: from nothing.

EMBED = 64  # width of embeddings of a simulated stream
HIDDEN = 256  # of layers, and of embeddings of photographs and captions
HELD_OUT = 4000  # pairs each to choose a learning rate on and to score, of a simulated stream
FLICKR_VALIDATION = 1000  # photographs, the last of the training file


@dataclasses.dataclass(frozen=True)
class Pairs:
    """n images, and texts by image and caption."""

    image: Tensor  # (n, width)
    text: Tensor  # (n, captions, …)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a task is trained, whatever the method; part of what a run is known by.

    Attributes:
        pairs: to train on; of a simulated stream, how many are drawn.
        epochs: times that each is seen.
        scale: the logit scale where it is fixed.
        decay: the weight decay.
        centres: seed of a simulated stream.
    """

    pairs: int
    epochs: int
    scale: float
    decay: float
    centres: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """Pairs by split, and which recalls are averaged into the score."""

    splits: dict[str, Pairs]
    recalls: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return EMBED if self.vocabulary is None else HIDDEN

    def towers(self) -> tuple[nn.Module, nn.Module]:
        """New towers of images and texts, initialised from torch's generator."""
        train, widths = self.splits["train"], (HIDDEN, HIDDEN)
        if self.vocabulary is not None:
            bag = nn.EmbeddingBag(self.vocabulary, HIDDEN, mode="mean", padding_idx=0)
            return perceptron(train.image.shape[1], *widths), nn.Sequential(bag, nn.GELU(), nn.Linear(*widths))
        return (
            perceptron(train.image.shape[1], *widths, EMBED),
            perceptron(train.text.shape[2], *widths, EMBED),
        )

    @torch.no_grad()
    def score(self, model: "TwoTowers", split: str) -> float:
        """Mean recall in percent, both ways, on the first captions of a split; 0 for a model that has diverged."""
        pairs = self.splits[split]
        found = model(pairs.image, pairs.text[:, 0])
        image, text = found["image_features"], found["text_features"]
        if not (image.isfinite().all() and text.isfinite().all()):
            return 0.0
        metrics = retrieval_metrics(image, text)
        names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in self.recalls]
        return 100 * sum(metrics[name] for name in names) / len(names)


class TwoTowers(nn.Module):
    """Unit embeddings of images and texts, a logit scale, and SigLIP's bias.

    Args:
        image, text: the towers.
        scale: the logit scale, or where it starts.
        learned: whether it is learned.
    """

    def __init__(self, image: nn.Module, text: nn.Module, scale: float, learned: bool) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(scale).log(), requires_grad=learned)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": normalize(self.image(image), dim=-1),
            "text_features": normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))[:-1]


@functools.cache
def stream(setting: Setting) -> Task:
    """Pairs of noisy views of a latent that lies in one of 64 coarse clusters, in one of its 32 fine ones.

    Latent `u = c_a + c_ab / 2 + 0.35 e`, of width 32, centres N(0, I); image `tanh(u A) + 0.25 e'`, text
    `tanh(u B) + 0.25 e''`, of width 64, entries of A and B N(0, 1/9). All noise is normal. What tells fine clusters
    apart is rare among few negatives.
    """
    generator = torch.Generator().manual_seed(setting.centres)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    coarse, fine, maps = normal(64, 32), normal(64, 32, 32), normal(2, 32, 64) / 3

    def draw(count: int) -> Pairs:
        a = torch.randint(64, (count,), generator=generator)
        b = torch.randint(32, (count,), generator=generator)
        latent = coarse[a] + fine[a, b] / 2 + 0.35 * normal(count, 32)
        image, text = ((latent @ matrix).tanh() + 0.25 * normal(count, 64) for matrix in maps)
        return Pairs(image, text[:, None])

    return Task({"train": draw(setting.pairs), "val": draw(HELD_OUT), "test": draw(HELD_OUT)}, recalls=(1,))


@functools.cache
def features(train_path: str, test_path: str) -> Task:
    """Precomputed image features, and captions as bags of words.

    Both files hold `x` (n, D), features, and `tokens` (n, captions, length), token ids, 0 for padding. The last 1,000
    images of the first file are the validation split.
    """
    train, test = np.load(train_path), np.load(test_path)
    known, dense = np.unique(np.concatenate([train["tokens"].ravel(), test["tokens"].ravel()]), return_inverse=True)
    if known[0] != 0:
        raise ValueError(f"{train_path}: tokens are padded by {known[0]}; padding must be token 0")
    parts = np.split(dense.ravel(), [train["tokens"].size])
    (x, tokens), held = (
        (torch.from_numpy(file["x"].astype(np.float32)), torch.from_numpy(part).view(*file["tokens"].shape))
        for file, part in zip((train, test), parts, strict=True)
    )
    cut = len(x) - FLICKR_VALIDATION
    splits = {"train": Pairs(x[:cut], tokens[:cut]), "val": Pairs(x[cut:], tokens[cut:]), "test": Pairs(*held)}
    return Task(splits, recalls=(1, 5, 10), vocabulary=len(known))
