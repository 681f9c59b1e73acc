"""Low-rank adaptation, and checkpoints of it that any OpenCLIP loads."""

import json
import math

import open_clip
import pytest
import torch

from openclip_ext import UserError, upstream
from openclip_ext.cli import main
from openclip_ext.training.lora import Adapters, parse_lora
from openclip_ext.upstream.attention_v3 import LinearAttention
from towers import TOWERS, inputs, tower_model

pytest.importorskip("peft")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "per head", "boolean"])
def test_attention_with_linear_layers_is_the_attention_it_replaces(batch_first, mask):
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first)
    torch.nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(3, 5, 8)
    allowed = torch.randn(6, 5, 5) > -1
    allowed |= torch.eye(5, dtype=torch.bool)
    attn_mask = {
        "none": None,
        "causal": torch.full((5, 5), -torch.inf).triu(1),
        "per head": torch.zeros(6, 5, 5).masked_fill(~allowed, -torch.inf),
        "boolean": ~allowed,
    }[mask]
    if not batch_first:
        x = x.transpose(0, 1)
    expected = attention(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
    found = LinearAttention(attention)(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
    torch.testing.assert_close(found, expected)


def adapted(name="vit", spec="r=2,alpha=6"):
    """A model, its weights and outputs before, and its adapters, which say something other than nothing."""
    model = tower_model(name)
    batch = inputs(model)
    with torch.no_grad():
        before = {key: value.clone() for key, value in model.state_dict().items()}, model(*batch)
        adapters = Adapters(model, parse_lora(spec))
        unchanged = model(*batch)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    for key in ("image_features", "text_features"):
        torch.testing.assert_close(unchanged[key], before[1][key])
    return model, batch, before, adapters


@pytest.mark.parametrize("name", TOWERS)
def test_merged_weights_compute_what_the_adapted_model_does(name):
    model, batch, (weights, _), adapters = adapted(name)
    merged = adapters.merged_state_dict()
    assert merged.keys() == weights.keys()
    plain = tower_model(name)
    plain.load_state_dict(merged)
    with torch.no_grad():
        found, expected = model(*batch), plain(*batch)
    for key in ("image_features", "text_features"):
        torch.testing.assert_close(found[key], expected[key])
    changed = {key for key in merged if not torch.equal(merged[key], weights[key])}
    assert "transformer.resblocks.0.attn.in_proj_weight" in {key.removeprefix("text.") for key in changed}
    assert all(key.endswith("weight") for key in changed)


def test_the_change_is_alpha_over_r_times_b_a_and_only_adapters_and_the_scale_are_trained():
    model, _, (weights, _), adapters = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained - {"logit_scale"}) and "logit_scale" in trained
    blocks = ["visual.transformer.resblocks.0", "transformer.resblocks.0"]
    layers = [
        f"{block}.{layer}" for block in blocks for layer in ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert trained == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"} | {"logit_scale"}
    parameters = dict(model.named_parameters())
    change = parameters["transformer.resblocks.0.mlp.c_fc.lora_B.default.weight"]
    change = 3 * change @ parameters["transformer.resblocks.0.mlp.c_fc.lora_A.default.weight"]
    key = "transformer.resblocks.0.mlp.c_fc.weight"
    torch.testing.assert_close(adapters.merged_state_dict()[key], weights[key] + change)


def test_targets_and_locked_towers_are_respected():
    model = tower_model("vit")
    model.lock_image_tower()
    adapters = Adapters(model, parse_lora("r=2,targets=in_proj+c_fc"))
    layers = {name.partition(".lora_")[0] for name in adapters.state_dict() if ".lora_" in name}
    assert layers == {"transformer.resblocks.0.attn.in_proj", "transformer.resblocks.0.mlp.c_fc"}
    with pytest.raises(UserError, match=r"have no fc1; they have c_fc, c_proj, in_proj, out_proj"):
        Adapters(tower_model("vit"), parse_lora("r=2,targets=fc1"))
    model = tower_model("vit")
    model.requires_grad_(False)
    with pytest.raises(UserError, match="--lora: neither tower has a Linear layer in its blocks that is trained"):
        Adapters(model, parse_lora("r=2"))


def test_a_text_tower_of_hugging_faces_is_adapted():
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = tower_model("text-last-token")
    model.text = HFTextEncoder("", 8, config=bert, proj_type="linear", pooler_type="mean_pooler")
    names = {name.rpartition(".")[2] for name in upstream.adaptable_layers(model) if name.startswith("text.")}
    assert names == {"query", "key", "value", "dense"}


def rows(tmp_path, name):
    """Of training, without those of validation."""
    found = [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "kind" not in row]


def checkpoint(tmp_path, name, epoch):
    return torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_{epoch}.pt", weights_only=True)


LORA = ("--lora", "r=4,dropout=0.1", "--ema", 0.8, "--layer-decay", 0.7, "--lr-scheduler", "const", "--lr", 0.01)


def test_a_run_learns_resumes_exactly_and_loads_in_openclip(train_flags, tmp_path, deep, val_shards, capsys):
    flags = (*deep, *LORA, "--val-data", val_shards, "--loss", "gamma_decomp", "--accum-freq", 2)
    assert main(train_flags(*flags, "--epochs", 3, "--name", "whole")) == 0
    # Rank times in plus out: 2 blocks of width 32, 3 of width 16, four layers each; and the logit scale.
    trained = sum(blocks * 4 * width * (4 + 2 + 5 + 5) for blocks, width in ((2, 32), (3, 16))) + 1
    assert f"LoRA of 20 layers, rank 4: {trained:,} parameters are trained" in capsys.readouterr().err
    whole = checkpoint(tmp_path, "whole", 3)
    losses = [row["loss"] for row in rows(tmp_path, "whole")]
    assert losses[-1] < losses[0]
    resume = tmp_path / "logs/whole/checkpoints/epoch_1.pt"
    assert main(train_flags(*flags, "--epochs", 3, "--name", "rest", "--resume", resume)) == 0
    assert [row["loss"] for row in rows(tmp_path, "rest")] == losses[4:]
    again = checkpoint(tmp_path, "rest", 3)
    for key in ("state_dict", "state_dict_ema", "loss"):
        torch.testing.assert_close(again[key], whole[key], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(again["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0)
    for key in ("state_dict", "state_dict_ema"):
        torch.testing.assert_close(again["lora"][key], whole["lora"][key], rtol=0, atol=0)
    for key in ("state_dict", "state_dict_ema"):
        torch.save(whole[key], tmp_path / "weights.pt")
        model = open_clip.create_model("deep-test", pretrained=str(tmp_path / "weights.pt"))
        torch.testing.assert_close(model.state_dict(), whole[key], rtol=0, atol=0)
    first = checkpoint(tmp_path, "whole", 1)["state_dict"]
    moved = {key for key, value in whole["state_dict"].items() if not torch.equal(value, first[key])}
    assert "logit_scale" in moved and "visual.transformer.resblocks.1.attn.in_proj_weight" in moved
    adapted_ones = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    assert all(key.endswith(adapted_ones) for key in moved - {"logit_scale"})
    change = whole["state_dict"]["transformer.resblocks.0.mlp.c_fc.weight"]
    change = change - whole["lora"]["state_dict"]["transformer.resblocks.0.mlp.c_fc.base_layer.weight"]
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 4
    # What was measured is what the merged weights score.
    measured = (tmp_path / "logs/whole/checkpoints/results.jsonl").read_text().splitlines()[-1]
    path = tmp_path / "logs/whole/checkpoints/epoch_3.pt"
    command = train_flags(*deep, "--val-data", val_shards, "--pretrained", path)
    position = command.index("--train-data")
    del command[position : position + 2]
    capsys.readouterr()
    assert main(command) == 0
    assert f"clip_val_loss {json.loads(measured)['clip_val_loss']:.4f}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("--precision", "amp_bf16", "--ema", 0.9), ("--precision", "pure_bf16"), ("--grad-checkpointing",),
     ("--lock-image", "--ema", 0.9, "--text-layer-decay", 0.5, "--loss", "gamma_decomp", "--warm-start-pass"),
     ("--force-custom-text", "--lock-text", "--image-lr", 1e-2, "--opt", "timm/lamb")],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_adapters_go_with_other_flags(train_flags, tmp_path, flags):
    flags += ("--lock-text-freeze-layer-norm",) if "--lock-text" in flags else ()
    assert main(train_flags("--lora", "r=2", "--epochs", 2, *flags)) == 0
    first, last = (checkpoint(tmp_path, "run", epoch)["state_dict"] for epoch in (1, 2))
    moved = {key for key, value in last.items() if not torch.equal(value, first[key])} - {"logit_scale"}
    towers = {"visual" if key.startswith("visual.") else "text" for key in moved}
    locked = {"visual"} if "--lock-image" in flags else {"text"} if "--lock-text" in flags else set()
    assert towers == {"visual", "text"} - locked


def test_flag_and_checkpoint_must_agree(train_flags, tmp_path, capsys):
    assert main(train_flags("--lora", "r=2", "--name", "lora")) == 0
    assert main(train_flags("--name", "plain")) == 0
    lora, plain = (tmp_path / f"logs/{name}/checkpoints/epoch_1.pt" for name in ("lora", "plain"))
    for flags, message in (
        (("--resume", lora), "was trained with --lora r=2; give that flag again, or start from its merged weights"),
        (("--resume", lora, "--lora", "r=4"), f"--lora r=4: {lora} was trained with r=2; use that"),
        (("--resume", lora, "--lora", "r=2,alpha=1"), f"--lora alpha=1.0: {lora} was trained with alpha=4.0"),
        (("--resume", lora, "--lora", "r=2", "--lock-image"), f"--lora: the adapters of {lora} are in other layers"),
        (("--resume", plain, "--lora", "r=2"), "was trained without --lora; to adapt its weights, start with --pretr"),
    ):
        capsys.readouterr()
        assert main(train_flags("--name", "second", "--epochs", 2, *flags)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
        assert message in line
    assert not (tmp_path / "logs" / "second").exists()
    assert main(train_flags("--name", "second", "--lora", "r=2", "--pretrained", lora)) == 0


def test_views_train_adapters_of_the_image_tower_only(train_flags, tmp_path):
    flags = ("--pairs", "views", "--momentum-encoder", 0.9, "--lora", "r=2", "--epochs", 1)
    assert main(train_flags(*flags)) == 0
    adapters = checkpoint(tmp_path, "run", 1)["lora"]["state_dict"]
    assert adapters and all(name.startswith("visual.") for name in adapters)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("r=0", "--lora r=0: r of LoRA must be int >= 1 (default 16)"),
        ("rank=4", "--lora rank=4: LoRA has no option 'rank'; its options: r, alpha, dropout, targets"),
        ("16", "--lora 16: expected key=value, such as --lora r=16"),
        ("r=4,alpha=0", "--lora alpha=0: alpha of LoRA must be float or none above 0"),
        ("targets=nope", "--lora targets=nope: the towers' blocks have no nope; they have c_fc"),
    ],
)
def test_a_wrong_spec_is_one_line(train_flags, tmp_path, capsys, spec, message):
    assert main(train_flags("--lora", spec)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert message in line and not (tmp_path / "logs").exists()


def test_without_peft_it_says_how_to_get_it(monkeypatch, train_flags, capsys):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find_spec(name, *a))
    assert main(train_flags("--lora", "r=4")) == 2
    assert "--lora r=4: needs peft, which is not installed; pip install peft" in capsys.readouterr().err


def test_the_default_strength_is_two():
    options = parse_lora("r=8")
    assert options.alpha == 16 and math.isclose(options.alpha / options.r, 2)
