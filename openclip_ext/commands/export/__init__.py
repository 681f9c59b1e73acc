"""`openclip-ext export`."""

import argparse

HELP = "write a run's model as a folder that stock OpenCLIP loads by name, ready for the hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="folder of a run, logs/NAME; or a checkpoint, with --model")
    parser.add_argument(
        "--to", choices=["open_clip", "hf"], required=True,
        help="open_clip: config and weights, for --model local-dir:FOLDER; hf: with a model card for the hub",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="new folder to write (default: RUN/export)")
    parser.add_argument("--epoch", type=int, metavar="N", help="which checkpoint (default: the last)")
    parser.add_argument("--checkpoint", metavar="FILE", help="or any checkpoint of the run's architecture")
    parser.add_argument(
        "--weights", choices=["model", "ema"], default="model",
        help="ema: the average of the weights over the steps, if the run kept one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="the architecture, where no run says it")
    parser.add_argument("--model-config", metavar="FILE", help="as in training, where the run's has moved")
    parser.add_argument("--repo", metavar="ORG/NAME", help="where it will be on the hub, with --to hf")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.export.body import run_export

    run_export(args)
    return 0
