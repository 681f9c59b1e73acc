"""`openclip-ext eval`."""

import argparse

from openclip_ext.evaluation.tasks import add_task_arguments

HELP = "score a checkpoint on one or more tasks, in one JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained", metavar="WEIGHTS",
        help="a file (.pt, .bin, .safetensors), the folder of a run, one of OpenCLIP's tags, hf-hub:… or local-dir:…",
    )  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="JSON to write (default: eval-TIME.json in a run's folder, else in runs/eval)"
    )
    add_task_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `load_model` beside the weights."""
    parser.add_argument(
        "--model", metavar="NAME", help="the architecture; default: the run's, and what hf-hub: and local-dir: bring"
    )
    parser.add_argument("--model-config", metavar="FILE", help="an OpenCLIP model config in JSON, as in training")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    parser.add_argument(
        "--precision",
        choices=["amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32"],
        help="as in training (default: amp on a GPU, else fp32)",
    )
    parser.add_argument("--cache-dir", metavar="FOLDER", help="where OpenCLIP keeps what it downloads")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.eval.body import run_eval

    run_eval(args)
    return 0
