"""Packing, indexing, listing and checking shards, on real images."""

import csv
import io
import json
import os
import pathlib
import re
import shutil
import tarfile

import pytest
from open_clip_train.data import get_dataset_size
from PIL import Image

from batches import config
from openclip_ext import UserError
from openclip_ext.cli import main
from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.check import check_shards
from openclip_ext.data.index import index
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.pairs import pairs_from_csv, pairs_from_folder
from openclip_ext.data.pipeline import eval_loader, train_loader
from openclip_ext.data.sizes import read_sizes
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
    assert "3 shards, 5 images, 5 captions\n" in capsys.readouterr().out
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 2, "00002.tar": 1}
    samples = [
        sample for name in sorted(os.listdir(out)) if name.endswith(".tar") for sample in read_all(out / name)[0]
    ]
    assert [sample["txt"].decode()[-3:] for sample in samples] == [", 0", ", 1", ", 2", ", 3", ", 4"]
    assert samples[1]["png"] == (images / "1.png").read_bytes()
    with Image.open(io.BytesIO(samples[0]["png"])) as ours, Image.open(images / "0.bmp") as original:
        assert ours.tobytes() == original.convert("RGB").tobytes()


@pytest.fixture
def several(images):
    """A CSV with three images, which have three captions, one, and two, the rows mixed."""
    rows = ["1.png,one a", "2.png,two", "1.png,one b", "3.png,three a", "3.png,three b", "1.png,one c"]
    (images / "several.csv").write_text("filepath,title\n" + "\n".join(rows) + "\n")
    return images


def test_rows_with_one_image_become_one_sample_with_a_list_of_captions(several, capsys):
    out = several / "shards"
    assert main(["shards", "pack", str(several / "several.csv"), str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 shards, 3 images, 6 captions, in JSON under 'captions', as sizes.json notes" in said
    samples, _ = read_all(out / "00000.tar")
    assert [json.loads(sample["json"])["captions"] for sample in samples] == [
        ["one a", "one b", "one c"], ["two"], ["three a", "three b"],
    ]  # fmt: skip
    assert [sample["txt"] for sample in samples] == [b"one a", b"two", b"three a"]
    assert main(["shards", "check", str(out)]) == 0


def test_a_sample_for_each_row_where_that_is_wanted(several):
    out = several / "shards"
    assert main(["shards", "pack", str(several / "several.csv"), str(out), "--one-row-per-sample"]) == 0
    samples, _ = read_all(out / "00000.tar")
    assert len(samples) == 6 and not any("json" in sample for sample in samples)
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 6}


# Stock OpenCLIP leaves the file open.
@pytest.mark.filterwarnings("ignore:.*sizes.json:pytest.PytestUnraisableExceptionWarning")
def test_the_note_in_sizes_json_is_read_kept_and_harms_no_other_reader(several):
    out = several / "shards"
    main(["shards", "pack", str(several / "several.csv"), str(out), "--samples-per-shard", "2"])
    listing = list_shards(str(out))
    assert listing.caption_keys == ("captions",) and listing.sizes == (2, 1)
    assert get_dataset_size(f"{out}/{{00000..00001}}.tar") == (3, 2)
    # A reader of sizes alone takes every value for a number, and the sum of them for the set's.
    assert sum(int(size) for size in json.loads((out / "sizes.json").read_text()).values()) == 3
    (out / "00001.tar").unlink()
    assert main(["shards", "index", str(out)]) == 0
    assert (read_sizes(out).of_shard, read_sizes(out).caption_key) == ({"00000.tar": 2}, "captions")
    (out / "sizes.json").write_text("{")
    assert main(["shards", "index", str(out)]) == 0 and read_sizes(out).caption_key is None


def test_training_and_evaluation_find_noted_captions_by_themselves(several):
    out = several / "shards"
    main(["shards", "pack", str(several / "several.csv"), str(out)])
    stream = config(str(out), batch_size=3)
    seen = set()
    for number in range(30):
        loader = train_loader(stream, num_samples=3, workers=0)
        loader.set_epoch(number)
        seen |= {as_text(row) for batch in loader.batches for row in batch["text"]}
    assert seen == {"one a", "one b", "one c", "two", "three a", "three b"}
    (batch,) = eval_loader(stream, workers=0)
    assert [as_text(row) for row in batch["text"]] == ["one a", "two", "three a"]


def as_text(codes):
    return "".join(map(chr, codes)).strip()


def test_a_noted_key_gives_way_to_the_text_where_a_sample_has_none(tmp_path, several):
    """As where a folder of other shards is read together with one that has the note."""
    main(["shards", "pack", str(several / "several.csv"), str(several / "noted")])
    write_tar(tmp_path / "a.tar", [("1.png", image_bytes()), ("1.txt", b"text"), ("1.json", b'{"caption": "other"}')])
    listing = list_shards(f"{several}/noted::{tmp_path}/a.tar")
    captions = [
        CaptionFormat().of_sample(sample, None, listing.caption_keys)
        for url in listing.urls for sample in read_all(url)[0]
    ]  # fmt: skip
    assert captions[2:] == [["three a", "three b"], ["text"]]
    assert CaptionFormat(key="caption").of_sample(sample_of(tmp_path / "a.tar"), None, ("captions",)) == ["other"]


def sample_of(path):
    return read_all(path)[0][0]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
def test_a_separator_is_recognised_by_the_columns_that_are_asked_for(tmp_path, separator, name):
    path = tmp_path / name
    rows = [["id", "filepath", "a note, or two"], ["0", "x.png", 'a "b", c; d'], ["1", "y.png", "two\nlines"]]
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    expected = [("x.png", 'a "b", c; d'), ("y.png", "two\nlines")]
    for given in (None, separator, "\\t" if separator == "\t" else separator):
        assert pairs_from_csv(str(path), "filepath", "a note, or two", given, check_images=False) == expected


@pytest.mark.parametrize(
    ("separator", "content", "message"),
    [
        (";", b"filepath,title\na,b\n", "--csv-separator ';': the header of .* splits at ','; drop the flag"),
        ("::", b"filepath,title\na,b\n", "--csv-separator '::': must be one character"),
        ("", b"filepath,title\na,b\n", "--csv-separator '': must be one character"),
        (None, b"filepath;text;x\na;b;c\n", r"--csv-caption-key title: .* split at ';' .*'filepath', 'text', 'x'"),
        (None, b"filepath,title\na,\xff\n", "cannot be read as a CSV in UTF-8"),
        (None, b"filepath,title\na," + b"x" * 200_000 + b"\n", "cannot be read as a CSV .*field larger"),
        (None, b"", ".* is empty; its first line must name its columns, such as filepath,title"),
    ],
)
def test_a_csv_that_cannot_be_split_is_one_line(tmp_path, separator, content, message):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        pairs_from_csv(str(tmp_path / "pairs.csv"), "filepath", "title", separator, check_images=False)
    assert "\n" not in str(error.value)


def test_a_folder_takes_captions_from_text_files_or_folder_names(tmp_path, pairs):
    for path in ("tabby_cat/a.png", "tabby_cat/b.png", "dog/c.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(pairs[0][0])
    (tmp_path / "dog/c.txt").write_text("a dog on a log\n")
    found = pairs_from_folder(str(tmp_path), "a photo of a {}")
    assert [caption for _, caption in found] == ["a dog on a log", "a photo of a tabby cat", "a photo of a tabby cat"]


@pytest.mark.parametrize("template", ["a {0[x]}", "a {0.x}", "a {x}", "a {1}", "a {"])
def test_a_template_that_cannot_be_filled_is_one_line(tmp_path, pairs, capsys, template):
    (tmp_path / "a.png").write_bytes(pairs[0][0])
    assert main(["shards", "pack", str(tmp_path), str(tmp_path / "out"), "--template", template]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"--template {template}: cannot be filled" in error and error.endswith("use {} for the folder's name")


def test_a_text_file_that_is_no_utf_8_is_one_line(tmp_path, pairs, capsys):
    (tmp_path / "a.png").write_bytes(pairs[0][0])
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert main(["shards", "pack", str(tmp_path), str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/a.txt: not a text file in UTF-8" in error


def test_packing_is_reproducible_and_shuffling_keeps_all_pairs(tmp_path, pairs):
    for name in ("one", "two"):
        pack(pairs[:20], str(tmp_path / name), samples_per_shard=7, shuffle_seed=3, progress=False)
    for shard in ("00000.tar", "00002.tar", "sizes.json"):
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
    samples = [s for n in range(3) for s in read_all(tmp_path / "one" / f"{n:05d}.tar")[0]]
    packed = [(sample["png"], sample["txt"].decode()) for sample in samples]
    assert sorted(packed) == sorted(pairs[:20]) and packed != pairs[:20]


def test_an_image_that_cannot_be_opened_is_left_out_and_named(tmp_path, pairs, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    packed = pack([*pairs[:2], (str(tmp_path / "bad.png"), "bad")], str(tmp_path / "out"), progress=False)
    assert packed.sizes.of_shard == {"00000.tar": 2} and packed.num_captions == 2
    assert "bad.png" in capsys.readouterr().out


def test_packing_leaves_nothing_behind_when_it_fails(tmp_path, pairs):
    def failing():
        yield from pairs[:10]
        raise KeyboardInterrupt

    class Pairs(list):
        def __iter__(self):
            return failing()

    with pytest.raises(KeyboardInterrupt):
        pack(Pairs(pairs[:10]), str(tmp_path / "out"), samples_per_shard=4, progress=False)
    assert os.listdir(tmp_path / "out") == []


def test_index_counts_samples_of_existing_shards(tmp_path, shards):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    write_tar(
        tmp_path / "b.tar", [("1.txt", b"x"), ("1.jpg", b"x"), ("2.txt", b"x"), ("__meta__", b"x"), ("3.jpg", b"x")]
    )
    assert main(["shards", "index", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"a.tar": 64, "b.tar": 3}


@pytest.fixture
def two_folders(tmp_path, pairs):
    """wds/train with two shards of four samples each, and wds/val with one of three."""
    pack(pairs[:8], str(tmp_path / "wds/train"), samples_per_shard=4, progress=False)
    pack(pairs[8:11], str(tmp_path / "wds/val"), progress=False)
    return tmp_path / "wds"


def test_braces_and_stars_over_folders(two_folders, capsys):
    urls = [f"{two_folders}/{name}.tar" for name in ("train/00000", "train/00001", "val/00000")]
    for pattern in ("{train,val}", "*", "t*n::{folder}/val", "{train/{00000..00001}.tar,val}"):
        listing = list_shards(f"{two_folders}/{pattern}".replace("{folder}", str(two_folders)))
        assert (list(listing.urls), listing.sizes) == (urls, (4, 4, 3))
    assert main(["shards", "check", f"{two_folders}/{{train,val}}"]) == 0
    assert "3 shards, 11 samples, no faults" in capsys.readouterr().out
    for folders in ([f"{two_folders}/{{train,val}}"], [f"{two_folders}/train", f"{two_folders}/val"]):
        for folder in ("train", "val"):
            (two_folders / folder / "sizes.json").unlink()
        assert main(["shards", "index", *folders]) == 0
        assert [read_sizes(two_folders / folder).total for folder in ("train", "val")] == [8, 3]


def test_index_goes_past_a_broken_shard_where_that_is_wanted(tmp_path, shards, capsys):
    for name in ("00000.tar", "00001.tar"):
        shutil.copy(os.path.join(shards, name), tmp_path / name)
    cut = tmp_path / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:20_000])
    (tmp_path / "00002.tar").write_bytes(b"no tar at all" * 100)
    assert main(["shards", "index", str(tmp_path)]) == 2
    assert "truncated shard; replace or remove it, or count what there is with --skip-un" in capsys.readouterr().err
    assert not (tmp_path / "sizes.json").exists()
    assert main(["shards", "index", str(tmp_path), "--skip-unreadable"]) == 0
    readable = len(read_all(cut)[0])
    assert 0 < readable < 64
    assert read_sizes(tmp_path).of_shard == {"00000.tar": 64, "00001.tar": readable, "00002.tar": 0}
    said = capsys.readouterr().out
    assert f"00001.tar: truncated shard; {readable} samples can be read" in said
    assert "00002.tar: unreadable shard; 0 samples can be read" in said
    # Sample ids need no more than that: no other fault than the breaks is found.
    kinds = {kind for report in check_shards(list_shards(str(tmp_path)), progress=False) for kind in report.faults}
    assert kinds == {"truncated shard", "unreadable shard"}


def test_a_caption_key_that_no_sample_has_is_named_with_those_there_are(tmp_path, shards):
    captions = b'{"caption": "a", "sentences": ["a", "b"], "width": 3, "none": []}'
    write_tar(
        tmp_path / "a.tar", [("1.png", b"x"), ("2.json", b"{"), ("3.json", captions), ("4.json", b'{"late": "a"}')]
    )
    urls = list_shards(str(tmp_path)).urls
    for key in ("caption", "sentences", "late", None):
        require_caption_key(urls, key)
    for key in ("captionz", "width", "none"):
        with pytest.raises(
            UserError, match=f"--caption-key {key}: none of the first 4 samples.*under: caption, late, sent"
        ):
            require_caption_key(urls, key)
    with pytest.raises(UserError, match="--caption-key caption: none of the first 256 samples.*they have no JSON"):
        require_caption_key(list_shards(shards).urls, "caption")


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
            index(str(tmp_path), progress=False)
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
    pack([(sample, "x") for sample in [image_bytes()] * 3], str(other), samples_per_shard=2, progress=False)
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
        (["index", "{tmp}/nowhere"], "shards index {tmp}/nowhere: no such folder"),
        (["index", "{tmp}"], "no .*tar in this folder"),
        (["index", "{tmp}/no*"], "no folder matches"),
        (["index", "{tmp}/{{a"], "braces that do not pair"),
        (["check", "{tmp}/{{a,b"], "braces that do not pair"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ('["a.tar"]', "not a table of sizes"), ('{"a.tar": "many"}', "not a table of sizes")],
)
def test_a_broken_sizes_file_is_named(tmp_path, shards, content, message):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(UserError, match=f"sizes.json: {message}"):
        list_shards(str(tmp_path))


def test_check_without_sizes_counts_and_finds_no_fault(tmp_path, shards):
    os.symlink(os.path.join(shards, "00000.tar"), tmp_path / "a.tar")
    (report,) = check_shards(list_shards(str(tmp_path)), progress=False)
    assert (report.samples, report.expected, report.faults) == (64, None, {})
