"""`openclip-ext demo`: small CLIP models from scratch on handwritten digits, one per loss and seed, compared."""

import contextlib
import datetime
import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import torch
from tqdm import tqdm

from openclip_ext.data import digits
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.errors import UserError
from openclip_ext.evaluation.intervals import half_width
from openclip_ext.evaluation.loading import load_model
from openclip_ext.evaluation.retrieval import retrieval_metrics
from openclip_ext.evaluation.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores
from openclip_ext.losses import ObjectivePlan
from openclip_ext.training.flags import parse_args, parse_terms
from openclip_ext.training.run import train

MODEL = "digits-tiny"
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": digits.IMAGE_SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
#: What is compared, and how it is called in the report.
SCORES = {
    "zero_shot_top1": "zero-shot top-1",
    "image_to_text_R@1": "image→text recall@1",
    "text_to_image_R@1": "text→image recall@1",
}
CURVE = "text_to_image_R@10"

_TERMS = ("feature_separation=0.5", "brownian_bridge=0.25", "geometric_consistency=0.1")
#: What is compared by default. The weights of terms are not tuned.
LOSSES = (
    *("clip", "dcl", "batch_corrected", "gamma_decomp"),
    *(f"clip+{term}" for term in _TERMS),
    "+".join(("clip", *_TERMS)),
)


def run_demo(out: str, *, losses: Sequence[str], seeds: int, epochs: int, batch_size: int) -> dict:
    """Pack the digits, train every loss with every seed, score on the test split, write `report.json` and `report.png`.

    A loss is a name, or a name and terms with their weights, such as `clip+brownian_bridge=0.25`. All losses see the
    same batches: the order is a function of the seed. Scores come from the test split, curves from the validation
    split.

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
    runs = []
    jobs = [(loss, seed) for seed in range(seeds) for loss in losses]
    for number, (loss, seed) in enumerate(jobs, start=1):
        tqdm.write(f"[{number}/{len(jobs)}] {loss}, seed {seed}")
        flags = _flags(out, shards, model_config, loss, seed, epochs, batch_size)
        with _quiet_third_parties():
            train(parse_args(flags))
            runs.append({"loss": loss, "seed": seed, **_score(out, shards, loss, seed, epochs)})
    report = {
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "versions": {name: version(name) for name in ("openclip-ext", "open_clip_torch", "torch")},
        "settings": {"epochs": epochs, "batch_size": batch_size, "seeds": seeds, "model": MODEL_CONFIG},
        "data": {name: len(rows) for name, rows in digits.digit_splits().items()},
        "summary": _summary(runs, losses),
        "runs": runs,
    }
    with open(os.path.join(out, "report.json"), "w") as file:
        json.dump(report, file, indent=1)
    _draw(report, losses, os.path.join(out, "report.png"))
    print(_table(report, losses))
    print(f"{out}/report.json, {out}/report.png")
    return report


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
        "--name": f"{loss}-{seed}",
    }
    pairs = [*flags.items(), *(("--loss-term", term) for term in terms)]
    return [str(part) for pair in pairs for part in pair]


def _score(out: str, shards: str, loss: str, seed: int, epochs: int) -> dict:
    """Scores of a run's last checkpoint on the test split, and its validation curve."""
    folder = os.path.join(out, "logs", f"{loss}-{seed}", "checkpoints")
    model = load_model(os.path.join(folder, f"epoch_{epochs}.pt"), name=MODEL, device="cpu")
    listing = list_shards(os.path.join(shards, "test"))
    config = StreamConfig(source=listing, batch_size=256, image_transform=model.transform, tokenizer=model.tokenizer)
    batches = list(eval_loader(config, workers=0))
    images = torch.cat([model.encode_images(batch["image"]) for batch in batches])
    texts = torch.cat([model.encode_texts(batch["text"]) for batch in batches])
    labels = torch.tensor([label for _, _, label in digits.digit_splits()["test"]])
    pictures = torch.cat([batch["image"] for batch in batches])
    classifier = zero_shot_classifier(model, digits.CLASS_NAMES, digits.TEMPLATES, progress=False)
    accuracy = zero_shot_scores(zero_shot_counts(model, classifier, [(pictures, labels)], progress=False))
    with open(os.path.join(folder, "results.jsonl")) as file:
        curve = [json.loads(line)[CURVE] for line in file]
    return {"zero_shot_top1": accuracy["top1"], **retrieval_metrics(images, texts), "validation_curve": curve}


def _summary(runs: list[dict], losses: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and half-width of the 95 % interval of each score, by loss; no interval from a single seed."""
    summary: dict = {}
    for loss in losses:
        summary[loss] = {}
        for score in SCORES:
            values = np.array([run[score] for run in runs if run["loss"] == loss])
            summary[loss][score] = {"mean": float(values.mean())}
            if len(values) > 1:
                summary[loss][score]["interval"] = half_width(values)
    return summary


def _table(report: dict, losses: Sequence[str]) -> str:
    head = "test split, mean ± 95 % interval"
    width = max(len(name) for name in (head, *losses)) + 2
    lines = [f"{head:{width}}" + "".join(f"{title:>22}" for title in SCORES.values())]
    for loss in losses:
        cells = [report["summary"][loss][score] for score in SCORES]
        lines.append(f"{loss:{width}}" + "".join(f"{_cell(cell):>22}" for cell in cells))
    return "\n".join(lines)


def _cell(cell: dict[str, float]) -> str:
    mean = f"{100 * cell['mean']:.1f}"
    return f"{mean} ± {100 * cell['interval']:.1f}" if "interval" in cell else mean


def _draw(report: dict, losses: Sequence[str], path: str) -> None:
    """Validation curves (mean and range over seeds) beside the test scores (mean and 95 % interval)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    width = 0.8 / len(losses)
    for number, loss in enumerate(losses):
        curves = 100 * np.array([run["validation_curve"] for run in report["runs"] if run["loss"] == loss])
        epochs = np.arange(1, curves.shape[1] + 1)
        (line,) = left.plot(epochs, curves.mean(0), marker=".", label=loss.replace("+", "\n+ "))
        left.fill_between(epochs, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
        cells = [report["summary"][loss][score] for score in SCORES]
        positions = np.arange(len(SCORES)) + (number - (len(losses) - 1) / 2) * width
        errors = [100 * cell.get("interval", 0.0) for cell in cells]
        right.bar(positions, [100 * cell["mean"] for cell in cells], width, yerr=errors, capsize=3)
    settings = report["settings"]
    left.set(title="validation, range over seeds", xlabel="epoch", ylabel="text→image recall@10, %")
    right.set(title="test, 95 % interval", ylabel="%")
    right.set_xticks(range(len(SCORES)), list(SCORES.values()))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.suptitle(f"handwritten digits, batch {settings['batch_size']}, {settings['seeds']} seed(s)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
