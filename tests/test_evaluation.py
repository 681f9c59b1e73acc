"""Scores against slow references and against OpenCLIP's own code."""

import contextlib

import open_clip
import pytest
import torch
from PIL import Image

from openclip_ext import UserError
from openclip_ext.evaluation.zero_shot import imagenet_loader, zero_shot_accuracy


@pytest.fixture
def model(model_config):
    open_clip.add_model_config(model_config)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-test", output_dict=True)
    return model.eval(), preprocess, open_clip.get_tokenizer("tiny-test")


def test_zero_shot_equals_openclips_classifier_and_a_slow_count(model):
    model, _, tokenizer = model
    names, templates = [f"thing {n}" for n in range(12)], ["a {}", lambda name: f"many {name}s"][:1]
    images, labels = torch.rand(30, 3, 32, 32), torch.arange(30) % 12
    scores = zero_shot_accuracy(
        model, tokenizer, list(zip(images.split(7), labels.split(7), strict=True)), names, templates,
        device=torch.device("cpu"), autocast=contextlib.nullcontext, progress=False,
    )  # fmt: skip
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    with torch.no_grad():
        logits = 100 * model.encode_image(images, normalize=True) @ classifier
    order = logits.argsort(dim=1, descending=True)
    assert scores["top1"] == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert scores["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert scores["num_samples"] == 30


def test_zero_shot_without_images_is_an_error(model):
    model, _, tokenizer = model
    with pytest.raises(UserError, match="no image"):
        zero_shot_accuracy(model, tokenizer, [], ["a"], ["{}"], device=torch.device("cpu"),
                           autocast=contextlib.nullcontext, progress=False)  # fmt: skip


@pytest.mark.parametrize("style", ["wnid", "index"])
def test_imagenet_folders_are_numbered_as_imagenet_numbers_its_classes(tmp_path, style):
    for number in range(1000):
        folder = tmp_path / (f"n{number:08d}" if style == "wnid" else str(number))
        folder.mkdir()
        Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(folder / "a.png")
    to_tensor = lambda image: torch.tensor(image.getpixel((0, 0)))  # noqa: E731
    loader = imagenet_loader(str(tmp_path), to_tensor, flag="--imagenet-val", batch_size=100, workers=0)
    for pixels, labels in loader:
        assert torch.equal(pixels[:, 0] + 256 * pixels[:, 1], labels)


def test_a_folder_that_is_not_imagenet_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="--imagenet-val .*: holds 1 class folders and ImageNet has 1000"):
        imagenet_loader(str(tmp_path), None, flag="--imagenet-val", batch_size=1, workers=0)
