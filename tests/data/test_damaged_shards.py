"""Hostile and damaged shards: whatever they hold, readers skip and count it, and write nothing."""

import io
import json
import os
import random
import struct
import tarfile
import zlib

import pytest
from PIL import Image, features

from batches import config
from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.check import check_shards
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import eval_loader, train_loader
from openclip_ext.errors import UserError

DAMAGES = ("flip bits", "cut", "zeros", "insert", "remove", "repeat")


def add(shard, name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    shard.addfile(member, io.BytesIO(data))


def small_shard(path, pairs, count=6):
    """Samples of a picture, a text, and a JSON with two captions."""
    with tarfile.open(path, "w") as shard:
        for number, (image, caption) in enumerate(pairs[:count]):
            listed = json.dumps({"captions": [caption, f"{number}"]}).encode()
            for extension, data in (("png", image), ("txt", caption.encode()), ("json", listed)):
                add(shard, f"{number:03d}.{extension}", data)


def damaged(data, kind, rng):
    """The bytes with one to eight places damaged in one way."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        place, length = rng.randrange(len(data)), rng.randint(1, 700)
        if kind == "flip bits":
            data[place] ^= rng.randrange(1, 256)
        elif kind == "cut":
            del data[max(place, 100) :]
        elif kind == "zeros":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "insert":
            data[place:place] = rng.randbytes(length)
        elif kind == "remove" and len(data) > 2000:
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length]
    return bytes(data)


def read(url):
    """The pictures and captions of a shard, in two formats; `None` for what cannot be used, which is recorded."""
    found, skips = [], tar.Skips()
    tar.count_samples(url, skips.record)
    for sample in tar.read_shard(url, skips.record):
        for captions in (CaptionFormat(), CaptionFormat(key="captions")):
            found.append((tar.decode_image(sample, skips.record), captions.of_sample(sample, skips.record)))
    assert skips or not any(None in pair for pair in found)
    return found


def read_in_every_way(folder):
    """What training, evaluation, `index`, `check` and `--caption-key` read; the pictures and captions there are."""
    found = [pair for url in list_shards(str(folder)).urls for pair in read(url)]
    check_shards(list_shards(str(folder)), progress=False)
    try:
        require_caption_key(list_shards(str(folder)).urls, "captions")
    except UserError as error:
        assert "--caption-key captions: none of" in str(error)
    stream = config(str(folder), batch_size=2, captions=CaptionFormat(key="captions"))
    for batch in [*train_loader(stream, num_samples=4, workers=0).batches, *eval_loader(stream, workers=0)]:
        assert "error" in batch or batch["image"].isfinite().all()
    return found


def files_below(folder):
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_thousand_damaged_shards_are_read_as_far_as_they_can_be(tmp_path, pairs, kind):
    """With those of the other kinds: 168 each, every tenth of them in every way."""
    rng = random.Random(f"damage {kind}")
    small_shard(tmp_path / "whole.tar", pairs)
    whole, folder = (tmp_path / "whole.tar").read_bytes(), tmp_path / "damaged"
    folder.mkdir()
    usable = 0
    for number in range(168):
        (folder / "0.tar").write_bytes(damaged(whole, kind, rng))
        found = read_in_every_way(folder) if number % 10 == 0 else read(str(folder / "0.tar"))
        usable += sum(image is not None and captions is not None for image, captions in found)
    assert 0 < usable < 168 * 6 * 2
    assert files_below(tmp_path) == [str(folder / "0.tar"), str(tmp_path / "whole.tar")]


def enormous_png():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_avifs_are_counted(tmp_path):
    """Under any extension: Pillow goes by what a file holds."""
    rng = random.Random("damage avif")
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 16), rng.randbytes(768)).save(buffer, "AVIF")
    shard = [(damaged(buffer.getvalue(), "flip bits", rng), "a") for _ in range(300)]
    small_shard(tmp_path / "0.tar", shard, count=len(shard))
    found = [image for image, _ in read(str(tmp_path / "0.tar"))]
    assert len(found) == 600 and None in found


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError, struct.error])
def test_whatever_a_decoder_raises_the_picture_is_corrupt(tmp_path, pairs, monkeypatch, error):
    def raising(*args):
        raise error("Failed to decode image")

    small_shard(tmp_path / "0.tar", pairs)
    monkeypatch.setattr(Image.Image, "convert", raising)
    (report,) = check_shards(list_shards(str(tmp_path)), progress=False)
    assert report.faults == {"corrupt image": 6}


def test_hostile_members_are_skipped_and_nothing_is_written(tmp_path, pairs):
    outside, inside = tmp_path / "outside", tmp_path / "shards" / "in"
    inside.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    image = pairs[0][0]
    with tarfile.open(inside / "0.tar", "w") as shard:
        for name in (
            "../../outside/a",
            f"{outside}/b",
            "c/../../../d",
            "e\x00f",
            "g\n",
            "." * 200,
            "é" * 90 + "/h",
            "",
        ):
            add(shard, f"{name}.png", image)
            add(shard, f"{name}.txt", b"hostile name")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            add(shard, "link.png", type=kind, linkname=str(outside / "secret.txt"))
            add(shard, "link.txt", type=kind, linkname="../../outside/secret.txt")
        for number, (picture, text, listed) in enumerate([
            (enormous_png(), b"bomb", b"{}"),
            (image, b"\xff\xfe", b'{"captions": "\xff"}'),
            (image, b"", b"[" * 200_000),
            (image, b"\x00" * 9000, b'{"captions": ' + b"[" * 200_000),
            (image, b"a", b'{"captions": ' + b"9" * 10_000 + b"}"),
            (b"", b"a", b'{"captions": {"a": 1}}'),
            (image[:50], b"a", b'{"captions": [null, 3, ["a"]]}'),
            (b"GIF89a", b"a", b'"\\ud800"'),
            (image, b"a", b'{"captions": "\\ud800"}'),
        ]):  # fmt: skip
            for extension, data in (("png", picture), ("txt", text), ("json", listed)):
                add(shard, f"x{number}.{extension}", data)
        add(shard, "good.png", image)
        add(shard, "good.txt", b"good")
        add(shard, "good.json", b'{"captions": ["good"]}')
    before = files_below(tmp_path)
    found = read_in_every_way(inside)
    assert [captions for image, captions in found if image is not None][-2:] == [["good"], ["good"]]
    texts = [text for _, captions in found for text in captions or ()]
    assert not any("secret" in text for text in texts) and all(text.encode() for text in texts if text)
    assert files_below(tmp_path) == before
