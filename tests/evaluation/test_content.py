"""Checksums of data sets: equal for the same content wherever it lies, and for nothing else."""

import shutil

import numpy as np
import pytest
import torch
from torchvision.datasets import FakeData, ImageFolder

from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.evaluation.datasets.content import (
    checksum_of_files,
    checksum_of_pairs,
    checksum_of_pictures,
    checksum_of_shards,
    content_id,
)
from openclip_ext.evaluation.datasets.labelled_sets import labelled_set


def checksum(folder):
    return labelled_set(str(folder), "--zero-shot", None, None).checksum()


def test_class_folders_are_known_by_their_files_wherever_they_lie(digit_folders, tmp_path):
    copy = tmp_path / "elsewhere" / "again"
    shutil.copytree(digit_folders, copy)
    assert checksum(copy) == checksum(digit_folders)
    seen = {checksum(copy)}
    (copy / "3").rename(copy / "other")
    seen.add(checksum(copy))
    (copy / "other").rename(copy / "3")
    assert checksum(copy) in seen
    picture = next((copy / "3").iterdir())
    picture.write_bytes(picture.read_bytes() + b"0")
    seen.add(checksum(copy))
    picture.unlink()
    seen.add(checksum(copy))
    assert len(seen) == 4


def test_classes_count(digit_folders):
    paths = sorted(map(str, digit_folders.glob("*/*.png")))
    assert checksum_of_files((path, 0) for path in paths) != checksum_of_files((path, 1) for path in paths)
    assert checksum_of_files((path, 0) for path in reversed(paths)) == checksum_of_files((path, 0) for path in paths)


def test_shards_are_known_by_what_is_in_them_not_by_their_sizes(pairs, tmp_path):
    sums = []
    for name, some in (("a", pairs[:10]), ("b", pairs[10:20]), ("c", pairs[:10])):
        pack(some, str(tmp_path / name), samples_per_shard=5, progress=False)
        sums.append(checksum_of_shards(list_shards(str(tmp_path / name)).urls))
    sizes = [[path.stat().st_size for path in sorted((tmp_path / name).glob("*.tar"))] for name in "ab"]
    assert sizes[0] == sizes[1]  # tars are padded
    assert len(sizes[0]) == 2
    assert sums[0] != sums[1] and sums[0] == sums[2]
    urls = list_shards(str(tmp_path / "a")).urls
    assert checksum_of_shards(urls[::-1]) == sums[0] != checksum_of_shards(urls[:1])
    with open(urls[0], "r+b") as file:
        file.truncate(5000)
    assert checksum_of_shards(urls) not in sums
    assert checksum_of_shards([*urls, "https://example.com/a.tar"]) is None


def test_foreign_sets_are_known_by_their_files_or_arrays(digit_folders):
    class Arrays:
        data, targets = np.arange(12, dtype=np.uint8).reshape(3, 4), [0, 1, 2]

    first = checksum_of_pictures(Arrays())
    assert first == checksum_of_pictures(Arrays())
    Arrays.targets = [0, 1, 1]
    assert checksum_of_pictures(Arrays()) != first
    folder = ImageFolder(str(digit_folders))
    assert checksum_of_pictures(folder) == checksum(digit_folders)
    assert checksum_of_pictures(FakeData(3)) is None


@pytest.fixture
def ids():
    """Of three pictures, of which the first has two captions."""
    images, texts = ([content_id(word.encode()) for word in words] for words in ("abc", "stuv"))
    return torch.tensor(images), torch.tensor(texts), torch.tensor([0, 0, 1, 2])


def test_pairs_are_known_in_any_order_and_other_pairs_are_not(ids):
    images, texts, owner = ids
    order, places = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = images[places], texts[order], places.argsort()[owner[order]]
    assert checksum_of_pairs(*moved) == checksum_of_pairs(*ids)
    assert checksum_of_pairs(images, texts, owner.flip(0)) != checksum_of_pairs(*ids)
    assert checksum_of_pairs(images, texts.flip(0), owner) != checksum_of_pairs(*ids)
