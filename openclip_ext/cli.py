"""The command line. torch is imported only inside the subcommand that needs it."""

import os
import sys
from collections.abc import Sequence

from openclip_ext import __version__
from openclip_ext.commands import (
    demo,
    diagnose,
    eval,
    export,
    interpolate,
    losses,
    patch,
    report,
    shards,
    structure,
    train,
)
from openclip_ext.errors import RankError, UserError
from openclip_ext.options import Parser
from openclip_ext.redact import redacted

DESCRIPTION = "Contrastive objectives for OpenCLIP that work at small batch, by name, without a fork."
COMMANDS = {
    "train": train,
    "losses": losses,
    "diagnose": diagnose,
    "demo": demo,
    "eval": eval,
    "interpolate": interpolate,
    "structure": structure,
    "report": report,
    "export": export,
    "shards": shards,
    "patch": patch,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. A wrong input is one line on stderr and code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # its flags are OpenCLIP's, parsed by OpenCLIP's parser
            return train.run_command_line(argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except UserError as error:
        if isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":  # else once per machine
            print(f"openclip-ext: {redacted(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("openclip-ext: interrupted", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="openclip-ext", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"openclip-ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
