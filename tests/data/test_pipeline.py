"""Streams of batches: ids, order, faults, and what they do not depend on."""

import collections
import hashlib
import os
import pathlib
import random
import shutil
import tarfile

import numpy as np
import pytest
import torch

from batches import as_codes, config, epoch, noisy, to_tensor
from openclip_ext import UserError
from openclip_ext.data.hash_ids import HashIds
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import eval_loader, train_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import Table
from openclip_ext.data.tar import Skips, decode_caption, decode_image, read_shard


def ids_of(batches):
    return torch.cat([batch["sample_ids"] for batch in batches]).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_sample_once_under_its_own_id(shards, workers):
    batches = epoch(shards, workers=workers)
    assert sorted(ids_of(batches)) == list(range(256))
    originals = {}
    for url in list_shards(shards).urls:
        for sample in read_shard(url, Skips().record):
            record = Skips().record
            originals[len(originals)] = decode_image(sample, record), decode_caption(sample, record)
    for batch in batches:
        assert not batch["skipped"]
        for image, text, sample_id in zip(batch["image"], batch["text"], batch["sample_ids"].tolist(), strict=True):
            picture, caption = originals[sample_id]
            assert torch.equal(image, to_tensor(picture)) and torch.equal(text, as_codes([caption])[0])


def test_ranks_and_workers_share_the_shards(shards):
    seen = [ids_of(epoch(shards, rank=rank, world_size=2, workers=2)) for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(256))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_a_function_of_seed_and_epoch(shards, workers):
    first = ids_of(epoch(shards, workers=workers))
    random.seed(99)
    torch.manual_seed(99)
    assert ids_of(epoch(shards, workers=workers)) == first
    assert ids_of(epoch(shards, workers=workers, number=1)) != first
    assert ids_of(epoch(shards, workers=workers, seed=1)) != first


def test_persistent_workers_follow_the_epoch(shards):
    loader = train_loader(config(shards), num_samples=256, workers=2)
    orders = []
    for number in (0, 1, 0):
        loader.set_epoch(number)
        orders.append(ids_of(loader.batches))
    assert orders[0] == orders[2] != orders[1]


def test_augmentation_depends_on_sample_and_epoch_only(shards):
    def images(**changes):
        batches = epoch(shards, image_transform=noisy, **changes)
        return {
            i: image for batch in batches for i, image in zip(batch["sample_ids"].tolist(), batch["image"], strict=True)
        }

    alone, shared = images(), images(workers=2) | images(rank=1, world_size=2)
    assert all(torch.equal(alone[i], shared[i]) for i in alone)
    assert not torch.equal(alone[0], images(number=1)[0])


def test_reading_in_the_training_process_leaves_its_random_state_alone(shards):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    epoch(shards, image_transform=noisy)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert state[:2] == after[:2] and torch.equal(state[2], after[2])


def test_an_epoch_is_rounded_up_to_equal_full_batches(shards):
    loader = train_loader(config(shards, batch_size=30), num_samples=256, workers=2)
    assert (loader.num_batches, loader.num_samples) == (10, 300)
    batches = list(loader.batches)
    assert [len(batch["image"]) for batch in batches] == [30] * 10


def test_resampling_draws_shards_by_their_weight(shards):
    folder = f"{shards}/00000.tar::{shards}/00001.tar"
    listing = list_shards(folder, "3::1")
    stream = StreamConfig(source=listing, batch_size=64, image_transform=to_tensor, tokenizer=as_codes,
                          sample_id="index", resampled=True)  # fmt: skip
    loader = train_loader(stream, num_samples=64 * 128, workers=0)
    shares = collections.Counter(i // 64 for i in ids_of(loader.batches))
    # 128 shards' worth of draws with probability 3/4: a standard deviation is 5 shards.
    assert shares[0] / 64 == pytest.approx(96, abs=20) and set(shares) == {0, 1}


def test_faulty_samples_are_skipped_and_counted_by_kind_and_shard(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "s")
    bad = tmp_path / "s" / "00001.tar"
    with tarfile.open(bad) as source, tarfile.open(tmp_path / "new.tar", "w") as target:
        for member in source.getmembers():
            if member.name == "000000070.txt":
                continue
            content = source.extractfile(member)
            if member.name == "000000071.png":
                member.size = 20
            target.addfile(member, content)
    shutil.move(tmp_path / "new.tar", bad)
    cut = tmp_path / "s" / "00002.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    batches = epoch(str(tmp_path / "s"), num_samples=192)
    skipped = collections.Counter()
    for batch in batches:
        for kind, url, count in batch["skipped"]:
            skipped[kind, os.path.basename(url)] += count
    assert skipped["missing caption", "00001.tar"] >= 1
    assert skipped["corrupt image", "00001.tar"] >= 1
    assert skipped["truncated shard", "00002.tar"] >= 1
    assert skipped["fewer samples than sizes.json says", "00002.tar"] >= 1
    assert not {70, 71} & set(ids_of(batches))


@pytest.fixture
def faulty(tmp_path, shards):
    """One shard of 64 samples, of which two have a broken image and one no caption, and a shard that breaks off."""
    with tarfile.open(f"{shards}/00000.tar") as source, tarfile.open(tmp_path / "a.tar", "w") as target:
        for member in source.getmembers():
            content = source.extractfile(member)
            if member.name in ("000000003.png", "000000004.png"):
                member.size = 20
            if member.name != "000000005.txt":
                target.addfile(member, content)
    whole = pathlib.Path(shards, "00001.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "sizes.json").write_text('{"a.tar": 63, "b.tar": 64}')
    return str(tmp_path)


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_counts_once_in_an_epoch_that_reads_the_shard_again(faulty, workers, resampled):
    loader = train_loader(config(faulty, resampled=resampled), num_samples=600, workers=workers)
    whole = sum(1 for _ in read_shard(f"{faulty}/b.tar", Skips().record))
    for number in range(2):
        loader.set_epoch(number)
        skipped = collections.Counter()
        for batch in loader.batches:
            skipped.update({(kind, os.path.basename(url)): count for kind, url, count in batch["skipped"]})
        assert skipped == {
            ("corrupt image", "a.tar"): 2, ("missing caption", "a.tar"): 1,
            ("more samples than sizes.json says", "a.tar"): 1,
            ("truncated shard", "b.tar"): 1, ("fewer samples than sizes.json says", "b.tar"): 64 - whole,
        }  # fmt: skip


def test_a_broken_row_of_a_table_counts_once_though_its_neighbour_needs_another_too(tmp_path, pairs):
    (tmp_path / "good.png").write_bytes(pairs[0][0])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [(str(tmp_path / f"{name}.png"), "a") for name in ("good", "bad", "bad", "good")]
    stream = StreamConfig(source=Table("t.csv", rows), batch_size=2, image_transform=to_tensor, tokenizer=as_codes)
    loader = train_loader(stream, num_samples=4, workers=0)
    for number in range(2):
        loader.set_epoch(number)
        assert sum(count for batch in loader.batches for _, _, count in batch["skipped"]) == 2


def test_ids_of_a_shard_with_more_samples_than_recorded_stay_in_its_range(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "s")
    (tmp_path / "s" / "sizes.json").write_text('{"00000.tar": 64, "00001.tar": 60, "00002.tar": 64, "00003.tar": 64}')
    batches = epoch(str(tmp_path / "s"))
    counts = collections.Counter(ids_of(batches))
    assert max(counts) == 251 and sum(counts[i] for i in range(64, 124)) == 64
    kinds = {(kind, os.path.basename(url)) for batch in batches for kind, url, _ in batch["skipped"]}
    assert kinds == {("more samples than sizes.json says", "00001.tar")}


def test_samples_of_a_shard_of_size_0_are_left_out_and_counted(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "s")
    (tmp_path / "s" / "sizes.json").write_text('{"00000.tar": 64, "00001.tar": 0, "00002.tar": 64, "00003.tar": 0}')
    batches = epoch(str(tmp_path / "s"), num_samples=128)
    assert sorted(ids_of(batches)) == list(range(128))
    skipped = {(kind, os.path.basename(url)): count for batch in batches for kind, url, count in batch["skipped"]}
    more = "more samples than sizes.json says"
    assert skipped == {(more, "00001.tar"): 64, (more, "00003.tar"): 64}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("resampled", [False, True])
def test_shards_without_a_full_batch_are_an_error_not_an_endless_wait(tmp_path, workers, resampled):
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    (batch,) = epoch(str(tmp_path), workers=workers, resampled=resampled, sample_id=None)
    assert "finds only 0 usable samples" in batch["error"] and "unreadable shard" in batch["error"]


def test_more_workers_than_shards_is_an_error_with_the_fix(shards):
    message = "--workers 3: takes at least 6 shards for 2 processes, and there are 4; use --workers 2"
    with pytest.raises(UserError, match=message):
        train_loader(config(shards, world_size=2), num_samples=256, workers=3)


def test_hashed_ids_depend_on_the_key_alone(shards):
    batches = epoch(shards, sample_id="hash")
    hashes = ids_of(batches)
    digest = hashlib.blake2b(b"000000000", digest_size=8).digest()
    assert len(set(hashes)) == 256 and int.from_bytes(digest, "big") >> 1 in hashes
    again = epoch(shards, sample_id="hash", number=1, rank=1, world_size=2, num_samples=128)
    assert set(ids_of(again)) <= set(hashes)


def key_hashes(count):
    """Hashes of the keys of shards, as the stream makes them."""
    digests = (hashlib.blake2b(b"%09d" % key, digest_size=8).digest() for key in range(count))
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def test_hashes_are_numbered_without_a_collision_where_folding_them_has_many():
    hashes, count = key_hashes(20_000), 20_000
    ids = HashIds(count)
    expected = {}
    for _ in range(2):
        for batch in hashes[torch.randperm(count)].split(300):
            for value, number in zip(batch.tolist(), ids(batch).tolist(), strict=True):
                assert expected.setdefault(value, number) == number
    assert sorted(expected.values()) == list(range(count)) and ids.collisions == 0
    folded = (hashes % (4 * count)).unique(return_counts=True)[1]
    assert (folded - 1).sum() / count > 0.1


def test_numbers_follow_the_order_in_which_hashes_come_and_go_on_from_a_checkpoint():
    hashes = key_hashes(100)
    ids = HashIds(100)
    assert ids(hashes[[5, 3, 5, 9]]).tolist() == [0, 1, 0, 2]
    # Hashes that want the same place of the table.
    assert ids(hashes[0] + 151 * torch.arange(3)).tolist() == [3, 4, 5]
    resumed = HashIds(100)
    resumed(ids.hashes)
    rest = hashes[torch.randperm(80)]
    assert torch.equal(resumed(rest), ids(rest)) and torch.equal(resumed.hashes, ids.hashes)


def test_samples_beyond_the_room_share_ids_and_are_counted():
    hashes = key_hashes(30)
    ids = HashIds(20)
    assert ids(hashes[:25]).tolist() == [*range(20), *(hashes[20:25] % 20).tolist()] and ids.collisions == 5
    assert ids(hashes[:20]).tolist() == list(range(20)) and ids.collisions == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_pair_once_in_order(shards, val_shards, workers):
    batches = list(eval_loader(config(val_shards), workers=workers))
    assert [len(batch["image"]) for batch in batches] == [16, 16, 16, 2]
    again = list(eval_loader(config(val_shards), workers=workers))
    assert all(torch.equal(a["text"], b["text"]) for a, b in zip(batches, again, strict=True))
    assert sum(len(batch["image"]) for batch in eval_loader(config(shards), workers=workers)) == 256


@pytest.fixture
def second_unreadable(tmp_path, shards):
    """A shard of 64 samples, and one that is no tar."""
    shutil.copy(f"{shards}/00000.tar", tmp_path / "0.tar")
    (tmp_path / "1.tar").write_bytes(random.Random(0).randbytes(9000))
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [16, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_tells_of_shards_that_nobody_can_read_once(second_unreadable, workers, batch_size, world_size):
    streams = [
        config(second_unreadable, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    ranks = [list(eval_loader(stream, workers=workers)) for stream in streams]
    assert len({len(batches) for batches in ranks}) == 1
    skipped = [tuple(row) for batches in ranks for batch in batches for row in batch["skipped"]]
    assert skipped == [("unreadable shard", f"{second_unreadable}/1.tar", 1)]
    positions = [p for batches in ranks for batch in batches for p in batch["position"].tolist() if p >= 0]
    assert len(positions) == 64
    if workers == 0:
        assert sorted(positions) == list(range(64))


def test_evaluation_tells_of_faults_of_every_rank_once(faulty):
    ranks = [list(eval_loader(config(faulty, batch_size=8, rank=rank, world_size=2), workers=0)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    skipped = collections.Counter()
    for kind, url, count in (row for batches in ranks for batch in batches for row in batch["skipped"]):
        skipped[kind, os.path.basename(url)] += count
    assert skipped == {("corrupt image", "a.tar"): 2, ("missing caption", "a.tar"): 1, ("truncated shard", "b.tar"): 1}
