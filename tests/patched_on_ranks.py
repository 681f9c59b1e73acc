"""OpenCLIP's patched loop as `torchrun` starts it, with each step's losses kept: MODEL_CONFIG LOSSES FLAGS…"""

import json
import os
import sys
from pathlib import Path

import open_clip


def main() -> None:
    model_config, losses_file, *flags = sys.argv[1:]
    open_clip.add_model_config(model_config)
    from open_clip_train.loss_plugins import LossPlugin
    from open_clip_train.main import main as train

    forward, rows = LossPlugin.forward, []

    def recording(self, *args):
        losses, logit_scale = forward(self, *args)
        rows.append({name: value.item() for name, value in losses.items()})
        return losses, logit_scale

    LossPlugin.forward = recording
    train(flags)
    if os.environ["RANK"] == "0":
        Path(losses_file).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
