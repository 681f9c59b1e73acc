"""Hard negatives for image-text matching, drawn from contrastive scores.

B   pairs on this rank        G   pairs of all ranks
"""

import dataclasses

import torch
from torch import Tensor

from openclip_ext.ops.counter_random import uniform
from openclip_ext.ops.gather import gather_rows, gather_sizes
from openclip_ext.ops.precision import promoted


@dataclasses.dataclass(frozen=True)
class Negatives:
    """A wrong text for each image and a wrong image for each text of this rank, among the pairs of all.

    Attributes:
        sizes: pairs on each rank.
        tokens: (G, L), token ids of all captions.
        text_of_image, image_of_text: (B,), places among the G pairs in rank order.
        exist: (B,), whether there is a wrong one at all: of pairs with one caption none is.
    """

    sizes: tuple[int, ...]
    tokens: Tensor
    text_of_image: Tensor
    image_of_text: Tensor
    exist: Tensor


@torch.no_grad()
def draw_negatives(
    image: Tensor, text: Tensor, logit_scale: Tensor, tokens: Tensor, seeds: Tensor, *, rank: int, world_size: int
) -> Negatives:
    """For image i text j with probability proportional to `exp(logit_scale <v_i, t_j>)`, and the other way round.

    Pairs with the same caption are no negatives of each other. Draws are by Gumbel noise that is a function of both
    pairs' seeds, so they do not depend on the order of pairs, nor on which rank has them.

    Args:
        image, text: (B, D) unit features.
        logit_scale: ().
        tokens: (B, L) token ids of the captions.
        seeds: (B,) int64, a number of each pair's own.
        rank, world_size: of this process, and how many there are.
    """
    sizes = gather_sizes(len(image), world_size, image.device)
    all_image, all_text, all_tokens, all_seeds = (gather_rows(x, sizes) for x in (image, text, tokens, seeds))
    same = (tokens[:, None] == all_tokens[None]).all(2)
    wrong = []
    for stream, (anchor, column) in enumerate(((image, all_text), (text, all_image))):
        scores = logit_scale * torch.matmul(*promoted(anchor, column.T))
        noise = -(-uniform(seeds[:, None], all_seeds[None], stream=3 + stream).log()).log()
        wrong.append((scores + noise).masked_fill(same, -torch.inf).argmax(1))
    text_of_image, image_of_text = wrong
    return Negatives(sizes, all_tokens, text_of_image, image_of_text, ~same.all(1))
