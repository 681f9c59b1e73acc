"""The data pipeline as tests read it: pictures and captions as plain tensors, which can be compared."""

import random

import numpy as np
import torch
from torchvision.transforms.functional import pil_to_tensor

from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.streams import StreamConfig


def to_tensor(image):
    return pil_to_tensor(image).float()


def noisy(image):
    return to_tensor(image) + torch.rand(1) + random.random() + np.random.rand()


def as_codes(texts):
    """Captions as fixed-length character codes, so that a batch can be compared with the shard's text."""
    return torch.tensor([[ord(c) for c in text[:60].ljust(60)] for text in texts])


def config(folder, **changes):
    fixed = {"batch_size": 16, "image_transform": to_tensor, "tokenizer": as_codes, "sample_id": "index"}
    return StreamConfig(source=list_shards(folder), **(fixed | changes))


def epoch(folder, *, workers=0, number=0, num_samples=256, **changes):
    loader = train_loader(config(folder, **changes), num_samples=num_samples, workers=workers)
    loader.set_epoch(number)
    return list(loader.batches)
