"""The command line. torch is imported only inside the subcommand that needs it."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from openclip_ext import __version__
from openclip_ext.errors import RankError, UserError

DESCRIPTION = "Contrastive objectives for OpenCLIP that work at small batch, by name, without a fork."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. A wrong input is one line on stderr and code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # its flags are OpenCLIP's, parsed by OpenCLIP's parser
            return _train(argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except UserError as error:
        if isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":  # else once per machine
            print(f"openclip-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("openclip-ext: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Answers a wrong flag in one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="openclip-ext", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"openclip-ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="train or fine-tune a model (all of OpenCLIP's flags, and ours)")
    train.set_defaults(run=lambda args: _train([]))

    losses = commands.add_parser("losses", help="list the registered losses and terms, or show one with its options")
    losses.add_argument("name", nargs="?", help="a loss or term")
    losses.add_argument("--json", action="store_true", help="print JSON")
    losses.set_defaults(run=_losses)

    demo = commands.add_parser("demo", help="train on handwritten digits with several losses, on CPU, in minutes")
    demo.add_argument("--out", default="runs/demo", help="folder for data, runs and the report (default: %(default)s)")
    demo.add_argument(
        "--losses", help="joined by commas, each a name, or a name and terms such as clip+brownian_bridge=0.25"
    )
    demo.add_argument("--seeds", type=int, default=3, help="runs per loss (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=8, help="per run (default: %(default)s)")
    demo.add_argument("--batch-size", type=int, default=32)
    demo.set_defaults(run=_demo)

    _add_structure(commands)
    shards = commands.add_parser("shards", help="pack, index and check WebDataset shards")
    actions = shards.add_subparsers(metavar="ACTION", required=True)
    _add_pack(actions)
    index = actions.add_parser("index", help="write sizes.json for a folder of shards")
    index.add_argument("folder")
    index.set_defaults(run=_shards_index)
    check = actions.add_parser("check", help="count samples and faults; exit code 1 if there are any")
    check.add_argument("shards", help="a folder, a pattern with braces or stars, or several joined by ::")
    check.add_argument("--json", action="store_true", help="print one JSON object per shard")
    check.set_defaults(run=_shards_check)
    return parser


def _add_structure(commands) -> None:
    structure = commands.add_parser("structure", help="show how checkpoints lay out images and texts, in one picture")
    structure.add_argument(
        "--checkpoint", nargs="+", required=True, metavar="FILE",
        help="files that OpenCLIP's --pretrained takes, or folders of runs for their last epoch; several are compared",
    )  # fmt: skip
    structure.add_argument("--model", required=True, metavar="NAME", help="their architecture")
    structure.add_argument("--model-config", metavar="FILE", help="an OpenCLIP model config in JSON, as in training")
    structure.add_argument("--data", required=True, metavar="SHARDS", help="held-out pairs: a folder or pattern")
    structure.add_argument("--out", default="runs/structure", metavar="FOLDER", help="default: %(default)s")
    structure.add_argument("--num-samples", type=int, default=2000, help="pairs to look at (default: %(default)s)")
    structure.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    structure.add_argument("--workers", type=int, default=0, help="processes that load data (default: %(default)s)")
    structure.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    structure.add_argument("--caption-separator", metavar="TEXT", help="as in training; the first caption counts")
    structure.add_argument("--caption-key", metavar="KEY", help="as in training")
    structure.set_defaults(run=_structure)


def _add_pack(actions) -> None:
    pack = actions.add_parser("pack", help="make shards of a CSV or a folder of images")
    pack.add_argument("source", help="a CSV or TSV with a header row, or a folder of images")
    pack.add_argument("out", help="the folder to write shards and sizes.json to")
    pack.add_argument("--csv-img-key", default="filepath", help="column of image paths (default: %(default)s)")
    pack.add_argument("--csv-caption-key", default="title", help="column of captions (default: %(default)s)")
    pack.add_argument("--csv-separator", help="default: a tab for .tsv, else a comma")
    pack.add_argument(
        "--template", default="a photo of a {}",
        help="caption of an image without a .txt beside it; {} is its folder's name (default: %(default)s)",
    )  # fmt: skip
    pack.add_argument("--samples-per-shard", type=int, default=1000, help="default: %(default)s")
    pack.add_argument("--shuffle", action="store_true", help="mix the pairs over the shards; recommended for training")
    pack.add_argument("--seed", type=int, default=0, help="of the mixing")
    pack.set_defaults(run=_shards_pack)


def _train(argv: Sequence[str]) -> int:
    from openclip_ext.training.flags import parse_args

    args = parse_args(argv)
    from openclip_ext.training.run import train

    train(args)
    return 0


def _losses(args: argparse.Namespace) -> int:
    from openclip_ext.describe import describe_all, describe_one

    text, data = describe_one(args.name) if args.name else describe_all()
    print(json.dumps(data, indent=1) if args.json else text)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from openclip_ext.demo import LOSSES, run_demo

    losses = args.losses.split(",") if args.losses else LOSSES
    run_demo(args.out, losses=losses, seeds=args.seeds, epochs=args.epochs, batch_size=args.batch_size)
    return 0


def _structure(args: argparse.Namespace) -> int:
    from openclip_ext.structure import run_structure

    run_structure(args)
    return 0


def _shards_pack(args: argparse.Namespace) -> int:
    from openclip_ext.data import pack

    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {args.samples_per_shard}: must be at least 1")
    if os.path.isdir(args.source):
        pairs = pack.pairs_from_folder(args.source, args.template)
    else:
        pairs = pack.pairs_from_csv(args.source, args.csv_img_key, args.csv_caption_key, args.csv_separator)
    seed = args.seed if args.shuffle else None
    sizes = pack.pack(pairs, args.out, samples_per_shard=args.samples_per_shard, shuffle_seed=seed)
    print(f"{args.out}: {len(sizes)} shards, {sum(sizes.values())} samples, sizes.json")
    return 0


def _shards_index(args: argparse.Namespace) -> int:
    from openclip_ext.data.pack import index

    sizes = index(args.folder)
    print(f"{args.folder}/sizes.json: {len(sizes)} shards, {sum(sizes.values())} samples")
    return 0


def _shards_check(args: argparse.Namespace) -> int:
    from openclip_ext.data.check import check_shards, format_table
    from openclip_ext.data.listing import list_shards

    reports = check_shards(list_shards(args.shards, flag="shards check"))
    if args.json:
        print("\n".join(json.dumps(report.as_dict()) for report in reports))
    else:
        print(format_table(reports))
    return int(any(report.faults for report in reports))
