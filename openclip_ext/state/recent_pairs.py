"""The pairs of recent steps, and how far the model has moved since.

    K   steps that are kept     R   pairs of one step, on all ranks     D   width of the embeddings

A stored pair is where the model was. Used after the model has moved too far, it pushes the batch away from where
features were, which makes the model move faster. So freshness is measured: the pairs of one step are encoded again 1,
2, 4, … steps later, and only ages at which scores with them are still right may join the batch.

Nor do they join where the batch needs none, since it holds enough of the negatives that count. Such a batch pushes what
it pulls: if a kind of pair is there too often by chance, it is pulled together and pushed apart too often, and most of
that noise cancels. Stored pairs would take over the push, and leave the noise.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openclip_ext.ops.gather import gather_rows, sum_over_ranks
from openclip_ext.ops.pair_sums import counting_negatives
from openclip_ext.ops.pairs import PairBatch, StoredPairs
from openclip_ext.state.table import require_room

#: Buffers that hold something of every pair of a step.
_ROWS = ("image", "text", "ids", "log_sum", "count", "positive")


class RecentPairs(nn.Module):
    """The pairs of the last K steps, the same on all ranks, and how many of those steps may join the batch.

    `stage` remembers, `commit` writes, once per optimizer step. The first step is the first whose size is known: then
    the memory is taken, 4 K R (2 D + 6) bytes. A step of another size starts it anew.

    Args:
        num_steps: K.
        check_every: optimizer steps between two checks of freshness, once there were as many.
        limit: largest error of scores, as `check` measures it, with which an age may join.
        enough: how many negatives that count a batch holds (`ops.pair_sums.counting_negatives`) when it needs no more.
        device: where the module is.
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    log_sum: Tensor
    count: Tensor
    positive: Tensor
    clock: Tensor
    error: Tensor
    negatives: Tensor

    def __init__(
        self, num_steps: int, check_every: int, limit: float, device: torch.device, enough: float = math.inf
    ) -> None:
        super().__init__()
        self.num_steps, self.check_every, self.limit, self.enough = num_steps, check_every, limit, enough
        self.ages = [2**power for power in range(num_steps.bit_length()) if 2**power < num_steps] + [num_steps]
        self._allocate((0, 0), torch.float32, device)
        # Of the host, which decides by it, and in `clock` of the state: steps committed, steps held, step at which the
        # check under way began (-1: none), ages it has passed, and the age up to which stored steps may join.
        self.steps, self.held, self.began, self.passed, self.usable = 0, 0, -1, 0, 0
        self.errors: dict[int, float] = {}  # by age
        self.register_buffer("clock", torch.zeros(5, dtype=torch.int64, device=device))
        self.counting = math.nan  # negatives that count, in a batch
        self.register_buffer("error", torch.full((len(self.ages),), math.nan, device=device))
        self.register_buffer("negatives", torch.tensor(math.nan, device=device))
        self._staged: dict[str, Tensor] | None = None
        self._found: tuple[int, Tensor, Tensor] | None = None

    @property
    def probe(self) -> str | None:
        """What is asked of the loop in this step: to `keep` its inputs, to `encode` or to `forget` those it kept."""
        age = self.steps - self.began
        # While the learning rate warms up, what was fresh is soon not: at first the time between checks doubles.
        if self.began < 0 or age >= max(min(self.check_every, self.began), self.num_steps + 1):
            return "keep"
        if self.passed < 0 or age > self.num_steps:
            return "forget"
        return "encode" if age in self.ages else None

    def joining(self) -> StoredPairs | None:
        """The pairs that may join the batch now; None: there are none."""
        return self._youngest(self.joined) if self.joined else None

    @property
    def joined(self) -> int:
        """How many steps may join the batch now."""
        return 0 if self.counting >= self.enough else min(self.usable, self.held)

    def _youngest(self, count: int) -> StoredPairs:
        steps = [(self.steps - age) % self.num_steps for age in range(1, count + 1)]
        rows = {name: torch.cat([getattr(self, name)[step] for step in steps], dim=-1 if name == "log_sum" else 0)
                for name in _ROWS}  # fmt: skip
        return StoredPairs(**rows)

    def visit(self, pairs: PairBatch, log_mean: Tensor, image_again: Tensor | None, text_again: Tensor | None) -> None:
        """Stage the global batch, and check freshness where the loop has encoded again what it kept."""
        self.stage(pairs, log_mean)
        if self.ids.shape[1] != len(pairs.all_ids):  # the memory begins anew with this step
            return
        if self.probe == "encode" and image_again is not None and text_again is not None:
            self.check(pairs, image_again, text_again)

    @torch.no_grad()
    def stage(self, pairs: PairBatch, log_mean: Tensor) -> None:
        """Remember the global batch for `commit`, with `log mean_j r_ij` of own anchors, (2, B).

        Replaces what was staged before. A collective call over several ranks.
        """
        own = torch.cat([log_mean + pairs.positive + pairs.log_count, pairs.count[None], pairs.positive[None]])
        gathered = pairs.gathered(own)
        self._staged = {
            "image": pairs.all_image,
            "text": pairs.all_text,
            "ids": pairs.all_ids,
            "log_sum": gathered[:2],
            "count": gathered[2],
            "positive": gathered[3],
        }

    @torch.no_grad()
    def check(self, pairs: PairBatch, image_again: Tensor, text_again: Tensor) -> None:
        """Measure the error of the age at hand, and what the batch needs; `commit` draws the conclusion.

        A collective call over several ranks.

        The error is the root mean square, over anchors of the batch and columns of the kept step, of their score with
        the stored column minus that with the column encoded now, divided by the scores' spread, the root mean square of
        their deviation from their mean over columns: stored columns are of use if they tell the columns apart. The
        larger one of both directions counts.

        Args:
            pairs: the global batch.
            image_again: (B', D), this rank's images of the kept step, encoded now.
            text_again: (B', D), its texts.
        """
        step = self.began % self.num_steps
        totals = []
        for anchors, column, again in ((pairs.image, self.text, text_again), (pairs.text, self.image, image_again)):
            now = gather_rows(again, pairs.sizes).to(column.dtype)
            for difference in (column[step] - now, now - now.mean(0)):
                # The sum of squares of all scores, without the scores: |A C^T|^2 = <A^T A, C^T C>.
                totals.append(((anchors.T @ anchors) * (difference.T @ difference)).sum())
        totals.append(counting_negatives(pairs, self._youngest(self.held)).sum())
        *squares, counting = sum_over_ranks(torch.stack(totals), len(pairs.sizes))
        error, spread = torch.stack(squares).clamp_min(0).sqrt().view(2, 2).unbind(1)
        error = (error / spread).nan_to_num(math.inf).max()
        self._found = self.steps - self.began, error, counting / (2 * len(pairs.all_ids))

    @torch.no_grad()
    def commit(self) -> None:
        """Write the pairs of this step, and what a check of this step has found."""
        if self._staged is None:
            return
        rows, self._staged = self._staged, None
        asked, features = self.probe, rows["image"]
        if self.image.shape[1:] != features.shape:
            self._allocate(features.shape, features.dtype, features.device)
            self.held, self.usable, self._found = 0, 0, None
            if asked != "keep":  # of what is under way nothing is held any more, and this step's inputs are not kept
                self.began, asked = -1, None
        for name, value in rows.items():
            getattr(self, name)[self.steps % self.num_steps].copy_(value)
        self._conclude(asked)
        self.steps, self.held = self.steps + 1, min(self.held + 1, self.num_steps)
        self._write_clock()

    def _conclude(self, asked: str | None) -> None:
        """Go on with the check that is under way, or begin one with the step just written."""
        if asked == "keep":
            self.began, self.passed = self.steps, 0
        elif asked == "encode":
            if self._found is None:  # the loop has not kept what it was asked to, or no longer: begin again
                self.began = -1
                return
            (age, error, self.negatives), self._found = self._found, None
            self.counting = float(self.negatives)
            self.errors[age] = float(error)
            self.error[self.ages.index(age)] = error
            if self.errors[age] <= self.limit:
                self.passed = age
                if age == self.num_steps:
                    self.usable = age
            else:
                # Ages before it that are not measured count as the last one that passed.
                self.usable, self.passed = age - 1, -1

    def _write_clock(self) -> None:
        self.clock.copy_(torch.tensor([self.steps, self.held, self.began, self.passed, self.usable]))

    def report(self) -> dict[str, Tensor]:
        """How many steps join, and the error of each age when it was last measured."""
        used = {"recent_batches_used": torch.tensor(float(self.joined))}
        if not math.isnan(self.counting):
            used["counting_negatives"] = torch.tensor(self.counting)
        return used | {f"recent_error_{age}": torch.tensor(error) for age, error in self.errors.items()}

    def describe(self) -> str:
        """How many steps join now, and why no more."""
        joining = f"recent pairs: those of {self.joined} of {self.num_steps} steps join now"
        if not self.errors:
            return f"{joining}; freshness is not measured yet"
        errors = ", ".join(f"{self.errors[age]:.2g}" for age in sorted(self.errors))
        ages = ", ".join(str(age) for age in sorted(self.errors))
        return (
            f"{joining}; scores err by {errors} of their spread after {ages} steps (--recent-limit "
            f"{self.limit:g}); a batch holds "
            f"{self.counting:.2g} of the negatives that count ({self.enough:g} are enough)"
        )

    def _allocate(self, shape_of_step: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        steps, (size, width) = self.num_steps, shape_of_step
        if size:
            number = dtype.itemsize
            needed = steps * size * (2 * width * number + 4 * number + 8)
            require_room(needed, device, f"memory of {steps} recent steps of {size} pairs")
        for name, shape in {
            "image": (steps, size, width),
            "text": (steps, size, width),
            "ids": (steps, size),
            "log_sum": (steps, 2, size),
            "count": (steps, size),
            "positive": (steps, size),
        }.items():
            kind = torch.int64 if name == "ids" else dtype
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Take over a memory of any size; of more steps than are kept here, the latest."""
        saved = {name: state_dict[prefix + name] for name in (*_ROWS, "clock") if prefix + name in state_dict}
        if "clock" in saved:
            steps, held, began, passed, usable = saved["clock"].tolist()
            kept = min(held, self.num_steps)
            self._allocate(saved["image"].shape[1:], saved["image"].dtype, self.clock.device)
            for step in range(steps - kept, steps):
                for name in _ROWS:
                    getattr(self, name)[step % self.num_steps] = saved[name][step % len(saved[name])]
            if len(saved["image"]) != self.num_steps:  # its check is of other ages
                began, passed, usable = -1, 0, min(usable, self.num_steps)
                state_dict[prefix + "error"] = torch.full_like(self.error, math.nan)
            self.steps, self.held, self.began, self.passed, self.usable = steps, kept, began, passed, usable
            self._write_clock()
            state_dict |= {prefix + name: getattr(self, name) for name in (*_ROWS, "clock")}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.counting = float(self.negatives)
        self.errors = {age: e for age, e in zip(self.ages, self.error.tolist(), strict=True) if not math.isnan(e)}


def describe_recent(loss: nn.Module) -> list[str]:
    """What is to be said of each memory of recent pairs in a loss."""
    return [module.describe() for module in loss.modules() if isinstance(module, RecentPairs)]
