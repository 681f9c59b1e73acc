"""What a run was started with, as it and stock OpenCLIP have written it."""

import json

import pytest

from openclip_ext.errors import UserError
from openclip_ext.report.params import read_params
from openclip_ext.report.run_files import read_run

HISTORY = [
    {"epoch": 2, "step": 4, "changed": {"--loss": ["gamma_decomp", "dcl"], "val_data": ["a/val", "b/val"]}},
    {"epoch": 3, "step": 6, "changed": {"--loss": ["dcl", "clip"]}},
]
FLAGS = {"loss": "clip", "lr": 1e-3, "val_data": "b/val", "image_mean": None, "loss_term": ["caption=1"], "seed": 0}


@pytest.fixture
def resumed(make_run):
    """A run of four epochs that was resumed twice, with other settings each time."""
    folder = make_run("run", recall=(0.1, 0.2, 0.3, 0.4), losses=range(8), loss="of another file")
    typed = {"versions": {"openclip-ext": "1", "torch": "2.6"}, "flags": FLAGS, "history": HISTORY}
    (folder / "params.json").write_text(json.dumps(typed))
    return folder


def test_flags_have_their_types(resumed, tmp_path):
    params = read_params(resumed)
    assert params.flags == FLAGS and params.versions == {"openclip-ext": "1", "torch": "2.6"}
    lines = "".join(f"{name}: {value}\n" for name, value in {**FLAGS, "torch": "2.6"}.items())
    (tmp_path / "params.txt").write_text(lines)
    old = read_params(tmp_path)
    assert old.flags == FLAGS and old.versions == {"torch": "2.6"} and old.history == ()
    assert read_params(tmp_path / "nowhere").flags == {}


def test_the_flags_of_an_epoch_are_those_it_was_trained_with(resumed):
    params = read_params(resumed)
    assert [params.flags_at(epoch)["loss"] for epoch in (1, 2, 3, 4)] == ["gamma_decomp", "gamma_decomp", "dcl", "clip"]
    assert params.flags_at(1)["lr"] == 1e-3
    assert params.changes() == {
        "loss": "gamma_decomp until epoch 2 (step 4), then dcl until epoch 3 (step 6), then clip",
        "val_data": "a/val until epoch 2 (step 4), then b/val",
    }


def test_a_run_of_two_losses_is_not_reported_as_one(resumed, make_run, show, capsys):
    code, report = show(resumed, make_run("clip", recall=(0.1,), loss="clip", seed=0, lr=1e-3, val_data="b/val"))
    assert code == 0
    row, clip = report["groups"]
    assert row["settings"]["loss"].startswith("gamma_decomp until epoch 2") and clip["settings"]["loss"] == "clip"
    story = "run: was resumed with other settings: loss gamma_decomp until epoch 2 (step 4), then dcl until"
    assert report["remarks"][0].startswith(story)
    assert "was resumed with other settings" in capsys.readouterr().out


def test_seeds_of_a_run_with_another_past_are_not_its_seeds(resumed, make_run, show):
    other = make_run("other", recall=(0.1,))
    typed = json.loads((resumed / "params.json").read_text())
    (other / "params.json").write_text(json.dumps(typed | {"flags": FLAGS | {"seed": 1}, "history": []}))
    assert len(show(resumed, other)[1]["groups"]) == 2
    (other / "params.json").write_text(json.dumps(typed | {"flags": FLAGS | {"seed": 1}}))
    assert len(show(resumed, other)[1]["groups"]) == 1


def test_rows_of_validation_after_another_val_data_are_another_column(resumed, show):
    _, report = show(resumed)
    validation = report["groups"][0]["runs"][0]["validation"]
    assert validation["val-data (a)/text_to_image_R@1"] == [0.1, 0.2, None, None]
    assert validation["val-data (b)/text_to_image_R@1"] == [None, None, 0.3, 0.4]


def test_a_row_without_a_loss_is_no_step(resumed):
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "epoch": 4, "validation": true, "text_to_image_R@1": 0.4}\n')
    training = read_run(str(resumed)).training
    assert [row["loss"] for row in training] == list(range(8))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"flags": {}}', '{"flags": [1], "versions": {}}',
             '{"flags": {}, "versions": {}, "history": [{"epoch": 1}]}',
             '{"flags": {}, "versions": {}, "history": [{"epoch": 1, "step": 1, "changed": {"lr": 1}}]}'],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(UserError, match="params.json: is not what a run writes"):
        read_params(tmp_path)
