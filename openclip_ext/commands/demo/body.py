"""`openclip-ext demo`: small CLIP models from scratch on handwritten digits, one per loss and seed, compared."""

import contextlib
import functools
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openclip_ext.commands.eval.body import describe
from openclip_ext.data import digits
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.pack import pack
from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.captioned import captioned_shards, pair_features
from openclip_ext.evaluation.datasets.content import checksum_of_pairs
from openclip_ext.evaluation.datasets.labelled import LabelledBatches
from openclip_ext.evaluation.loading import load_model
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores
from openclip_ext.files import write_json
from openclip_ext.losses import ObjectivePlan
from openclip_ext.options import parse_terms
from openclip_ext.processes import worker_pool
from openclip_ext.report.compare import compare, group, write_report
from openclip_ext.report.run_files import read_run
from openclip_ext.report.tables import verdict
from openclip_ext.training.flags import parse_args
from openclip_ext.training.run import train

MODEL = "digits-tiny"
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": digits.IMAGE_SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
#: What the report shows: scores on the test split, and a curve on the validation split.
METRICS = ("test/top1", "test/*R@1", "text_to_image_R@10")

_TERMS = ("feature_separation=0.5", "brownian_bridge=0.25", "geometric_consistency=0.1")
#: What is compared by default, with how many seeds: 3 minutes on two cores. The weights of terms are not tuned.
LOSSES, SEEDS = ("clip", "dcl", "clip+feature_separation=0.5"), 6
#: With `--full`.
ALL_LOSSES, ALL_SEEDS = (
    (
        *("clip", "dcl", "batch_corrected", "gamma_decomp"),
        *(f"clip+{term}" for term in _TERMS),
        "+".join(("clip", *_TERMS)),
    ),
    3,
)
PROCESSES = 2  # runs at a time, on one core each: the model is too small to gain from more


def run_demo(out: str, *, losses: Sequence[str], seeds: int, epochs: int, batch_size: int) -> dict:
    """Pack the digits, train every loss with every seed, score on the test split, and write a report.

    A loss is a name, or a name and terms with their weights, such as `clip+brownian_bridge=0.25`. All losses see the
    same batches: the order is a function of the seed. Scores come from the test split, curves from the validation
    split. Report: as that of `openclip-ext report`, which can be made of `out/logs` too, with `seconds` and `data`,
    the pictures by split, and `verdict`, which is printed last.

    Raises:
        UserError: an unknown loss, or no seed.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    for loss in losses:
        _plan(loss)
    started = time.time()
    os.makedirs(out, exist_ok=True)
    shutil.rmtree(os.path.join(out, "logs"), ignore_errors=True)
    shards = _pack(out)
    model_config = os.path.join(out, f"{MODEL}.json")
    with open(model_config, "w") as file:
        json.dump(MODEL_CONFIG, file, indent=1)
    jobs = {
        _folder(out, loss, seed): _flags(out, shards, model_config, loss, seed, epochs, batch_size)
        for seed in range(seeds)
        for loss in losses
    }
    for number, (folder, top1) in enumerate(_train_all(jobs, os.path.join(shards, "test")), start=1):
        print(f"[{number}/{len(jobs)}] {os.path.basename(folder)}: top-1 {100 * top1:.1f} %", flush=True)
    report = compare(group([read_run(_folder(out, loss, seed)) for loss in losses for seed in range(seeds)]), METRICS)
    report["seconds"] = round(time.time() - started, 1)
    report["data"] = {name: len(rows) for name, rows in digits.digit_splits().items()}
    report["verdict"] = verdict(report)
    write_report(report, Path(out))
    print(report["verdict"])
    return report


def _train_all(jobs: dict[str, list[str]], test: str) -> Iterator[tuple[str, float]]:
    """Train with the flags of each folder and score it on `test`; yields folders and top-1 as they are done."""
    workers = min(PROCESSES, os.cpu_count() or 1, len(jobs))
    with worker_pool(workers, begin=functools.partial(torch.set_num_threads, 1)) as pool:
        futures = {pool.submit(_train_one, folder, flags, test): folder for folder, flags in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else the rest is trained first
            raise


def _train_one(folder: str, flags: list[str], test: str) -> float:
    """Without a word: two runs at a time would write through each other."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(parse_args(flags))
        return _score(folder, test)


def _folder(out: str, loss: str, seed: int) -> str:
    return os.path.join(out, "logs", f"{loss}-{seed}")


def _pack(out: str) -> str:
    """Write the splits as shards, anew on every call."""
    root = os.path.join(out, "shards")
    shutil.rmtree(root, ignore_errors=True)
    for name, rows in digits.digit_splits().items():
        pairs = [(image, caption) for image, caption, _ in rows]
        shuffle_seed = 0 if name == "train" else None
        pack(pairs, os.path.join(root, name), samples_per_shard=200, shuffle_seed=shuffle_seed, progress=False)
    return root


def _plan(loss: str) -> ObjectivePlan:
    name, *terms = loss.split("+")
    return ObjectivePlan(name, {}, parse_terms(terms))


def _flags(out, shards, model_config, loss, seed, epochs, batch_size) -> list[str]:
    name, *terms = loss.split("+")
    flags = {
        "--model": MODEL,
        "--model-config": model_config,
        "--train-data": os.path.join(shards, "train"),
        "--train-num-samples": len(digits.digit_splits()["train"]) // batch_size * batch_size,
        "--val-data": os.path.join(shards, "val"),
        "--loss": name,
        "--seed": seed,
        "--epochs": epochs,
        "--batch-size": batch_size,
        "--device": "cpu",
        "--precision": "fp32",
        "--workers": 0,
        "--lr": 1e-3,
        "--wd": 0.1,
        "--warmup": 40,
        "--save-frequency": 0,
        "--log-every-n-steps": 5,
        "--logs": os.path.join(out, "logs"),
        "--name": os.path.basename(_folder(out, loss, seed)),
    }
    pairs = [*flags.items(), *(("--loss-term", term) for term in terms)]
    return [str(part) for pair in pairs for part in pair]


def _score(folder: str, shards: str) -> float:
    """Write a run's scores on the test split into its folder, as `openclip-ext eval` would; returns top-1."""
    model = load_model(folder, device="cpu")
    pairs = captioned_shards(shards, "--out", CaptionFormat())
    features = pair_features(model, pairs, batch_size=256, workers=0, progress=False)
    rows: Any = [(Image.open(io.BytesIO(image)), label) for image, _, label in digits.digit_splits()["test"]]
    batches = LabelledBatches(rows, model.transform, batch_size=256, workers=0)
    classifier = zero_shot_classifier(model, digits.CLASS_NAMES, digits.TEMPLATES, progress=False)
    accuracy = zero_shot_scores(zero_shot_counts(model, classifier, batches, progress=False))
    scores = {
        "top1": accuracy["top1"],
        **retrieval_metrics(features["image"], features["text"], features["image_of_text"]),
    }
    checksum = checksum_of_pairs(features["image_id"], features["text_id"], features["image_of_text"])
    result = {
        "dataset": shards,
        "num_samples": len(rows),
        "num_texts": len(features["text"]),
        "num_classes": len(digits.CLASS_NAMES),
        "data": {"images": len(features["image"]), "texts": len(features["text"]), "checksum": checksum},
        "scores": scores,
    }
    write_json(describe(model) | {"tasks": {"test": result}}, os.path.join(folder, "test.json"))
    return scores["top1"]
