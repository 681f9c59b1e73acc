"""Compare losses on precomputed image features and tokenised captions, in minutes on a CPU.

A small image head and a bag-of-words text side are trained from scratch with each loss on the same batches, and scored
by retrieval (mean of recall@1, 5 and 10, both ways). Learning rate and loss options are to be chosen on the validation
split (default); `--split test` scores the held-back file once they are.

    python scripts/compare_losses.py --train train.npz --test val.npz --losses clip dcl gamma_decomp:gamma=0.5

Both files hold `x` (n, D) float features and `tokens` (n, captions, length) int ids, 0 for padding.
"""

import argparse
import json
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

from openclip_ext import create_loss
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.report.intervals import half_width

VALIDATION = 1000
RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


class TwoTowers(nn.Module):
    def __init__(self, image_width: int, vocabulary: int, width: int, logit_scale: float) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(image_width, width), nn.GELU(), nn.Linear(width, width))
        self.tokens = nn.EmbeddingBag(vocabulary, width, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale).log())

    def forward(self, x, tokens):
        return (
            normalize(self.image(x), dim=-1),
            normalize(self.text(self.tokens(tokens)), dim=-1),
            self.logit_scale.exp(),
        )


def load(train_path: str, test_path: str, split: str):
    """(features, tokens) to train on and to score on, token ids made dense."""
    train, test = np.load(train_path), np.load(test_path)
    known, dense = np.unique(np.concatenate([train["tokens"].ravel(), test["tokens"].ravel()]), return_inverse=True)
    assert known[0] == 0, "padding must be token 0"
    cut = train["tokens"].size
    tokens = [torch.from_numpy(part) for part in np.split(dense.ravel(), [cut])]
    tokens = [part.view(*file["tokens"].shape) for part, file in zip(tokens, (train, test), strict=True)]
    x = [torch.from_numpy(file["x"].astype(np.float32)) for file in (train, test)]
    if split == "val":
        x, tokens = [x[0][:-VALIDATION], x[0][-VALIDATION:]], [tokens[0][:-VALIDATION], tokens[0][-VALIDATION:]]
    return x, tokens, len(known)


def run(args, loss_text: str, batch_size: int, seed: int, data) -> dict[str, float]:
    """Train once; retrieval metrics in percent, the mean of the six recalls as `score`."""
    (x, held_x), (tokens, held_tokens), vocabulary = data
    name, *assignments = loss_text.split(":")
    torch.manual_seed(seed)
    model = TwoTowers(x.shape[1], vocabulary, args.width, args.logit_scale)
    model.logit_scale.requires_grad_(args.learn_scale)
    options: dict[str, Any] = dict(item.split("=") for item in assignments)
    loss = create_loss(name, num_samples=len(x), embed_dim=args.width, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.wd, fused=True)
    steps = len(x) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps * args.epochs, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(args.epochs):
        order = torch.randperm(len(x), generator=generator)[: steps * batch_size]
        captions = torch.randint(tokens.shape[1], (len(x),), generator=generator)
        for index, ids in enumerate(order.split(batch_size)):
            loss.begin_step(step=epoch * steps + index, total_steps=steps * args.epochs)
            outputs = loss(*model(x[ids], tokens[ids, captions[ids]]), sample_ids=ids)
            optimizer.zero_grad()
            outputs["contrastive_loss"].backward()
            optimizer.step()
            schedule.step()
            loss.commit()
    with torch.no_grad():
        image, text, _ = model(held_x, held_tokens[:, 0])
    metrics = {key: 100 * value for key, value in retrieval_metrics(image, text).items() if key in RECALLS}
    return metrics | {"score": sum(metrics.values()) / len(metrics), "logit_scale": model.logit_scale.exp().item()}


def cell(values: np.ndarray, sign: str = "") -> str:
    width = half_width(values.tolist())
    return f"{values.mean():{sign}.2f} ± {math.nan if width is None else width:.2f}"


def compare(args, batch_size: int, data) -> list[dict]:
    """Train with every loss and seed, printing a line per loss."""
    rows, scores = [], {}
    baseline = args.losses[0]
    for loss_text in args.losses:
        seeds = tqdm(range(args.seeds), desc=f"batch {batch_size}, {loss_text}", leave=False)
        runs = [run(args, loss_text, batch_size, seed, data) for seed in seeds]
        scores[loss_text] = np.array([metrics["score"] for metrics in runs])
        # Seeds share batches, so differences are taken seed by seed.
        difference = cell(scores[loss_text] - scores[baseline], sign="+")
        print(
            f"batch {batch_size:<5} {loss_text:32} {cell(scores[loss_text])}   against {baseline}: {difference}",
            flush=True,
        )
        rows.append({"batch_size": batch_size, "loss": loss_text, "runs": runs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--split", choices=["val", "test"], default="val", help="val: the last 1,000 of --train")
    parser.add_argument("--losses", nargs="+", required=True, metavar="NAME[:OPTION=VALUE…]")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wd", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--logit-scale", type=float, default=20.0)
    parser.add_argument("--learn-scale", action="store_true", help="train the logit scale too")
    parser.add_argument("--json", help="write all runs to this file")
    args = parser.parse_args()
    data = load(args.train, args.test, args.split)
    print(f"{args.split} split, mean recall in %, 95 % intervals over {args.seeds} seeds")
    rows = [row for batch_size in args.batch_size for row in compare(args, batch_size, data)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
