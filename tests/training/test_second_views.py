"""Second views from the shard to the loss, and the towers' pooled outputs, end to end."""

import io
import json
import random
import tarfile

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from batches import as_codes, config, epoch, noisy
from openclip_ext.cli import main
from openclip_ext.data.captions import CaptionFormat, changed_words, two_views
from openclip_ext.data.tar import Skips
from openclip_ext.losses import Widths
from openclip_ext.training.pair_model import PairModel, feature_widths, pair_model
from towers import TEXT, TOWERS, VIT, inputs, tower_model

ALL_TERMS = (
    "--loss-term", "brownian_bridge=0.25", "--loss-term", "geometric_consistency=0.1",
    "--loss-term", "feature_separation=0.5",
)  # fmt: skip


def rows(tmp_path, name="run"):
    return [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]


# Captions.


def test_words_change_without_new_ones():
    rng, caption = random.Random(0), "one two three four five six seven eight nine ten"
    changed = [changed_words(caption, rng) for _ in range(200)]
    assert all(set(text.split()) <= set(caption.split()) and text for text in changed)
    lengths = [len(text.split()) for text in changed]
    assert 8.5 < sum(lengths) / 200 < 9.5 and max(lengths) == 10
    assert sum(text == caption for text in changed) < 10
    assert changed_words("word", rng) == "word" and changed_words("", rng) == ""


def test_the_second_view_is_another_caption_where_there_is_one():
    rng = random.Random(0)
    pairs = {two_views(["a", "b", "c"], rng) for _ in range(100)}
    assert len(pairs) == 6 and all(first != second for first, second in pairs)
    first, second = two_views(["a b c d"], rng)
    assert first == "a b c d" != second and set(second) <= set(first)


@pytest.mark.parametrize(
    ("format", "sample", "expected"),
    [
        ({}, {"txt": b"a | b"}, ["a | b"]),
        ({"separator": "|"}, {"txt": b"a | b | "}, ["a", "b"]),
        ({"separator": "|"}, {"txt": b""}, [""]),
        ({"key": "captions"}, {"json": b'{"captions": ["a", "b", 3, ""]}'}, ["a", "b"]),
        ({"key": "captions"}, {"json": b'{"captions": "a"}', "txt": b"t"}, ["a"]),
        ({"key": "captions", "separator": ";"}, {"json": b'{"captions": ["a;b", "c"]}'}, ["a", "b", "c"]),
    ],
)
def test_captions_come_from_the_text_or_the_json(format, sample, expected):
    assert CaptionFormat(**format).of_sample(sample, None) == expected


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ({}, "missing caption"),
        ({"json": b'{"title": "a"}'}, "missing caption"),
        ({"json": b'["a"]'}, "missing caption"),
        ({"json": b'{"captions": []}'}, "missing caption"),
        ({"json": b'{"captions'}, "corrupt caption"),
        ({"json": b"\xff"}, "corrupt caption"),
    ],
)
def test_json_without_a_usable_caption_is_recorded(sample, kind):
    skips = Skips()
    sample = sample | {"__url__": "s.tar", "__ordinal__": 0}
    assert CaptionFormat(key="captions").of_sample(sample, skips.record) is None
    assert dict(skips) == {(kind, "s.tar"): 1}


# Batches.


def test_views_are_a_function_of_seed_epoch_and_sample(shards):
    wanted = {"image_aug_transform": noisy, "image_transform": noisy, "text_aug": True}

    def by_id(**changes):
        found = {}
        for batch in epoch(shards, **(wanted | changes)):
            for index, sample_id in enumerate(batch["sample_ids"].tolist()):
                found[sample_id] = {name: batch[name][index] for name in ("image", "image_aug", "text", "text_aug")}
        return found

    one, again, other = by_id(), by_id(batch_size=32, workers=2), by_id(number=1)
    for sample_id, views in one.items():
        for name, value in views.items():
            assert torch.equal(value, again[sample_id][name])
        assert not torch.equal(views["image"], views["image_aug"])
        assert torch.equal(views["text"], other[sample_id]["text"])
    assert sum(not torch.equal(views["text_aug"], other[i]["text_aug"]) for i, views in one.items()) > 128
    assert sum(not torch.equal(views["text"], views["text_aug"]) for views in one.values()) > 128


def test_only_what_is_asked_for_is_made_and_the_first_view_does_not_change(shards):
    plain = epoch(shards, image_transform=noisy)
    both = epoch(shards, image_transform=noisy, image_aug_transform=noisy)
    assert not any(name.endswith("_aug") for name in plain[0]) and set(both[0]) - set(plain[0]) == {"image_aug"}
    assert all(torch.equal(x["image"], y["image"]) for x, y in zip(plain, both, strict=True))


def test_one_of_several_captions_is_drawn_each_epoch(tmp_path, pairs):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for number, (image, _) in enumerate(pairs[:16]):
            text = json.dumps({"captions": [f"{number} first", f"{number} second"]}).encode()
            for extension, data in (("png", image), ("json", text)):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    (tmp_path / "sizes.json").write_text('{"0.tar": 16}')
    changes = {"captions": CaptionFormat(key="captions"), "num_samples": 16}
    texts = torch.cat([epoch(str(tmp_path), number=number, **changes)[0]["text"] for number in range(20)])
    seen = {"".join(map(chr, row)).strip() for row in texts.tolist()}
    assert seen == {f"{number} {which}" for number in range(16) for which in ("first", "second")}
    stream = config(str(tmp_path), **{key: value for key, value in changes.items() if key != "num_samples"})
    assert torch.equal(stream.batch([stream.evaluation_row(torch_picture(), ["x", "y"])])["text"], as_codes(["x"]))


def torch_picture():
    from PIL import Image

    return Image.new("RGB", (4, 4))


# Towers.


@pytest.mark.parametrize("name", TOWERS)
def test_trunk_features_are_what_the_projection_is_given(name):
    """Projected by the tower's own last layer, they are the tower's output, where that is a projection of them."""
    model = tower_model(name)
    paired = PairModel(model, trunk_features=True)
    image, text = inputs(model)
    with torch.no_grad():
        out, plain = paired(image, text), model(image, text)
    assert paired.projected == []
    assert torch.equal(out["image_features"], plain["image_features"])
    assert torch.equal(out["text_features"], plain["text_features"])
    tower = getattr(model, "text", model)
    projection = tower.text_projection
    trunk = out["text_trunk_features"]
    projected = projection(trunk) if callable(projection) else trunk @ projection
    torch.testing.assert_close(normalize(projected, dim=-1), plain["text_features"])
    trunk = out["image_trunk_features"]
    if name == "resnet":  # attention pooling projects and pools at once
        assert trunk.shape == (3, 256)
        return
    visual = model.visual
    if hasattr(visual, "proj"):
        projected = trunk @ visual.proj
    else:
        projected = visual.head(trunk) if len(visual.head) else visual.trunk.get_classifier()(trunk)
    torch.testing.assert_close(normalize(projected, dim=-1), plain["image_features"])
    widths = feature_widths(paired, None)
    assert widths == Widths(image_trunk=trunk.shape[1], text_trunk=16, embed=8)


def test_hugging_face_text_towers_have_trunk_features():
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for proj, width, projected in (("linear", 16, []), ("mlp", 16, []), (None, 8, ["text"])):
        model = tower_model("text-last-token")
        model.text = HFTextEncoder("", 8 if proj else 16, config=bert, proj_type=proj, pooler_type="mean_pooler").eval()
        paired = PairModel(model, trunk_features=True)
        assert paired.projected == projected
        with torch.no_grad():
            trunk = paired(*inputs(model))["text_trunk_features"]
            text_features = model.encode_text(inputs(model)[1])
        assert trunk.shape == (3, 16) and text_features.shape == (3, 8 if proj else 16), (proj, width)


def test_towers_without_a_projection_are_named_and_their_features_stand_in():
    model = open_clip.model.CLIP(
        16, VIT | {"timm_model_name": "test_vit", "timm_proj": "none", "image_size": 160, "width": 16}, TEXT,
        output_dict=True,
    ).eval()  # fmt: skip
    paired = PairModel(model, trunk_features=True)
    assert paired.projected == ["image"]
    with torch.no_grad():
        out = paired(*inputs(model))
    assert torch.equal(out["image_trunk_features"], out["image_features"])


def test_both_views_go_through_the_model_at_once(monkeypatch):
    model = tower_model("vit")
    paired = pair_model(model, frozenset({"image_aug", "text_aug"}))
    (image, text), (image_aug, text_aug) = inputs(model), inputs(model)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: calls.append(len(args[0])) or forward(*args))
    with torch.no_grad():
        out = paired(image, text, image_aug, text_aug)
        assert calls == [6]
        for suffix, pair in (("", (image, text)), ("_aug", (image_aug, text_aug))):
            for key in ("image_features", "text_features"):
                torch.testing.assert_close(out[key + suffix], forward(*pair)[key])


def test_without_need_the_model_stays_as_it_is():
    model = tower_model("vit")
    assert pair_model(model, frozenset({"sample_ids"})) is model


# Training.


def test_all_terms_train_and_the_checkpoint_is_openclips(train_flags, tmp_path, model_config):
    flags = ("--loss", "gamma_decomp", *ALL_TERMS, "--epochs", 4, "--lr", "3e-3")
    assert main(train_flags(*flags)) == 0
    curve = rows(tmp_path)
    for name in ("contrastive", "brownian_bridge", "geometric_consistency", "feature_separation"):
        values = [row[f"{name}_loss"] for row in curve]
        assert sum(values[-8:]) < sum(values[:8]), name
    assert {"orthogonality", "private_contrastive", "uniformity"} <= curve[0].keys()
    path = tmp_path / "logs/run/checkpoints/epoch_4.pt"
    open_clip.add_model_config(model_config)
    open_clip.create_model("tiny-test", pretrained=str(path))
    content = torch.load(path)
    stock = open_clip.create_model("tiny-test")
    assert content["state_dict"].keys() == stock.state_dict().keys()
    assert "terms.feature_separation.heads.image.0.weight" in content["loss"]
    assert main(train_flags(*flags, "--epochs", 5, "--resume", "latest")) == 0
    assert rows(tmp_path)[-1]["epoch"] == 4


def test_private_heads_learn(train_flags, tmp_path):
    assert main(train_flags("--loss-term", "feature_separation=1", "--epochs", 2)) == 0
    first, last = (
        torch.load(tmp_path / f"logs/run/checkpoints/epoch_{epoch}.pt")["loss"] for epoch in (1, 2)
    )  # fmt: skip
    assert all(not torch.equal(first[key], last[key]) for key in first)


def test_accumulated_batches_equal_one_large_batch_with_all_terms(train_flags, tmp_path):
    # A light weight on a term that grows with the batch: else one step of it changes the model beyond comparison.
    terms = [part.replace("geometric_consistency=0.1", "geometric_consistency=0.002") for part in ALL_TERMS]
    common = (*terms, "--epochs", 3, "--train-num-samples", 256, "--opt", "timm/sgd", "--lr", "0.02")
    assert main(train_flags(*common, "--batch-size", 256, "--name", "large")) == 0
    assert main(train_flags(*common, "--batch-size", 128, "--accum-freq", 2, "--name", "parts")) == 0
    for large, parts in zip(rows(tmp_path, "large"), rows(tmp_path, "parts"), strict=True):
        for key in [key for key in large if key.endswith("_loss")]:
            assert parts[key] == pytest.approx(large[key], rel=1e-5, abs=1e-6), key
    large, parts = (torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_3.pt") for name in ("large", "parts"))
    torch.testing.assert_close(parts["state_dict"], large["state_dict"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["loss"], large["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ("--view-aug", "auto", "--loss-term", "brownian_bridge=0:1@0.5,tau=0.75"),
        ("--caption-separator", " ", "--loss-term", "geometric_consistency=0.1", "--workers", "2"),
        ("--precision", "amp_bf16", *ALL_TERMS),
        ("--precision", "pure_bf16", *ALL_TERMS),
        ("--grad-checkpointing", "--lock-image", *ALL_TERMS),
    ],
)
def test_terms_go_with_other_flags(train_flags, tmp_path, flags):
    assert main(train_flags(*flags)) == 0
    assert all(value is not None for row in rows(tmp_path) for value in row.values())


def test_a_scheduled_weight_is_logged(train_flags, tmp_path):
    assert main(train_flags("--loss-term", "brownian_bridge=0:1@0.5")) == 0
    weights = [row["brownian_bridge_weight"] for row in rows(tmp_path)]
    assert weights == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
