import json
import multiprocessing

import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState

from openclip_ext.cli import main
from openclip_ext.data import digits
from openclip_ext.data.pack import pack
from openclip_ext.testing import RankPool
from towers import DEEP_MODEL, TINY_MODEL

#: What processes have imported that tests fork, in `launching` and in a `RankPool`: each would take ten seconds to.
PRELOADED = ["accelerate", "launching", "rank_jobs", "open_clip_train.main", "openclip_ext.training.run", "peft",
             "torch.distributed.fsdp"]  # fmt: skip
multiprocessing.set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors are tiny here: more threads would spend their time waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps its state per process, where a user starts one process per run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def ranks():
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def model_config(tmp_path_factory):
    """Path of a model config small enough to train in a test; the model is called `tiny-test`."""
    path = tmp_path_factory.mktemp("model") / "tiny-test.json"
    path.write_text(json.dumps(TINY_MODEL))
    return str(path)


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """Flags for a model with several blocks in each tower, called `deep-test`."""
    path = tmp_path_factory.mktemp("model") / "deep-test.json"
    path.write_text(json.dumps(DEEP_MODEL))
    return "--model", "deep-test", "--model-config", str(path)


@pytest.fixture(scope="session")
def pairs():
    """(PNG bytes, caption) of real handwritten digits."""
    return [(image, caption) for image, caption, _ in digits.digit_splits()["train"]]


@pytest.fixture(scope="session")
def shards(tmp_path_factory, pairs):
    """A folder with four shards of 64 digits each, and sizes.json."""
    folder = tmp_path_factory.mktemp("shards")
    pack(pairs[:256], str(folder), samples_per_shard=64, progress=False)
    return str(folder)


@pytest.fixture(scope="session")
def val_shards(tmp_path_factory, pairs):
    """A folder with one shard of 50 other digits."""
    folder = tmp_path_factory.mktemp("val")
    pack(pairs[300:350], str(folder), progress=False)
    return str(folder)


@pytest.fixture
def train_flags(shards, model_config, tmp_path):
    """A function from extra flags to a full command line of `openclip-ext train`."""

    def flags(*extra):
        fixed = {
            "--model": "tiny-test", "--model-config": model_config, "--train-data": shards, "--batch-size": "32",
            "--epochs": "1", "--workers": "0", "--device": "cpu", "--precision": "fp32", "--lr": "1e-3",
            "--warmup": "2", "--log-every-n-steps": "1", "--logs": str(tmp_path / "logs"), "--name": "run",
        }  # fmt: skip
        given = [str(part) for part in extra]
        kept = [part for key, value in fixed.items() if key not in given for part in (key, value)]
        return ["train", *kept, *given]

    return flags


@pytest.fixture
def by_hand(model_config, tmp_path):
    """The folder of a run whose weights nobody has trained, which takes less time."""
    checkpoints = tmp_path / "logs" / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    open_clip.add_model_config(model_config)
    state = open_clip.create_model("tiny-test").state_dict()
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, checkpoints / "epoch_1.pt")
    params = f"model: tiny-test\nmodel_config: {model_config}\nopenclip-ext: 0\n"
    (checkpoints.parent / "params.txt").write_text(params)
    return checkpoints.parent


@pytest.fixture(scope="session")
def digit_run(tmp_path_factory, pairs, model_config):
    """The folder of a run that has learnt to tell digits apart a little."""
    logs = tmp_path_factory.mktemp("digit_run")
    pack(pairs[:640], str(logs / "shards"), progress=False)
    flags = "--batch-size 32 --epochs 6 --workers 0 --device cpu --precision fp32 --lr 5e-3 --warmup 5 --name run"
    assert main(["train", "--model", "tiny-test", "--model-config", model_config, "--train-data", str(logs / "shards"),
                 "--logs", str(logs), "--save-frequency", "0", *flags.split()]) == 0  # fmt: skip
    return logs / "run"


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory):
    """A folder per digit with 8 of the test pictures each, and how to say them."""
    root = tmp_path_factory.mktemp("digits")
    for number, (image, _, label) in enumerate(digits.digit_splits()["test"]):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) < 8:
            (folder / f"{number:04}.png").write_bytes(image)
    (root / "classnames.txt").write_text("\n".join(digits.CLASS_NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text(
        "".join(f"{template.replace('{}', '{c}')}\n" for template in digits.TEMPLATES)
    )
    return root
