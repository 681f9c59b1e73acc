"""Functions that tests run on several ranks."""

import torch


def world_size(rank, num_ranks):
    return torch.distributed.get_world_size()


def gathered(rank, num_ranks, sizes):
    from openclip_ext.ops.gather import gather_rows, gather_sizes

    own = torch.full((sizes[rank], 2), float(rank))
    return gather_rows(own, gather_sizes(len(own), num_ranks, own.device))


def fails_on_rank_one(rank, num_ranks):
    if rank == 1:
        raise ValueError("rank one is unwell")
    torch.distributed.barrier()
