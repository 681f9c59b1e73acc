"""Tasks that go through `openclip-ext train`: a small CLIP from scratch, and pretrained models that are fine-tuned."""

import contextlib
import json
import os
import random
import shutil
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
from openclip_ext.files import atomic
from openclip_ext.registry import TERMS, registered_names
from openclip_ext.training.flags import parse_args
from openclip_ext.training.run import train

from .methods import Method
from .tasks import Files

#: Tasks by name, and the flags that only they have. Those on digits are one small CLIP: from scratch; and, from where
#: `pretrain_on_digits` leaves it, all of it or a low-rank change.
TRAINED: dict[str, dict[str, object]] = {
    "digits": {},
    "digits_tuned": {},
    "digits_lora": {"--lora": "r=8,alpha=16"},
    "photos": {},
}
PRETRAINED = ("digits_tuned", "digits_lora")
RECALLS = ("R@1", "R@5", "R@10")
HELD_OUT = 600  # photographs of a split to score, and half as many of one to choose a learning rate on


def score_trained(run, files: Files) -> dict[str, float]:
    """Train with OpenCLIP's flags and score; what `quality.loop.score` returns.

    Args:
        run: a `quality.loop.Run`.
        files: of photographs, the CSV (columns `filepath` and `title`) or folder, the checkpoint to start from, and the
            JSON of its architecture; of digits, the checkpoint; none: from scratch.
    """
    splits = splits_of(run.task, files)
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


def splits_of(task: str, files: Files) -> dict[str, list]:
    """Pictures with captions of a task, by split."""
    if task == "photos":
        return photo_splits(files[0])
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
    if run.task == "photos":
        name = os.path.splitext(os.path.basename(files[2]))[0]
        flags |= {"--model": name, "--model-config": files[2], "--pretrained": files[1]}
    else:
        flags |= _digits_model(folder) | ({"--pretrained": files[0]} if files else {})
    pairs = list((flags | TRAINED[run.task]).items())
    terms = registered_names(TERMS)
    for name, value in method.options.items():
        if name != "accumulate":
            pairs.append(("--loss-term" if name in terms else "--loss-arg", f"{name}={value}"))
    return [str(part) for pair in pairs for part in pair]


def _digits_model(folder: str) -> dict[str, str]:
    Path(folder, f"{MODEL}.json").write_text(json.dumps(MODEL_CONFIG))
    return {"--model": MODEL, "--model-config": f"{folder}/{MODEL}.json"}


def pretrain_on_digits(checkpoint: str, epochs: int = 8) -> None:
    """Write the weights of a small CLIP that tells digits apart, whose captions have said no more than that.

    What it is fine-tuned to is how they are written: thick or thin, wide or narrow, upright or leaning.
    """
    pairs = [(image, f"the digit {digits.CLASS_NAMES[label]}") for image, _, label in digits.digit_splits()["train"]]
    with tempfile.TemporaryDirectory() as folder:
        pack(pairs, f"{folder}/train", samples_per_shard=200, shuffle_seed=0, progress=False)
        flags = {
            "--train-data": f"{folder}/train", "--batch-size": 64, "--epochs": epochs, "--lr": 1e-3, "--wd": 0.1,
            "--warmup": 15, "--precision": "fp32", "--device": "cpu", "--workers": 0, "--loss": "clip", "--seed": 0,
            "--logs": f"{folder}/logs", "--name": "run", **_digits_model(folder),
        }  # fmt: skip
        train(parse_args([str(part) for pair in flags.items() for part in pair]))
        with atomic(checkpoint) as partial:
            shutil.copyfile(f"{folder}/logs/run/checkpoints/epoch_{epochs}.pt", partial)


def _found(metrics: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if "contrastive_loss" in row]
    found = {"logit_scale": float(steps[-1]["logit_scale"])}
    if "recent_batches_used" in steps[-1]:
        found["recent"] = statistics.mean(row["recent_batches_used"] for row in steps)
    return found
