"""What pairs of recent steps cost in training: a step with all of them against one without, on random pairs.

    python scripts/bench_recent.py
    python scripts/bench_recent.py --model RN50 --batch-size 64 --loss batch_corrected --recent-check 50

Beside its loss such a step pays, now and then, for running the model again to see how fresh the pairs are: K = 16 takes
five forward passes in `--recent-check` steps. Seconds are the CPU's (on a GPU: passed), medians of steps in turns.
"""

import argparse
import sys

import open_clip
import torch
from runs.turns import medians
from torch import Tensor

from openclip_ext import UserError, create_loss
from openclip_ext.losses import Loss
from openclip_ext.state.recent_pairs import RecentPairs


def fill(loss: Loss, steps: int, given: dict[str, Tensor]) -> None:
    """Let the loss see one batch until pairs of all these steps join; a model that stands still is always fresh."""
    found: dict[str, Tensor] = {}
    again = {f"{name}_again": given[name] for name in ("image_features", "text_features")}
    while found.get("recent_batches_used", -1) != steps:
        found = loss(**given, **again)
        loss.commit()


def seconds(args: argparse.Namespace) -> dict[str, float]:
    """Medians: `without` and `with` recent pairs, of `encoding` once more, and of the two losses alone."""
    torch.manual_seed(0)
    model = open_clip.create_model(args.model, device=args.device, output_dict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    size, length = model.visual.image_size, model.context_length
    images = torch.randn(args.batch_size, 3, *(size if isinstance(size, tuple) else (size, size)), device=args.device)
    texts = torch.randint(1, model.vocab_size, (args.batch_size, length), device=args.device)
    ids = torch.arange(args.batch_size, device=args.device)
    losses = {
        name: create_loss(
            args.loss, num_samples=args.batch_size, device=args.device, recent_batches=steps, recent_enough="inf"
        )
        for name, steps in (("without", 0), ("with", args.recent_batches))
    }

    def encode() -> dict[str, Tensor]:
        with torch.no_grad():
            return model(images, texts)

    given = encode() | {"sample_ids": ids}
    fill(losses["with"], args.recent_batches, given)

    def step(loss: Loss) -> None:
        loss(**model(images, texts), sample_ids=ids, output_dict=False).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.commit()

    def alone(loss: Loss) -> None:
        leaves = {name: given[name].detach().requires_grad_() for name in ("image_features", "text_features")}
        loss(**given | leaves, output_dict=False).backward()
        loss.commit()

    step(losses["without"])  # the first one takes the optimizer's memory
    found = medians(
        {name: lambda loss=loss: step(loss) for name, loss in losses.items()} | {"encoding": encode},
        args.repeats, args.device.startswith("cuda"),
    )  # fmt: skip
    return found | medians(
        {f"loss {name}": lambda loss=loss: alone(loss) for name, loss in losses.items()},
        max(5, args.repeats), args.device.startswith("cuda"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="of OpenCLIP")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--loss", default="dcl")
    parser.add_argument("--recent-batches", type=int, default=16, metavar="K")
    parser.add_argument("--recent-check", type=int, default=100, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.recent_batches < 1:
        parser.error(f"--recent-batches {args.recent_batches}: must be at least 1, what is compared with none")
    try:
        found = seconds(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, taken in found.items():
        print(f"{name:<14}{taken:>9.3f} s")
    checks = len(RecentPairs(args.recent_batches, args.recent_check, limit=1.0, device=torch.device("cpu")).ages)
    average = found["with"] + checks / args.recent_check * found["encoding"]
    print(f"a step with K = {args.recent_batches}: {found['with'] / found['without']:.3f} times one without, "
          f"{average / found['without']:.3f} with {checks} forward passes in {args.recent_check} steps; "
          f"the loss alone: {found['loss with'] / found['loss without']:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
