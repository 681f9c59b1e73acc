"""Runs of OpenCLIP 4's loop for `test_open_clip_main`, in a process of their own: its `open_clip` is another one.

    python open_clip_main_jobs.py MODEL_CONFIG JOBS.json RESULTS.json

A job is `{"name", "flags", "batches"}`; `batches` is "ours" for those of `openclip-ext train`, "theirs" for OpenCLIP's,
or "saved" to train nothing and save the rows of an epoch; "train" stands for `openclip-ext train` itself. Optional
is the `scale` that a gradient scaler begins with. Its result holds the `losses` of each step, `exit`, `error`, and how
often the scale was read.
"""

import contextlib
import functools
import io
import json
import sys

import open_clip
import torch
from open_clip.task import CLIPTask
from open_clip_train import main as loop
from open_clip_train.params import parse_args

from openclip_ext import cli
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.streams import StreamConfig


class OurBatches:
    """Our loader in the shape in which OpenCLIP's loop takes one."""

    def __init__(self, args, preprocess, tokenizer):
        plugin = getattr(args, "loss_plugin", None)
        needs = plugin.needs if plugin else ()
        config = StreamConfig(
            source=list_shards(args.train_data),
            batch_size=args.batch_size,
            image_transform=preprocess,
            tokenizer=tokenizer,
            sample_id="index" if "sample_ids" in needs else None,
            image_aug_transform=preprocess if "image_aug" in needs else None,
            text_aug="text_aug" in needs,
        )
        self.loader = train_loader(config, num_samples=config.source.length, workers=0)
        self.dataloader = self
        self.num_batches, self.num_samples = self.loader.num_batches, self.loader.num_samples

    def set_epoch(self, epoch):
        self.loader.set_epoch(epoch)

    def __iter__(self):
        for batch in self.loader.batches:
            for key in ("skipped", "origins", "place"):  # which our loop takes out itself
                batch.pop(key, None)
            yield batch


def save_rows(flags):
    """Save what OpenCLIP's pipeline gives in its third epoch, by name, to the path that `--logs` gives."""
    args = parse_args(flags)
    args.world_size = 1
    transform, tokenizer = open_clip.image_transform(32, is_train=True), open_clip.get_tokenizer(args.model)
    loader = loop.get_data(args, (transform, transform), epoch=2, tokenizer=tokenizer)["train"].dataloader
    batches = list(loader)
    torch.save({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, args.logs)


def run(job):
    if job["batches"] == "saved":
        return save_rows(job["flags"])
    if job["batches"] == "train":
        sys.exit(cli.main(["train", *job["flags"]]))
    get_data, scaler = loop.get_data, torch.amp.GradScaler
    if "scale" in job:
        torch.amp.GradScaler = functools.partial(scaler, init_scale=job["scale"])
    if job["batches"] == "ours":
        loop.get_data = lambda args, preprocess, epoch, tokenizer, naflex_data_config: {
            "train": OurBatches(args, preprocess[0], tokenizer)
        }
    try:
        loop.main(job["flags"])
    finally:
        loop.get_data, torch.amp.GradScaler = get_data, scaler


def recorded(forward, losses):
    def training_forward(self, batch):
        outputs, report = forward(self, batch)
        losses.append({name: value.item() for name, value in outputs.items()})
        return outputs, report

    return training_forward


def counted(get_scale, reads):
    def counting(self):
        reads.append(self)
        return get_scale(self)

    return counting


def main(model_config, jobs, results):
    open_clip.add_model_config(model_config)
    torch.set_num_threads(1)
    losses, reads, done = [], [], {}
    torch.amp.GradScaler.get_scale = counted(torch.amp.GradScaler.get_scale, reads)
    classes = [CLIPTask]
    with contextlib.suppress(ImportError):  # a checkout without the patch has no use for it
        from openclip_ext.stock_loop.task_v4 import LossTask

        classes.append(LossTask)
    for task in classes:
        task.training_forward = recorded(task.training_forward, losses)
    with open(jobs) as file:
        todo = json.load(file)
    for job in todo:
        losses.clear()
        reads.clear()
        result = {"exit": 0, "error": ""}
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                run(job)
            except SystemExit as exit:
                result["exit"], result["error"] = exit.code, stderr.getvalue()
            except ValueError as error:
                result["exit"], result["error"] = 1, str(error)
        done[job["name"]] = result | {"losses": list(losses), "scale_reads": len(reads)}
    with open(results, "w") as file:
        json.dump(done, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
