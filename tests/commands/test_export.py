"""`openclip-ext export`: what stock OpenCLIP makes of the folder is the model that was trained."""

import json
import shlex
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from openclip_ext.cli import main
from openclip_ext.commands.export.model_card import training_command
from openclip_ext.report.params import Params, read_params
from openclip_ext.training.flags import parse_args

FORCED = ("--force-quick-gelu", "--force-custom-text", "--force-image-size", 48, "--force-context-length", 9,
          "--image-mean", 0.4, 0.5, 0.6, "--image-std", 0.2, 0.3, 0.4, "--image-interpolation", "bilinear",
          "--image-resize-mode", "squash")  # fmt: skip


@pytest.fixture
def trained(train_flags, tmp_path):
    """A function from extra flags to the folder of a run."""

    def run(*extra):
        assert main(train_flags(*extra)) == 0
        return tmp_path / "logs" / "run"

    return run


def encoded(name, pretrained=None, **options):
    """Features of a photograph and a caption, and the steps of the preprocessing."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained, **options)
    tokenizer = open_clip.get_tokenizer(name, context_length=options.get("force_context_length"))
    image, text = preprocess(Image.fromarray(data.astronaut())), tokenizer(["an astronaut who smiles at us"])
    with torch.no_grad():
        return model.eval().encode_image(image[None]), model.encode_text(text), preprocess, model


@pytest.mark.parametrize("forced", [False, True])
def test_stock_openclip_loads_the_same_model_by_the_folder(trained, tmp_path, capsys, forced):
    run = trained(*FORCED) if forced else trained()
    out = tmp_path / "exported"
    assert main(["export", str(run), "--to", "open_clip", "--out", str(out)]) == 0
    assert f"local-dir:{out}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    options = {
        "force_quick_gelu": True, "force_custom_text": True, "force_image_size": 48, "force_context_length": 9,
        "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.4), "image_interpolation": "bilinear",
        "image_resize_mode": "squash",
    }  # fmt: skip
    checkpoint = str(run / "checkpoints" / "epoch_1.pt")
    image, text, preprocess, model = encoded("tiny-test", checkpoint, **(options if forced else {}))
    again = encoded(f"local-dir:{out}")
    assert torch.equal(again[0], image) and torch.equal(again[1], text)
    wide = Image.fromarray(data.chelsea())
    assert torch.equal(again[2](wide), preprocess(wide))
    assert str(again[2]).replace("[", "(").replace("]", ")") == str(preprocess).replace("[", "(").replace("]", ")")
    assert type(again[3]) is type(model)
    assert oct((out / "open_clip_model.safetensors").stat().st_mode) == oct(
        (out / "open_clip_config.json").stat().st_mode
    )


def test_a_run_that_started_from_an_exported_folder_is_exported(by_hand, trained, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["export", str(by_hand), "--to", "open_clip", "--out", str(first)]) == 0
    trained("--model", f"local-dir:{first}", "--name", "other", "--siglip")  # a model without a bias in its config
    run = tmp_path / "logs" / "other"
    assert main(["export", str(run), "--to", "open_clip", "--out", str(second)]) == 0
    weights = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    model = open_clip.create_model(f"local-dir:{second}")
    assert model.logit_bias is not None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_tokenizer_of_the_hub_comes_along(by_hand, model_config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "an", "astronaut", "smiles", "us"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(source)
    config = json.loads(Path(model_config).read_text())
    config["text_cfg"] |= {"hf_tokenizer_name": str(source)}
    (tmp_path / "worded.json").write_text(json.dumps(config))
    out, checkpoint = tmp_path / "exported", str(by_hand / "checkpoints" / "epoch_1.pt")
    flags = ["--model", "worded", "--model-config", str(tmp_path / "worded.json"), "--repo", "me/worded"]
    assert main(["export", checkpoint, "--to", "hf", "--out", str(out), *flags]) == 0
    expected = encoded("worded", checkpoint)
    for path in source.iterdir():
        path.unlink()  # only the files in the exported folder are left
    again = encoded(f"local-dir:{out}")
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/worded"


def test_the_average_of_weights_and_an_earlier_epoch_can_be_had(by_hand, tmp_path):
    path = by_hand / "checkpoints" / "epoch_1.pt"
    content = torch.load(path, weights_only=True)
    average = {f"module.{name}": value + 1 for name, value in content["state_dict"].items()}
    torch.save(content | {"state_dict_ema": average}, path)
    torch.save(content | {"epoch": 2}, path.with_name("epoch_2.pt"))
    rows = [{"epoch": 1, "R@1": 0.123, "ema-R@1": 0.456, "num_samples": 7}, {"epoch": 2, "R@1": 0.789}]
    path.with_name("results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "exported"
    flags = ["--to", "hf", "--epoch", "1", "--weights", "ema", "--out", str(out)]
    assert main(["export", str(by_hand), *flags]) == 0
    weights = load_file(out / "open_clip_model.safetensors")
    assert all(torch.equal(value, average[f"module.{name}"]) for name, value in weights.items())
    card = (out / "README.md").read_text()
    assert "0.456" in card and "0.123" not in card and "0.789" not in card


def test_a_mixture_has_no_scores_of_the_runs_epochs(by_hand, tmp_path):
    path = by_hand / "checkpoints" / "epoch_1.pt"
    path.with_name("results.jsonl").write_text('{"epoch": 1, "R@1": 0.123}\n')
    torch.save(torch.load(path, weights_only=True)["state_dict"], path.with_name("mixed.pt"))
    shown = []
    for file in (path, path.with_name("mixed.pt")):
        out = tmp_path / file.stem
        assert main(["export", str(by_hand), "--to", "hf", "--checkpoint", str(file), "--out", str(out)]) == 0
        shown.append("0.123" in (out / "README.md").read_text())
    assert shown == [True, False]


def test_a_checkpoint_from_within_an_epoch_has_no_scores_of_the_epoch_before(trained, tmp_path, val_shards):
    folder = trained("--epochs", 2, "--save-every-steps", 11, "--val-data", val_shards) / "checkpoints"
    (folder / "epoch_1_step_11.pt").rename(folder / "epoch_latest.pt")  # as --save-most-recent names it
    shown = []
    for name in ("epoch_1", "epoch_latest"):
        flags = ["--checkpoint", str(folder / f"{name}.pt"), "--out", str(tmp_path / name)]
        assert main(["export", str(folder.parent), "--to", "hf", *flags]) == 0
        shown.append("clip_val_loss" in (tmp_path / name / "README.md").read_text())
    assert shown == [True, False]


def test_a_checkpoint_from_elsewhere_takes_the_runs_architecture(by_hand, tmp_path):
    elsewhere = tmp_path / "mixed.pt"
    (by_hand / "checkpoints" / "epoch_1.pt").rename(elsewhere)
    out = tmp_path / "exported"
    flags = ["--to", "open_clip", "--checkpoint", str(elsewhere), "--out", str(out)]
    assert main(["export", str(by_hand), *flags]) == 0
    assert (out / "open_clip_model.safetensors").exists()


def test_the_card_says_what_the_hub_and_people_want_to_know(trained, val_shards, shards):
    extra = ("--loss-term", "brownian_bridge=0.1", "--val-data", val_shards)
    run = trained("--loss", "gamma_decomp", "--loss-arg", "gamma=0.2", *extra)
    assert main(["export", str(run), "--to", "hf", "--repo", "me/digits"]) == 0
    text = (run / "export" / "README.md").read_text()
    front = text.split("---\n")[1]
    assert "library_name: open_clip" in front and "- clip\n" in front
    assert "license: # fill in" in front
    recall = json.loads((run / "checkpoints" / "results.jsonl").read_text())["text_to_image_R@5"]
    for part in ("tiny-test", shards, "gamma_decomp", "gamma=0.2", "brownian_bridge=0.1", "hf-hub:me/digits",
                 "--batch-size 32", f"{recall:.4g}"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("name", ["params.txt", "params.json"])
def test_the_training_command_gives_the_same_parameters(train_flags, val_shards, tmp_path, name):
    extra = ["--loss-arg", "gamma=0.2", "--loss-arg", "beta=0.9", "--lock-image", "--image-mean", 0.5, 0.5, 0.5,
             "--aug-cfg", "scale=(0.5, 1.0)", "--caption-separator", "; ", "--val-data", val_shards]  # fmt: skip
    args = vars(parse_args(train_flags("--loss", "gamma_decomp", *extra)[1:]).flags)
    versions = {"openclip-ext": "0"}
    if name == "params.json":
        text = json.dumps({"versions": versions, "flags": args})
    else:
        text = "".join(f"{name}: {value}\n" for name, value in (versions | args).items())
    (tmp_path / name).write_text(text)
    program, command, *flags = shlex.split(training_command(read_params(tmp_path)))
    assert (program, command) == ("openclip-ext", "train")
    assert json.dumps(vars(parse_args(flags).flags)) == json.dumps(args)


def test_the_training_command_starts_as_many_processes():
    stock = {"world_size": 4, "epochs": 3}
    ours = Params(stock, {"openclip-ext": "0"})
    assert training_command(ours) == "accelerate launch --num_processes 4 -m openclip_ext train --epochs 3"
    assert training_command(Params(stock)) == "torchrun --nproc_per_node 4 -m open_clip_train.main --epochs 3"


def test_the_card_tells_what_a_resumed_run_changed(by_hand):
    (change,) = [{"epoch": 2, "step": 1080, "changed": {"loss": ["gamma_decomp", "dcl"], "lr": [0.001, 0.0001]}}]
    flags = dict(line.split(": ") for line in (by_hand / "params.txt").read_text().splitlines())
    flags |= {"loss": "dcl", "lr": 0.0001, "batch_size": 32}
    params = {"versions": {"openclip-ext": flags.pop("openclip-ext")}, "flags": flags, "history": [change]}
    (by_hand / "params.json").write_text(json.dumps(params))
    assert main(["export", str(by_hand), "--to", "hf"]) == 0
    card = (by_hand / "export" / "README.md").read_text()
    assert "* `loss`: gamma_decomp until epoch 2 (step 1,080), then dcl\n" in card
    assert "* `lr`: 0.001 until epoch 2 (step 1,080), then 0.0001\n" in card
    assert card.count("gamma_decomp until") == 2  # in the details too


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["nowhere", "--to", "hf"], "RUN nowhere: no such file"),
        (["{run}", "--to", "hf", "--epoch", "7"], "--epoch 7: "),
        (["{run}", "--to", "hf", "--epoch", "1", "--checkpoint", "x.pt"], "these exclude each other"),
        (["{run}", "--to", "hf", "--checkpoint", "x.pt"], "--checkpoint x.pt: no such file"),
        (["{run}", "--to", "hf", "--weights", "ema"], "has no average of weights"),
        (["{run}", "--to", "hf", "--repo", "me"], "--repo me: "),
        (["{run}", "--to", "open_clip", "--repo", "me/x"], "--repo me/x: is for the hub"),
        (["{run}", "--to", "hf", "--out", "{run}"], "exists already"),
        (["{run}/params.txt", "--to", "hf", "--model", "tiny-test"], "not a checkpoint"),
        (["{run}/checkpoints/epoch_1.pt", "--to", "hf", "--model", "RN50"], "RN50"),
        (["{run}", "--to", "hf", "--model-config", "nowhere.json"], "--model-config nowhere.json: no such file"),
        (["{run}/checkpoints", "--to", "hf"], "not the folder of a run"),
        (["{run}", "--to", "gguf"], "invalid choice"),
    ],
)
def test_a_wrong_input_is_one_line_and_leaves_nothing(by_hand, capsys, flags, expected):
    assert main(["export", *(flag.format(run=by_hand) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(by_hand.glob("*export*"))


def test_a_checkpoint_that_holds_more_than_tensors_is_refused(by_hand, capsys):
    torch.save({"epoch": 1, "state_dict": {}, "code": Path("x")}, by_hand / "checkpoints" / "epoch_2.pt")
    assert main(["export", str(by_hand), "--to", "open_clip"]) == 2
    assert "not a checkpoint of tensors and plain values" in capsys.readouterr().err
