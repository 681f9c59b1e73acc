"""OpenCLIP's patched loop as `torchrun` starts it, with each step's losses kept: MODEL_CONFIG LOSSES BATCHES FLAGS…

BATCHES is `ours` for those of `openclip-ext train`, in its order, or `theirs` for OpenCLIP's own pipeline.
"""

import json
import os
import sys
from pathlib import Path

import open_clip

import stock


def main() -> None:
    model_config, losses_file, batches, *flags = sys.argv[1:]
    open_clip.add_model_config(model_config)
    from open_clip_train import main as loop
    from open_clip_train.loss_plugins import LossPlugin

    if batches == "ours":
        loop.get_data = stock.our_data
    forward, rows = LossPlugin.forward, []

    def recording(self, *args):
        losses, logit_scale = forward(self, *args)
        rows.append({name: value.item() for name, value in losses.items()})
        return losses, logit_scale

    LossPlugin.forward = recording
    loop.main(flags)
    if os.environ["RANK"] == "0":
        Path(losses_file).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
