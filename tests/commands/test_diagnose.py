"""`openclip-ext diagnose`: the command, what it encodes, duplicates, drift, and what it recommends."""

import json
import math
from argparse import Namespace

import open_clip
import pytest
import torch
from PIL import Image

from launching import fork
from openclip_ext import UserError, upstream
from openclip_ext.cli import main
from openclip_ext.commands.diagnose import body
from openclip_ext.commands.diagnose.advice import LOSSES, recommend
from openclip_ext.commands.diagnose.encoding import choose_source, encode
from openclip_ext.commands.diagnose.gradients import Walk
from openclip_ext.commands.diagnose.measure import parse_loss
from openclip_ext.commands.diagnose.sample import make_sample
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.pack import pack
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.evaluation.loading import load_model
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.state.table import NoRoomError
from towers import TOWERS, inputs, tower_model

FEW = ("--batch-sizes", 8, 32, "--batch-size", 8, "--draws", 20)


@pytest.fixture
def diagnose(tmp_path, shards, monkeypatch):
    """A function from flags to the exit code and the report of `openclip-ext diagnose`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*extra):
        out = tmp_path / "diagnosis"
        flags = {"--train-data": shards, "--out": out, "--device": "cpu", "--workers": 0}
        given = [part for name, value in flags.items() if name not in extra for part in (name, value)]
        code = main(["diagnose", *(str(part) for part in [*given, *extra])])
        return code, json.loads((out / "diagnosis.json").read_text()) if code == 0 else None

    return run


def test_a_checkpoint_is_measured_drawn_and_judged(by_hand, diagnose, tmp_path, capsys):
    code, report = diagnose("--pretrained", by_hand, *FEW)
    assert code == 0
    assert report.keys() == {
        "created", "versions", "model", "checkpoint", "precision", "device", "data", "num_pairs", "batch_size", "draws",
        "seed", "gradients", "losses", "negatives", "duplicates", "drift", "recommendation",
    }  # fmt: skip
    assert report["num_pairs"] == 256 and report["drift"] is None
    assert report["gradients"] == {"image": "last projection", "text": "last projection"}
    assert [loss["name"] for loss in report["losses"]] == list(LOSSES)
    for loss in report["losses"]:
        assert [row["batch_size"] for row in loss["batches"]] == [8, 32]
        few, more = (row["signal"]["value"] for row in loss["batches"])
        assert 0 < few < more < 1
    for row in report["losses"][0]["batches"]:  # of clip
        assert row["equivalent_batch"]["value"] == pytest.approx(row["batch_size"])
    printed = capsys.readouterr().out
    assert len(report["recommendation"]) == 3 and all(sentence in printed for sentence in report["recommendation"])
    assert f"{report['losses'][1]['batches'][0]['signal']['value']:.3f} ±" in printed
    with Image.open(tmp_path / "diagnosis" / "diagnosis.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_features_are_encoded_once(by_hand, diagnose, tmp_path, capsys):
    flags = ("--pretrained", by_hand, "--losses", "dcl", *FEW)
    (_, first), (_, second) = diagnose(*flags), diagnose(*flags)
    assert capsys.readouterr().err.count("features taken from") == 1
    assert first["losses"] == second["losses"]
    _, other = diagnose(*flags, "--samples", 100, "--feature-cache", tmp_path / "mine")
    assert other["num_pairs"] == 100 and len(list((tmp_path / "mine").iterdir())) == 1


def test_gradients_are_those_of_the_models_projections(by_hand, shards):
    """Of OpenCLIP's own model and loss, on one shard's pictures."""
    model = load_model(str(by_hand), device="cpu")
    args = Namespace(train_data=shards, samples=64, seed=0, caption_key=None, batch_size=64, workers=0)
    args.csv_img_key = args.csv_caption_key = args.csv_separator = None
    source = choose_source(args)
    sample = make_sample(encode(model, source, CaptionFormat(), args), torch.device("cpu"))
    found = Walk(parse_loss("clip"), sample, 64).gradient(torch.arange(64))
    stream = StreamConfig(source=source, batch_size=64, image_transform=model.transform, tokenizer=model.tokenizer)
    batch = next(iter(eval_loader(stream, workers=0)))
    clip = model.model
    weights = [clip.visual.proj.requires_grad_(), clip.text_projection.requires_grad_()]
    out = clip(batch["image"], batch["text"])
    loss = open_clip.ClipLoss()(out["image_features"], out["text_features"], out["logit_scale"].detach())
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TOWERS)
def test_what_a_projection_is_given_is_seen_in_every_tower(name):
    """Then its weights' gradient is that times the gradient of what it gives."""
    model = tower_model(name)
    projections = upstream.find_projections(model)
    assert ("image" in projections) == (name != "resnet") and "text" in projections
    given = dict(zip(("image", "text"), inputs(model), strict=True))
    for modality, seen_by in projections.items():
        with upstream.watched({modality: seen_by}) as seen:
            output = getattr(model, f"encode_{modality}")(given[modality])
        slope = torch.randn_like(output)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(output, list(named.values()), slope, allow_unused=True)
        expected = seen_by.pool(seen[modality], given[modality]).detach().T @ slope
        shapes = (expected.shape, expected.T.shape)
        close = [
            torch.allclose(gradient if gradient.shape == expected.shape else gradient.T, expected, atol=1e-5)
            for gradient in gradients
            if gradient is not None and gradient.shape in shapes
        ]
        assert any(close), modality


def test_a_tower_that_shows_no_projection_is_said(tmp_path, diagnose, capsys):
    config = {
        "embed_dim": 8,
        "vision_cfg": TOWERS["resnet"][0],
        "text_cfg": TOWERS["resnet"][1] | {"vocab_size": 49408},
    }
    (tmp_path / "resnet-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "resnet-test.json")
    torch.save(open_clip.create_model("resnet-test").state_dict(), tmp_path / "weights.pt")
    flags = ("--model", "resnet-test", "--model-config", tmp_path / "resnet-test.json", "--losses", "dcl")
    code, report = diagnose("--pretrained", tmp_path / "weights.pt", *flags, *FEW)
    assert code == 0
    assert report["gradients"] == {"image": "linear map behind the features", "text": "last projection"}
    assert "the image tower shows no last projection" in capsys.readouterr().out


@pytest.mark.slow
def test_several_processes_give_the_numbers_of_one(by_hand, diagnose, shards, tmp_path):
    flags = ("--pretrained", by_hand, "--losses", "emc2", "sogclr", "dcl:recent_batches=2", *FEW)
    _, alone = diagnose(*flags)
    shared = [*map(str, flags), "--train-data", shards, "--device", "cpu", "--workers", "0", "--no-feature-cache"]
    result = fork("accelerate", ["diagnose", *shared, "--out", str(tmp_path / "two")])
    assert result.returncode == 0, result.stderr
    together = json.loads((tmp_path / "two" / "diagnosis.json").read_text())
    assert together["losses"] == alone["losses"]
    assert together["recommendation"] == alone["recommendation"]
    assert result.stdout.count("negatives: CV²") == 1


class Second(Ranks):
    """The second of two processes, to which the first sends what it has: here, what went wrong."""

    def on_all(self, value):
        return [UserError("the first one says so"), value]


def test_what_goes_wrong_in_the_first_process_ends_all():
    with pytest.raises(UserError, match="the first one says so"):
        body._encode_on_first(None, None, None, Second(1, 2))


# Duplicates.


def test_false_negatives_are_found_with_their_keys(by_hand, diagnose, tmp_path, pairs):
    """Of 40 pairs: two with one caption, two with the same words in another order, and a picture that comes twice."""
    words = ["apple", "bread", "candle", "drum", "eagle", "fence", "garden", "hammer", "island", "jacket"]
    captions = [f"{one} with {other}" for one in words for other in words if one < other][:40]
    captions[3] = captions[20]
    captions[5] = " ".join(reversed(captions[31].split()))
    pictures = {image for image, _ in pairs}
    images = [image for image, _ in pairs[:300]][::7][:40]
    assert len(set(images)) == 40 <= len(pictures)
    images[9] = images[14]
    pack(list(zip(images, captions, strict=True)), str(tmp_path / "twice"), samples_per_shard=16, progress=False)
    code, report = diagnose(
        "--pretrained", by_hand, "--train-data", tmp_path / "twice", "--losses", "dcl", "--workers", 2, *FEW
    )
    found = report["duplicates"]
    assert code == 0 and found["same_caption"] == 2 / 40 and found["near_caption"] == 4 / 40
    assert found["same_image"] == 2 / 40
    worst = {tuple(sorted(key.rpartition(":")[2] for key in pair["keys"])): pair for pair in found["worst"]}
    assert worst["000000003", "000000020"]["caption_cosine"] == 1
    assert worst["000000003", "000000020"]["captions"] == [captions[3]] * 2
    assert worst["000000005", "000000031"]["caption_cosine"] == pytest.approx(1, abs=1e-3)
    assert worst["000000009", "000000014"]["image_correlation"] == 1
    assert len(worst) == len(found["worst"]) <= 10


def test_a_csv_names_its_pictures(by_hand, diagnose, tmp_path, pairs):
    rows = ["filepath,title"]
    for number, (image, _) in enumerate(pairs[:40]):
        (tmp_path / f"{number}.png").write_bytes(image)
        rows.append(f"{number}.png,{'the same' if number in (7, 33) else 'number ' + 'abcdefghij'[number % 10] * 3}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    code, report = diagnose("--pretrained", by_hand, "--train-data", tmp_path / "pairs.csv", "--losses", "dcl", *FEW)
    assert code == 0 and report["num_pairs"] == 40
    assert all(key.endswith(".png") for pair in report["duplicates"]["worst"] for key in pair["keys"])


# Drift.


def test_a_model_that_moves_faster_leaves_fewer_recent_batches(by_hand, diagnose, capsys):
    before = (by_hand / "checkpoints" / "epoch_1.pt").read_bytes()
    flags = ("--pretrained", by_hand, *FEW)
    (_, slow), (_, fast) = (diagnose(*flags, "--probe-lr", rate) for rate in (1e-6, 3e-3))
    assert (by_hand / "checkpoints" / "epoch_1.pt").read_bytes() == before
    for report in (slow, fast):
        assert list(report["drift"]["errors"]) == ["1", "2", "4", "8", "16"] and report["drift"]["limit"] == 0.1
    assert slow["drift"]["usable"] == 16 > fast["drift"]["usable"]
    assert fast["drift"]["errors"]["16"] > 10 * slow["drift"]["errors"]["16"] > 0
    assert slow["losses"][-1]["name"] == "gamma_decomp:recent_batches=16"
    assert slow["losses"][:6] == fast["losses"][:6]  # the copy moved, and what is measured did not
    assert "drift at lr 1e-06: scores err by" in capsys.readouterr().out


# What it recommends.


def judged(losses, cv2=30.0, drift=None):
    """The sentences of (name, signal, equivalent batch and its interval, that towards clip's target, direction)."""

    def worth(value, low, high):
        return {"value": value, "interval": [low, high], "extrapolated": value > 1024}

    rows = [
        {
            "name": name,
            "batches": [{
                "batch_size": 64,
                "signal": {"value": signal},
                "clip_signal": {"value": signal / 2},
                "direction": {"value": direction, "interval": [direction - 0.01, direction + 0.01]},
                "equivalent_batch": worth(*own),
                "clip_equivalent_batch": worth(*towards_clip),
            }],
        }
        for name, signal, own, towards_clip, direction in losses
    ]  # fmt: skip
    return recommend({"batch_size": 64, "losses": rows, "negatives": {"cv2": cv2}, "drift": drift})


SAME = (64, 64, 64)
CLIP = ("clip", 0.2, SAME, SAME, 0.7)


def test_where_a_small_batch_costs_nothing_it_says_so():
    losses = [("clip", 0.48, SAME, SAME, 0.999), ("dcl", 0.5, (70, 66, 75), (70, 66, 75), 1.0)]
    cost, gain, action = judged(losses, cv2=0.3)
    assert "the mean of many steps one of 1.00: the small batch costs noise, which more steps average out" in cost
    assert gain == "No other loss does clearly better: the best, dcl, is worth a batch of 70 of clip's."
    assert action == "Keep --loss clip, and look again once the model tells pairs apart better."


def test_of_losses_that_cannot_be_told_apart_the_plainest_is_recommended():
    emc2, corrected = (310, 250, 380), (290, 230, 350)
    losses = [CLIP, ("emc2", 0.5, emc2, emc2, 0.9), ("batch_corrected", 0.48, corrected, corrected, 0.9)]
    cost, gain, action = judged(losses)
    assert "of 0.20 with the gradient over all pairs, and the mean of many steps only 0.70: no number" in cost
    assert gain == "One step of batch_corrected is worth a batch of 290 of clip's (cosine 0.24)."
    assert action.startswith("Try: --loss batch_corrected; --probe-lr tells")


def test_what_gains_towards_another_target_alone_is_not_recommended():
    losses = [CLIP, ("dcl", 0.9, (400, 390, 410), (66, 60, 70), 0.9), ("sogclr", 0.4, (90, 85, 99), (95, 90, 99), 0.9)]
    assert judged(losses)[1:] == [
        "One step of sogclr is worth a batch of 90 of clip's (cosine 0.20).",
        "Try: --loss sogclr; --probe-lr tells whether recent pairs add to it.",
    ]


def test_options_come_as_flags():
    worth = (2345, 2000, 2600)
    _, gain, action = judged([CLIP, ("gamma_decomp:recent_batches=4,gamma=0.5", 0.9, worth, worth, 0.9)])
    assert "is worth a batch of about 2,300 of clip's (cosine 0.45)." in gain
    assert action == "Try: --loss gamma_decomp --loss-arg recent_batches=4 --loss-arg gamma=0.5."


def test_a_loss_whose_mean_points_elsewhere_is_recommended_with_a_warning():
    worth = (100, 90, 110)
    _, gain, action = judged([("clip", 0.2, SAME, SAME, 0.98), ("batch_corrected", 0.3, worth, worth, 0.88)])
    assert gain.endswith("(cosine 0.15), but the mean of many has a cosine of 0.88 alone (clip's: 0.98), so that where "
                         "steps are many and small it may not help.")  # fmt: skip
    assert action.startswith("Try: --loss batch_corrected")


def test_of_losses_worth_as_much_one_that_points_worse_is_left_out():
    dcl, corrected = (160, 150, 170), (90, 81, 99)
    losses = [CLIP, ("dcl", 0.5, dcl, dcl, 0.75), ("batch_corrected", 0.4, corrected, corrected, 0.89)]
    assert judged(losses)[2].startswith("Try: --loss batch_corrected")


def test_what_is_not_certain_is_not_recommended():
    for worth in ((200, 50, 800), (70, 66, 75)):  # may be less than the batch; is hardly more
        assert judged([CLIP, ("dcl", 0.3, worth, worth, 0.8)])[2] == "Keep --loss clip."
    assert "steps one of 0.93 to 0.95, which more --draws tell better." in judged([("clip", 0.2, SAME, SAME, 0.941)])[0]
    assert judged([CLIP])[1] == "No other loss measured here does better at batch 64."


# Bad input.


def test_a_sample_that_does_not_fit_into_memory_is_one_line(by_hand, diagnose, monkeypatch, capsys):
    def no_room(size, device, what):
        raise NoRoomError(f"the {what} takes {size / 1e9:.3f} GB and 0.0 GB are free on {device}")

    monkeypatch.setattr(body, "require_room", no_room)
    assert diagnose("--pretrained", by_hand, *FEW) == (2, None)
    expected = "--samples 10000: the matrix of scores of 256 pairs takes 0.002 GB and 0.0 GB are free on cpu; use"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--batch-sizes 1024: a batch is drawn from 256 usable pairs"),
        (("--batch-sizes", 8, "--samples", 20), "--batch-sizes 64: a batch is drawn from 20 usable pairs"),
        (("--batch-sizes", 1), "--batch-sizes 1: must be at least 2"),
        (("--samples", 1), "--samples 1: must be at least 2"),
        (("--draws", 19), "--draws 19: must be at least 20"),
        (("--probe-lr", -1), "--probe-lr -1.0: must be above 0"),
        (("--workers", -1), "--workers -1: must be at least 0"),
        (("--losses", "nope"), "--losses nope: no such loss"),
        (("--losses", "siglip", *FEW), "--losses siglip: needs a logit bias"),
        (("--train-data", "nowhere"), "--train-data nowhere: no shard matches"),
        (("--train-data", "bare"), "--train-data bare: has no sizes.json"),
        (("--train-data", "same", *FEW), "gives every image the same features"),
        (("--pretrained", "nope.pt", *FEW), "--pretrained nope.pt: no such file"),
        (("--pretrained", "diverged.pt", *FEW), "--pretrained diverged.pt: its features are not finite in fp32"),
        (("--pretrained", "constant.pt", *FEW), "--pretrained constant.pt: gives every text the same features"),
        (("--out", "diverged.pt", *FEW), "--out diverged.pt: cannot be made a folder"),
    ],
    ids=lambda part: " ".join(map(str, part)) if isinstance(part, tuple) else "",
)
def test_a_wrong_input_is_one_line(
    by_hand, diagnose, model_config, tmp_path, monkeypatch, pairs, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    state = torch.load(by_hand / "checkpoints" / "epoch_1.pt")["state_dict"]
    torch.save(state | {"text_projection": state["text_projection"] * math.nan}, "diverged.pt")
    still = {"ln_final.weight": torch.zeros(16), "ln_final.bias": torch.ones(16)}
    torch.save(state | still, "constant.pt")
    pack(pairs[:1] * 40, str(tmp_path / "same"), progress=False)
    pack(pairs[:40], str(tmp_path / "bare"), progress=False)
    (tmp_path / "bare" / "sizes.json").unlink()
    given = ("--pretrained", by_hand) if "--pretrained" not in flags else ("--model", "tiny-test", "--model-config",
                                                                           model_config)  # fmt: skip
    assert diagnose(*given, *flags) == (2, None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert message in line
