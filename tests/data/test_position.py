"""An epoch that goes on from where it was left has the batches that are left of it, to the bit."""

import pathlib
import shutil
import tarfile

import pytest
import torch

from batches import as_codes, config, noisy
from openclip_ext.data import passes, streams
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.position import Position
from openclip_ext.data.streams import Start, StreamConfig
from openclip_ext.data.table import Table


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch):
    """Else it holds all samples of a test before the first one leaves it."""
    monkeypatch.setattr(passes, "SAMPLE_BUFFER", (30, 10))


def read_epoch(stream, number=2, *, start=None, workers=0, num_samples=256):
    """Batches of an epoch with the position after each."""
    loader = train_loader(stream, num_samples=num_samples, workers=workers, start=start)
    loader.set_epoch(number)
    position, found = loader.position(number), []
    for batch in loader.batches:
        assert "error" not in batch
        batch.pop("skipped")
        position.advance(stream.rank, batch)
        found.append((batch, position.state_dict()))
    assert len(found) == loader.batches_left(number)
    return found


def check(stream, after=(1, 2, 7, 15), **options):
    whole = read_epoch(stream, **options)
    for count in after:
        start = Start(2, Position.from_state_dict(whole[count - 1][1]))
        left = read_epoch(stream, start=start, **options)
        assert len(left) == len(whole) - count
        for (batch, state), (expected, expected_state) in zip(left, whole[count:], strict=True):
            assert batch.keys() == expected.keys() and state == expected_state
            assert all(torch.equal(value, expected[name]) for name, value in batch.items())
    return whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"resampled": True}, {"rank": 1, "world_size": 2, "batch_size": 8}])
def test_shards_go_on(shards, workers, changes):
    check(config(shards, image_transform=noisy, image_aug_transform=noisy, **changes), workers=workers)


@pytest.mark.parametrize("changes", [{"captions": None}, {"sample_id": "hash"}, {"sample_id": None}])
def test_other_rows_go_on(shards, changes):
    check(config(shards, image_transform=noisy, **changes))


def test_several_sources_go_on_and_so_do_passes_that_start_over(shards):
    sources = f"{shards}/00000.tar::{shards}/{{00002,00003}}.tar"
    whole = check(config(sources), num_samples=640, after=(1, 11, 12, 13, 25, 39))
    numbers = [state["places"][0][0][0] for _, state in whole]
    assert numbers[-1] == 3 and numbers == sorted(numbers)


@pytest.fixture
def faulty(tmp_path, shards):
    """Four shards, without `sizes.json`: one has broken samples, one breaks off, and one is none."""
    with tarfile.open(f"{shards}/00000.tar") as source, tarfile.open(tmp_path / "0.tar", "w") as target:
        for number, member in enumerate(source.getmembers()):
            content = source.extractfile(member)
            member.size = min(member.size, 20) if number % 9 == 0 else member.size
            target.addfile(member, content)
    whole = pathlib.Path(shards, "00001.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.tar").write_bytes(b"no tar" * 300)
    shutil.copy(f"{shards}/00003.tar", tmp_path / "3.tar")
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_cannot_be_used_are_passed_over_too(faulty, workers):
    check(config(faulty, sample_id="hash"), num_samples=512, after=(1, 5, 8, 9, 17, 30), workers=workers)


def test_a_table_goes_on(tmp_path, pairs):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(pairs[number][0] if number != 3 else b"no picture")
    rows = [(str(tmp_path / f"{number % 5}.png"), f"caption {number}") for number in range(50)]
    for world_size in (1, 2):
        stream = StreamConfig(
            source=Table("t.csv", rows), batch_size=4, image_transform=noisy, tokenizer=as_codes, sample_id="index",
            rank=world_size - 1, world_size=world_size,
        )  # fmt: skip
        for workers in (0, 2):
            check(stream, after=(1, 4), workers=workers)


def test_shards_whose_samples_were_used_are_not_opened_and_no_sample_is_decoded_twice(shards, monkeypatch):
    stream = config(shards, batch_size=8)
    whole = read_epoch(stream)
    position = whole[25][1]
    opened, decoded = [], []
    read, decode = streams.tar.read_shard, streams.tar.decode_image
    monkeypatch.setattr(streams.tar, "read_shard", lambda url, record: opened.append(url) or read(url, record))
    monkeypatch.setattr(streams.tar, "decode_image", lambda *given: decoded.append(1) or decode(*given))
    left = read_epoch(stream, start=Start(2, Position.from_state_dict(position)))
    assert len(decoded) == 8 * len(left) == 48
    (_, drawn, sizes), *_ = position["places"][0]
    assert drawn == 208 and len(sizes) == 3
    assert len(opened) <= 2  # the one that was being read, and one whose last samples waited


def test_a_shard_that_is_gone_meanwhile_is_told(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "s")
    stream = config(str(tmp_path / "s"), batch_size=8)
    start = Start(2, Position.from_state_dict(read_epoch(stream)[3][1]))
    for path in (tmp_path / "s").glob("*.tar"):
        path.write_bytes(b"")
    loader = train_loader(stream, num_samples=256, workers=0, start=start)
    loader.set_epoch(2)
    (batch,) = loader.batches
    assert "unreadable shard" in batch["error"]
