"""`openclip-ext structure`: numbers against slow references, then the command on trained checkpoints."""

import io
import json
import math
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import oracles
from openclip_ext.cli import main
from openclip_ext.commands.structure.picture import _project, draw_structure
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.tar import Skips, decode_image, read_shard
from openclip_ext.evaluation.metrics.structure import Structure, structure_metrics

SHARED_KEYS = {
    "modality_gap", "alignment", "uniformity_image", "uniformity_text", "consistency_error_across",
    "consistency_error_within", "image_to_text_R@1", "text_to_image_R@1",
}  # fmt: skip
PRIVATE_KEYS = {"private_share_image", "private_share_text", "private_overlap_image", "private_overlap_text"}


def slow_metrics(image, text, image_private, text_private):
    dot, distance = oracles.dot, oracles.distance
    rows = range(len(image))
    others = [(j, k) for j in rows for k in rows if j != k]

    def mean(values):
        return sum(values) / len(values)

    def center(x):
        return [mean([row[d] for row in x]) for d in range(len(x[0]))]

    def variance(x):
        return mean([distance(row, center(x)) for row in x])

    def recall(queries, candidates):
        scores = [[dot(query, candidate) for candidate in candidates] for query in queries]
        return mean([float(max(row) == row[j]) for j, row in enumerate(scores)])

    across = [(dot(image[j], text[k]) - dot(image[k], text[j])) ** 2 for j, k in others]
    within = [(dot(image[j], image[k]) - dot(text[j], text[k])) ** 2 for j, k in others]
    expected = {
        "modality_gap": distance(center(image), center(text)) ** 0.5,
        "alignment": mean([distance(v, t) for v, t in zip(image, text, strict=True)]),
        "consistency_error_across": mean(across),
        "consistency_error_within": mean(within),
        "image_to_text_R@1": recall(image, text),
        "text_to_image_R@1": recall(text, image),
    }
    for name, shared, private in (("image", image, image_private), ("text", text, text_private)):
        spread = [math.exp(-2 * distance(shared[j], shared[k])) for j, k in others]
        expected[f"uniformity_{name}"] = math.log(mean(spread))
        expected[f"private_share_{name}"] = variance(private) / (variance(shared) + variance(private))
        expected[f"private_overlap_{name}"] = mean([dot(v, p) ** 2 for v, p in zip(shared, private, strict=True)])
    return expected


@pytest.mark.parametrize(("pairs", "width"), [(9, 6), (17, 4), (2, 5)])  # few and many pairs for the width
def test_every_number_equals_a_slow_reference(pairs, width):
    image, text, image_private, text_private = oracles.unit(4, pairs, width)
    text = torch.nn.functional.normalize(image + text, dim=-1)
    features = (image, text, image_private, text_private)
    expected = slow_metrics(*(x.tolist() for x in features))
    metrics = structure_metrics(*features)
    assert metrics == pytest.approx(expected, rel=1e-10)
    assert structure_metrics(image, text) == {name: metrics[name] for name in metrics if name in SHARED_KEYS}


def test_blocks_of_pairs_change_nothing():
    image, text = oracles.unit(2, 1500, 3)  # more than one block
    exponents = -2 * torch.cdist(image, image)[~torch.eye(len(image), dtype=torch.bool)].square()
    expected = exponents.exp().mean().log().item()
    assert structure_metrics(image, text)["uniformity_image"] == pytest.approx(expected, rel=1e-10)


def test_identical_modalities_have_no_gap_and_no_error():
    image = oracles.unit(30, 8)
    metrics = structure_metrics(image, image.clone())
    for name in ("modality_gap", "alignment", "consistency_error_across", "consistency_error_within"):
        assert metrics[name] == 0, name
    assert metrics["image_to_text_R@1"] == metrics["text_to_image_R@1"] == 1


def test_errors_do_not_grow_with_the_number_of_pairs():
    image, text = oracles.unit(2, 2000, 8)
    few, all_pairs = structure_metrics(image[:500], text[:500]), structure_metrics(image, text)
    for name in ("consistency_error_across", "consistency_error_within", "uniformity_image"):
        assert few[name] == pytest.approx(all_pairs[name], rel=0.05), name


def test_a_rotation_of_both_modalities_changes_nothing():
    features = oracles.unit(4, 12, 6)
    rotation = torch.linalg.qr(oracles.unit(6, 6, seed=1)).Q
    assert structure_metrics(*(features @ rotation)) == pytest.approx(structure_metrics(*features), rel=1e-9)


def test_features_that_are_all_the_same_can_be_measured_and_drawn(tmp_path):
    same = torch.ones(5, 4) / 2
    metrics = structure_metrics(same, same, same, same)
    assert metrics["uniformity_image"] == 0 and metrics["private_share_text"] == 0
    draw_structure([Structure("same", {"image": same, "text": same}, metrics)], "", str(tmp_path / "same.png"))


def test_checkpoints_share_one_projection():
    image, text = (x.float() for x in oracles.unit(2, 40, 6))
    there = [Structure("a", {"image": image, "text": text}, {}), Structure("b", {"image": text, "text": image}, {})]
    (first, shares), (second, _) = _project(there)
    np.testing.assert_allclose(first["image"], second["text"])  # the same features are the same points
    assert not np.allclose(first["image"], second["image"]) and 0 < shares[1] <= shares[0] < 1
    narrow = Structure("c", {"image": image[:, :3], "text": text[:, :3]}, {})
    assert [plane["image"].shape for plane, _ in _project([*there, narrow])] == [(40, 2)] * 3


# The command.


@pytest.fixture
def show(tmp_path, model_config, val_shards):
    """A function from extra flags to the exit code and the JSON of `openclip-ext structure`."""

    def run(*extra):
        out = tmp_path / "structure"
        fixed = {"--model": "tiny-test", "--model-config": model_config, "--data": val_shards, "--out": str(out),
                 "--device": "cpu"}  # fmt: skip
        given = [str(part) for part in extra]
        kept = [part for key, value in fixed.items() if key not in given for part in (key, value)]
        code = main(["structure", *kept, *given])
        return code, json.loads((out / "structure.json").read_text()) if code == 0 else None

    return run


@pytest.fixture
def separated(train_flags, tmp_path):
    """The folder of a run of two epochs with private heads."""
    assert main(train_flags("--loss-term", "feature_separation=1", "--epochs", 2)) == 0
    return tmp_path / "logs" / "run"


def test_two_checkpoints_are_measured_and_drawn(separated, show, tmp_path, capsys):
    code, report = show("--checkpoint", separated / "checkpoints" / "epoch_1.pt", separated)
    assert code == 0
    assert report.keys() == {"created", "versions", "model", "precision", "data", "num_pairs", "checkpoints"}
    assert report["num_pairs"] == 50 and report["model"] == "tiny-test"
    first, last = report["checkpoints"]
    assert [first["label"], last["label"]] == ["epoch_1", "epoch_2"]
    assert last["path"] == str(separated / "checkpoints" / "epoch_2.pt")
    for checkpoint in (first, last):
        assert checkpoint["metrics"].keys() == SHARED_KEYS | PRIVATE_KEYS
        assert all(0 < checkpoint["metrics"][f"private_share_{modality}"] < 1 for modality in ("image", "text"))
    assert first["metrics"] != last["metrics"]
    printed = capsys.readouterr()
    assert f"{last['metrics']['alignment']:.4f}" in printed.out and "50/50" in printed.err
    with Image.open(tmp_path / "structure" / "structure.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 1000
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_numbers_are_those_of_the_model_and_its_heads(separated, show, val_shards, model_config):
    """Against OpenCLIP's own encoders, and the heads' weights applied by hand."""
    path = separated / "checkpoints" / "epoch_2.pt"
    _, report = show("--checkpoint", path, "--batch-size", 7, "--num-samples", 20)
    open_clip.add_model_config(model_config)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-test", pretrained=str(path))
    (shard,) = list_shards(val_shards).urls
    samples = list(read_shard(shard, Skips().record))[:20]
    images = torch.stack([preprocess(decode_image(sample, None)) for sample in samples])
    texts = open_clip.get_tokenizer("tiny-test")([sample["txt"].decode() for sample in samples])
    trunks = {}
    model.visual.ln_post.register_forward_hook(lambda module, inputs, out: trunks.update(image=out[:, 0]))
    model.ln_final.register_forward_hook(
        lambda module, inputs, out: trunks.update(text=out[torch.arange(len(out)), texts.argmax(-1)])
    )
    heads = torch.load(path)["loss"]
    private = {}
    with torch.no_grad():
        shared = [model.eval().encode_image(images, normalize=True), model.encode_text(texts, normalize=True)]
        for modality in ("image", "text"):
            x = trunks[modality]
            for layer in (0, 2):
                prefix = f"terms.feature_separation.heads.{modality}.{layer}"
                x = torch.nn.functional.linear(x, heads[f"{prefix}.weight"], heads[f"{prefix}.bias"])
                x = torch.nn.functional.gelu(x) if layer == 0 else x
            private[f"{modality}_private"] = torch.nn.functional.normalize(x, dim=-1)
    expected = structure_metrics(*shared, **private)
    assert report["num_pairs"] == 20
    assert report["checkpoints"][0]["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_checkpoint_without_heads_has_no_private_numbers(train_flags, show, tmp_path, capsys):
    """Trained as SigLIP, whose logit bias no model config tells of."""
    assert main(train_flags("--siglip")) == 0
    code, report = show("--checkpoint", tmp_path / "logs" / "run")
    assert code == 0 and report["checkpoints"][0]["metrics"].keys() == SHARED_KEYS
    assert "private" not in capsys.readouterr().out


def test_checkpoints_with_and_without_heads_are_compared(separated, train_flags, show, tmp_path, capsys):
    assert main(train_flags("--name", "plain")) == 0
    code, report = show("--checkpoint", tmp_path / "logs" / "plain", separated)
    assert code == 0
    assert [checkpoint["label"] for checkpoint in report["checkpoints"]] == ["plain/epoch_1", "run/epoch_2"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("private share, images"))
    assert row.split()[-2] == "–"


def test_captions_are_read_as_in_training(separated, show, tmp_path, pairs):
    pack([(image, f"zero | {caption}") for image, caption in pairs[:20]], str(tmp_path / "several"), progress=False)
    pack([(image, "zero") for image, _ in pairs[:20]], str(tmp_path / "first"), progress=False)
    flags = ("--checkpoint", separated)
    _, several = show(*flags, "--data", tmp_path / "several", "--caption-separator", "|")
    _, first = show(*flags, "--data", tmp_path / "first")
    assert several["checkpoints"] == first["checkpoints"]


def test_what_cannot_be_used_is_left_out_and_named(separated, show, tmp_path, pairs, capsys):
    (tmp_path / "rot").mkdir()
    with tarfile.open(tmp_path / "rot" / "0.tar", "w") as shard:
        for number, (image, caption) in enumerate(pairs[:20]):
            for name, data in (("png", b"rot" if number == 3 else image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:03}.{name}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    code, report = show("--checkpoint", separated, "--data", tmp_path / "rot", "--workers", 1)
    assert code == 0 and report["num_pairs"] == 19
    assert "epoch_2: 1 x corrupt image in " in capsys.readouterr().err


@pytest.fixture
def weights(model_config, tmp_path):
    """A file of random weights of the tiny model."""
    open_clip.add_model_config(model_config)
    path = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("tiny-test").state_dict(), path)
    return path


def test_files_of_bare_weights_are_checkpoints(show, weights, tmp_path):
    save_file(torch.load(weights), tmp_path / "same.safetensors")
    code, report = show("--checkpoint", weights, tmp_path / "same.safetensors")
    first, same = report["checkpoints"]
    assert code == 0 and (first["label"], same["label"]) == ("weights", "same")
    assert first["metrics"] == same["metrics"]


def test_what_a_run_or_a_folder_brings_need_not_be_said(by_hand, show, model_config, tmp_path, val_shards):
    """As `openclip-ext eval` has it: the architecture of a run, and of local-dir:."""
    path = by_hand / "checkpoints" / "epoch_1.pt"
    _, expected = show("--checkpoint", path)
    local = tmp_path / "local"
    local.mkdir()
    save_file(torch.load(path)["state_dict"], local / "open_clip_model.safetensors")
    config = open_clip.get_model_config("tiny-test")
    (local / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    sources = [str(by_hand), f"local-dir:{local}"]
    out = tmp_path / "inferred"
    flags = ["--data", val_shards, "--out", str(out), "--device", "cpu", "--batch-size", "16"]
    assert main(["structure", "--checkpoint", *sources, *flags]) == 0
    report = json.loads((out / "structure.json").read_text())
    assert report["model"] == f"tiny-test, {sources[1]}" and report["precision"] == "fp32"
    assert [row["label"] for row in report["checkpoints"]] == ["epoch_1", sources[1]]
    assert [row["source"] for row in report["checkpoints"]] == sources
    for row in report["checkpoints"]:
        assert row["metrics"] == pytest.approx(expected["checkpoints"][0]["metrics"], rel=1e-5)


def test_precision_counts(by_hand, show):
    full, half = (show("--checkpoint", by_hand, "--precision", name)[1] for name in ("fp32", "amp_bf16"))
    assert (full["precision"], half["precision"]) == ("fp32", "amp_bf16")
    values = [report["checkpoints"][0]["metrics"]["modality_gap"] for report in (full, half)]
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=0.05)


def test_a_csv_gives_the_numbers_of_its_shards(by_hand, show, tmp_path, pairs):
    """Its first batch has nothing that can be used."""
    rows = ["image\tcaption"]
    for number, (image, caption) in enumerate(pairs[:40]):
        (tmp_path / f"{number}.png").write_bytes(b"rot" if number < 8 else image)
        rows.append(f"{number}.png\t{caption}")
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    pack(pairs[8:40], str(tmp_path / "packed"), progress=False)
    columns = ("--csv-img-key", "image", "--csv-caption-key", "caption", "--csv-separator", "\t")
    flags = ("--checkpoint", by_hand, "--batch-size", 8)
    _, table = show(*flags, "--data", tmp_path / "pairs.tsv", *columns)
    _, shards = show(*flags, "--data", tmp_path / "packed")
    assert table["num_pairs"] == shards["num_pairs"] == 32
    assert table["checkpoints"] == shards["checkpoints"]


def test_the_first_pairs_are_the_same_with_any_number_of_workers(by_hand, show, tmp_path, pairs):
    pack(pairs[:40], str(tmp_path / "several"), samples_per_shard=10, progress=False)
    flags = ("--checkpoint", by_hand, "--data", tmp_path / "several", "--batch-size", 5, "--num-samples", 12)
    alone, many = (show(*flags, "--workers", workers)[1]["checkpoints"] for workers in (0, 3))
    assert alone == many


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "nope.pt"], "--checkpoint nope.pt: no such file; give a checkpoint"),
        (["--checkpoint", "empty"], "--checkpoint empty: no checkpoints/epoch_N.pt in this folder"),
        (["--checkpoint", "rot.pt"], "--checkpoint rot.pt: not a checkpoint of tensors and plain values"),
        (["--checkpoint", "rot.safetensors"], "--checkpoint rot.safetensors: not a checkpoint of tensors"),
        (["--checkpoint", "none.pt"], "--checkpoint none.pt: holds no weights"),
        (["--checkpoint", "weights.pt", "--model", "RN50"],
         "--checkpoint weights.pt: its weights do not fit --model RN50"),
        (["--checkpoint", "weights.pt", "--model", "tiny-tset"], "--model tiny-tset: no such model"),
        (["--checkpoint", "diverged.pt"], "--checkpoint diverged.pt: its features are not finite"),
        (["--checkpoint", "weights.pt", "--data", "nowhere"], "--data nowhere: no shard matches"),
        (["--checkpoint", "weights.pt", "--data", "one"], "--data one: 1 usable pair, and at least 2 are needed"),
        (["--checkpoint", "weights.pt", "--data", "one", "--caption-key", "captions"],
         "--caption-key captions: none of the first 1 samples"),
        (["--checkpoint", "weights.pt", "--num-samples", "1"], "--num-samples 1: must be at least 2"),
        (["--checkpoint", "weights.pt", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--checkpoint", "weights.pt", "--workers", "-1"], "--workers -1: must be at least 0"),
        (["--checkpoint", "weights.pt", "--precision", "pure_fp16"], "--precision pure_fp16: needs a GPU"),
        (["--checkpoint", "weights.pt", "--caption-separator", ""], "--caption-separator: must not be empty"),
        (["--checkpoint", "weights.pt", "--data", "pairs.csv", "--caption-key", "texts"],
         "--caption-key texts: is for shards; a CSV takes --csv-caption-key"),
        (["--checkpoint", "weights.pt", "--data", "pairs.csv", "--csv-img-key", "image"], "--csv-img-key image"),
        (["--checkpoint", "local-dir:nowhere"], "local-dir:nowhere: no such folder"),
        (["--checkpoint", "weights.pt", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--checkpoint", "weights.pt", "--out", "rot.pt"], "--out rot.pt: cannot be made a folder"),
        (["--checkpoint", "weights.pt", "--model-config", "no.json"], "--model-config no.json: no such file"),
        ([], "the following arguments are required: --checkpoint"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_a_wrong_input_is_one_line(show, weights, pairs, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("rot.pt", "rot.safetensors"):
        (tmp_path / name).write_bytes(b"rot")
    torch.save({"epoch": 1, "state_dict": {}}, tmp_path / "none.pt")
    state = torch.load(weights)
    torch.save(state | {"text_projection": state["text_projection"] * math.nan}, tmp_path / "diverged.pt")
    pack(pairs[:1], str(tmp_path / "one"), progress=False)
    (tmp_path / "pairs.csv").write_text("filepath,title\nx.png,x\n")
    assert show(*flags) == (2, None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_one_line(show, weights, capsys):
    assert show("--checkpoint", weights, "--device", "cuda") == (2, None)
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err
