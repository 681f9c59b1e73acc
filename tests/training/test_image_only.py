"""Image-only training: two views of each picture, keys of an averaged tower, end to end."""

import copy
import io
import json
import pathlib
import tarfile

import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import oracles
from launching import fork
from openclip_ext.cli import main
from openclip_ext.losses import LossContext, ObjectivePlan, Widths
from openclip_ext.losses.base import total_loss
from openclip_ext.training.flags import parse_args
from openclip_ext.training.image_only import MomentumEncoder, SymmetricObjective, ViewsModel
from openclip_ext.training.loop import Trainer
from openclip_ext.training.run import train
from ours import LOSSES
from pictures import class_folders
from towers import tower_model

VIEWS = ("--pairs", "views")
MOMENTUM = (*VIEWS, "--momentum-encoder", "0.9")
WAYS = [
    pytest.param(VIEWS, "clip", id="views-clip"),
    pytest.param(MOMENTUM, "gamma_decomp", id="momentum-gamma_decomp"),
    pytest.param(VIEWS, "gamma_decomp", id="views-gamma_decomp", marks=pytest.mark.slow),
    pytest.param(MOMENTUM, "clip", id="momentum-clip", marks=pytest.mark.slow),
]


def rows(tmp_path, name="run"):
    return [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def losses(tmp_path, name="run"):
    return [row["contrastive_loss"] for row in rows(tmp_path, name)]


def checkpoint(tmp_path, epoch, name="run"):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt")


def write_images_only(folder, pairs, per_shard):
    """Shards whose samples hold a picture and nothing else."""
    folder.mkdir()
    sizes = {}
    for start in range(0, len(pairs), per_shard):
        name = f"{start // per_shard}.tar"
        with tarfile.open(folder / name, "w") as shard:
            for number, (image, _) in enumerate(pairs[start : start + per_shard], start):
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(image)
                shard.addfile(member, io.BytesIO(image))
        sizes[name] = len(pairs[start : start + per_shard])
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


# The model and the objective.


def test_features_are_the_towers_of_both_views_in_one_pass(monkeypatch):
    model = tower_model("vit")
    views, plain = ViewsModel(model, None), ViewsModel(copy.deepcopy(model), 0.5)
    first, second = torch.randn(2, 3, 3, 32, 32)
    calls, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x, **options: calls.append(len(x)) or encode(x, **options))
    monkeypatch.setattr(model, "encode_text", lambda *_: pytest.fail("the text tower is run"))
    out = views(first, second)
    assert calls == [6]
    expected = [normalize(encode(view), dim=-1) for view in (first, second)]
    torch.testing.assert_close([out["image_features"], out["text_features"]], expected)
    torch.testing.assert_close(out["logit_scale"], model.logit_scale.exp())
    swapped = plain(first, second)
    names = ("image_features", "text_features_swapped", "image_features_swapped", "text_features")
    torch.testing.assert_close([swapped[name] for name in names], [*expected[:1] * 2, *expected[1:] * 2])
    assert [swapped[name].requires_grad for name in names] == [True, False, True, False]


@pytest.mark.parametrize("name", ["vit", "text-last-token", "resnet"])
def test_only_the_image_tower_and_the_scale_are_trained(name):
    model = tower_model(name)
    ViewsModel(model, 0.9)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("visual.", "logit_scale"))}


def test_the_momentum_encoder_equals_a_slow_average():
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    keys = MomentumEncoder(tower, 0.9)
    expected = {name: value.detach().double().clone() for name, value in tower.named_parameters()}
    for _ in range(20):
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                parameter += torch.randn_like(parameter)
                expected[name] = 0.9 * expected[name] + 0.1 * parameter.double()
            tower(torch.randn(8, 4))
            keys(torch.randn(8, 4))
        keys.update()
    for name, parameter in keys.average.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(keys.average.named_buffers()), dict(tower.named_buffers()))
    assert not any(parameter.requires_grad for parameter in keys.parameters())


def context(num_samples):
    return LossContext(num_samples=num_samples, widths=Widths(embed=8))


def test_queries_and_keys_give_moco_v3s_gradient():
    """Against cross entropies over rows and columns, written out; a key gets none."""
    torch.manual_seed(0)
    plan = ObjectivePlan("clip", {})
    objective = SymmetricObjective(plan, context(6))
    first, second = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    keys = [normalize(torch.randn(6, 8), dim=-1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(5.0, requires_grad=True)
    total_loss(
        objective(first, keys[1], scale, image_features_swapped=second, text_features_swapped=keys[0])
    ).backward()
    weights = [parameter for parameter in objective.predictor.parameters()]
    found = [x.grad.clone() for x in (first, second, scale, *weights)]
    assert all(key.grad is None for key in keys)

    def contrast(features, key):
        hidden, gain, shift, out = weights
        query = features @ hidden.T
        query = (query - query.mean(1, keepdim=True)) / (query.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        query = (gain * query + shift).clamp_min(0) @ out.T
        logits = scale * (query / query.norm(dim=1, keepdim=True)) @ key.detach().T
        labels = torch.arange(6)
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    loss = (contrast(first, keys[1]) + contrast(second, keys[0])) / 2
    torch.testing.assert_close(found, list(torch.autograd.grad(loss, (first, second, scale, *weights))))


@pytest.mark.parametrize("loss", LOSSES)
def test_both_ways_round_are_two_runs_of_the_loss(loss):
    """Value and state of each way are those of the loss alone on it."""
    plan = ObjectivePlan(loss, {})
    objective = SymmetricObjective(plan, context(10))
    objective.predictor = torch.nn.Identity()
    alone = [plan.build(context(10)) for _ in range(2)]
    for step in range(3):
        first, second, first_key, second_key = oracles.unit(4, 4, 8, seed=step, dtype=torch.float32)
        extra = {"sample_ids": torch.arange(step, step + 4), "logit_bias": torch.tensor(-1.0)}
        swapped = {"image_features_swapped": second, "text_features_swapped": first_key}
        for part in (objective, *alone):
            part.begin_step(step=step, total_steps=3)
        both = objective(first, second_key, torch.tensor(5.0), **swapped, **extra)
        one, other = (
            part(query, key, torch.tensor(5.0), **extra)
            for part, query, key in zip(alone, (first, second), (second_key, first_key), strict=True)
        )
        torch.testing.assert_close(both, {name: (one[name] + other[name]) / 2 for name in one})
        for part in (objective, *alone):
            part.commit()
    for part, reference in zip(objective.objectives, alone, strict=True):
        torch.testing.assert_close(part.state_dict(), reference.state_dict(), equal_nan=True)


# Training.


@pytest.mark.parametrize("flags", [VIEWS, MOMENTUM], ids=["views", "momentum"])
def test_every_step_is_the_loss_of_the_towers_features(train_flags, tmp_path, monkeypatch, flags):
    """Recomputed in float64 from the batch and the weights before the step."""
    expected, original = [], Trainer._backward

    def watched(self, batches):
        (batch,) = batches
        assert batch.keys() == {"image", "image_aug", "origins"}
        assert not torch.equal(batch["image"], batch["image_aug"])
        model, scale = copy.deepcopy(self.module).double(), self.module.logit_scale.double().exp()
        queries = [model.encode_image(batch[name].double(), normalize=True) for name in ("image", "image_aug")]
        keys = queries
        if self.momentum_encoder is not None:
            tower, predictor = (copy.deepcopy(x).double() for x in (self.momentum_encoder.average, self.loss.predictor))
            keys = [normalize(tower(batch[name].double()), dim=-1) for name in ("image", "image_aug")]
            queries = [normalize(predictor(query), dim=-1) for query in queries]
        with torch.no_grad():
            ways = [oracles.dcl(query, key, scale) for query, key in zip(queries, reversed(keys), strict=True)]
            expected.append(sum(ways).item() / 2)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_backward", watched)
    assert main(train_flags(*flags, "--loss", "dcl", "--batch-size", 16, "--aug-cfg", "scale=(0.5,1.0)")) == 0
    assert len(expected) == 16 and losses(tmp_path) == pytest.approx(expected, rel=1e-5)


def test_the_average_follows_every_step_that_was_taken(train_flags, tmp_path, monkeypatch):
    taken, original = [], Trainer._update

    def poisoned(self, outputs, batches):
        if not taken:
            taken.append(copy.deepcopy(self.momentum_encoder.average.state_dict()))
        step = len(taken)
        if step == 3:
            outputs["contrastive_loss"] = outputs["contrastive_loss"] * float("nan")
        original(self, outputs, batches)
        tower, last = self.module.visual.state_dict(), taken[-1]
        taken.append(last if step == 3 else {key: 0.9 * last[key] + 0.1 * tower[key] for key in last})

    monkeypatch.setattr(Trainer, "_update", poisoned)
    assert main(train_flags(*MOMENTUM, "--loss", "gamma_decomp")) == 0
    assert [row["skipped_steps"] for row in rows(tmp_path)[:4]] == [0, 0, 1, 0]
    saved = checkpoint(tmp_path, 1)
    average = {key.removeprefix("average."): value for key, value in saved["momentum_encoder"].items()}
    torch.testing.assert_close(average, taken[-1])
    assert not torch.equal(average["proj"], saved["state_dict"]["visual.proj"])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("flags", [VIEWS, MOMENTUM], ids=["views", "momentum"])
def test_images_alone_train_with_every_loss(train_flags, tmp_path, pairs, loss, flags):
    folder = write_images_only(tmp_path / "images", pairs[:128], 64)
    assert main(train_flags("--train-data", folder, *flags, "--loss", loss, "--epochs", 6, "--lr", "3e-3")) == 0
    curve = losses(tmp_path)
    assert len(curve) == 24 and sum(curve[-6:]) < sum(curve[:6])
    assert "skipped" not in (tmp_path / "logs" / "run" / "out.log").read_text().replace("skipped_steps", "")


@pytest.mark.parametrize("flags", [VIEWS, MOMENTUM], ids=["views", "momentum"])
def test_the_text_tower_rests_and_the_checkpoint_is_openclips(train_flags, tmp_path, model_config, flags):
    assert main(train_flags(*flags, "--epochs", 2)) == 0
    open_clip.add_model_config(model_config)
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt"
    model = open_clip.create_model("tiny-test", pretrained=str(path))
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    torch.testing.assert_close(model.state_dict(), second["state_dict"])
    for key, value in first["state_dict"].items():
        moves = key.startswith(("visual.", "logit_scale"))
        assert torch.equal(value, second["state_dict"][key]) != moves, key
    trained = sum(key.startswith(("visual.", "logit_scale")) for key, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in second["optimizer"]["param_groups"]) == trained
    assert ("momentum_encoder" in second) == (flags == MOMENTUM)
    if flags == MOMENTUM:
        weights = [key for key in second["loss"] if key.startswith("predictor")]
        assert len(weights) == 4
        assert not any(torch.equal(first["loss"][key], second["loss"][key]) for key in weights)


@pytest.mark.parametrize("flags,loss", WAYS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(train_flags, tmp_path, loss, flags):
    flags = (*flags, "--loss", loss, "--epochs", 4)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    halfway = tmp_path / "logs" / "whole" / "checkpoints" / "epoch_2.pt"
    assert main(train_flags(*flags, "--name", "half", "--resume", halfway)) == 0
    assert losses(tmp_path, "half") == losses(tmp_path, "whole")[16:]
    whole, half = checkpoint(tmp_path, 4, "whole"), checkpoint(tmp_path, 4, "half")
    for key in whole.keys() - {"name", "loss_name", "clock"}:
        torch.testing.assert_close(half[key], whole[key], rtol=0, atol=0, equal_nan=True)


def test_an_average_may_begin_later_and_says_so(train_flags, tmp_path, capsys):
    assert main(train_flags(*VIEWS)) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    assert main(train_flags(*MOMENTUM, "--name", "on", "--epochs", 2, "--resume", path)) == 0
    assert "it holds no momentum encoder: that starts as a copy of what it follows" in capsys.readouterr().err


@pytest.mark.parametrize("flags,loss", WAYS)
def test_accumulated_batches_equal_one_large_batch(train_flags, tmp_path, loss, flags):
    common = (*flags, "--loss", loss, "--epochs", 3, "--train-num-samples", 256, "--opt", "timm/sgd", "--lr", "0.1")
    assert main(train_flags(*common, "--batch-size", 256, "--name", "large")) == 0
    assert main(train_flags(*common, "--batch-size", 128, "--accum-freq", 2, "--name", "parts")) == 0
    assert losses(tmp_path, "parts") == pytest.approx(losses(tmp_path, "large"), rel=1e-5)
    large, parts = checkpoint(tmp_path, 3, "large"), checkpoint(tmp_path, 3, "parts")
    for key in {"state_dict", "loss", "momentum_encoder"} & large.keys():
        torch.testing.assert_close(parts[key], large[key], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("flags", "loss"), [(VIEWS, "dcl"), ((*MOMENTUM, "--recent-batches", "0"), "gamma_decomp"), (MOMENTUM, "clip")]
)
def test_two_processes_equal_one_with_twice_the_batch(train_flags, tmp_path, pairs, flags, loss):
    folder = write_images_only(tmp_path / "two", pairs[:32], 16)
    common = ("--train-data", folder, *flags, "--loss", loss, "--epochs", 6, "--opt", "timm/sgd", "--lr", 0.2)
    assert main(train_flags(*common, "--batch-size", 32, "--name", "one")) == 0
    result = fork("torchrun", train_flags(*common, "--batch-size", 16, "--name", "two"))
    assert result.returncode == 0, result.stderr
    curve = losses(tmp_path, "one")
    assert len(curve) == 6 and curve[0] != curve[-1]
    assert losses(tmp_path, "two") == pytest.approx(curve, rel=1e-5)
    one, two = checkpoint(tmp_path, 6, "one"), checkpoint(tmp_path, 6, "two")
    two["state_dict"] = {key.removeprefix("module."): value for key, value in two["state_dict"].items()}
    for key in {"state_dict", "loss", "momentum_encoder"} & one.keys():
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "amp_bf16"), ("--grad-clip-norm", 1.0), ("--view-aug", "auto", "--workers", 2),
        ("--sample-id", "hash", "--loss", "sogclr"), ("--siglip",), ("--grad-checkpointing", "--accum-freq", 2),
        ("--loss-term", "geometric_consistency=0.01,views=false"), ("--lock-image",), ("--dataset-type", "synthetic"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)  # fmt: skip
@pytest.mark.parametrize("mode", [VIEWS, MOMENTUM], ids=["views", "momentum"])
def test_other_flags_go_with_it(train_flags, tmp_path, mode, flags):
    assert main(train_flags(*mode, "--train-num-samples", 128, *flags)) == 0
    assert all(value is not None for row in rows(tmp_path) for value in row.values())


def test_a_tower_with_batch_norm_trains_against_its_average(train_flags, tmp_path, model_config):
    config = json.loads(pathlib.Path(model_config).read_text())
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    path = tmp_path / "resnet.json"
    path.write_text(json.dumps(config))
    assert main(train_flags(*MOMENTUM, "--model", "resnet", "--model-config", path, "--accum-freq", 2)) == 0
    content = checkpoint(tmp_path, 1)
    for name in ("bn1.running_mean", "bn1.num_batches_tracked"):
        assert torch.equal(content["momentum_encoder"][f"average.{name}"], content["state_dict"][f"visual.{name}"])


@pytest.mark.slow
def test_neighbours_are_nearer_after_training(train_flags, tmp_path, pairs):
    data = write_images_only(tmp_path / "images", pairs[:896], 224)
    fit, measure = class_folders(tmp_path / "fit", "train", 300, skip=896), class_folders(tmp_path / "val", "val", 150)
    flags = train_flags("--train-data", data, "--probe-train", fit, "--probe-val", measure, "--val-frequency", 100)
    position = flags.index("--train-data")
    untrained = train(parse_args(flags[1:position] + flags[position + 2 :]))
    recipe = "--loss dcl --epochs 15 --batch-size 64 --lr 3e-3 --aug-cfg scale=(0.6,1.0) --save-frequency 0"
    trained = train(parse_args([*flags[1:], *VIEWS, *recipe.split()]))
    assert trained["knn-top1"] > untrained["knn-top1"] + 0.1


BAD = [
    (["--momentum-encoder", "0.9"], "--momentum-encoder 0.9: is for training on images alone; add --pairs views"),
    ([*VIEWS, "--momentum-encoder", "1"], "--momentum-encoder 1.0: must be in [0, 1), such as 0.99"),
    ([*MOMENTUM, "--precision", "pure_bf16"], "--precision pure_bf16: an average of weights in half precision"),
    ([*VIEWS, "--loss-term", "brownian_bridge=1"], "--loss-term brownian_bridge: needs image_aug, and with --pairs"),
    ([*VIEWS, "--loss-term", "geometric_consistency=1"], "--loss-term geometric_consistency: needs image_aug, text"),
    ([*VIEWS, "--loss-term", "feature_separation=1"], "--loss-term feature_separation: needs image_aug, text_aug, tr"),
    ([*VIEWS, "--loss-term", "caption=1"], "--loss-term caption: --model tiny-test makes no captions"),
    ([*VIEWS, "--model", "coca_ViT-B-32"], "--model coca_ViT-B-32: a CoCa model makes captions"),
    ([*VIEWS, "--distill-model", "ViT-B-32"], "--distill-model ViT-B-32: needs captions, and --pairs views has none"),
    ([*VIEWS, "--val-data", "/x.tar"], "--val-data /x.tar: needs captions"),
    ([*VIEWS, "--caption-key", "c"], "--caption-key c: needs captions"),
    ([*VIEWS, "--pairs", "words"], "argument --pairs: invalid choice: 'words'"),
    (["--probe-train", "/nowhere"], "--probe-train, --probe-val: give both or neither"),
    (["--probe-train", "/nowhere", "--probe-val", "/nowhere"], "--probe-train /nowhere: no such folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_wrong_input_is_one_line_with_exit_code_2_and_no_run(train_flags, tmp_path, capsys, flags, message):
    assert main(train_flags(*flags)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.glob("logs/run/checkpoints/*"))


def test_a_sharded_model_is_refused(train_flags, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert main(train_flags(*VIEWS)) == 2
    assert "--pairs views: does not go with FSDP" in capsys.readouterr().err


def test_two_memories_do_not_share_a_file(train_flags, tmp_path, capsys):
    file = ("--loss-arg", "bank_device=mmap", "--loss-arg", f"bank_path={tmp_path / 'bank'}")
    assert main(train_flags(*MOMENTUM, "--loss", "emc2", *file)) == 2
    assert "--momentum-encoder: keeps a memory for each way round" in capsys.readouterr().err
