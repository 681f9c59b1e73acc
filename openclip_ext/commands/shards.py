"""`openclip-ext shards pack`, `index` and `check`."""

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openclip_ext.errors import UserError

if TYPE_CHECKING:
    from openclip_ext.data.sizes import Sizes

HELP = "pack, index and check WebDataset shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_pack(actions)
    index = actions.add_parser(
        "index", help="write sizes.json for folders of shards",
        description="Count the samples of each shard and write them to sizes.json beside the shards, for training to "
        "number samples by. Where captions are, as shards pack notes it there, is kept. Shards that are elsewhere are "
        "given as URLs, 'pipe:' and others, with --out; training takes the sizes.json that is written there as its "
        "--train-data. What has been counted is kept: the same command goes on after an interruption.",
    )  # fmt: skip
    index.add_argument(
        "folders", nargs="+", metavar="FOLDER",
        help="braces and stars do, as in 'wds/{train,val}'; or URLs of shards, as in 's3://bucket/{000..331}.tar'",
    )  # fmt: skip
    index.add_argument("--out", metavar="FOLDER", help="where sizes.json of shards that are elsewhere goes")
    index.add_argument("--jobs", type=int, default=1, help="processes that count (default: %(default)s)")
    index.add_argument(
        "--skip-unreadable", action="store_true",
        help="go on past a shard that cannot be read to its end: name it, and count what can be read of it",
    )  # fmt: skip
    index.set_defaults(action=_index)
    check = actions.add_parser(
        "check", help="count samples and faults; exit code 1 if there are any",
        description="Read shards to their end and count what training would skip or misread: images that cannot be "
        "decoded, captions that are missing or empty, keys that come twice in a folder, shards that break off, other "
        "numbers of samples than sizes.json says. Exit code 1 if there is any.",
    )  # fmt: skip
    check.add_argument(
        "shards", help="a folder, a pattern of shards or folders with braces or stars, or several joined by ::"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object per shard")
    check.set_defaults(action=_check)


def _add_pack(actions) -> None:
    pack = actions.add_parser(
        "pack", help="make shards of a CSV or a folder of images",
        description="Write WebDataset shards and their sizes.json. An image that has several rows in the CSV becomes "
        "one sample: its captions are a list in the sample's JSON, the first is its text, and sizes.json notes that, "
        "for training and evaluation to find them.",
    )  # fmt: skip
    pack.add_argument("source", help="a CSV or TSV with a header row, or a folder of images")
    pack.add_argument("out", help="the folder to write shards and sizes.json to")
    pack.add_argument("--csv-img-key", default="filepath", help="column of image paths (default: %(default)s)")
    pack.add_argument("--csv-caption-key", default="title", help="column of captions (default: %(default)s)")
    pack.add_argument("--csv-separator", metavar="CHARACTER", help="between columns; default: recognised")
    pack.add_argument(
        "--one-row-per-sample", action="store_true",
        help="write a sample for each row of the CSV; default: one for each image, with the captions of all its rows",
    )  # fmt: skip
    pack.add_argument(
        "--template", default="a photo of a {}",
        help="caption of an image without a .txt beside it; {} is its folder's name (default: %(default)s)",
    )  # fmt: skip
    pack.add_argument("--samples-per-shard", type=int, default=1000, help="default: %(default)s")
    pack.add_argument("--shuffle", action="store_true", help="mix the pairs over the shards; recommended for training")
    pack.add_argument("--seed", type=int, default=0, help="of the mixing")
    pack.set_defaults(action=_pack)


def run(args: argparse.Namespace) -> int:
    return args.action(args)


def _pack(args: argparse.Namespace) -> int:
    from openclip_ext.data.pack import pack
    from openclip_ext.data.pairs import captions_by_image, pairs_from_csv, pairs_from_folder

    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {args.samples_per_shard}: must be at least 1")
    if os.path.isdir(args.source):
        pairs: Sequence[tuple[str, str | Sequence[str]]] = pairs_from_folder(args.source, args.template)
    else:
        rows = pairs_from_csv(args.source, args.csv_img_key, args.csv_caption_key, args.csv_separator)
        by_image = captions_by_image(rows)
        grouped = len(by_image) < len(rows) and not args.one_row_per_sample
        pairs = list(by_image.items()) if grouped else rows
    seed = args.seed if args.shuffle else None
    packed = pack(pairs, args.out, samples_per_shard=args.samples_per_shard, shuffle_seed=seed)
    sizes = packed.sizes
    where = f", in JSON under {sizes.caption_key!r}, as sizes.json notes" if sizes.caption_key else ""
    print(f"{args.out}: {len(sizes.of_shard)} shards, {sizes.total} images, {packed.num_captions} captions{where}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from openclip_ext.data.index import index, index_urls
    from openclip_ext.data.listing import expand_urls, is_local, list_folders

    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    remote = [pattern for pattern in args.folders if not is_local(pattern)]
    if remote and (len(remote) < len(args.folders) or not args.out):
        raise UserError(f"shards index {remote[0]}: give URLs alone, and --out FOLDER for their sizes.json")
    if args.out and not remote:
        raise UserError(f"--out {args.out}: sizes.json of local shards goes beside them; drop it")
    how = {"skip_unreadable": args.skip_unreadable, "jobs": args.jobs}
    if remote:
        urls = [url for pattern in remote for url in expand_urls(pattern, "shards index")]
        _say_index(args.out, *index_urls(urls, args.out, **how))
        return 0
    for folder in [folder for pattern in args.folders for folder in list_folders(pattern, "shards index")]:
        _say_index(folder, *index(folder, **how))
    return 0


def _say_index(folder: str, sizes: "Sizes", faults: list[str]) -> None:
    print("\n".join([*faults, f"{folder}/sizes.json: {len(sizes.of_shard)} shards, {sizes.total} samples"]))


def _check(args: argparse.Namespace) -> int:
    from openclip_ext.data.check import check_shards, format_table
    from openclip_ext.data.listing import list_shards

    reports = check_shards(list_shards(args.shards, flag="shards check"))
    if args.json:
        print("\n".join(json.dumps(report.as_dict()) for report in reports))
    else:
        print(format_table(reports))
    return int(any(report.faults for report in reports))
