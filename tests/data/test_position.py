"""An epoch that goes on from where it was left has the batches that are left of it, to the bit."""

import collections
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


def test_an_epoch_that_has_become_shorter_meanwhile_is_over(shards):
    _, state = read_epoch(config(shards))[9]
    assert read_epoch(config(shards), start=Start(2, Position.from_state_dict(state)), num_samples=100) == []


def ids(batches):
    return [number for batch, _ in batches for number in batch["sample_ids"].tolist()]


def read_by_all(shards, layout, *, start=None, batches=None):
    """Ids of the samples of an epoch, or of its first batches, on all ranks of a layout, and where they then are."""
    world_size, workers, batch_size = layout
    seen, places = [], []
    for rank in range(world_size):
        stream = config(shards, rank=rank, world_size=world_size, batch_size=batch_size)
        found = read_epoch(stream, start=start, workers=workers)[:batches]
        seen += ids(found)
        places.append(found[-1][1]["places"][rank])
        state = found[-1][1]
    return seen, Start(2, Position.from_state_dict(state | {"places": places}))


@pytest.mark.parametrize(
    "layouts", [[(2, 2, 8), (1, 0, 8)], [(1, 0, 16), (2, 2, 8)], [(2, 1, 8), (1, 2, 4), (4, 1, 2)]]
)
def test_others_go_on_with_what_nobody_has_read(shards, layouts):
    seen, start = [], None
    for layout in layouts[:-1]:
        part, start = read_by_all(shards, layout, start=start, batches=4)
        seen += part
    rest, _ = read_by_all(shards, layouts[-1], start=start)
    assert sorted(seen + rest) == list(range(256))


def test_what_comes_twice_or_not_at_all_is_said(shards):
    seen, start = read_by_all(shards, (2, 2, 8), batches=3)
    stream = config(shards, batch_size=32)
    loader = train_loader(stream, num_samples=256, workers=0, start=start)
    rest = ids(read_epoch(stream, start=start))
    counts = collections.Counter(seen + rest)
    assert len(seen) == 48 and len(rest) == 7 * 32
    twice, never = sum(count - 1 for count in counts.values()), 256 - len(counts)
    # Of 208 samples, 16 fill no batch; another pass fills it, in which some of these may come.
    assert loader.remarks == (
        [
            "epoch 3 was begun by 2 processes x 2 workers x batch 8, and goes on with 1 process x 1 worker x batch 32: "
            "of 208 samples left, 16 do not come, and 32 come again"
        ]
    )
    assert never <= 16 and twice - never == 16


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"resampled": True}, "it is drawn with replacement"), ({"seed": 1}, "the data is another"),
     ({"sample_id": "hash"}, "its samples have no numbers")],
)  # fmt: skip
def test_where_nobody_knows_what_was_read_other_passes_go_on(shards, faulty, changes, why):
    folder = faulty if changes == {"sample_id": "hash"} else shards
    first = {name: value for name, value in changes.items() if name != "seed"}
    _, state = read_epoch(config(folder, **first))[4]
    stream = config(folder, batch_size=8, **changes)
    start = Start(2, Position.from_state_dict(state))
    loader = train_loader(stream, num_samples=256, workers=0, start=start)
    assert loader.remarks[0].endswith(f": {why}, so the rest of it comes from all samples, those seen too")
    found = read_epoch(stream, start=start)
    assert len(found) == 22 and found[0][1]["places"][0][0][0] == 1
    # And goes on from there as any other.
    again = read_epoch(stream, start=Start(2, Position.from_state_dict(found[9][1])))
    assert all(
        torch.equal(batch["image"], expected["image"])
        for (batch, _), (expected, _) in zip(again, found[10:], strict=True)
    )


def test_other_ranks_go_on_with_the_rows_of_a_table_that_are_left(pairs, tmp_path):
    (tmp_path / "a.png").write_bytes(pairs[0][0])
    table = Table("t.csv", [(str(tmp_path / "a.png"), "a")] * 50)
    fixed = {"source": table, "image_transform": noisy, "tokenizer": as_codes, "sample_id": "index"}
    whole = read_epoch(StreamConfig(batch_size=6, **fixed))
    rest = []
    for rank in range(2):
        stream = StreamConfig(batch_size=5, rank=rank, world_size=2, **fixed)
        rest += ids(read_epoch(stream, start=Start(2, Position.from_state_dict(whole[2][1]))))
    assert len(rest) == 30 and len({*ids(whole[:3]), *rest}) == 48
