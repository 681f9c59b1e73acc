"""OpenCLIP 3.3's own loop, patched, against `openclip-ext train`: losses, checkpoints, sample ids, two processes."""

import gc
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch

import stock
from openclip_ext.cli import main
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.streams import StreamConfig
from towers import coca_flags

LOSSES = {
    "gamma_decomp": ["--loss", "gamma_decomp", "--loss-arg", "gamma=0.3"],
    "terms": ["--loss", "clip", "--loss-term", "geometric_consistency=0.02", "--loss-term", "feature_separation=0.5"],
    "emc2": ["--loss", "emc2"],
    "caption_words": ["--loss", "dcl", "--loss-term", "caption_words=1"],
}


pytestmark = [
    # webdataset 0.2 leaves it to the garbage collector to close shards.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with a patched copy of the installed `open_clip_train`."""
    return stock.patched_copy(tmp_path_factory.mktemp("patched"))


@pytest.fixture
def patched(copy, model_config):
    """`open_clip_train.main` of that copy; what else is imported of OpenCLIP's training inside a test is the copy's."""
    open_clip.add_model_config(model_config)
    with stock.imported_from(copy) as module, stock.logging_kept():
        yield module


@pytest.fixture
def run_patched(monkeypatch, patched, train_flags):
    """Runs the patched loop; returns what the loss returned in each step."""
    from open_clip_train.loss_plugins import LossPlugin

    forward, rows = LossPlugin.forward, []

    def recording(self, *args):
        losses, logit_scale = forward(self, *args)
        rows.append({name: value.item() for name, value in losses.items()})
        return losses, logit_scale

    def run(*flags):
        rows.clear()
        patched.main(stock.without_ours(train_flags(*flags)))
        return list(rows)

    monkeypatch.setattr(LossPlugin, "forward", recording)
    return run


@pytest.fixture
def run_ours(train_flags, tmp_path):
    """Runs `openclip-ext train`; returns the rows of its metrics."""

    def run(*flags):
        assert main(train_flags(*flags)) == 0
        rows = (tmp_path / "logs" / flags[flags.index("--name") + 1] / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows]

    return run


def assert_equal_losses(rows, reference):
    assert len(rows) == len(reference) > 0
    names = [name for name in rows[0] if name.endswith("_loss")]
    for name in names:
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in reference], rel=1e-5), name


def checkpoint(tmp_path, name, epoch):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt")


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_equal_ours_over_24_steps_and_after_resuming_either(
    monkeypatch, patched, run_patched, run_ours, tmp_path, loss
):
    stock.feed_our_batches(monkeypatch, patched)
    flags = [*LOSSES[loss], "--epochs", 3, "--grad-clip-norm", 1]
    ours = run_ours(*flags, "--name", "ours")
    assert_equal_losses(run_patched(*flags, "--name", "patched"), ours)
    contents = [checkpoint(tmp_path, name, 3) for name in ("ours", "patched")]
    assert contents[0].keys() - {"loss_name", "clock"} == contents[1].keys()
    assert contents[0].get("loss", {}).keys() == contents[1].get("loss", {}).keys()
    logs = tmp_path / "logs"
    on = run_patched(*flags, "--name", "patched-on", "--resume", logs / "ours/checkpoints/epoch_1.pt")
    assert_equal_losses(on, ours[8:])
    on = run_ours(*flags, "--name", "ours-on", "--resume", logs / "patched/checkpoints/epoch_1.pt")
    assert_equal_losses(on, ours[8:])


def test_state_of_another_loss_is_left_behind_or_refused_in_one_line(
    monkeypatch, patched, run_patched, tmp_path, capsys
):
    stock.feed_our_batches(monkeypatch, patched)
    run_patched("--loss", "gamma_decomp", "--name", "first")
    resume = ("--resume", tmp_path / "logs/first/checkpoints/epoch_1.pt", "--epochs", 2)
    assert len(run_patched("--loss", "clip", "--name", "stateless", *resume)) == 8
    assert "starts anew" not in (tmp_path / "logs/stateless/out.log").read_text()
    run_patched("--loss", "clip", "--name", "clip")
    clip = ("--resume", tmp_path / "logs/clip/checkpoints/epoch_1.pt", "--epochs", 2)
    assert len(run_patched("--loss", "gamma_decomp", "--name", "anew", *clip)) == 8
    assert "epoch_1.pt: it holds no loss state: the loss starts anew" in (tmp_path / "logs/anew/out.log").read_text()
    hashed = checkpoint(tmp_path, "first", 1) | {"sample_hashes": torch.arange(256)}
    torch.save(hashed, tmp_path / "hashed.pt")
    capsys.readouterr()
    for loss, path, message in (
        ("sogclr", resume[1], "epoch_1.pt: its loss state does not fit --loss and the data"),
        ("gamma_decomp", tmp_path / "hashed.pt", "its loss does not know samples by --sample-id index"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_patched("--loss", loss, "--name", f"another-{loss}", "--resume", path, "--epochs", 2)
        assert exit.value.code == 2
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
        assert message in error


def test_a_loss_that_cannot_be_built_is_one_line(run_patched, tmp_path, capsys):
    (tmp_path / "bank").write_text("of something else")
    with pytest.raises(SystemExit) as exit:
        run_patched("--loss", "emc2", "--loss-arg", "bank_device=mmap", "--loss-arg", f"bank_path={tmp_path / 'bank'}")
    assert exit.value.code == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert f"--loss-arg bank_path={tmp_path / 'bank'}: holds 17 bytes" in error


@pytest.mark.parametrize(
    "flags",
    [
        "--loss siglip --loss-term brownian_bridge=0.2,sample=true",
        "--loss dcl",
        "--loss batch_corrected",
        "--loss dcl --loss-arg recent_batches=2 --loss-arg recent_limit=9 --loss-arg recent_enough=1e9",
        "--loss sogclr --precision amp_bf16",
        "--loss clip --dataset-type synthetic --train-num-samples 64",
    ],
)
def test_other_losses_equal_ours(monkeypatch, patched, run_patched, run_ours, flags):
    flags = [*flags.split(), "--lr-scheduler", "const"]
    if "synthetic" not in flags:
        stock.feed_our_batches(monkeypatch, patched)
    assert_equal_losses(run_patched(*flags, "--name", "patched"), run_ours(*flags, "--name", "ours"))


@pytest.mark.slow
def test_a_teacher_and_captions_are_terms_as_in_ours(monkeypatch, patched, run_patched, run_ours, tmp_path):
    stock.feed_our_batches(monkeypatch, patched)
    run_ours("--name", "teacher")
    teacher = tmp_path / "logs/teacher/checkpoints/epoch_1.pt"
    pupil = ["--loss", "gamma_decomp", "--distill-model", "tiny-test", "--distill-pretrained", teacher]
    rows = run_patched(*pupil, "--name", "patched")
    assert "distill_loss" in rows[0]
    assert_equal_losses(rows, run_ours(*pupil, "--name", "ours"))
    flags = coca_flags(tmp_path)
    flags += ["--loss", "gamma_decomp", "--accum-freq", "2", *RECENT]
    rows = run_patched(*flags, "--name", "patched-coca")
    assert "caption_loss" in rows[0] and rows[-1]["recent_batches_used"] == 2
    assert_equal_losses(rows, run_ours(*flags, "--name", "ours-coca"))


def test_a_step_that_the_scaler_skips_is_not_committed(monkeypatch, patched, run_patched, tmp_path):
    stock.feed_our_batches(monkeypatch, patched)
    rows = run_patched("--loss", "clip", "--loss-term", "brownian_bridge=100", "--precision", "amp", "--name", "amp")
    content = checkpoint(tmp_path, "amp", 1)
    taken = content["optimizer"]["state"][0]["step"]
    assert content["loss"]["terms.brownian_bridge.steps_taken"] == taken and 0 < taken < len(rows)


#: Pairs of two recent steps, which join however far the model has moved.
RECENT = [word for value in ("batches=2", "limit=99", "enough=1e9") for word in ("--loss-arg", f"recent_{value}")]


@pytest.fixture
def two_shards(tmp_path, pairs):
    """Two shards of 16: an epoch is one optimizer step of 32 pairs, whatever their order."""
    pack(pairs[:32], str(tmp_path / "two"), samples_per_shard=16, progress=False)
    return str(tmp_path / "two/{00000..00001}.tar")


# No weight decay: with a timm optimizer OpenCLIP decays positional embeddings on several ranks, and not on one.
ONE_STEP_PER_EPOCH = (
    "--loss gamma_decomp --loss-arg recent_batches=0 --loss-term brownian_bridge=0.25 "
    "--loss-term feature_separation=0.5 "
    "--opt timm/sgd --eps 1e-8 --lr 0.01 --wd 0 --epochs 20 --save-frequency 20 --workers 0"
)


def test_accumulated_batches_are_one_large_batch(run_patched, run_ours, two_shards, tmp_path):
    """The pipeline too is OpenCLIP's here: views are ours, and logit scale and heads get the gradient of one batch."""
    flags = [*ONE_STEP_PER_EPOCH.split(), "--train-data", two_shards, "--epochs", 6, "--loss-term", "caption_words=1"]
    whole = run_ours(*flags, "--batch-size", 32, "--name", "whole")
    assert_equal_losses(run_patched(*flags, "--batch-size", 8, "--accum-freq", 4, "--name", "parts"), whole)
    contents = [checkpoint(tmp_path, name, 6) for name in ("whole", "parts")]
    assert contents[0]["state_dict"]["logit_scale"].exp() != pytest.approx(1 / 0.07, rel=0.01)
    for key in ("state_dict", "loss"):
        torch.testing.assert_close(contents[1][key], contents[0][key], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.fixture
def run_two_processes(copy, train_flags, tmp_path, model_config):
    """Runs the patched loop in two processes; returns what the loss returned in each step."""
    tests, losses = Path(__file__).parent.parent, tmp_path / "losses.json"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend=c10d"]
    launcher += ["--rdzv_endpoint=localhost:0", str(tests / "patched_on_ranks.py"), "--", model_config, str(losses)]

    def run(*flags, batches):
        command = [sys.executable, *launcher, batches, *stock.without_ours(train_flags(*flags))]
        environment = os.environ | {"PYTHONPATH": f"{copy}:{tests.parent}", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert result.returncode == 0, result.stderr
        assert "Process (global: 0, local 0), total 2." in result.stderr
        return json.loads(losses.read_text())

    return run


def assert_equal_runs(tmp_path, epoch):
    one, two = (checkpoint(tmp_path, name, epoch) for name in ("one", "two"))
    weights = {key.removeprefix("module."): value for key, value in two["state_dict"].items()}
    torch.testing.assert_close(weights, one["state_dict"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_a_state_that_is_spread_is_for_our_loop(run_two_processes, two_shards):
    flags = ("--train-data", two_shards, "--batch-size", 16, "--loss", "sogclr", "--loss-arg", "rate_shard=true")
    with pytest.raises(AssertionError, match="spread over 2 processes, .* and OpenCLIP's loop"):
        run_two_processes(*flags, batches="theirs")


@pytest.mark.slow
def test_two_processes_equal_one(run_ours, run_two_processes, two_shards, tmp_path):
    flags = [*ONE_STEP_PER_EPOCH.split(), "--train-data", two_shards]
    reference = run_ours(*flags, "--batch-size", 32, "--name", "one")
    rows = run_two_processes(*flags, "--batch-size", 8, "--accum-freq", 2, "--name", "two", batches="theirs")
    assert_equal_losses(rows, reference)
    assert_equal_runs(tmp_path, 20)


@pytest.mark.slow
def test_two_processes_draw_the_chains_of_one(run_ours, run_two_processes, tmp_path):
    """The draws of `emc2` are among the gathered pairs in their order, so both runs have the same one."""
    flags = "--loss emc2 --loss-arg bank_dtype=float32 --opt timm/sgd --eps 1e-8 --lr 0.01 --wd 0 --epochs 3"
    flags = [*flags.split(), *RECENT]
    reference = run_ours(*flags, "--batch-size", 8, "--accum-freq", 4, "--name", "one")
    rows = run_two_processes(*flags, "--batch-size", 8, "--accum-freq", 2, "--name", "two", batches="ours")
    assert len(rows) == 24 and rows[-1]["stored_weight"] > 0 and rows[-1]["recent_batches_used"] == 2
    assert_equal_losses(rows, reference)
    assert_equal_runs(tmp_path, 3)


@pytest.mark.parametrize("extra", [[], ["--accum-freq", "2"], ["--siglip", "--grad-clip-norm", "0.5"]])
def test_without_a_loss_training_is_what_it_was(monkeypatch, copy, train_flags, tmp_path, model_config, extra):
    open_clip.add_model_config(model_config)
    for name, folder in (("before", stock.copy_installed(tmp_path / "stock")), ("after", copy)):
        with stock.imported_from(folder) as module, stock.logging_kept():
            stock.feed_our_batches(monkeypatch, module)
            module.main(stock.without_ours(train_flags("--name", name, *extra)))
    before, after = (checkpoint(tmp_path, name, 1) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after["state_dict"][key], value) for key, value in before["state_dict"].items())


@pytest.fixture
def holed_shards(tmp_path, pairs):
    """Four shards of 10; the fourth sample of the second one, id 13, has no caption."""
    pack(pairs[:40], str(tmp_path / "data"), samples_per_shard=10, progress=False)
    whole, holed = tmp_path / "data/00001.tar", tmp_path / "holed.tar"
    with tarfile.open(whole) as source, tarfile.open(holed, "w") as target:
        captions = [member for member in source if member.name.endswith(".txt")]
        for member in source:
            if member.name != captions[3].name:
                target.addfile(member, source.extractfile(member))
    os.replace(holed, whole)
    return str(tmp_path / "data/{00000..00003}.tar")


def by_id(batches):
    """Sample id to the rest of its row, of batches of tuples whose third is the id; a sample is the same each time."""
    rows = {}
    for batch in batches:
        for image, text, sample_id, *views in zip(*batch, strict=True):
            row = torch.stack([image, *views]), text
            first = rows.setdefault(sample_id.item(), row)
            assert all(torch.equal(*both) for both in zip(first, row, strict=True))
    return rows


@pytest.mark.parametrize("extra", [[], ["--workers", "2"], ["--dataset-resampled"]])
def test_ids_are_positions_in_the_shards_and_views_are_ours(patched, train_flags, holed_shards, pairs, extra):
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    flags = train_flags("--loss", "sogclr", "--loss-term", "brownian_bridge=1", "--train-data", holed_shards,
                        "--batch-size", 5, "--seed", 3, *extra)  # fmt: skip
    args = parse_args(stock.without_ours(flags))
    args.world_size = 1
    assert args.loss_plugin.batch_keys == ("sample_ids", "image_aug")
    transform, tokenizer = open_clip.image_transform(32, is_train=True), open_clip.get_tokenizer("tiny-test")
    loader = get_wds_dataset(args, transform, True, epoch=2, tokenizer=tokenizer).dataloader
    theirs = by_id([batch for _ in range(3) for batch in loader])
    config = StreamConfig(
        source=list_shards(holed_shards), batch_size=5, sample_id="index", seed=3, image_transform=transform,
        tokenizer=tokenizer, image_aug_transform=transform,
    )  # fmt: skip
    ours = train_loader(config, num_samples=200, workers=0)
    ours.set_epoch(2)
    names = ("image", "text", "sample_ids", "image_aug")
    reference = by_id(tuple(batch[name] for name in names) for batch in ours.batches)
    assert set(range(40)) - {13} >= theirs.keys() and len(theirs) > 20
    for sample_id, (images, text) in theirs.items():
        assert torch.equal(text, tokenizer(pairs[sample_id][1])[0])
        assert torch.equal(images, reference[sample_id][0])


WRONG = {
    "--loss nope": "--loss nope: 0 packages register it; registered are: ",
    "--loss-term brownian_bridge=1": "--loss-arg and --loss-term need --loss",
    "--loss gamma_decomp --loss-arg gamma=2": "--loss-arg gamma=2",
    "--loss gamma_decomp --loss-term nope=1": "--loss-term nope: no such loss term",
    "--loss emc2 --loss-arg bank=index": "--loss-arg bank=index: ",
    "--loss emc2 --loss-arg bank_device=mmap": "--loss-arg bank_device=mmap: name the file with --loss-arg bank_path=",
    "--loss gamma_decomp --loss-arg rate_device=mmap --loss-arg rate_path=/nowhere/r": "/nowhere is no folder",
    "--loss clip --siglip": "--siglip --loss clip: these exclude each other",
    "--loss clip --horovod": "--horovod --loss clip: ",
    "--loss clip --loss-term caption=1": "--loss-term caption: --model tiny-test makes no captions",
    "--loss clip --loss-term distill=1": "--loss clip: it or a term of it needs a teacher",
    "--loss clip --loss-term feature_separation=1 --torchcompile": "--torchcompile: hides",
    "--loss emc2 --dataset-type synthetic --train-num-samples 8": "--loss emc2: it or a term of it needs sample ids",
    "--loss emc2 --train-data nowhere-{0..1}.tar": "--train-data nowhere-{0..1}.tar: no shard matches",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_one_line_before_anything_is_written(patched, train_flags, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        patched.main(stock.without_ours(train_flags(*flags.split())))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert WRONG[flags] in error and len(error.splitlines()) == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("pattern", ["{folder}", "{folder}/*.tar", "{folder}/{{00000..00002}}.tar::{folder}/*3.tar"])
def test_folders_and_globs_are_refused_with_the_braces_to_use(patched, train_flags, shards, capsys, pattern):
    flags = stock.without_ours(train_flags("--loss", "clip"))
    data = flags.index("--train-data") + 1
    braces, flags[data] = flags[data], pattern.format(folder=shards)
    with pytest.raises(SystemExit) as exit:
        patched.main(flags)
    (error,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "expands neither folders nor globs" in error
    assert error.endswith(f"such as --train-data '{braces}'")


def test_that_one_of_several_captions_is_used_is_said(patched, train_flags, pairs, tmp_path):
    from open_clip_train.params import parse_args

    several = [(image, [caption, f"another {caption}"]) for image, caption in pairs[:16]]
    pack(several, str(tmp_path / "several"), progress=False)
    flags = train_flags("--loss", "clip", "--train-data", tmp_path / "several/00000.tar")
    with pytest.warns(UserWarning, match="several captions in their JSON, .*, under captions; .* one of each sample"):
        parse_args(stock.without_ours(flags))


def test_a_shard_of_size_0_that_holds_samples_is_refused_and_an_empty_one_is_not(
    patched, train_flags, two_shards, capsys
):
    folder = Path(two_shards).parent
    (folder / "sizes.json").write_text('{"00000.tar": 16, "00001.tar": 0}')
    flags = stock.without_ours(train_flags("--loss", "sogclr", "--train-data", two_shards))
    with pytest.raises(SystemExit) as exit:
        patched.main(flags)
    (error,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and f"{folder}/00001.tar holds samples, and sizes.json says 0; write" in error
    tarfile.open(folder / "00001.tar", "w").close()
    from open_clip_train.params import parse_args

    assert [len(ids) for ids in parse_args(flags).loss_plugin.host.sample_ids.values()] == [16, 0]


def test_the_end_of_a_shard_in_newer_webdataset_is_no_file(patched):
    from open_clip_train.data import group_by_keys_nothrow

    files = [{"fname": f"{key}.txt", "data": b"", "__url__": "shard"} for key in "ab"]
    samples = list(group_by_keys_nothrow([files[0], {}, files[1], {}]))
    assert [sample["__key__"] for sample in samples] == ["a", "b"]
