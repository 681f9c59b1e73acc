"""The folder of a run."""

import argparse
import datetime
import os

from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
)

from openclip_ext.errors import UserError


def run_folder(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """The folder of this run, None with `--logs none`. Not made yet.

    Raises:
        UserError: it holds a run already.
    """
    if not args.logs or args.logs.lower() == "none":
        return None
    if args.name is None:
        stamp = datetime.datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
        (stamp,) = broadcast_object_list([stamp]) if accelerator.num_processes > 1 else (stamp,)
        model = args.model.replace("/", "-").replace(":", "-")
        args.name = f"{stamp}-model_{model}-loss_{args.loss}-lr_{args.lr}-b_{args.batch_size}-p_{args.precision}"
    folder = os.path.join(args.logs, args.name)
    if os.path.exists(os.path.join(folder, "params.txt")) and args.resume is None:
        raise UserError(f"--name {args.name}: {folder} holds a run already; use another --name, or --resume latest")
    return folder
