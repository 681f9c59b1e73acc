"""Functions that tests run on several ranks."""

import oracles
import torch
from openclip_ext import create_loss
from torch.nn.parallel import DistributedDataParallel

GLOBAL_BATCH, INPUT, WIDTH, NUM_SAMPLES = 8, 7, 5, 30


class TwoTowers(torch.nn.Module):
    """Returns what an OpenCLIP model returns."""

    def __init__(self, with_bias):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image = torch.nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator))
        self.text = torch.nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.6))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-2.0)) if with_bias else None

    def forward(self, image, text):
        image, text = (torch.nn.functional.normalize(x @ w, dim=-1) for x, w in ((image, self.image), (text, self.text)))
        return image, text, self.logit_scale.exp(), self.logit_bias


def visits():
    """Inputs and ids of the global batch for two steps: the same samples, in another order the second time."""
    generator = torch.Generator().manual_seed(5)
    for order in (torch.arange(GLOBAL_BATCH), torch.randperm(GLOBAL_BATCH, generator=generator)):
        image, text = torch.randn(2, GLOBAL_BATCH, INPUT, generator=generator)
        yield image[order], text[order], (torch.arange(GLOBAL_BATCH) * 3)[order]


def two_steps(rank, num_ranks, name, options, sizes=None):
    """Values, averaged gradients, and state after each of two steps at fixed parameters."""
    sizes = sizes or [GLOBAL_BATCH // num_ranks] * num_ranks
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    towers = TwoTowers(with_bias=name == "siglip")
    model = DistributedDataParallel(towers) if num_ranks > 1 else towers
    loss = create_loss(name, num_samples=NUM_SAMPLES, rank=rank, world_size=num_ranks, **options)
    results = []
    for step, (image, text, ids) in enumerate(visits()):
        loss.begin_step(step=step, total_steps=2)
        towers.zero_grad()
        image_features, text_features, logit_scale, logit_bias = model(image[own], text[own])
        extra = {} if logit_bias is None else {"logit_bias": logit_bias}
        outputs = loss(image_features, text_features, logit_scale, sample_ids=ids[own], **extra)
        outputs["contrastive_loss"].backward()
        loss.commit()
        gradients = {key: p.grad.clone() for key, p in towers.named_parameters()}
        state = {key: value.clone() for key, value in loss.state_dict().items()}
        values = {key: value.detach().clone() for key, value in outputs.items()}
        results.append((values, gradients, state))
    return results


def world_size(rank, num_ranks):
    return torch.distributed.get_world_size()


def gathered(rank, num_ranks, sizes):
    from openclip_ext.ops.gather import gather_rows, gather_sizes

    own = torch.full((sizes[rank], 2), float(rank))
    return gather_rows(own, gather_sizes(len(own), num_ranks, own.device))


def fails_on_rank_one(rank, num_ranks):
    if rank == 1:
        raise ValueError("rank one is unwell")


def unit_batch(seed):
    return oracles.unit(2, GLOBAL_BATCH, WIDTH, seed=seed, dtype=torch.float32)
