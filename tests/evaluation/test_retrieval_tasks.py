"""`openclip-ext eval --retrieval` on photographs with several captions each, against features encoded one by one."""

import csv
import io
import json

import numpy as np
import open_clip
import pytest
import skimage.data
import torch
import webdataset as wds
from PIL import Image

from openclip_ext.cli import main
from oracles import slow_recall

#: Photographs that come with scikit-image, and what they show.
CAPTIONS = {
    "astronaut": ["an astronaut in an orange suit", "a woman in front of a flag", "Eileen Collins"],
    "coffee": ["a cup of coffee", "an espresso on a wooden table"],
    "chelsea": ["a cat", "the face of a tabby cat", "Chelsea, looking left"],
    "rocket": ["a rocket at night", "a launch pad"],
    "camera": ["a man with a camera", "a photographer, in black and white"],
    "coins": ["greek coins", "rows of coins", "old coins on a dark ground"],
    "page": ["a page of text"],
    "text": ["handwriting", "a line of written text"],
}


def photographs():
    """(name, PNG bytes, captions)."""
    for name, captions in CAPTIONS.items():
        buffer = io.BytesIO()
        Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((64, 64)).save(buffer, "PNG")
        yield name, buffer.getvalue(), captions


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The photographs as a CSV with a row per caption, the rows mixed, and as shards of two kinds."""
    root = tmp_path_factory.mktemp("photos")
    rows = []
    with (
        wds.TarWriter(str(root / "joined.tar"), encoder=False) as joined,
        wds.TarWriter(str(root / "listed.tar"), encoder=False) as listed,
    ):
        for name, image, captions in photographs():
            (root / f"{name}.png").write_bytes(image)
            rows += [(f"{name}.png", caption) for caption in captions]
            joined.write({"__key__": name, "png": image, "txt": " | ".join(captions).encode()})
            listed.write({"__key__": name, "png": image, "json": json.dumps({"captions": captions}).encode()})
    np.random.default_rng(0).shuffle(rows)
    with open(root / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model_config):
    """A checkpoint of the tiny model whose texts differ: at its initialization they hardly do."""
    open_clip.add_model_config(model_config)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test")
    model.token_embedding.weight.data *= 50
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def evaluate(weights, model_config, tmp_path):
    """A function from flags to the exit code and the report's tasks."""

    def run(*flags, pretrained=weights):
        out = tmp_path / "eval.json"
        out.unlink(missing_ok=True)
        fixed = {
            "--pretrained": pretrained, "--model": "tiny-test", "--model-config": model_config, "--device": "cpu",
            "--workers": 0, "--batch-size": 3, "--feature-cache": tmp_path / "features", "--out": out,
        }  # fmt: skip
        kept = [str(part) for pair in fixed.items() for part in pair if pair[0] not in flags]
        code = main(["eval", *kept, *map(str, flags)])
        return code, json.loads(out.read_text())["tasks"] if out.exists() else None

    return run


def one_by_one(weights, photos):
    """Features of each image and caption of the CSV, and whose captions they are."""
    model, _, transform = open_clip.create_model_and_transforms("tiny-test", pretrained=str(weights))
    model.eval()
    tokenizer = open_clip.get_tokenizer("tiny-test")
    names = list(CAPTIONS)
    texts = [(caption, names.index(name)) for name, captions in CAPTIONS.items() for caption in captions]
    with torch.no_grad():
        images = [model.encode_image(transform(Image.open(photos / f"{name}.png"))[None], normalize=True)
                  for name in names]  # fmt: skip
        captions = [model.encode_text(tokenizer([caption]), normalize=True) for caption, _ in texts]
    return torch.cat(images), torch.cat(captions), torch.tensor([owner for _, owner in texts])


def test_all_captions_of_an_image_count_wherever_they_are(evaluate, photos, weights):
    features = one_by_one(weights, photos)
    code, tasks = evaluate("--retrieval", photos / "photos.csv", "--csv-separator", ",")
    results = [tasks["retrieval-photos"]]
    code_of_joined, tasks = evaluate("--retrieval", photos / "joined.tar", "--caption-separator", "|")
    results.append(tasks["retrieval-joined"])
    code_of_listed, tasks = evaluate("--retrieval", photos / "listed.tar", "--caption-key", "captions")
    results.append(tasks["retrieval-listed"])
    assert (code, code_of_joined, code_of_listed) == (0, 0, 0)
    for result in results:
        assert (result["num_samples"], result["num_texts"]) == (8, sum(map(len, CAPTIONS.values())))
        assert result["data"] == results[0]["data"]  # in whatever form and order
        assert (result["data"]["images"], result["data"]["texts"]) == (8, result["num_texts"])
        for k in (1, 5):
            both = [result["scores"][f"{way}_R@{k}"] for way in ("image_to_text", "text_to_image")]
            assert both == pytest.approx(slow_recall(*features, k)) and min(both) > 0
        assert result["ranks"] == pytest.approx(results[0]["ranks"]) and result["ranks"]["image_to_text_mean_rank"] > 1


def test_packed_shards_score_as_the_csv_they_were_packed_from(evaluate, photos, tmp_path):
    code, tasks = evaluate("--retrieval", photos / "photos.csv")
    from_csv = tasks["retrieval-photos"]
    for name, extra in (("packed", ()), ("rows", ("--one-row-per-sample",))):
        assert main(["shards", "pack", str(photos / "photos.csv"), str(tmp_path / name), *extra]) == 0
    code_of_shards, tasks = evaluate("--retrieval", tmp_path / "packed")
    packed = tasks["retrieval-packed"]
    assert code == code_of_shards == 0
    for key in ("num_samples", "num_texts", "scores", "ranks"):
        assert packed[key] == pytest.approx(from_csv[key])
    _, tasks = evaluate("--retrieval", tmp_path / "rows")
    assert tasks["retrieval-rows"]["num_samples"] == tasks["retrieval-rows"]["num_texts"] == from_csv["num_texts"]


def test_several_sets_in_one_call_and_captions_as_they_are(evaluate, photos, capsys):
    code, tasks = evaluate("--retrieval", photos / "joined.tar", "--retrieval", photos / "photos.csv")
    assert code == 0 and [task["num_texts"] for task in tasks.values()] == [8, sum(map(len, CAPTIONS.values()))]
    printed = capsys.readouterr().out
    assert "retrieval-joined" in printed and "text_to_image_R@10" in printed


def test_copies_of_images_are_noted_and_what_to_do(evaluate, photos, tmp_path, capsys):
    """A sample per caption, as a CSV with a row per caption becomes where rows are not grouped."""
    with wds.TarWriter(str(tmp_path / "rows.tar"), encoder=False) as rows:
        for name, image, captions in photographs():
            for number, caption in enumerate(captions):
                rows.write({"__key__": f"{name}{number}", "png": image, "txt": caption.encode()})
    code, tasks = evaluate("--retrieval", tmp_path / "rows.tar", "--retrieval", photos / "joined.tar")
    total = sum(map(len, CAPTIONS.values()))
    note = tasks["retrieval-rows"]["note"]
    assert code == 0 and note.startswith(f"{total - 8} of {total} images are copies of others")
    assert "shards pack" in note and "--caption-key" in note and f"retrieval-rows: {note}" in capsys.readouterr().out
    assert "note" not in tasks["retrieval-joined"]


def test_the_second_time_features_come_from_disk(evaluate, photos, tmp_path, weights):
    flags = "--retrieval", photos / "joined.tar", "--caption-separator", "|"
    _, first = evaluate(*flags)
    _, second = evaluate(*flags)
    assert [tasks["retrieval-joined"]["cached"] for tasks in (first, second)] == [False, True]
    assert first["retrieval-joined"]["scores"] == second["retrieval-joined"]["scores"]
    assert first["retrieval-joined"]["data"] == second["retrieval-joined"]["data"]
    assert first["retrieval-joined"]["ranks"] == second["retrieval-joined"]["ranks"]
    # Not what depends on anything else.
    changed = tmp_path / "changed.pt"
    state = torch.load(weights, weights_only=True)
    state["text_projection"][0, 0] += 1
    torch.save(state, changed)
    assert not evaluate(*flags, pretrained=changed)[1]["retrieval-joined"]["cached"]
    assert not evaluate(*flags[:2])[1]["retrieval-joined"]["cached"]
    assert not evaluate(*flags, "--no-feature-cache")[1]["retrieval-joined"]["cached"]
    assert evaluate(*flags)[1]["retrieval-joined"]["cached"]


def test_a_wrong_input_is_one_line(evaluate, photos, tmp_path, capsys, weights):
    def refused(message, *flags, **options):
        code, tasks = evaluate(*flags, **options)
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and not tasks and message in error and error.startswith("openclip-ext: "), error

    refused("--retrieval /nowhere.csv: no such file", "--retrieval", "/nowhere.csv")
    refused("--retrieval /nowhere: no shard matches", "--retrieval", "/nowhere")
    refused("--csv-img-key image", "--retrieval", photos / "photos.csv", "--csv-img-key", "image")
    refused("--caption-key captions: is for shards", "--retrieval", photos / "photos.csv", "--caption-key", "captions")
    refused("--caption-separator: must not be empty", "--retrieval", photos / "joined.tar", "--caption-separator", "")
    refused("sample astronaut: missing caption", "--retrieval", photos / "listed.tar")
    refused("--caption-key caption: none of the first 8 samples, from ", "--retrieval", photos / "listed.tar",
            "--caption-key", "caption")  # fmt: skip
    refused("both would be called", *2 * ("--retrieval", photos / "joined.tar"))
    (tmp_path / "file").touch()
    refused("cannot be made a folder", "--retrieval", photos / "joined.tar", "--feature-cache", tmp_path / "file")

    table = tmp_path / "table.csv"
    table.write_text("filepath,title\ngone.png,a picture\n")
    refused("row 2 names gone.png, which does not exist", "--retrieval", table)
    (tmp_path / "broken.png").write_text("no picture")
    table.write_text("filepath,title\nbroken.png,a picture\n")
    refused("broken.png: cannot be opened as a picture", "--retrieval", table)

    def shard(**files):
        with wds.TarWriter(str(tmp_path / "shard.tar"), encoder=False) as writer:
            writer.write({"__key__": "one", **files})
        return tmp_path / "shard.tar"

    picture = (photos / "coffee.png").read_bytes()
    refused("sample one: empty caption", "--retrieval", shard(png=picture, txt=b" "))
    refused("sample one: corrupt image", "--retrieval", shard(png=b"no picture", txt=b"a"))
    whole = shard(png=picture, txt=b"a").read_bytes()
    (tmp_path / "shard.tar").write_bytes(whole[: len(whole) // 2])
    refused("shard.tar: ", "--retrieval", tmp_path / "shard.tar")

    diverged = {name: value * torch.nan for name, value in torch.load(weights, weights_only=True).items()}
    torch.save(diverged, tmp_path / "diverged.pt")
    refused("not finite", "--retrieval", photos / "joined.tar", pretrained=tmp_path / "diverged.pt")
