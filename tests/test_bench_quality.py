"""The benchmark of losses: its records, what it chooses by them, its differences, and accumulation."""

import argparse
import dataclasses
import json

import bench_quality
import pytest
import torch
from quality import turns
from quality.loop import Run, score, take_gradient, train, visits
from quality.methods import Method
from quality.published import short_table
from quality.store import Row, open_store
from quality.summary import markdown, summarise
from quality.tasks import Pairs, Setting, Task, TwoTowers, perceptron
from quality.trained import pretrain_on_digits

from openclip_ext import UserError

BASE = Run(
    task="stream", setting=Setting(pairs=100, epochs=1, scale=9.0, decay=0.0), method="dcl", batch_size=8,
    scale="fixed", lr=0.0, seed=0, split="",
)  # fmt: skip


def found(score, **more):
    return {"score": score, "seconds": 1.0, "steps": 13, "pairs": 104, "logit_scale": 9.0} | more


def filled(path, scores, validation=((0.1, 20.0), (0.2, 30.0))):
    """A store of rows with these scores by seed, by method."""
    store = open_store(path)
    for method, values in scores.items():
        more = {"recent": 2.5} if "recent" in method else {}
        row = Row(base=dataclasses.replace(BASE, method=method), rates=tuple(lr for lr, _ in validation), seeds=3)
        tried = dict(validation)
        while (runs := row.wanted(store)) and runs[0].split == "val":
            for run in runs:
                store.add(run, found(tried[run.lr], **more))
        for run, value in zip(runs, values, strict=False):
            store.add(run, found(value, **more))
    return store


def test_what_is_done_is_read_again_without_a_line_that_was_cut_off(tmp_path):
    path = str(tmp_path / "runs.jsonl")
    first, second = BASE, dataclasses.replace(BASE, seed=1)
    open_store(path).add(first, found(50.0))
    with open(path, "a") as file:
        file.write(json.dumps({"run": dataclasses.asdict(second)})[:-9])
    store = open_store(path)
    assert store.get(first)["score"] == 50.0 and store.get(second) is None
    store.add(second, found(60.0))
    assert [open_store(path).get(run)["score"] for run in (first, second)] == [50.0, 60.0]


@pytest.mark.parametrize(
    "other",
    [{"lr": 0.5}, {"batch_size": 16}, {"scale": "learned"}, {"setting": dataclasses.replace(BASE.setting, epochs=2)}],
)
def test_a_run_of_another_configuration_is_another_run(tmp_path, other):
    store = open_store(str(tmp_path / "runs.jsonl"))
    store.add(BASE, found(50.0))
    assert store.get(dataclasses.replace(BASE, **other)) is None


def test_the_learning_rate_is_climbed_to_and_the_test_split_used_at_its_top(tmp_path):
    row = Row(base=BASE, rates=(0.1, 0.2, 0.4, 0.8, 1.6), seeds=2)
    scores = {0.1: 29.0, 0.2: 30.0, 0.4: 25.0, 0.8: 20.0, 1.6: 99.0}
    store = open_store(str(tmp_path / "runs.jsonl"))
    tried = []
    while (runs := row.wanted(store))[0].split == "val":
        assert row.left(store) >= len(runs) + 2 and {run.seed for run in runs}.isdisjoint({0, 1})
        tried.append([run.lr for run in runs])
        for run in runs:
            store.add(run, found(scores[run.lr]))
    assert tried == [[0.2, 0.4, 0.8], [0.1]]  # never the rate far off, however good it might be
    assert [(run.lr, run.seed, run.split) for run in runs] == [(0.2, 0, "test"), (0.2, 1, "test")]
    for run in runs:
        assert row.scored(store) != runs
        store.add(run, found(40.0))
    assert row.scored(store) == runs and row.wanted(store) == [] and row.left(store) == 0


def test_differences_are_taken_seed_by_seed_to_the_best_baseline_and_to_the_same_without(tmp_path):
    scores = {
        "clip": [50.0, 60.0, 70.0],
        "dcl": [40.0, 50.0, 60.0],
        "dcl+recent=8": [51.0, 61.0, 71.0],
        "emc2": [90.0, 90.0],
    }
    records = {record["method"]: record for record in summarise(filled(str(tmp_path / "runs.jsonl"), scores))}
    recent = records["dcl+recent=8"]
    assert recent["best_baseline"] == "clip" and recent["lr"] == 0.2 and recent["recent"] == 2.5
    assert recent["against_best"] == pytest.approx([1.0, 0.0])  # seeds differ by 10, the difference does not
    assert recent["against_without"] == pytest.approx([11.0, 0.0])
    assert recent["half_width"] > 20
    assert records["clip"]["against_best"] is None and records["dcl"]["against_without"] is None
    assert records["emc2"]["against_best"][0] == pytest.approx(35.0)  # of the seeds that both have
    assert "| 8 | `dcl+recent=8` | 61.0 ± 24.8 | +1.0 ± 0.0 | +11.0 ± 0.0 | 0.2 (edge) | 2.5 |" in markdown([recent])


def test_the_short_table_has_what_was_measured_and_dashes(tmp_path):
    store = filled(str(tmp_path / "runs.jsonl"), {"clip": [50.0, 60.0, 70.0], "emc2": [1.0, 2.0]})
    (clip, emc2) = summarise(store)
    head, rule, *rows = short_table([clip | {"batch_size": 64}, emc2]).splitlines()
    assert head == "| | stream, 64 |"
    assert [row.split("|")[2].strip() for row in rows] == ["60.0 ± 24.8", *6 * "–"]
    assert "emc2" not in "".join(rows) and {row.count("|") for row in (head, rule, *rows)} == {head.count("|")}


def test_methods_are_read_and_refused():
    method = Method("dcl+recent=8+limit=0.5")
    assert method.options == {"recent_batches": "8", "recent_limit": "0.5"} and method.without_recent == "dcl"
    assert Method("clip+accumulate=1024").pairs_per_step(64) == 1024 and not Method("clip+accumulate=1024").stateless
    assert Method("gamma_decomp").without_recent == "gamma_decomp+recent=0"  # it has them by default
    assert Method("gamma_decomp+recent=0").without_recent is None
    assert (
        Method("clip+caption_words=0.5").terms == ["caption_words"] and not Method("clip+caption_words=0.5").stateless
    )
    for text in ("dlc", "dcl+recent=-1", "siglip+recent=2", "clip+accumulate=many", "clip+caption_words=much"):
        with pytest.raises(UserError):
            Method(text)


def test_terms_are_refused_where_there_is_no_training_with_captions_and_second_views():
    args = argparse.Namespace(
        methods=["clip+caption_words=1"], scales=["fixed"], batch_sizes=[8], rates=[0.1], seeds=1, photos=None
    )
    with pytest.raises(UserError, match="caption_words=1: terms go with --task digits, .*photos, not with stream"):
        bench_quality.plan("stream", args)
    assert [row.base.method for row in bench_quality.plan("digits", args)] == ["clip+caption_words=1"]


def test_fine_tuning_begins_where_the_small_clip_was_left(tmp_path):
    checkpoint = str(tmp_path / "pretrained.pt")
    pretrain_on_digits(checkpoint, epochs=1)
    run = dataclasses.replace(
        BASE, task="digits_tuned", setting=Setting(pairs=1257, epochs=1, scale=0.0, decay=0.0), method="gamma_decomp",
        batch_size=400, scale="learned", lr=1e-9, split="val",
    )  # fmt: skip
    whole, low_rank = score(run, [checkpoint]), score(dataclasses.replace(run, task="digits_lora"), [checkpoint])
    assert whole["score"] == low_rank["score"] != score(dataclasses.replace(run, task="digits"))["score"]
    assert whole["steps"] == 3 and whole["pairs"] == 1200 and "recent" in whole


def test_seconds_are_those_taken_in_turns_where_they_were(tmp_path, monkeypatch):
    setting = Setting(pairs=96, epochs=1, scale=9.0, decay=0.0)
    store = open_store(str(tmp_path / "runs.jsonl"))
    for method in ("clip", "dcl+recent=2"):
        for split, seed in (("val", 1000), ("test", 0), ("test", 1)):
            run = dataclasses.replace(BASE, setting=setting, method=method, lr=0.1, seed=seed, split=split)
            store.add(run, score(run))
    before = [record["seconds"] for record in summarise(store)]
    ticks = iter(range(10**6))
    monkeypatch.setattr(turns.time, "process_time", lambda: next(ticks))  # each part of a training takes a second
    turns.time_rows("stream", store)
    after = summarise(store)
    assert [record["seconds"] for record in after] == [turns.PARTS] * 2 != before
    assert [record["scores"] for record in after] == [record["scores"] for record in summarise(open_store(store.path))]
    with pytest.raises(UserError, match="--time --task digits"):
        bench_quality.time_tasks(argparse.Namespace(task=["digits"]), store)


def test_every_epoch_visits_every_pair_once():
    order = visits(10, 3, 4, seed=0).flatten().tolist()
    assert len(order) == 32
    assert all(sorted(order[start : start + 10]) == list(range(10)) for start in (0, 10, 20))


@pytest.mark.parametrize("vocabulary", [None, 9])
def test_a_loss_that_stores_embeddings_trains_on_every_kind_of_pairs(vocabulary):
    torch.manual_seed(0)
    texts = torch.randn(12, 2, 5) if vocabulary is None else torch.randint(vocabulary, (12, 2, 5))
    task = Task({"train": Pairs(torch.randn(12, 4), texts)}, recalls=(1,), vocabulary=vocabulary)
    run = dataclasses.replace(BASE, method="emc2", batch_size=4, lr=0.1)
    model = TwoTowers(*task.towers(), 9.0, learned=False)
    assert train(run, task, model)["steps"] == 3


@pytest.mark.parametrize("name", ["clip", "dcl", "siglip"])
def test_batches_that_count_as_one_step_give_its_gradient(name):
    torch.manual_seed(0)
    model = TwoTowers(perceptron(5, 6, 4), perceptron(5, 6, 4), 9.0, learned=True)
    images, texts, ids = torch.randn(12, 5), torch.randn(12, 5), torch.arange(12)
    gradients = []
    for size in (12, 3):
        parts = [{"image": i, "text": t} for i, t in zip(images.split(size), texts.split(size), strict=True)]
        model.zero_grad()
        take_gradient(model, Method(name).build(12), parts, ids, {})
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
