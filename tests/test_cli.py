import json
import subprocess
import sys

import pytest

from openclip_ext.cli import main
from openclip_ext.training.flags import build_parser
from openclip_ext.upstream.v3 import REFUSED


def test_the_help_of_training_data_warns_of_commands_in_a_listing():
    text = " ".join(build_parser().format_help().split())
    assert "Names that begin with pipe: are commands that are run, those in a sizes.json too" in text


def test_help_does_not_wait_for_torch():
    code = "import sys; from openclip_ext.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n" \
           "assert 'torch' not in sys.modules, 'torch was imported'"  # fmt: skip
    for command in (["--help"], ["train", "--help"], ["shards", "pack", "--help"], ["eval", "--help"],
                    ["diagnose", "--help"]):  # fmt: skip
        subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)


def test_losses_lists_every_loss_with_package_needs_and_options(capsys):
    assert main(["losses", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    by_name = {row["name"]: row for row in data["losses"]}
    assert by_name["gamma_decomp"]["needs"] == ["encoded_again", "num_samples", "sample_ids"]
    assert by_name["siglip"]["needs"] == ["logit_bias"]
    assert [row["name"] for row in by_name["gamma_decomp"]["options"]] == [
        "recent_batches", "recent_check", "recent_limit", "recent_enough", "rate_device", "rate_path", "rate_shard",
        "gamma", "gamma_decay", "draws", "max_weight", "decoupled", "negatives",
    ]  # fmt: skip
    assert all(row["package"] == "openclip-ext" for row in data["losses"])
    assert main(["losses"]) == 0
    assert "batch_corrected  openclip-ext  same-batch estimate" in capsys.readouterr().out


def test_one_loss_shows_its_options(capsys):
    assert main(["losses", "gamma_decomp"]) == 0
    text = capsys.readouterr().out
    assert "gamma = auto  (float or auto in (0, 1])  weight of the current batch" in text and "NeurIPS 2022" in text
    assert main(["losses", "siglip"]) == 0
    assert "no options" in capsys.readouterr().out
    assert main(["losses", "gamma_decomp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"][6]["default"] == "auto"


@pytest.mark.parametrize(
    ("command", "message"),
    [(["losses", "nope"], "losses nope: no such loss"), ([], "required: COMMAND"), (["fly"], "invalid choice: 'fly'"),
     (["demo", "--seeds", "0"], "--seeds 0: must be at least 1"),
     (["demo", "--losses", "x"], "--loss x: no such loss")],
)  # fmt: skip
def test_a_wrong_command_is_one_line(capsys, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_every_flag_of_openclip_is_known_with_its_default():
    """OpenCLIP's parser as it is: any change in a new release shows here."""
    from open_clip_train.params import parse_args

    reference = vars(parse_args([]))
    ours = vars(build_parser().parse_args([]))
    filled_later = {"lr", "beta1", "beta2", "eps"}
    assert reference.keys() - ours.keys() == set()
    for name in reference.keys() - filled_later:
        assert ours[name] == reference[name], name
    assert ours.keys() - reference.keys() == {
        "loss", "loss_arg", "loss_term", "sample_id", "sample_id_table", "check_shards", "model_config",
        "view_aug", "pairs", "momentum_encoder", "probe_train", "probe_val", "caption_key", "caption_separator",
        "layer_decay", "image_lr", "image_layer_decay", "text_lr", "text_layer_decay",
        "warm_start_pass", "ema", "lora", "resume_other_loss", "save_best", "save_every_steps",
        "keep_last", "max_minutes", "profile", "rank_timeout", "max_skipped", "max_bad",
        "zero_shot", "class_names", "templates", "classes", "recent_batches", "recent_check", "recent_limit",
        "loss_tile", "loss_comm", "fusion", "task", "task_images", "answers",
    }  # fmt: skip
    assert REFUSED.keys() <= reference.keys()
