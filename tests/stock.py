"""OpenCLIP's own training loop in tests, as installed or as a patched copy."""

import contextlib
import importlib
import logging
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.stock_loop import patching

_SPEC = find_spec("open_clip_train")
assert _SPEC and _SPEC.origin
INSTALLED = Path(_SPEC.origin).parent


def copy_installed(folder):
    """A folder that holds a copy of the installed `open_clip_train`, as it is without the patch."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(INSTALLED, Path(folder) / "open_clip_train", ignore=ignored)
    target = patching.find_target(str(folder))
    if target.state == "applied":
        patching.revert(target)
    return Path(folder)


def patched_copy(folder):
    patching.apply(patching.find_target(str(copy_installed(folder))))
    return Path(folder)


@contextlib.contextmanager
def logging_kept():
    """OpenCLIP adds handlers to the root logger and sets the level of every other."""
    handlers = list(logging.root.handlers)
    loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def imported_from(folder):
    """`open_clip_train.main`, and every later import of the package inside, from the folder."""

    def loaded():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "open_clip_train"}

    kept = loaded()
    for name in kept:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        main = importlib.import_module("open_clip_train.main")
        assert Path(main.__file__).is_relative_to(folder)
        yield main
    finally:
        sys.path.remove(str(folder))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(kept)
        importlib.invalidate_caches()


class OurBatches:
    """Our loader in the shape in which OpenCLIP's loop takes one, patched or not.

    Several ranks take turns in it, `accum_freq` batches each, so that a step's gathered pairs are in one rank's order.
    """

    def __init__(self, args, preprocess, tokenizer):
        plugin = getattr(args, "loss_plugin", None)
        self.keys = plugin.batch_keys if plugin else ()
        source = list_shards(args.train_data)
        config = StreamConfig(
            source=source,
            batch_size=args.batch_size,
            image_transform=preprocess,
            tokenizer=tokenizer,
            sample_id="index" if "sample_ids" in self.keys else None,
            image_aug_transform=preprocess if "image_aug" in self.keys else None,
            text_aug="text_aug" in self.keys,
        )
        self.loader = train_loader(config, num_samples=source.length, workers=0)
        self.dataloader = self
        self.num_batches, self.num_samples = self.loader.num_batches // args.world_size, self.loader.num_samples
        self.is_mine = lambda index: index // args.accum_freq % args.world_size == args.rank

    def set_epoch(self, epoch):
        self.loader.set_epoch(epoch)

    def __iter__(self):
        for index, batch in enumerate(self.loader.batches):
            if self.is_mine(index):
                yield tuple(batch[name] for name in ("image", "text", *self.keys))


def our_data(args, preprocess, epoch, tokenizer):
    """In place of OpenCLIP's `get_data`."""
    return {"train": OurBatches(args, preprocess[0], tokenizer)}


def feed_our_batches(monkeypatch, main):
    """Let OpenCLIP's loop train on our batches, whose order is a function of the seed."""
    monkeypatch.setattr(main, "get_data", our_data)


def without_ours(flags):
    """The command line of `openclip-ext train` for OpenCLIP's own, which knows the model config and needs braces."""
    flags = list(flags[1:])
    data = flags.index("--train-data") + 1
    if Path(flags[data]).is_dir():
        flags[data] += f"/{{00000..{len(list(Path(flags[data]).glob('*.tar'))) - 1:05}}}.tar"
    position = flags.index("--model-config")
    del flags[position : position + 2]
    return flags


def stock_losses(monkeypatch, flags):
    """Losses of each step of stock's loop over our batches."""
    stock = importlib.import_module("open_clip_train.main")
    seen = []
    create_loss = stock.create_loss

    def recording(args):
        loss = create_loss(args)

        def forward(**inputs):
            outputs = loss(**inputs)
            seen.append(outputs["contrastive_loss"].item())
            return outputs

        return forward

    monkeypatch.setattr(stock, "create_loss", recording)
    feed_our_batches(monkeypatch, stock)
    with logging_kept():
        stock.main(flags)
    return seen


def moving(checkpoint, part="state_dict"):
    """Weights whose gradient is not zero up to rounding, as that of the keys' bias is: there Adam amplifies noise."""
    return {key: value for key, value in checkpoint[part].items() if "in_proj_bias" not in key}
