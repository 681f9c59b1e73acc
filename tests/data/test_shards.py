"""Packing, indexing, listing and checking shards, on real images."""

import io
import json
import os
import pathlib
import re
import tarfile

import pytest
from PIL import Image

from openclip_ext import UserError
from openclip_ext.cli import main
from openclip_ext.data import pack
from openclip_ext.data.check import check_shards
from openclip_ext.data.listing import list_shards
from openclip_ext.data.tar import Skips, read_shard


def write_tar(path, files):
    with tarfile.open(path, "w") as shard:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def read_all(path):
    skips = Skips()
    return list(read_shard(str(path), skips.record)), skips


@pytest.fixture
def images(tmp_path, pairs):
    """A CSV with five rows and its images: PNG files, and one BMP."""
    rows = ["filepath,title"]
    for number, (data, caption) in enumerate(pairs[:5]):
        name = f"{number}.png" if number else "0.bmp"
        with Image.open(io.BytesIO(data)) as image:
            image.save(tmp_path / name)
        rows.append(f'{name},"{caption}, {number}"')
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    return tmp_path


def test_a_csv_becomes_shards_that_hold_its_rows(images, capsys):
    out = images / "shards"
    assert main(["shards", "pack", str(images / "pairs.csv"), str(out), "--samples-per-shard", "2"]) == 0
    assert "3 shards, 5 samples" in capsys.readouterr().out
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 2, "00002.tar": 1}
    samples = [
        sample for name in sorted(os.listdir(out)) if name.endswith(".tar") for sample in read_all(out / name)[0]
    ]
    assert [sample["txt"].decode()[-3:] for sample in samples] == [", 0", ", 1", ", 2", ", 3", ", 4"]
    assert samples[1]["png"] == (images / "1.png").read_bytes()
    with Image.open(io.BytesIO(samples[0]["png"])) as ours, Image.open(images / "0.bmp") as original:
        assert ours.tobytes() == original.convert("RGB").tobytes()


def test_a_folder_takes_captions_from_text_files_or_folder_names(tmp_path, pairs):
    for path in ("tabby_cat/a.png", "tabby_cat/b.png", "dog/c.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(pairs[0][0])
    (tmp_path / "dog/c.txt").write_text("a dog on a log\n")
    found = pack.pairs_from_folder(str(tmp_path), "a photo of a {}")
    assert [caption for _, caption in found] == ["a dog on a log", "a photo of a tabby cat", "a photo of a tabby cat"]


def test_packing_is_reproducible_and_shuffling_keeps_all_pairs(tmp_path, pairs):
    for name in ("one", "two"):
        pack.pack(pairs[:20], str(tmp_path / name), samples_per_shard=7, shuffle_seed=3, progress=False)
    for shard in ("00000.tar", "00002.tar", "sizes.json"):
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
    samples = [s for n in range(3) for s in read_all(tmp_path / "one" / f"{n:05d}.tar")[0]]
    packed = [(sample["png"], sample["txt"].decode()) for sample in samples]
    assert sorted(packed) == sorted(pairs[:20]) and packed != pairs[:20]


def test_an_image_that_cannot_be_opened_is_left_out_and_named(tmp_path, pairs, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    sizes = pack.pack([*pairs[:2], (str(tmp_path / "bad.png"), "bad")], str(tmp_path / "out"), progress=False)
    assert sizes == {"00000.tar": 2}
    assert "bad.png" in capsys.readouterr().out


def test_packing_leaves_nothing_behind_when_it_fails(tmp_path, pairs):
    def failing():
        yield from pairs[:10]
        raise KeyboardInterrupt

    class Pairs(list):
        def __iter__(self):
            return failing()

    with pytest.raises(KeyboardInterrupt):
        pack.pack(Pairs(pairs[:10]), str(tmp_path / "out"), samples_per_shard=4, progress=False)
    assert os.listdir(tmp_path / "out") == []


def test_index_counts_samples_of_existing_shards(tmp_path, shards):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    write_tar(
        tmp_path / "b.tar", [("1.txt", b"x"), ("1.jpg", b"x"), ("2.txt", b"x"), ("__meta__", b"x"), ("3.jpg", b"x")]
    )
    assert main(["shards", "index", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"a.tar": 64, "b.tar": 3}


def test_a_key_that_starts_again_starts_a_new_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.txt", b"a"), ("1.JPG", b"b"), ("1.txt", b"c"), ("1.jpg", b"d")])
    samples, skips = read_all(tmp_path / "a.tar")
    assert [(s["__ordinal__"], s["txt"], s["jpg"]) for s in samples] == [(0, b"a", b"b"), (1, b"c", b"d")]
    assert not skips


@pytest.mark.parametrize(
    ("keep", "kind"),
    [(0.6, "truncated shard"), (0.6005, "truncated shard"), (0.65, "truncated shard"), (0.001, "unreadable shard")],
)
def test_a_shard_that_breaks_off_yields_what_is_whole(tmp_path, shards, keep, kind):
    whole = pathlib.Path(shards) / "00000.tar"
    data = whole.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * keep) + 100])
    samples, skips = read_all(tmp_path / "cut.tar")
    complete, _ = read_all(whole)
    assert len(samples) < 64 and list(skips) == [(kind, str(tmp_path / "cut.tar"))]
    if kind == "truncated shard":
        with pytest.raises(UserError, match="cut.tar: truncated shard"):
            pack.index(str(tmp_path), progress=False)
    for ours, original in zip(samples, complete, strict=False):
        assert ours["png"] == original["png"] and ours["txt"] == original["txt"]


def test_check_finds_every_fault_and_exits_with_1(tmp_path, pairs, capsys):
    png = pairs[0][0]
    write_tar(
        tmp_path / "bad.tar",
        [("1.png", png), ("1.txt", b"ok"), ("2.png", b"rot"), ("2.txt", b"ok"), ("3.png", png), ("4.txt", b"ok"),
         ("1.png", png), ("1.txt", b"again"), ("5.png", png), ("5.txt", b" ")],
    )  # fmt: skip
    (tmp_path / "sizes.json").write_text('{"bad.tar": 9}')
    assert main(["shards", "check", str(tmp_path)]) == 1
    table = capsys.readouterr().out
    for fault in ("1 x corrupt image", "1 x missing caption", "1 x missing image", "1 x duplicate key",
                  "1 x empty caption", "3 x fewer samples than sizes.json says"):  # fmt: skip
        assert fault in table
    assert main(["shards", "check", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["samples"] == 6


def test_check_of_sound_shards_exits_with_0(shards, capsys):
    assert main(["shards", "check", shards]) == 0
    assert "4 shards, 256 samples, no faults" in capsys.readouterr().out


def test_sources_are_expanded_in_order_with_offsets_and_weights(tmp_path, shards):
    other = tmp_path / "other"
    pack.pack([(sample, "x") for sample in [image_bytes()] * 3], str(other), samples_per_shard=2, progress=False)
    listing = list_shards(f"{other}::{shards}/{{00001..00002}}.tar", "2::0.5")
    assert [os.path.basename(url) for url in listing.urls] == ["00000.tar", "00001.tar", "00001.tar", "00002.tar"]
    assert listing.sizes == (2, 1, 64, 64) and listing.length == 131
    assert list(listing.offsets.values()) == [0, 2, 3, 67]
    assert listing.weights == (2.0, 2.0, 0.5, 0.5)
    assert list_shards(f"{shards}/*.tar").urls == list_shards(shards).urls


def image_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_length_file_gives_the_total_but_no_sizes(tmp_path, shards):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    assert list_shards(str(tmp_path)).length is None
    (tmp_path / "__len__").write_text("64\n")
    listing = list_shards(str(tmp_path))
    assert listing.length == 64 and listing.sizes is None


@pytest.mark.parametrize(
    ("sources", "factors", "message"),
    [
        ("{folder}/none.tar", None, "--train-data {folder}/none.tar: no shard matches"),
        ("{folder}/*.zip", None, "no shard matches"),
        ("{folder}", None, "the folder holds no .*tar; pack one"),
        ("{shards}/{{00000..00009}}.tar", None, "6 of 10 shards do not exist, the first is .*00004.tar"),
        ("{shards}", "1::2", "--train-data-upsampling-factors 1::2: give one number per source"),
        ("{shards}", "much", "--train-data-upsampling-factors much: give one number per source"),
    ],
)
def test_sources_that_match_nothing_are_named(tmp_path, shards, sources, factors, message):
    with pytest.raises(UserError, match=message.format(folder=tmp_path)):
        list_shards(sources.format(folder=tmp_path, shards=shards), factors)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pack", "{tmp}/none.csv", "{tmp}/o"], "none.csv: no such file"),
        (["pack", "{tmp}/pairs.csv", "{tmp}/o", "--csv-img-key", "image"], "--csv-img-key image: .* no such column"),
        (["pack", "{tmp}/broken.csv", "{tmp}/o"], "row 2 names .*gone.png, which does not exist"),
        (["pack", "{tmp}/blank.csv", "{tmp}/o"], "row 3 lacks an image or a caption"),
        (["pack", "{tmp}/pairs.csv", "{shards}"], "holds shards already"),
        (
            ["pack", "{tmp}/pairs.csv", "{tmp}/o", "--samples-per-shard", "0"],
            "--samples-per-shard 0: must be at least 1",
        ),
        (["index", "{tmp}/nowhere"], "nowhere: no .*tar in this folder"),
        (["check", "{tmp}/nowhere"], "shards check {tmp}/nowhere: no shard matches"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(images, shards, capsys, command, message):
    (images / "blank.csv").write_text("filepath,title\n1.png,a\n,b\n")
    (images / "broken.csv").write_text("filepath,title\ngone.png,a\n")
    assert main(["shards", *(part.format(tmp=images, shards=shards) for part in command)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message.format(tmp=images), error[0])
    assert not (images / "o").exists()


def test_a_broken_sizes_file_is_named(tmp_path, shards):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(UserError, match="sizes.json: not valid JSON"):
        list_shards(str(tmp_path))


def test_check_without_sizes_counts_and_finds_no_fault(tmp_path, shards):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    (report,) = check_shards(list_shards(str(tmp_path)), progress=False)
    assert (report.samples, report.expected, report.faults) == (64, None, {})
