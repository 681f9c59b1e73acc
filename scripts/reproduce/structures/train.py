"""One run: trained by `openclip-ext train`, scored on a split that was not trained on."""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from openclip_ext.commands import structure
from openclip_ext.commands.structure.body import run_structure
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.pack import pack
from openclip_ext.evaluation.datasets.captioned import captioned_shards, pair_features
from openclip_ext.evaluation.datasets.labelled import LabelledBatches
from openclip_ext.evaluation.loading import LoadedModel, load_model
from openclip_ext.evaluation.metrics.probes import linear_probe_accuracy
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores
from openclip_ext.training.flags import parse_args
from openclip_ext.training.run import train as train_run

from .data import Example, Source, Splits, load, model_flags

RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is known by.

    Attributes:
        source: see `Source`.
        loss: the base loss.
        terms: pairs of a term and its weight.
        lr: the peak of the schedule.
        epochs, batch_size: of training.
        seed: of initial parameters and order.
        split: what is scored: `val` or `test`.
    """

    source: Source
    loss: str
    terms: tuple[tuple[str, float], ...]
    lr: float
    epochs: int
    batch_size: int
    seed: int
    split: str


def read_run(record: dict) -> Run:
    """A run of its fields as JSON has them."""
    terms = tuple((name, weight) for name, weight in record["terms"])
    return Run(**record | {"source": Source(**record["source"]), "terms": terms})


def train(run: Run) -> dict:
    """Train and score.

    Returns:
        `recall`, the mean of recall@1, 5 and 10 both ways, by which weights are chosen, and `seconds` of CPU time that
        training took. Of runs that are scored on the test split also `zero_shot`, `linear_probe` (fitted to the
        training split), each recall, and `structure`, what `openclip-ext structure` measures.
    """
    splits = load(run.source)
    with tempfile.TemporaryDirectory() as folder, _silence():
        for name in ("train", run.split):
            pairs = [(example.image, example.caption) for example in splits.examples[name]]
            shuffle = 0 if name == "train" else None
            pack(pairs, f"{folder}/{name}", samples_per_shard=200, shuffle_seed=shuffle, progress=False)
        started = time.process_time()
        train_run(parse_args(_flags(run, len(splits.examples["train"]), folder)))
        seconds = time.process_time() - started
        model = load_model(f"{folder}/logs/run", device="cpu")
        held_out = captioned_shards(f"{folder}/{run.split}", "--out", CaptionFormat())
        features = pair_features(model, held_out, batch_size=100, workers=0, progress=False)
        metrics = retrieval_metrics(features["image"], features["text"], features["image_of_text"])
        recalls = {name: 100 * metrics[name] for name in RECALLS}
        found: dict[str, Any] = {"recall": statistics.mean(recalls.values()), "seconds": seconds}
        if run.split == "test":
            found |= recalls | _classify(model, splits) | {"structure": _measure(folder, run.split)}
    return found


def _flags(run: Run, num_train: int, folder: str) -> list[str]:
    flags: dict[str, object] = model_flags(run.source, folder) | {
        "--train-data": f"{folder}/train", "--train-num-samples": num_train // run.batch_size * run.batch_size,
        "--loss": run.loss, "--lr": run.lr, "--wd": 0.1, "--warmup": 40, "--epochs": run.epochs,
        "--batch-size": run.batch_size, "--seed": run.seed, "--device": "cpu", "--precision": "fp32", "--workers": 0,
        "--save-frequency": 0, "--logs": f"{folder}/logs", "--name": "run",
    }  # fmt: skip
    pairs = [*flags.items(), *(("--loss-term", f"{name}={weight:g}") for name, weight in run.terms)]
    return [str(part) for pair in pairs for part in pair] + ["--lock-image"] * run.source.frozen


def _classify(model: LoadedModel, splits: Splits) -> dict[str, float]:
    """Top-1 in percent on the test split: by texts, and by a linear classifier fitted to the training split."""
    test = _Labelled(splits.examples["test"])
    classifier = zero_shot_classifier(model, splits.class_names, splits.templates, progress=False)
    counts = zero_shot_counts(model, classifier, _batches(model, test), progress=False)
    of_train, of_test = (_features(model, _Labelled(splits.examples[name])) for name in ("train", "test"))
    return {
        "zero_shot": 100 * zero_shot_scores(counts)["top1"],
        "linear_probe": 100 * linear_probe_accuracy(*of_train, *of_test),
    }


def _measure(folder: str, split: str) -> dict[str, float]:
    """What `openclip-ext structure` says of the run."""
    parser = argparse.ArgumentParser()
    structure.add_arguments(parser)
    flags = ["--checkpoint", f"{folder}/logs/run", "--data", f"{folder}/{split}", "--device", "cpu", "--workers", "0"]
    report = run_structure(parser.parse_args([*flags, "--out", f"{folder}/structure"]))
    return report["checkpoints"][0]["metrics"]


class _Labelled(torch.utils.data.Dataset):
    """(picture, class index) of examples."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.examples[index].picture(), self.examples[index].label


def _batches(model: LoadedModel, rows: _Labelled) -> LabelledBatches:
    return LabelledBatches(rows, model.transform, batch_size=100, workers=0)


def _features(model: LoadedModel, rows: _Labelled) -> tuple[Tensor, Tensor]:
    parts: list[tuple[Tensor, Tensor]] = [
        *model.labelled(_batches(model, rows), normalize=True, desc="features", progress=False)
    ]
    features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, labels


@contextlib.contextmanager
def _silence():
    """Runs at a time would write through each other."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
