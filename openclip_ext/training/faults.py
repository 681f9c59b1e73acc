"""Steps that cannot be taken and samples that cannot be used: which they are, and when they end a run."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openclip_ext.data import tar
from openclip_ext.data.listing import ShardListing
from openclip_ext.data.table import Table
from openclip_ext.errors import UserError, counted
from openclip_ext.training.log import logger

SHOWN = 4  # samples of a rank in a line of the log

Skipped = Sequence[tuple[str, str, int]]


@dataclasses.dataclass
class Faults:
    """What has gone wrong so far, on all ranks.

    Attributes:
        source: of the training data.
        rank: of this process.
        world_size: number of processes.
        samples: of an epoch, on all ranks.
        max_skipped: steps in a row that may be left out before the run ends.
        max_bad: share of an epoch's samples that may be unusable; None: any.
        write: is given a row for each step that is left out, on the first rank; None: nothing is.
    """

    source: ShardListing | Table
    rank: int
    world_size: int
    samples: int
    max_skipped: int
    max_bad: float | None
    write: Callable[[dict[str, Any]], None] | None = None

    def are_finite(self, values: Sequence[Tensor], skipped: Skipped, told: Sequence[int]) -> tuple[bool, list[int]]:
        """Whether numbers of a step are finite on all ranks, and sums of `told`. A collective call.

        The one place of a step at which the host waits for the device.

        Args:
            values: () each, of this rank.
            skipped: (kind, shard, count) of what this rank could not use in this epoch.
            told: numbers of this rank, which it saves a call to add up here.

        Raises:
            UserError: on all ranks; the samples that none could use are more than `max_bad` allows.
        """
        bad = 0 if self.max_bad is None else _unusable(skipped)
        infinite = (~torch.stack([value.detach().isfinite() for value in values])).sum()
        numbers = torch.cat([infinite[None], torch.tensor([bad, *told]).to(infinite.device, non_blocking=True)])
        if self.world_size > 1:
            dist.all_reduce(numbers)
        infinite, bad, *sums = numbers.tolist()
        if self.max_bad is not None and bad > self.max_bad * self.samples:
            self._end_for_samples(bad, skipped)
        return infinite == 0, sums

    def _end_for_samples(self, bad: int, skipped: Skipped) -> None:
        totals: collections.Counter[tuple[str, str]] = collections.Counter()
        for rows in self._of_all(list(skipped)):
            for kind, url, count in rows:
                totals[kind, url] += count
        worst = [f"{count} x {kind} in {url}" for (kind, url), count in totals.most_common(5)]
        more = f", and {len(totals) - len(worst)} more" if len(totals) > len(worst) else ""
        raise UserError(
            f"--max-bad {self.max_bad}: {bad} of the {self.samples} samples of an epoch cannot be used "
            f"({', '.join(worst)}{more}); see openclip-ext shards check, repair them, or allow more"
        )

    def skip_step(
        self, step: int, epoch: int, in_row: int, values: dict[str, Tensor], batches: Sequence[dict], features: Sequence
    ) -> None:
        """Tell of a step that is not taken. A collective call.

        Args:
            step, epoch: when, from 0.
            in_row: how many steps in a row have not been taken.
            values: the loss's outputs and the norm of its gradient.
            batches: of this rank, with their `origins`.
            features: (B, D) each, of the samples in their order.

        Raises:
            UserError: on all ranks; these are `max_skipped`.
        """
        finite = torch.stack([value.reshape(len(value), -1).isfinite().all(1).cpu() for value in features]).all(0)
        samples = [sample for batch in batches for sample in self._samples(batch)]
        names = [name for name, value in values.items() if not value.isfinite().all()]
        own = {"rank": self.rank, "samples": samples, "not_finite": (~finite).nonzero().flatten().tolist()}
        ranks, names_of_all = zip(*self._of_all((own, names)), strict=True)
        what = sorted(set().union(*names_of_all))
        guilty = [rank for rank in ranks if rank["not_finite"]]
        where = "; ".join(map(_described, guilty or ranks))
        line = f"step {step} is not taken: {', '.join(what)} not finite; {where}"
        logger.warning(line)
        if self.write:
            self.write({"step": step, "epoch": epoch, "not_finite": what, "ranks": guilty or list(ranks)})
        if in_row >= self.max_skipped:
            raise UserError(
                f"--max-skipped {self.max_skipped}: the loss or its gradient was not finite for "
                f"{counted(in_row, 'step')} in a row; lower --lr, raise --warmup, or use --grad-clip-norm 1 or "
                f"--precision fp32 ({line})"
            )

    def _of_all(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. A collective call."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def _samples(self, batch: dict[str, Tensor]) -> Iterable[dict[str, Any]]:
        ids = batch["sample_ids"].tolist() if "sample_ids" in batch else [None] * len(batch["origins"])
        for (shard, ordinal), sample_id in zip(batch["origins"].tolist(), ids, strict=True):
            if isinstance(self.source, Table):
                yield {"id": ordinal, "shard": self.source.name, "ordinal": ordinal}
                continue
            url = self.source.urls[shard]
            if sample_id is None and self.source.sizes is not None:
                sample_id = self.source.ids_of(url)[0] + ordinal
            yield {"id": sample_id, "shard": url, "ordinal": ordinal}


def _unusable(skipped: Skipped) -> int:
    """How many samples; those beyond what `sizes.json` says are not missing."""
    return sum(count for kind, _, count in skipped if kind != tar.MORE_SAMPLES)


def _described(rank: dict[str, Any]) -> str:
    """A rank's samples whose features are not finite, or where all are, its batch; a few by name."""
    samples, numbers = rank["samples"], rank["not_finite"]
    chosen = [samples[number] for number in numbers] or samples
    names = [f"{s['shard'] if '://' in s['shard'] else os.path.relpath(s['shard'])} {s['ordinal']}"
             + ("" if s["id"] is None else f" (id {s['id']})") for s in chosen[:SHOWN]]  # fmt: skip
    more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
    which = f"features of {len(numbers)} of its {len(samples)} samples" if numbers else "its batch"
    return f"rank {rank['rank']}, {which}: {', '.join(names)}{more}"
