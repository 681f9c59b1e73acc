"""`openclip-ext demo --fusion`: a fusion model from nothing to four scores, on generated scenes."""

import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from openclip_ext.commands import eval as eval_command
from openclip_ext.commands.eval.body import run_eval
from openclip_ext.data.questions import read_questions
from openclip_ext.data.scenes import IMAGE_SIZE, write_scenes
from openclip_ext.files import write_json
from openclip_ext.options import Parser
from openclip_ext.training.flags import parse_args
from openclip_ext.training.run import train

MODEL = "scenes-tiny"
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
#: Captions are short, so more of their words are hidden; and a copy of a new model has nothing to teach at first.
FUSION_CONFIG = {
    "layers": 2, "width": 64, "heads": 4, "decoder_layers": 1, "dropout": 0.0, "momentum": 0.99, "mask_share": 0.4,
    "distill": "0:0.4",
}  # fmt: skip
#: Stages in order: task, what it starts from, and epochs.
STAGES = {
    "pretrain": (None, 24),  # matching begins to be learned after five
    "retrieval": ("pretrain", 2),
    "vqa": ("pretrain", 6),
    "assign": ("pretrain", 1),
    "nlvr2": ("assign", 6),
    "ve": ("pretrain", 3),
}
#: By stage that is scored: the flag of eval, and the score that is shown.
SCORES = {
    "retrieval": ("--retrieval", "text_to_image_R@1"),
    "vqa": ("--vqa", "accuracy"),
    "nlvr2": ("--nlvr2", "accuracy"),
    "ve": ("--snli-ve", "accuracy"),
}


def run_fusion_demo(
    out: str, *, loss: str = "clip", terms: Sequence[str] = (), seed: int = 0, epochs: float = 1.0,
    sizes: Mapping[str, int] | None = None, batch_size: int = 50,
) -> dict[str, Any]:  # fmt: skip
    """Write the scenes, pre-train, fine-tune for four tasks, and score each on scenes that no stage has seen.

    Args:
        out: folder of scenes, runs and `fusion.json`, which has what is returned.
        loss: the contrastive loss.
        terms: `NAME=WEIGHT`, as `--loss-term` takes them, of pre-training.
        seed: of scenes, weights and batches.
        epochs: a factor on those of each stage.
        sizes: scenes by split; None: `scenes.SPLITS`.
        batch_size: of all stages.

    Returns:
        `scores` by stage, and of `retrieval-reranked`, what matching makes of retrieval; `words_alone`, what the best
        guess from a question's words would score; and `seconds`.
    """
    started = time.time()
    os.makedirs(out, exist_ok=True)
    data = write_scenes(os.path.join(out, "scenes"), dict(sizes) if sizes else None, seed)
    logs = os.path.join(out, "logs")
    shutil.rmtree(logs, ignore_errors=True)
    configs = {MODEL: MODEL_CONFIG, "fusion-config": FUSION_CONFIG}
    for name, config in configs.items():
        write_json(config, os.path.join(out, f"{name}.json"))
    scores: dict[str, float] = {}
    for stage, (start, number) in STAGES.items():
        flags = _flags(out, data, stage, start, seed, max(1, round(epochs * number)), batch_size)
        if stage in ("pretrain", "retrieval"):
            flags += ["--loss", loss] + [word for term in terms for word in ("--loss-term", term)]
        train(parse_args(flags))
        if stage in SCORES:
            scores |= _score(logs, data, stage)
            print(_shown(scores), flush=True)
    words_alone = {task: _by_words_alone(task, data) for task in ("vqa", "nlvr2", "ve")}
    print(f"without a look at the pictures: {_shown(words_alone)}")
    result = {"scores": scores, "words_alone": words_alone, "seconds": round(time.time() - started, 1)}
    write_json(result, os.path.join(out, "fusion.json"))
    return result


def _shown(scores: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {100 * value:.1f} %" for name, value in scores.items())


def _by_words_alone(task: str, data: Mapping[str, str]) -> float:
    """The accuracy of the answer that a question had most often in training, or that all had, of one never asked."""
    train, val = (read_questions(task, data[f"{task}/{split}"], None, "--out").rows for split in ("train", "val"))
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        given[row.text].update(row.answers)
    of_all = sum(given.values(), Counter())
    return fmean(given.get(row.text, of_all).most_common(1)[0][0] in row.answers for row in val)


def _flags(
    out: str, data: Mapping[str, str], stage: str, start: str | None, seed: int, epochs: int, batch_size: int
) -> list[str]:
    logs = os.path.join(out, "logs")
    source = f"{stage}/train" if f"{stage}/train" in data else "pairs/train"
    flags: dict[str, Any] = {
        "--fusion": os.path.join(logs, start) if start else os.path.join(out, "fusion-config.json"),
        "--train-data": data[source],
        "--epochs": epochs,
        "--batch-size": batch_size,
        "--seed": seed,
        "--lr": 2e-3 if start is None else 1e-3,
        "--warmup": 20,
        "--wd": 0.02,
        "--workers": 0,
        "--device": "cpu",
        "--precision": "fp32",
        "--save-frequency": 0,
        "--log-every-n-steps": 20,
        "--logs": logs,
        "--name": stage,
    }
    if start is None:
        flags |= {"--model": MODEL, "--model-config": os.path.join(out, f"{MODEL}.json")}
    else:
        flags["--task"] = stage
    return [str(part) for pair in flags.items() for part in pair]


def _score(logs: str, data: Mapping[str, str], stage: str) -> dict[str, float]:
    """What `openclip-ext eval` finds."""
    flag, name = SCORES[stage]
    source = f"{stage}/val" if f"{stage}/val" in data else "pairs/val"
    report = os.path.join(logs, stage, "eval.json")
    parser = Parser(prog="openclip-ext eval")
    eval_command.add_arguments(parser)
    words = ["--fusion", os.path.join(logs, stage), flag, data[source], "--out", report, "--device", "cpu",
             "--workers", "0", "--no-feature-cache", "--rerank", "16"]  # fmt: skip
    tasks = run_eval(parser.parse_args(words))["tasks"]
    return {
        f"{stage}-reranked" if task.endswith("-reranked") else stage: result["scores"][name]
        for task, result in tasks.items()
    }
