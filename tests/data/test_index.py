"""`sizes.json` of many shards, of shards elsewhere, and after an interruption; ids of billions of samples."""

import os
import shutil

import fsspec
import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.data import index as index_module
from openclip_ext.data import tar
from openclip_ext.data.index import COUNTED_FILE, index, index_urls
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pack import pack
from openclip_ext.errors import UserError
from openclip_ext.ops.counter_random import uniform
from openclip_ext.state.exchange import Samples
from openclip_ext.state.table import Placement, SampleTable


@pytest.fixture
def folder(tmp_path, pairs):
    """12 shards of 5 samples, the last of 2."""
    pack(pairs[:57], str(tmp_path / "wds"), samples_per_shard=5, progress=False)
    return tmp_path / "wds"


@pytest.fixture
def counted(monkeypatch):
    """The shards that are counted in this process."""
    urls, count = [], index_module._count
    monkeypatch.setattr(index_module, "_count", lambda url: (urls.append(os.path.basename(url)), count(url))[1])
    return urls


def test_several_processes_count_what_one_does(folder):
    one, two = (index(str(folder), progress=False, jobs=jobs) for jobs in (1, 2))
    assert one == two and one[0].total == 57 and list(one[0].of_shard.values()) == [5] * 11 + [2]


def test_counting_goes_on_where_it_was_interrupted(folder, counted):
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    whole = (folder / names[7]).read_bytes()
    (folder / names[7]).write_bytes(whole[:3000])
    with pytest.raises(UserError, match=rf"{names[7]}: .* shard; replace or remove it"):
        index(str(folder), progress=False)
    assert counted == names[:8]
    (folder / names[7]).write_bytes(whole)
    shutil.copy(folder / names[11], folder / names[2])  # a shard that was counted, and has changed
    with open(folder / COUNTED_FILE, "a") as file:
        file.write('{"name": "' + names[9])  # as a kill leaves it
    counted.clear()
    sizes, faults = index(str(folder), progress=False)
    assert counted == [names[2], *names[7:]]
    assert faults == [] and list(sizes.of_shard.values()) == [5, 5, 2] + [5] * 8 + [2]
    assert not (folder / COUNTED_FILE).exists()


def test_shards_elsewhere_are_listed_by_their_sizes(folder, tmp_path, capsys):
    pattern, out = f"pipe:cat {folder}/0000{{0..3}}.tar", tmp_path / "remote"
    assert main(["shards", "index", pattern, "--out", str(out)]) == 0
    assert f"{out}/sizes.json: 4 shards, 20 samples" in capsys.readouterr().out
    listing = list_shards(str(out / "sizes.json"))
    assert listing.sizes == (5,) * 4 and all(url.startswith("pipe:cat ") for url in listing.urls)
    keys = [[sample["__key__"] for sample in tar.read_shard(url, lambda *fault: None)] for url in listing.urls]
    assert list(map(len, keys)) == [5] * 4
    # That of local shards stands for the folder.
    assert list_shards(str(folder / "sizes.json")) == list_shards(str(folder))


def test_what_webdataset_does_not_open_fsspec_does(folder, tmp_path):
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))[:2]
    for name in names:
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", (folder / name).read_bytes())
    sizes, faults = index_urls([f"memory://bucket/{name}" for name in names], str(tmp_path), progress=False)
    assert list(sizes.of_shard.values()) == [5, 5] and not faults
    with pytest.raises(UserError, match="memory://bucket/none.tar: unreadable shard"):
        index_urls(["memory://bucket/none.tar"], str(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["pipe:cat a.tar"], "give URLs alone, and --out FOLDER"),
        (["pipe:cat a.tar", "{folder}", "--out", "{folder}"], "give URLs alone, and --out FOLDER"),
        (["{folder}", "--out", "x"], "--out x: sizes.json of local shards goes beside them"),
        (["{folder}", "--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder, capsys, flags, said):
    assert main(["shards", "index", *(flag.format(folder=folder) for flag in flags)]) == 2
    assert said in capsys.readouterr().err


def test_ids_of_billions_of_samples_stay_apart():
    """5,000,000,000 samples in 100,000 shards, over 1,000,000 ranks, so that a rank's part fits here."""
    number, each, ranks = 100_000, 50_000, 1_000_000
    urls = tuple(f"{shard:06}.tar" for shard in range(number))
    ids = ShardListing(urls, None, (each,) * number, number * each).ids_of(urls[-1])
    assert ids[-1] == 4_999_999_999
    last = torch.tensor([ids[-1], ids[-2], ids[-1] - 2**32])
    assert last.tolist() == [4_999_999_999, 4_999_999_998, 705_032_703]
    assert len(uniform(torch.tensor(3), last, stream=0).unique()) == 3
    placement = Placement(parts=ranks, rank=ranks - 1)
    table = SampleTable((2, number * each), torch.int64, -1, "ids", placement)
    assert table.values.shape == (2, 5_000) and table.block == 5_000
    table.check(last)
    table.write(1, last, last)
    assert table.read(last[:2])[1].tolist() == last[:2].tolist()
    assert (table.values >= 0).sum() == 2  # what another rank keeps is not written
    keeper = Samples(last, last, (3,)).ids // table.block
    assert keeper.tolist() == [999_999, 999_999, 141_006]
