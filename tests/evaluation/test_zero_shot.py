"""Scores against slow references and against OpenCLIP's own code."""

import contextlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from openclip_ext import UserError
from openclip_ext.evaluation.datasets.imagenet import imagenet_folder, wnids
from openclip_ext.evaluation.datasets.labelled import LabelledBatches
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores


@pytest.fixture
def encoder(model_config):
    """A tiny model of random weights."""
    open_clip.add_model_config(model_config)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test", output_dict=True)
    return Encoder(
        model=model.eval(), tokenizer=open_clip.get_tokenizer("tiny-test"), device=torch.device("cpu"),
        autocast=contextlib.nullcontext, dtype=None,
    )  # fmt: skip


@pytest.mark.parametrize("num_classes", [12, 2])
def test_zero_shot_equals_a_slow_count(encoder, num_classes):
    names, templates = [f"thing {n}" for n in range(num_classes)], ["a {}", "many {}s"]
    images, labels = torch.rand(30, 3, 32, 32), torch.arange(30) % (num_classes - 1)  # the last class has no image
    batches = zip(images.split(7), labels.split(7), strict=True)
    classifier = zero_shot_classifier(encoder, names, templates, progress=False)
    scores = zero_shot_scores(zero_shot_counts(encoder, classifier, batches, progress=False))
    with torch.no_grad():
        expected = open_clip.build_zero_shot_classifier(encoder.model, encoder.tokenizer, names, templates)
        logits = 100 * encoder.model.encode_image(images, normalize=True) @ expected
    assert torch.equal(classifier, expected)
    order = [sorted(range(num_classes), key=lambda c: -row[c]) for row in logits.tolist()]
    for top in (1, 3, 5):
        hits = [label in row[:top] for label, row in zip(labels.tolist(), order, strict=True)]
        assert scores[f"top{top}"] == pytest.approx(np.mean(hits))
    firsts = [[row[0] == c for label, row in zip(labels, order, strict=True) if label == c]
              for c in range(num_classes - 1)]  # fmt: skip
    assert scores["mean_per_class"] == pytest.approx(np.mean([np.mean(hits) for hits in firsts]))


def test_zero_shot_without_images_is_an_error():
    with pytest.raises(UserError, match="no image"):
        zero_shot_scores(torch.zeros(3, 4, dtype=torch.int64))


@pytest.mark.parametrize("style", ["wnid", "index"])
def test_imagenet_folders_are_numbered_as_imagenet_numbers_its_classes(tmp_path, style):
    for number, wnid in enumerate(wnids()):
        folder = tmp_path / (wnid if style == "wnid" else str(number))
        folder.mkdir()
        Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(folder / "a.png")
    to_tensor = lambda image: torch.tensor(image.getpixel((0, 0)))  # noqa: E731
    found = imagenet_folder(str(tmp_path), "--imagenet-val")
    for pixels, labels in LabelledBatches(found.pictures, to_tensor, batch_size=100, workers=0):
        assert torch.equal(pixels[:, 0] + 256 * pixels[:, 1], labels)


def test_a_folder_that_is_not_imagenet_is_refused(tmp_path):
    (tmp_path / "n01440764").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "n01440764" / "a.png")
    with pytest.raises(
        UserError, match="--imagenet-val .*: holds 1 of ImageNet's 1000 class folders; .*--classes present"
    ):
        imagenet_folder(str(tmp_path), "--imagenet-val")
