"""OpenCLIP's main branch, patched: its loop trains registered losses as `openclip-ext train` does.

The environment variable OPEN_CLIP_MAIN names a checkout of it, at the commit that patches/README.md gives.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.stock_loop import patching

CHECKOUT = os.environ.get("OPEN_CLIP_MAIN")
HERE = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="the environment variable OPEN_CLIP_MAIN names no checkout of OpenCLIP's main branch"
)

PARITY = {
    "gamma_decomp": "--loss gamma_decomp --loss-arg gamma=0.3 --grad-clip-norm 1",
    "views": "--loss clip --loss-term brownian_bridge=0.25 --loss-term geometric_consistency=0.02",
    "siglip": "--loss siglip",
    "clip": "--loss clip --loss-arg recent_batches=2",
    "batch_corrected": "--loss batch_corrected",
    "sogclr": "--loss sogclr",
    "distill": "--loss dcl --distill-model tiny-test --distill-pretrained WEIGHTS",
    "emc2": "--loss emc2",
}
# An epoch is one optimizer step of 32 pairs, whatever their order.
ONE_STEP = (
    "--loss gamma_decomp --loss-arg recent_batches=0 --loss-term brownian_bridge=0.25 "
    "--loss-term feature_separation=0.5 "
    "--loss-term caption_words=1 --opt timm/sgd --lr 0.05 --epochs 6 --save-frequency 6 --grad-clip-norm 5"
)
PLAIN = "--accum-freq 2 --precision amp"
COUNTERS = {"global_step", "samples_seen"}  # which OpenCLIP 4 adds to checkpoints
WRONG = {
    "--loss nope": "error: --loss nope: no such loss; registered: ",
    "--loss-arg gamma=1": "error: --loss-arg and --loss-term need --loss",
    "--loss gamma_decomp --loss-arg gamma=2": "error: --loss-arg gamma=2: ",
    "--loss emc2 --use-naflex": "error: --loss emc2: not available for audio or with --use-naflex",
    "--loss sogclr --train-data nowhere-{0..1}.tar": "error: --train-data nowhere-{0..1}.tar: no shard matches",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("main4")


@pytest.fixture(scope="module")
def copies(folder):
    """Two copies of the checkout's source, of which one is patched."""
    for name in ("stock", "patched"):
        shutil.copytree(os.path.join(CHECKOUT, "src"), folder / name / "src", ignore=shutil.ignore_patterns("__py*"))
    assert main(["patch", "apply", "--target", str(folder / "patched")]) == 0
    return {name: folder / name / "src" for name in ("stock", "patched")}


@pytest.fixture(scope="module")
def data(folder, pairs):
    """Where shards are: `four` of 64, `two` of 16, and `uneven` ones of which the first lacks a caption."""
    patterns = {}
    for name, count, size, last in (("four", 256, 64, 3), ("two", 32, 16, 1), ("uneven", 40, 16, 2)):
        pack(pairs[:count], str(folder / name), samples_per_shard=size, progress=False)
        patterns[name] = f"{folder / name}/{{00000..0000{last}}}.tar"
    return patterns


@pytest.fixture(scope="module")
def weights(folder, model_config):
    """Weights to begin with: the two versions draw other ones from the same seed."""
    import open_clip

    open_clip.add_model_config(model_config)
    torch.manual_seed(1)
    path = str(folder / "start.pt")
    torch.save(open_clip.create_model("tiny-test").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def flags(folder, data, weights):
    """A function from a run's name, the batch size and further flags to a command line of either loop."""

    def build(name, *extra):
        fixed = {
            "--model": "tiny-test", "--pretrained": weights, "--train-data": data["four"], "--batch-size": "32",
            "--epochs": "3", "--workers": "0", "--device": "cpu", "--precision": "fp32", "--lr": "1e-3", "--wd": "0",
            "--warmup": "2", "--logs": str(folder / "logs"), "--name": name, "--log-every-n-steps": "1",
        }  # fmt: skip
        given = [weights if part == "WEIGHTS" else str(part) for part in extra]
        return [part for key, value in fixed.items() if key not in given for part in (key, value)] + given

    return build


@pytest.fixture(scope="module")
def start(folder, model_config):
    """Runs jobs of `open_clip_main_jobs` with a copy of OpenCLIP; returns the results by the jobs' names."""

    def run(source, jobs, *launcher):
        todo, results = folder / "jobs.json", folder / "results.json"
        todo.write_text(json.dumps(jobs))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
        environment |= {"PYTHONPATH": f"{source}:{HERE.parent}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        script = str(HERE / "open_clip_main_jobs.py")
        command = [sys.executable, *launcher, script, model_config, str(todo), str(results)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(results.read_text())

    return run


@pytest.fixture(scope="module")
def results(folder, flags, data, copies, start, model_config):
    """Of all single-process runs of the patched loop."""
    checkpoint = folder / "logs/gamma_decomp/checkpoints/epoch_1.pt"
    two = ("--train-data", data["two"], *ONE_STEP.split())
    jobs = [(name, "ours", flags(name, *extra.split())) for name, extra in PARITY.items()]
    jobs += [
        ("on", "ours", flags("on", *PARITY["gamma_decomp"].split(), "--resume", checkpoint)),
        ("other", "ours", flags("other", "--loss", "emc2", "--resume", checkpoint)),
        ("without", "ours", flags("without", "--resume", checkpoint, "--epochs", 2)),
        ("plain", "ours", flags("plain", *PLAIN.split())),
        ("whole", "theirs", flags("whole", *two)),
        ("parts", "theirs", flags("parts", *two, "--batch-size", 8, "--accum-freq", 4)),
        ("rows", "saved", flags("rows", "--loss", "sogclr", "--loss-term", "brownian_bridge=1", "--train-data",
                                data["uneven"], "--batch-size", 8, "--seed", 3, "--logs", folder / "rows.pt")),
    ]  # fmt: skip
    gamma, config = PARITY["gamma_decomp"].split(), ("--model-config", model_config)
    own = folder / "logs/own/checkpoints/epoch_1.pt"
    jobs += [
        ("own", "train", flags("own", *gamma, *config)),
        ("own-on", "ours", flags("own-on", *gamma, "--resume", own)),
        ("on-own", "train", flags("on-own", *gamma, *config, "--resume", checkpoint)),
    ]
    jobs += [(wrong, "ours", flags("wrong", *wrong.split())) for wrong in WRONG]
    todo = [dict(zip(("name", "batches", "flags"), job, strict=True)) for job in jobs]
    skipping = flags("skipping", "--loss", "gamma_decomp", "--precision", "amp")
    todo.append({"name": "skipping", "batches": "ours", "flags": skipping, "scale": 2.0**26})
    return start(copies["patched"], todo)


def checkpoint(folder, name, epoch):
    return torch.load(folder / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt")


def metrics(folder, name):
    return [json.loads(row) for row in (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def by_step(rows, name):
    return [row[name] for row in rows]


@pytest.mark.parametrize("name", PARITY)
def test_losses_equal_ours_over_24_steps(results, folder, flags, model_config, name):
    extra = ["--model-config", model_config, *PARITY[name].split()]
    assert main(["train", *flags(f"ours-{name}", *extra)]) == 0
    rows = metrics(folder, f"ours-{name}")
    assert results[name]["error"] == "" and len(results[name]["losses"]) == 24
    for key in (key for key in rows[0] if key == "loss" or key.endswith("_loss")):
        assert by_step(results[name]["losses"], key) == pytest.approx(by_step(rows, key), rel=1e-5, abs=1e-6), key
    ours, theirs = checkpoint(folder, f"ours-{name}", 3), checkpoint(folder, name, 3)
    assert ours.keys() - {"loss_name", "clock"} == theirs.keys() - COUNTERS
    torch.testing.assert_close(theirs.get("loss"), ours.get("loss"), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_resumed_run_goes_on_with_the_losss_state(results):
    assert results["on"]["losses"] == results["gamma_decomp"]["losses"][8:]


def test_our_loop_runs_on_this_version_and_either_resumes_the_other(results, folder):
    assert [results[name]["exit"] for name in ("own", "own-on", "on-own")] == [0, 0, 0]
    reference = by_step(results["gamma_decomp"]["losses"], "contrastive_loss")
    assert by_step(metrics(folder, "own"), "contrastive_loss") == pytest.approx(reference, rel=1e-5)
    assert by_step(results["own-on"]["losses"], "contrastive_loss") == pytest.approx(reference[8:], rel=1e-5)
    assert by_step(metrics(folder, "on-own"), "contrastive_loss") == pytest.approx(reference[8:], rel=1e-5)
    keys = [checkpoint(folder, name, 3).keys() for name in ("own", "gamma_decomp")]
    assert keys[0] - {"loss_name", "clock"} == keys[1] - COUNTERS


def test_without_a_loss_it_resumes_too_and_another_loss_is_refused(results):
    assert results["without"]["error"] == "" and len(results["without"]["losses"]) == 8
    assert results["other"]["exit"] == 2
    assert "\nerror: --resume" in "\n" + results["other"]["error"]
    assert "epoch_1.pt: its loss state does not fit --loss and the data" in results["other"]["error"]


def test_accumulated_batches_are_one_large_batch(results, folder):
    """OpenCLIP's own pipeline; views, logit scale and heads included, and the loss's state is written once per step."""
    whole, parts = checkpoint(folder, "whole", 6), checkpoint(folder, "parts", 6)
    assert abs(whole["state_dict"]["logit_scale"] - torch.tensor(1 / 0.07).log()) > 1e-3
    assert whole["loss"]["base.steps_taken"] == 6
    for key in ("state_dict", "loss"):
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-6, equal_nan=True)
    assert "loss_optimizer" in whole and len(whole["optimizer"]["param_groups"]) == 2


def test_a_step_that_the_gradient_scaler_skips_writes_no_state(results, folder):
    assert results["skipping"]["error"] == "" and len(results["skipping"]["losses"]) == 24
    content = checkpoint(folder, "skipping", 3)
    taken = content["optimizer"]["state"][0]["step"]
    assert 0 < taken < 24 and content["loss"]["base.steps_taken"] == taken


def test_two_processes_equal_one(results, folder, flags, data, copies, start):
    extra = ("--train-data", data["two"], *ONE_STEP.split(), "--batch-size", 8, "--accum-freq", 2)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0")  # fmt: skip
    start(copies["patched"], [{"name": "two", "batches": "theirs", "flags": flags("two", *extra)}], *launcher)
    log = (folder / "logs" / "two" / "out.log").read_text()
    assert "Process (global: 0, local 0), total 2." in log
    one, two = checkpoint(folder, "whole", 6), checkpoint(folder, "two", 6)
    for key in ("state_dict", "loss"):
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_without_a_loss_training_is_what_it_was(results, folder, flags, copies, start):
    job = {"name": "before", "batches": "ours", "flags": flags("before", *PLAIN.split())}
    stock = start(copies["stock"], [job])
    assert results["plain"]["scale_reads"] == stock["before"]["scale_reads"]  # each waits for the device
    before, after = checkpoint(folder, "before", 3), checkpoint(folder, "plain", 3)
    assert before.keys() == after.keys()
    torch.testing.assert_close(after["state_dict"], before["state_dict"], rtol=0, atol=0)


def test_ids_and_views_of_their_pipeline_are_ours(results, folder, data):
    import open_clip

    rows = torch.load(folder / "rows.pt")
    assert results["rows"]["error"] == "" and rows.keys() == {"image", "text", "sample_ids", "image_aug"}
    transform = open_clip.image_transform(32, is_train=True)
    config = StreamConfig(
        source=list_shards(data["uneven"]), batch_size=8, sample_id="index", seed=3, image_transform=transform,
        tokenizer=open_clip.get_tokenizer("tiny-test"), image_aug_transform=transform,
    )  # fmt: skip
    loader = train_loader(config, num_samples=40, workers=0)
    loader.set_epoch(2)
    (ours,) = (
        {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "text", "sample_ids", "image_aug")}
        for batches in [list(loader.batches)]
    )
    assert sorted(rows["sample_ids"].tolist()) == list(range(40))
    theirs_order, our_order = rows["sample_ids"].argsort(), ours["sample_ids"].argsort()
    for name in ("image", "text", "image_aug"):
        assert torch.equal(rows[name][theirs_order], ours[name][our_order]), name


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_flag_is_one_line_before_anything_is_written(results, folder, wrong):
    assert results[wrong]["exit"] == 2
    assert WRONG[wrong] in results[wrong]["error"] and len(results[wrong]["error"].splitlines()) == 1
    assert not (folder / "logs" / "wrong").exists()


def test_the_patch_comes_off_again(copies, folder):
    target = patching.find_target(str(shutil.copytree(copies["patched"], folder / "third" / "src").parent))
    assert (target.version, target.state, target.patch.name) == ("4.2.0.dev0", "applied", "open_clip-main.patch")
    assert main(["patch", "revert", "--target", str(folder / "third")]) == 0
    for path in copies["stock"].rglob("*.py"):
        assert (folder / "third/src" / path.relative_to(copies["stock"])).read_bytes() == path.read_bytes()
