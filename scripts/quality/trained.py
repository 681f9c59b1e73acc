"""Tasks that go through `openclip-ext train`: a small CLIP from scratch, and a pretrained model that is fine-tuned."""

import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from openclip_ext.commands.demo.body import MODEL, MODEL_CONFIG
from openclip_ext.data import digits
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.pack import pack
from openclip_ext.data.pairs import pairs_from_csv, pairs_from_folder
from openclip_ext.evaluation.datasets.captioned import captioned_shards, pair_features
from openclip_ext.evaluation.loading import load_model
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.registry import TERMS, registered_names
from openclip_ext.training.flags import parse_args
from openclip_ext.training.run import train

from .methods import Method
from .tasks import Files

RECALLS = ("R@1", "R@5", "R@10")
HELD_OUT = 600  # photographs of a split to score, and half as many of one to choose a learning rate on


def score_trained(run, files: Files) -> dict[str, float]:
    """Train with OpenCLIP's flags and score; what `quality.loop.score` returns.

    Args:
        run: a `quality.loop.Run`.
        files: of photographs, the CSV (columns `filepath` and `title`) or folder, the checkpoint to start from, and the
            JSON of its architecture; None: handwritten digits, from scratch.
    """
    splits = photo_splits(files[0]) if files else digit_splits()
    method = Method(run.method)
    steps = run.setting.epochs * (len(splits["train"]) // method.pairs_per_step(run.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", run.split):
            shuffle = 0 if name == "train" else None
            pack(splits[name], f"{folder}/{name}", samples_per_shard=200, shuffle_seed=shuffle, progress=False)
        flags = _flags(run, len(splits["train"]), folder, files)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            started = time.process_time()
            train(parse_args(flags))
            seconds = time.process_time() - started
        found = _found(Path(folder, "logs/run/metrics.jsonl"))
        model = load_model(f"{folder}/logs/run", device="cpu")
        pairs = captioned_shards(f"{folder}/{run.split}", "--out", CaptionFormat())
        features = pair_features(model, pairs, batch_size=100, workers=0, progress=False)
    metrics = retrieval_metrics(features["image"], features["text"], features["image_of_text"])
    scores = [metrics[f"{way}_{recall}"] for way in ("image_to_text", "text_to_image") for recall in RECALLS]
    found |= {"steps": steps, "pairs": steps * method.pairs_per_step(run.batch_size), "seconds": seconds}
    return {"score": 100 * statistics.mean(scores)} | found


def digit_splits() -> dict[str, list]:
    """Pictures with captions, by split."""
    return {name: [(image, text) for image, text, _ in rows] for name, rows in digits.digit_splits().items()}


def photo_splits(source: str) -> dict[str, list]:
    """Pictures with captions, by split, always the same: 600 to score, 300 to choose by, the rest to train on."""
    is_csv = os.path.isfile(source)
    pairs = pairs_from_csv(source, "filepath", "title", None) if is_csv else pairs_from_folder(source, "{}")
    random.Random(0).shuffle(pairs)
    test, val = HELD_OUT, HELD_OUT // 2
    return {"test": pairs[:test], "val": pairs[test : test + val], "train": pairs[test + val :]}


def _flags(run, num_train: int, folder: str, files: Files) -> list[str]:
    method = Method(run.method)
    step = method.pairs_per_step(run.batch_size)
    flags = {
        "--train-data": f"{folder}/train", "--train-num-samples": num_train // step * step,
        "--batch-size": run.batch_size, "--accum-freq": step // run.batch_size, "--epochs": run.setting.epochs,
        "--loss": method.name, "--lr": run.lr, "--wd": run.setting.decay, "--seed": run.seed,
        "--warmup": run.setting.epochs * num_train // step // 10, "--precision": "fp32", "--device": "cpu",
        "--workers": 0, "--save-frequency": 0, "--log-every-n-steps": 1, "--logs": f"{folder}/logs", "--name": "run",
    }  # fmt: skip
    if files:
        name = os.path.splitext(os.path.basename(files[2]))[0]
        flags |= {"--model": name, "--model-config": files[2], "--pretrained": files[1]}
    else:
        Path(folder, f"{MODEL}.json").write_text(json.dumps(MODEL_CONFIG))
        flags |= {"--model": MODEL, "--model-config": f"{folder}/{MODEL}.json"}
    pairs = list(flags.items())
    terms = registered_names(TERMS)
    for name, value in method.options.items():
        if name != "accumulate":
            pairs.append(("--loss-term" if name in terms else "--loss-arg", f"{name}={value}"))
    return [str(part) for pair in pairs for part in pair]


def _found(metrics: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if "contrastive_loss" in row]
    found = {"logit_scale": float(steps[-1]["logit_scale"])}
    if "recent_batches_used" in steps[-1]:
        found["recent"] = statistics.mean(row["recent_batches_used"] for row in steps)
    return found
