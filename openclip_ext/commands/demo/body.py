"""`openclip-ext demo`: small CLIP models from scratch on handwritten digits, one per loss and seed, compared."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from openclip_ext.commands.eval.body import describe
from openclip_ext.data import digits
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.errors import UserError
from openclip_ext.evaluation.loading import load_model
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores
from openclip_ext.files import write_json
from openclip_ext.losses import ObjectivePlan
from openclip_ext.options import parse_terms
from openclip_ext.report.compare import compare, group, write_report
from openclip_ext.report.run_files import read_run
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
#: What is compared by default. The weights of terms are not tuned.
LOSSES = (
    *("clip", "dcl", "batch_corrected", "gamma_decomp"),
    *(f"clip+{term}" for term in _TERMS),
    "+".join(("clip", *_TERMS)),
)


def run_demo(out: str, *, losses: Sequence[str], seeds: int, epochs: int, batch_size: int) -> dict:
    """Pack the digits, train every loss with every seed, score on the test split, and write a report.

    A loss is a name, or a name and terms with their weights, such as `clip+brownian_bridge=0.25`. All losses see the
    same batches: the order is a function of the seed. Scores come from the test split, curves from the validation
    split. Report: as that of `openclip-ext report`, which can be made of `out/logs` too, with `seconds` and `data`,
    the pictures by split.

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
    jobs = [(loss, seed) for seed in range(seeds) for loss in losses]
    for number, (loss, seed) in enumerate(jobs, start=1):
        tqdm.write(f"[{number}/{len(jobs)}] {loss}, seed {seed}")
        flags = _flags(out, shards, model_config, loss, seed, epochs, batch_size)
        with _quiet_third_parties():
            train(parse_args(flags))
            _score(_folder(out, loss, seed), os.path.join(shards, "test"))
    report = compare(group([read_run(_folder(out, loss, seed)) for loss in losses for seed in range(seeds)]), METRICS)
    report["seconds"] = round(time.time() - started, 1)
    report["data"] = {name: len(rows) for name, rows in digits.digit_splits().items()}
    write_report(report, Path(out))
    return report


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


def _score(folder: str, shards: str) -> None:
    """Write a run's scores on the test split into its folder, as `openclip-ext eval` would."""
    model = load_model(folder, device="cpu")
    config = StreamConfig(
        source=list_shards(shards), batch_size=256, image_transform=model.transform, tokenizer=model.tokenizer
    )
    batches = list(eval_loader(config, workers=0))
    images = torch.cat([model.encode_images(batch["image"]) for batch in batches])
    texts = torch.cat([model.encode_texts(batch["text"]) for batch in batches])
    labels = torch.tensor([label for _, _, label in digits.digit_splits()["test"]])
    pictures = torch.cat([batch["image"] for batch in batches])
    classifier = zero_shot_classifier(model, digits.CLASS_NAMES, digits.TEMPLATES, progress=False)
    accuracy = zero_shot_scores(zero_shot_counts(model, classifier, [(pictures, labels)], progress=False))
    scores = {"top1": accuracy["top1"], **retrieval_metrics(images, texts)}
    tasks = {"test": {"dataset": shards, "num_samples": len(labels), "scores": scores}}
    write_json(describe(model) | {"tasks": tasks}, os.path.join(folder, "test.json"))


@contextlib.contextmanager
def _quiet_third_parties():
    """OpenCLIP warns on the root logger that a model starts from scratch, which is the point here."""
    import logging

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
