"""`openclip-ext patch status`, `apply`, `revert` and `diff`."""

import argparse
import sys

from openclip_ext.errors import UserError

HELP = "give OpenCLIP's own training loop the flags --loss, --loss-arg and --loss-term"

_ACTIONS = {
    "status": "say which OpenCLIP is found, whether it is patched, and which versions can be",
    "apply": "patch it, wholly or not at all, and keep the originals",
    "revert": "put the originals back, byte for byte",
    "diff": "print the patch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    for name, meaning in _ACTIONS.items():
        action = actions.add_parser(name, help=meaning)
        action.add_argument(
            "--target",
            metavar="DIR",
            help="the folder that holds open_clip_train/, or a source checkout. Default: the installed OpenCLIP",
        )


def run(args: argparse.Namespace) -> int:
    from openclip_ext.stock_loop import patching
    from openclip_ext.stock_loop.patch_files import patches

    target = patching.find_target(args.target)
    if args.action == "status":
        print(f"{target}: {target.state}" + (f", {target.patch.name}" if target.patch else ""))
        print("supported: " + ", ".join(f"{patch.supported} ({patch.name})" for patch in patches()))
    elif args.action == "diff":
        if target.patch is None:
            raise UserError(patching.unsupported(target))
        sys.stdout.write(target.patch.text.decode())
    else:
        change = patching.apply if args.action == "apply" else patching.revert
        patch = change(target)
        done = "patched with" if args.action == "apply" else "reverted"
        print(f"{target}: {done} {patch.name}, {len(patch.files)} files")
    return 0
