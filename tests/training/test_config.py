"""What comes of a command line: a configuration that stays as it is, and the record a run keeps of it."""

import dataclasses
import json

import pytest

from openclip_ext import upstream
from openclip_ext.cli import main
from openclip_ext.training.config import run_config
from openclip_ext.training.flags import build_parser, parse_args


def test_what_is_parsed_cannot_be_changed(train_flags):
    config = parse_args(train_flags("--loss-arg", "gamma=0.5", "--loss-term", "distill=2,x=1", "--lora", "r=4")[1:])
    assert config.loss_options == {"gamma": "0.5"} and config.loss_terms == {"distill": {"weight": "2", "x": "1"}}
    assert (config.lora.r, config.lora.alpha) == (4, 8.0)
    assert {"batch_size", "precision"} <= config.given and "seed" not in config.given
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.precision = "amp"
    with pytest.raises(AttributeError, match="flags are read-only"):
        config.flags.precision = "amp"


def test_what_is_decided_later_reaches_openclips_functions_and_leaves_the_first_as_it_was(train_flags):
    config = parse_args(train_flags()[1:])
    decided = config.decided(precision="amp_bf16", name="other")
    assert (decided.precision, decided.flags.precision, decided.flags.name) == ("amp_bf16", "amp_bf16", "other")
    assert (config.precision, config.flags.precision, config.name) == ("fp32", "fp32", "run")


def test_flags_of_openclips_own_loop_make_a_configuration_with_our_defaults():
    """Those of its parser, and what the patch adds to them."""
    flags = upstream.default_flags().replace(loss="dcl", loss_arg=["a=1"], loss_term=[])
    config = run_config(flags)
    assert (config.loss, config.loss_options, config.pairs, config.sample_id) == (
        "dcl",
        {"a": "1"},
        "captions",
        "index",
    )
    defaults = vars(build_parser().parse_args([]))
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and field.name in defaults and field.name != "loss":
            assert field.default == (defaults[field.name] or field.default), field.name


def test_the_table_of_flags_names_flags_that_there_are():
    ours = vars(build_parser().parse_args([]))
    recorded = {"log_level", "log_path", "tensorboard_path", "checkpoint_path", "wandb", "tensorboard",
                "save_logs", "rank", "local_rank", "world_size"}  # fmt: skip
    for role in set(upstream.Role) - {upstream.Role.FOREIGN}:
        assert set(upstream.flags_with(role)) - recorded <= ours.keys()
    assert upstream.role_of("fsdp_wrap") is upstream.Role.FOREIGN and upstream.role_of("workers") is None


def test_a_run_records_its_flags_as_they_are(train_flags, tmp_path):
    extra = ("--aug-cfg", "scale=(0.5,1.0)", "--loss-arg", "gamma=0.3", "--grad-clip-norm", 1)
    assert main(train_flags("--loss", "gamma_decomp", *extra)) == 0
    record = json.loads((tmp_path / "logs" / "run" / "params.json").read_text())
    assert record.keys() == {"versions", "flags", "history"} and record["history"] == []
    assert {"openclip-ext", "open_clip_torch", "torch"} <= record["versions"].keys()
    flags = record["flags"]
    assert flags.keys() == vars(build_parser().parse_args([])).keys() | {"world_size"}
    assert (flags["loss"], flags["loss_arg"], flags["grad_clip_norm"]) == ("gamma_decomp", ["gamma=0.3"], 1.0)
    assert flags["aug_cfg"] == {"scale": [0.5, 1.0]} and flags["lock_image"] is False and flags["resume"] is None
    assert flags["image_mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-3)  # what the model has of itself
    lines = (tmp_path / "logs" / "run" / "params.txt").read_text().splitlines()
    assert "loss: gamma_decomp" in lines and "lock_image: False" in lines
