"""Steps of losses, forward and backward, for `bench_loss.py`: what they take."""

from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from openclip_ext import create_loss

from .methods import parse_method
from .peak import extra_bytes
from .peers import PEERS
from .turns import medians, seconds_of

STOCK = "open_clip.ClipLoss"
SCALE = 20.0
FILLED = 256  # pairs of the batches in which samples are seen before
VIEWS = ("geometric_consistency", "geometric_consistency_naive")


def naive(image: Tensor, text: Tensor, image_aug: Tensor, text_aug: Tensor) -> Tensor:
    cross, images, texts = image @ text.T, image @ image.T, text @ text.T
    total = (cross - cross.T).square().sum() + (images - texts).square().sum()
    total = total + (images - image_aug @ image_aug.T).square().sum() + (texts - text_aug @ text_aug.T).square().sum()
    gaps = (image * text).sum(1) - (image_aug * text_aug).sum(1)
    return total / len(image) + gaps.square().mean()


def stepper(name: str, batch: int, width: int, device: str) -> Callable[[], None]:
    """A function that takes one step of a loss, forward and backward."""
    torch.manual_seed(0)
    views = 4 if name in VIEWS else 2
    leaves = [normalize(torch.randn(batch, width, device=device), dim=-1).requires_grad_() for _ in range(views)]
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    if name == STOCK:
        value: Callable[[], Tensor] = lambda: loss(*leaves, scale)  # noqa: E731
        loss: Callable = ClipLoss()
    elif name in PEERS:
        loss = PEERS[name]()
        value = lambda: loss(*leaves, scale)  # noqa: E731
    elif name in VIEWS:
        value = with_views(name, leaves)
    else:
        value = registered(name, leaves, scale)

    def step() -> None:
        value().backward()
        for leaf in (*leaves, scale):
            leaf.grad = None

    return step


def with_views(name: str, leaves: list[Tensor]) -> Callable[[], Tensor]:
    if name.endswith("naive"):
        return lambda: naive(*leaves)
    term = create_loss("clip", num_samples=2, terms={"geometric_consistency": {}}).terms["geometric_consistency"]
    image, text, image_aug, text_aug = leaves
    again = {"image_features_aug": image_aug, "text_features_aug": text_aug}
    return lambda: term(image, text, torch.tensor(SCALE), **again, output_dict=False)


def registered(name: str, leaves: list[Tensor], scale: Tensor) -> Callable[[], Tensor]:
    """A loss that has seen all samples of the batch, each among others, half of which are not in the batch."""
    (batch, width), device = leaves[0].shape, leaves[0].device
    base, given_options = parse_method(name)
    options: dict[str, Any] = {**given_options}
    loss = create_loss(base, num_samples=2 * batch, embed_dim=width, device=device, **options)
    given = {"logit_bias": torch.tensor(-SCALE / 2, device=device)} if base == "siglip" else {}
    loss.begin_step(step=0, total_steps=1)
    ids = torch.arange(batch, device=device)
    for own in ids.split(FILLED // 2):
        with torch.no_grad():
            features = [leaf[own].repeat(2, 1) for leaf in leaves]
            loss(*features, scale.detach(), sample_ids=torch.cat([own, own + batch]), **given)
        loss.commit()
    return lambda: loss(*leaves, scale, sample_ids=ids, output_dict=False, **given)


def measure(name: str, batch: int, width: int, device: str, repeats: int, alone: bool) -> dict:
    """Bytes of one step and median seconds of several, and of ClipLoss's in turns, in this process.

    Without repeats: seconds of the step that memory was measured by.
    """
    stepper(name, 64, width, device)()  # libraries allocate on first use
    step, cuda = stepper(name, batch, width, device), device.startswith("cuda")
    found: dict[str, float] = {}
    found["seconds"] = seconds_of(lambda: found.update(bytes=extra_bytes(step, cuda)), cuda)
    steps = {"seconds": step} | ({} if alone else {"stock_seconds": stepper(STOCK, batch, width, device)})
    return found | (medians(steps, repeats, cuda) if repeats else {})
