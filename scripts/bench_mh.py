"""Speed of emc2: its chains against a loop over columns, its loss against ClipLoss, its bank at two sizes.

    python scripts/bench_mh.py
    python scripts/bench_mh.py --json --device cuda

The loop is written as published samplers write it: one column of the batch after the other, with boolean-indexed rows.
CPU seconds (on a GPU: passed), medians of several repeats, taken in turns; of the bank: seconds passed.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

import psutil
import torch
from runs.loss_steps import STOCK, stepper
from runs.turns import medians
from torch.nn.functional import normalize

from openclip_ext import create_loss
from openclip_ext.losses.emc2.kernels import metropolis_hastings


def column_loop(scores, burn_in):
    """States of chains that scan the columns in order: rows of (anchor, column) pairs after burn-in."""
    anchors, columns = scores.shape
    likelihood = scores.exp()
    state = torch.full((anchors,), -1)
    current = torch.full((anchors,), torch.finfo(torch.float32).smallest_normal)
    index, random, kept = torch.arange(anchors), torch.empty(anchors), []
    for column in range(columns):
        proposed = likelihood[:, column]
        accepted = random.uniform_() < proposed / current
        current[accepted] = proposed[accepted]
        state[accepted] = column
        if column > burn_in:
            kept.append(torch.stack((index, state))[:, proposed != 0])
    return torch.hstack(kept)


def in_turns(functions: dict, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each function, after one call to warm up."""
    for function in functions.values():
        function()
    return medians(functions, args.repeats, args.device.startswith("cuda"))


def chains(args) -> dict:
    scores = 3 * torch.randn(args.batch, args.batch, device=args.device)
    steps = args.batch - 1
    start = torch.randint(args.batch, (args.batch,), device=args.device)

    def ours():
        proposals = torch.randint(args.batch, (steps, args.batch), device=args.device)
        noise = -torch.rand(steps, args.batch, device=args.device).log()
        return metropolis_hastings(scores, start, proposals, noise, steps // 2)

    on_cpu = scores.cpu()  # where the published loop runs
    times = in_turns({"loop": lambda: column_loop(on_cpu, steps // 2), "ours": ours}, args)
    return {"anchors": args.batch, "proposals": steps, **times, "speedup": times["loop"] / times["ours"]}


def losses(args) -> dict:
    """Of steps as `bench_loss.py` takes them."""
    names = {"clip": STOCK, "isir": "emc2", "mh": "emc2+kernel=mh"}
    functions = {key: stepper(name, args.batch, args.width, args.device) for key, name in names.items()}
    times = in_turns(functions, args)
    ratios = {f"{kernel}_to_clip": times[kernel] / times["clip"] for kernel in ("isir", "mh")}
    return {"batch": args.batch, "width": args.width, **times, **ratios}


def banks(args) -> dict:
    """Seconds per step with a bank in a file, small and large, and what memory the large one takes.

    Samples come in rounds, as epochs do. A first visit also makes the file longer on disk, later ones do not.
    """
    batch, rounds, steps, result = args.bank_batch, 4, args.bank_steps, {}
    process = psutil.Process()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for num_samples in args.bank_samples:
            path = os.path.join(folder, str(num_samples))
            place: dict[str, Any] = {"bank_device": "mmap", "bank_path": path}
            loss = create_loss("emc2", num_samples=num_samples, embed_dim=args.width, device=args.device, **place)
            scale, seconds, resident = torch.tensor(20.0, device=args.device), [], 0
            order = torch.randint(num_samples, (steps, batch), device=args.device)
            for ids in order.repeat(rounds, 1):
                image, text = (normalize(x, dim=-1) for x in torch.randn(2, batch, args.width, device=args.device))
                start = time.perf_counter()
                outputs = loss(image.requires_grad_(), text.requires_grad_(), scale, sample_ids=ids)
                outputs["contrastive_loss"].backward()
                loss.commit()
                seconds.append(time.perf_counter() - start)
                resident = max(resident, process.memory_info().rss)
            result[str(num_samples)] = {
                "first_seconds": statistics.median(seconds[:steps]),
                "later_seconds": statistics.median(seconds[steps:]),
                "file_bytes": os.path.getsize(path),
                "disk_bytes": os.stat(path).st_blocks * 512,
                "resident_bytes": resident,
            }
    small, large = (result[str(num_samples)] for num_samples in args.bank_samples)
    ratios = {f"{when}_ratio": large[f"{when}_seconds"] / small[f"{when}_seconds"] for when in ("first", "later")}
    return {"batch": batch, "steps": rounds * steps, **result, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--bank-batch", type=int, default=256)
    parser.add_argument("--bank-samples", type=int, nargs=2, default=[10_000, 2_000_000], metavar=("SMALL", "LARGE"))
    parser.add_argument("--bank-steps", type=int, default=50, help="of each of four rounds over the same samples")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where to put the bank's file; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = {"chains": chains(args), "losses": losses(args), "banks": banks(args)}
    if args.json:
        print(json.dumps(report, indent=1))
        return
    chain, loss, bank = report.values()
    print(f"chains: loop {1e3 * chain['loop']:.0f} ms, ours {1e3 * chain['ours']:.1f} ms: {chain['speedup']:.1f} times")
    print(f"loss, forward and backward, to ClipLoss: isir {loss['isir_to_clip']:.2f}, mh {loss['mh_to_clip']:.2f}")
    small, large = args.bank_samples
    held = bank[str(large)]
    print(
        f"{large:,} in a file: a first visit takes {bank['first_ratio']:.2f} times that with {small:,}, a later one "
        f"{bank['later_ratio']:.2f} times; {held['file_bytes'] / 1e9:.1f} GB, of which on disk "
        f"{held['disk_bytes'] / 1e9:.2f} GB and resident {held['resident_bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
