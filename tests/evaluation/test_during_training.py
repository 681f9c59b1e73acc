"""Evaluation between epochs: what several ranks find together is what one finds alone."""

import contextlib
import csv
import io
import json
import shutil
import tarfile

import open_clip
import pytest
import torch
from torchvision.transforms import ToTensor

import rank_jobs
from launching import fork, launch
from openclip_ext.cli import main
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pack
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.evaluation.datasets.imagenet import imagenet_folder, wnids
from openclip_ext.evaluation.datasets.labelled import LabelledBatches
from openclip_ext.evaluation.during_training import Evaluator, ZeroShotSet
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores


@pytest.fixture(scope="module")
def sources(tmp_path_factory, pairs):
    """The same 50 pairs as two shards, as a table, and as shards with samples that cannot be used."""
    root = tmp_path_factory.mktemp("pairs")
    pack(pairs[300:350], str(root / "shards"), samples_per_shard=30, progress=False)
    broken = {3, *range(16, 24)}
    with open(root / "pairs.csv", "w", newline="") as file, open(root / "rot.csv", "w", newline="") as rotten:
        tables = csv.writer(file), csv.writer(rotten)
        for table in tables:
            table.writerow(["filepath", "title"])
        for number, (image, caption) in enumerate(pairs[300:350]):
            (root / f"{number}.png").write_bytes(image)
            tables[0].writerow([root / f"{number}.png", caption])
            tables[1].writerow([root / ("pairs.csv" if number in broken else f"{number}.png"), caption])
    (root / "rot").mkdir()
    with tarfile.open(root / "rot" / "0.tar", "w") as shard:
        for number, (image, caption) in enumerate(pairs[300:350]):
            for name, data in (("png", b"rot" if number in broken else image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:03}.{name}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    (root / "rot" / "1.tar").write_bytes(b"rot")
    return root


@pytest.mark.parametrize(
    ("source", "num_ranks", "batch_size"),
    [
        ("shards", 2, 8),  # 7 batches: 4 and 3
        ("shards", 3, 50),  # the second and the third rank have none
        ("pairs.csv", 2, 8),
        ("rot", 2, 8),  # the third batch of 7 has nothing that can be used
        ("rot.csv", 2, 8),
    ],
)
def test_ranks_together_find_what_one_finds(ranks, model_config, sources, digit_folders, source, num_ranks, batch_size):
    job = (rank_jobs.evaluated, num_ranks, model_config, str(sources / source), batch_size, str(digit_folders))
    (first, skipped), *others = ranks.run(*job)
    expected, expected_skips = rank_jobs.evaluated(0, 1, *job[2:])
    rotten = source.startswith("rot")
    assert expected["num_samples"] == (41 if rotten else 50)
    assert first == expected  # to the last bit
    assert skipped == expected_skips and bool(skipped) == rotten
    assert others == [({}, [])] * (num_ranks - 1)


def test_every_set_has_its_own_words(model_config, pairs, tmp_path, monkeypatch):
    """Two parts of ImageNet, one with the words of its own classes, and one with all."""
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", [lambda name: f"a {name}."])
    for number, wnid in enumerate(list(wnids())[:60:20]):
        for copy in range(4):
            path = tmp_path / wnid / f"{copy}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pairs[4 * number + copy][0])
    open_clip.add_model_config(model_config)
    model, _, transform = open_clip.create_model_and_transforms("tiny-test", output_dict=True)
    how = {"tokenizer": open_clip.get_tokenizer("tiny-test"), "device": torch.device("cpu"),
           "autocast": contextlib.nullcontext, "dtype": None}  # fmt: skip
    sets = {classes: imagenet_folder(str(tmp_path), "--imagenet-val", classes) for classes in ("present", "all")}
    assert [len(labelled.class_names) for labelled in sets.values()] == [3, 1000]
    batches = {name: LabelledBatches(labelled.pictures, transform, batch_size=5, workers=0)
               for name, labelled in sets.items()}  # fmt: skip
    measured = [ZeroShotSet(name, batches[name], labelled.class_names, labelled.templates)
                for name, labelled in sets.items()]  # fmt: skip
    evaluator = Evaluator(**how, pairs=None, val_frequency=1, zeroshot_frequency=1, progress=False, zero_shot=measured)
    metrics = evaluator.evaluate(model, 1, True)
    encoder = Encoder(model=model, **how)
    for name, labelled in sets.items():
        classifier = zero_shot_classifier(encoder, labelled.class_names, labelled.templates, progress=False)
        expected = zero_shot_scores(zero_shot_counts(encoder, classifier, batches[name], progress=False))
        assert metrics[f"{name}-top1"] == expected["top1"] and metrics[f"{name}-top5"] == expected["top5"]
    assert metrics["present-top5"] == 1  # of three


def test_the_first_ranks_batch_statistics_count(ranks):
    first, second = ranks.run(rank_jobs.buffers_shared, 2)
    assert torch.equal(first, second) and torch.allclose(first, torch.full((3,), 0.1))


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_work_and_keep_the_order(sources, workers):
    def batches(rank, world_size):
        """(positions, pictures) of a rank's batches."""
        shards = list_shards(str(sources / "shards"))
        config = StreamConfig(source=shards, batch_size=8, rank=rank, world_size=world_size,
                              image_transform=ToTensor(), tokenizer=open_clip.tokenize)  # fmt: skip
        return [(batch["position"].tolist(), batch["image"].tolist()) for batch in eval_loader(config, workers=workers)]

    alone, shares = batches(0, 1), [batches(rank, 3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1  # each as often as any other
    real = [[batch for batch in share if batch[0] != [-1]] for share in shares]
    assert sum(map(len, real)) == len(alone) and max(map(len, real)) - min(map(len, real)) <= max(workers, 1)
    assert sorted(batch for share in real for batch in share) == alone  # the pictures too


@pytest.mark.slow
def test_what_one_rank_cannot_read_ends_all_with_one_line(train_flags, tmp_path, digit_folders):
    folders = tmp_path / "rot"
    shutil.copytree(digit_folders, folders)
    last = max(folders.glob("*/*.png"))
    last.write_bytes(b"rot")  # in the tenth batch, the fifth of the second process
    result = launch("torchrun", train_flags("--batch-size", 8, "--probe-train", folders, "--probe-val", digit_folders))
    assert result.returncode != 0
    assert result.stderr.count(f"openclip-ext: {last}: cannot be opened as a picture") == 1


@pytest.mark.parametrize("launcher", ["torchrun", "fsdp"])
def test_two_processes_write_the_results_of_one(train_flags, tmp_path, sources, digit_folders, launcher):
    """At a learning rate of 0, so that both evaluate the same weights."""
    data = ("--val-data", sources / "shards", "--probe-train", digit_folders, "--probe-val", digit_folders)
    flags = ("--lr", 0, "--batch-size", 20, "--workers", 2, *data)  # 3 batches for two
    assert main(train_flags(*flags, "--name", "one")) == 0
    result = fork(launcher, train_flags(*flags, "--name", "two"))
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / "logs" / name / "checkpoints/results.jsonl").read_text())
                for name in ("one", "two"))  # fmt: skip
    assert one["num_samples"] == 50 and {"clip_val_loss", "knn-top1", "linear-probe-top1"} <= one.keys()
    assert two == (one if launcher == "torchrun" else pytest.approx(one, rel=1e-5))
