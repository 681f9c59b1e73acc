"""Learning rates by tower and by depth."""

import json

import open_clip
import pytest
import torch

from openclip_ext import UserError, upstream
from openclip_ext.cli import main
from openclip_ext.training.flags import parse_args
from openclip_ext.training.learning_rates import scale_learning_rates, scaled
from towers import TOWERS, tower_model


def depths(model, tower):
    """A parameter's name to the number of its layer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = upstream.tower_layers(model, tower)
    return {names[id(parameter)]: depth for depth, layer in enumerate(layers) for parameter in layer}, len(layers)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_parameter_of_a_tower_has_one_layer_and_the_input_is_the_first(name, tower):
    model = tower_model(name)
    listed = [parameter for layer in upstream.tower_layers(model, tower) for parameter in layer]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in upstream.tower_parameters(model)[tower]}
    towers = upstream.tower_parameters(model)
    rest = {id(p) for p in model.parameters()} - {id(p) for p in towers["image"] + towers["text"]}
    assert rest == {id(model.logit_scale)}
    depth, count = depths(model, tower)
    first = next(name for name in depth if "conv1" in name or "patch_embed" in name or "stem" in name
                 or "token_embedding" in name)  # fmt: skip
    assert depth[first] == 0 and count >= 3


def test_the_layers_of_openclips_own_towers(deep):
    open_clip.add_model_config(deep[-1])
    model = open_clip.create_model("deep-test")
    depth, count = depths(model, "text")
    assert count == 5
    assert {depth["token_embedding.weight"], depth["positional_embedding"]} == {0}
    assert [depth[f"transformer.resblocks.{i}.ln_1.weight"] for i in range(3)] == [1, 2, 3]
    assert depth["ln_final.weight"] == 3 and depth["text_projection"] == 4
    depth, count = depths(model, "image")
    assert {depth[f"visual.{name}"] for name in ("class_embedding", "conv1.weight", "ln_pre.bias")} == {0}
    assert depth["visual.ln_post.weight"] == depth["visual.transformer.resblocks.1.mlp.c_fc.bias"] == 2
    assert depth["visual.proj"] == count - 1 == 3


def test_the_layers_of_a_resnet_of_timms_towers_and_of_hugging_faces():
    resnet, count = depths(tower_model("resnet"), "image")
    assert resnet["visual.bn3.weight"] == 0 and resnet["visual.layer3.0.conv1.weight"] == 3
    assert resnet["visual.attnpool.c_proj.weight"] == count - 1 == 5
    timm, count = depths(tower_model("timm-linear"), "image")
    assert timm["visual.head.proj.weight"] == count - 1
    assert timm["visual.trunk.layer1.0.conv1.weight"] < timm["visual.trunk.layer4.0.conv1.weight"] < count - 1
    own, count = depths(tower_model("timm-own-classifier"), "image")
    assert own["visual.trunk.fc.weight"] == count - 1
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = tower_model("text-last-token")
    model.text = HFTextEncoder("", 8, config=bert, proj_type="linear", pooler_type="mean_pooler")
    text, count = depths(model, "text")
    assert text["text.transformer.embeddings.word_embeddings.weight"] == 0
    assert [text[f"text.transformer.encoder.layer.{i}.output.dense.weight"] for i in range(2)] == [1, 2]
    assert text["text.proj.weight"] == count - 1 == 3


def test_a_tower_whose_order_is_not_known_is_refused_for_decay_only():
    model = tower_model("vit")
    model.visual = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="the layers of Linear are not known"):
        upstream.tower_layers(model, "image")
    assert len(upstream.tower_parameters(model)["image"]) == 2


@pytest.mark.parametrize("opt", ["adamw", "timm/lamb", "timm/lookahead_adamw"])
def test_rates_are_the_schedules_times_tower_and_depth(train_flags, deep, opt):
    flags = ("--lr", 0.01, "--visual-lr", 0.002, "--layer-decay", 0.5, "--text-layer-decay", 0.1, "--opt", opt)
    config = parse_args(train_flags(*flags, *deep, "--epochs", 2)[1:])
    open_clip.add_model_config(deep[-1])
    model = open_clip.create_model("deep-test")
    optimizer = upstream.create_optimizer(config.flags, model)
    plain = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    scale_learning_rates(config, model, optimizer)
    schedule = scaled(upstream.create_schedule(config.flags, optimizer, steps_per_epoch=10), optimizer)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(plain) and all(decays[id(p)] == decay for p, decay in plain)
    for step in (0, 7, 7, 19):
        base = schedule(step)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        named = {name: rates[id(p)] / base for name, p in model.named_parameters()}
        assert named["visual.proj"] == pytest.approx(0.2)
        assert named["visual.transformer.resblocks.1.mlp.c_fc.weight"] == pytest.approx(0.2 * 0.5)
        assert named["visual.conv1.weight"] == pytest.approx(0.2 * 0.5**3)
        assert named["text_projection"] == named["logit_scale"] == pytest.approx(1)
        assert named["transformer.resblocks.0.ln_1.bias"] == pytest.approx(0.1**3)


def test_a_schedule_that_respects_scales_itself_is_not_scaled_twice():
    """As those of OpenCLIP 4."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups, lr=1.0)

    def schedule(step):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * step * group["lr_scale"]
        return 0.1 * step

    set_rates = scaled(schedule, optimizer)
    for step in (3, 3, 4):
        assert set_rates(step) == pytest.approx(0.1 * step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * step, 0.05 * step])


def metrics(tmp_path, name, key):
    lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


DECAYED = ("--layer-decay", 0.5, "--text-lr", 2e-3)


def test_depth_moves_weights_less_and_the_log_shows_the_schedules_rate(train_flags, tmp_path, deep, capsys):
    for name, extra in (("plain", ()), ("decayed", ("--layer-decay", 0.01))):
        assert main(train_flags(*deep, "--name", name, "--epochs", 2, *extra)) == 0
    assert "learning rates: 1e-08 to 1 times the schedule's, 5 levels" in capsys.readouterr().err
    assert metrics(tmp_path, "decayed", "lr") == pytest.approx(metrics(tmp_path, "plain", "lr"))
    moved = {}
    for name in ("plain", "decayed"):
        first, last = (torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_{n}.pt")["state_dict"] for n in (1, 2))
        moved[name] = {key: float((last[key] - first[key]).abs().max()) for key in ("token_embedding.weight",
                       "visual.conv1.weight", "text_projection", "logit_scale")}  # fmt: skip
    for key in ("text_projection", "logit_scale"):
        assert moved["decayed"][key] > moved["plain"][key] / 3
    for key in ("token_embedding.weight", "visual.conv1.weight"):
        assert 0 < moved["decayed"][key] < moved["plain"][key] / 1000


@pytest.mark.parametrize("opt", ["adamw", "timm/lamb"])
def test_a_resumed_run_keeps_its_rates_and_the_flags_of_now_count(train_flags, tmp_path, deep, opt):
    flags = (*deep, *DECAYED, "--opt", opt, "--lr-scheduler", "const")
    assert main(train_flags(*flags, "--epochs", 2, "--name", "whole")) == 0
    assert main(train_flags(*flags, "--epochs", 1, "--name", "half")) == 0
    half = tmp_path / "logs" / "half" / "checkpoints" / "epoch_1.pt"
    assert main(train_flags(*flags, "--epochs", 2, "--name", "rest", "--resume", half)) == 0
    assert metrics(tmp_path, "rest", "loss") == metrics(tmp_path, "whole", "loss")[8:]
    steeper = [0.25 if flag == 0.5 else flag for flag in flags]
    assert main(train_flags(*steeper, "--epochs", 2, "--name", "steeper", "--resume", half)) == 0
    saved = torch.load(tmp_path / "logs" / "steeper" / "checkpoints" / "epoch_2.pt")["optimizer"]["param_groups"]
    assert min(group["lr_scale"] for group in saved) == 2 * 0.25**4
    assert min(group["lr"] for group in saved) == pytest.approx(2 * 0.25**4 * 1e-3)


def test_a_locked_image_tower_goes_with_decay_of_the_text_tower(train_flags, tmp_path, deep):
    assert main(train_flags(*deep, *DECAYED, "--lock-image", "--epochs", 2)) == 0
    first, last = (torch.load(tmp_path / f"logs/run/checkpoints/epoch_{n}.pt")["state_dict"] for n in (1, 2))
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert {"text_projection", "token_embedding.weight", "logit_scale"} <= moved
    assert not any(key.startswith("visual.") for key in moved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer-decay", "0"], "--layer-decay 0.0: must be in (0, 1], such as 0.75"),
        (["--visual-layer-decay", "1.5"], "--image-layer-decay 1.5: must be in (0, 1]"),
        (["--text-lr", "0"], "--text-lr 0.0: must be above 0; to keep the tower as it is use --lock-text"),
        (["--image-lr", "1e-5", "--lr", "0"], "--image-lr 1e-05: follows the schedule of --lr, which is 0.0"),
    ],
)
def test_a_rate_that_means_nothing_is_one_line(train_flags, tmp_path, capsys, flags, message):
    assert main(train_flags(*flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "logs").exists()
