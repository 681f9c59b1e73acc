"""Whatever text and JSON say, a parser returns what it promises or raises a UserError; ids and shards add up."""

import contextlib
import json
import math
import pathlib
import tempfile

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openclip_ext.commands.export.model_card import training_command
from openclip_ext.commands.interpolate.mixing import parse_alphas
from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.hash_ids import HashIds
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import shared_batches
from openclip_ext.data.sizes import MOST_SAMPLES, read_sizes
from openclip_ext.errors import UserError
from openclip_ext.files import checkpoints, keep_rows
from openclip_ext.losses.weights import parse_weight
from openclip_ext.options import parse_assignments, parse_terms
from openclip_ext.redact import redacted
from openclip_ext.report.compare import compare, group
from openclip_ext.report.measured import chances, columns, remarks, told_apart
from openclip_ext.report.params import read_params
from openclip_ext.report.run_files import read_run
from openclip_ext.report.tables import tables
from openclip_ext.training.lora import parse_lora
from openclip_ext.training.record import read_record

often = settings(max_examples=100, deadline=None, derandomize=True, database=None)
seldom = settings(often, max_examples=60)

numbers = st.one_of(st.integers(), st.floats(), st.integers(-3, 300), st.sampled_from([10**400, -(10**400), 1 << 63]))
plain = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
anything = st.recursive(
    plain,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=6), x, max_size=3)),
    max_leaves=8,
)
#: What a flag's value is made of.
words = st.text(st.sampled_from("ab01.,:=@+-:einf{}*/_ é"), max_size=14)


def told_apart_all(runs):
    apart = columns(runs)
    assert all(isinstance(remark, str) for remark in remarks(apart))
    runs = [told_apart(run, apart) for run in runs]
    assert all(0 <= chance <= 1 for chance in chances(runs).values())
    return runs


def refused(function, *args):
    """What the function returns, None where it says in one line that it will not."""
    try:
        return function(*args)
    except UserError as error:
        assert "\n" not in str(error).replace(repr(args), "") or any("\n" in str(arg) for arg in args)
        return None


@st.composite
def damaged(draw, whole):
    """The JSON value with one to three of its parts replaced, removed or added."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(anything)
            else:
                del place[key]
            break
    return value


@contextlib.contextmanager
def folder_with(**files):
    """A folder with files of such content: JSON, or text as it is. A double underscore in a name is its dot."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = pathlib.Path(folder, name.replace("__", "."))
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        yield folder


sizes_like = st.one_of(
    anything, st.dictionaries(st.sampled_from(["0.tar", "1.tar", "caption_key=a", "../x"]), plain, max_size=3)
)


@often
@given(sizes_like)
@example({"0.tar": 1e400})
@example({"0.tar": -1})
@example({"0.tar": True})
@example({"0.tar": "12", "1.tar": 3.0})
def test_sizes_are_numbers_of_samples(content):
    with folder_with(sizes__json=content) as folder:
        sizes = refused(read_sizes, folder)
    if sizes is not None:
        assert all(type(size) is int and 0 <= size <= MOST_SAMPLES for size in sizes.of_shard.values())
        assert sizes.total <= MOST_SAMPLES


@often
@given(st.one_of(st.text(max_size=30), st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "9" * 10_000, "NaN"])))
def test_what_is_no_json_is_refused_in_one_line(text):
    with folder_with(sizes__json=text, params__json=text, a__json=text) as folder:
        refused(read_sizes, folder)
        refused(read_record, folder)
        refused(read_params, pathlib.Path(folder))
        refused(read_run, folder)
        refused(read_run, f"{folder}/a.json")


FLAGS = {"model": "ViT-B-32", "loss": "clip", "lr": 1e-3, "seed": 1, "loss_arg": ["a=1"],
         "aug_cfg": {"scale": [0.4, 1.0]}, "debug": False, "val_data": "val", "batch_size": 32,
         "train_data": None}  # fmt: skip
PARAMS = {"versions": {"torch": "2.6"}, "flags": FLAGS,
          "history": [{"epoch": 1, "step": 8, "changed": {"lr": [1e-3, 1e-4]}}]}  # fmt: skip


@often
@given(st.one_of(damaged(PARAMS), anything))
def test_records_of_runs_are_read_or_refused(content):
    with folder_with(params__json=content) as folder:
        record, params = refused(read_record, folder), refused(read_params, pathlib.Path(folder))
    if record is not None:
        assert set(record.as_of(1, 3).changes(FLAGS)) <= set(FLAGS)
    if params is not None:
        assert training_command(params) and isinstance(params.changes(), dict)


REPORT = {
    "created": "2026-01-01", "model": "ViT-B-32", "checkpoint": {"path": "a/epoch_1.pt", "sha256": "0" * 64},
    "versions": {"torch": "2.6"}, "tasks": {"imagenet-val": {
        "dataset": "val", "num_samples": 50, "num_classes": 10, "scores": {"top1": 0.5, "top5": 0.9},
        "data": {"checksum": "a" * 64, "images": 50, "texts": None}, "seconds": 1.0,
    }},
}  # fmt: skip


@seldom
@given(st.one_of(damaged(REPORT), anything), st.one_of(damaged(PARAMS), st.just(PARAMS)))
def test_reports_are_compared_or_refused(content, params):
    row = {"epoch": 1, "imagenet-zeroshot-val-top1": 0.5}
    files = {"a__json": content, "b__json": REPORT, "params__json": params, "metrics__jsonl": json.dumps(row) + "\n"}
    with folder_with(**files) as folder:
        names = (f"{folder}/a.json", f"{folder}/b.json", folder)
        runs = [run for name in names if (run := refused(read_run, name)) is not None]
        assert [run.scores for run in runs if run.name == "b"] == [{"imagenet-val/top1": 0.5, "imagenet-val/top5": 0.9}]
        text = refused(lambda: tables(compare(group(told_apart_all(runs)))))
        assert text is None or isinstance(text, str)


@often
@given(st.lists(st.one_of(damaged({"step": 3, "epoch": 0, "loss": 1.0}), anything), max_size=4), st.binary(max_size=20))
def test_rows_of_a_run_are_read_or_refused(rows, end):
    with folder_with(metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows)) as folder:
        run = refused(read_run, folder)
        if run is not None:
            steps = [row["step"] for row in run.training]
            assert steps == sorted(steps) and all(float(x) is not None for row in run.training for x in row.values())
        with open(f"{folder}/metrics.jsonl", "ab") as file:
            file.write(end)
        keep_rows(f"{folder}/metrics.jsonl", lambda row: row["step"] < 3)
        kept = pathlib.Path(folder, "metrics.jsonl").read_bytes().splitlines()
        assert all(json.loads(line)["step"] < 3 for line in kept)


@often
@given(st.dictionaries(st.sampled_from("abc"), st.binary(max_size=20)), st.one_of(st.binary(max_size=20), anything))
def test_captions_are_text_or_counted(files, content):
    data = content if isinstance(content, bytes) else json.dumps({"a": content, "b": content}).encode()
    sample = files | {"json": data, "__url__": "a.tar", "__ordinal__": 0, "txt": files.get("a", b"x")}
    for form in (CaptionFormat(), CaptionFormat(key="a"), CaptionFormat(key="b", separator=";")):
        skips = tar.Skips()
        captions = form.of_sample(sample, skips.record, ("a",))
        assert skips if captions is None else (captions and all(isinstance(text, str) for text in captions))


@often
@given(words)
@example("0:1:1e-9")
@example("0:1:0")
@example("0:inf:1")
@example("nan")
def test_flags_are_understood_or_refused(text):
    alphas = refused(parse_alphas, text)
    assert alphas is None or (all(0 <= alpha <= 1 for alpha in alphas) and len(alphas) < 100_000)
    lora = refused(parse_lora, text)
    assert lora is None or (lora.r >= 1 and math.isfinite(lora.alpha))
    terms = refused(parse_terms, [text])
    assert terms is None or list(terms) == [text.partition("=")[0]]
    given_options = refused(parse_assignments, [text], "--loss-arg")
    assert given_options is None or "=".join(next(iter(given_options.items()))) == text
    try:
        weight = parse_weight(text)
    except ValueError:
        return
    assert all(0 <= weight.at(step, 10) < math.inf for step in range(12))


@often
@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0.01, 1))
def test_weights_are_read_as_they_are_written(start, end, share):
    weight = parse_weight(f"{start}:{end}@{share}")
    assert (weight.start, weight.end, weight.share) == (start, end, share)
    assert min(start, end) - 1e-6 <= weight.at(3, 10) <= max(start, end) + 1e-6


@seldom
@example({"0", "1"}, "*", "nan")
@example({"0", "1"}, "*", "-1")
@example({"0", "1"}, "*", "0")
@example({"0", "1"}, "*", "2")
@given(st.sets(st.sampled_from(["0", "1", "00", "a b", "x*", "{y", "é", "[z]"]), min_size=1), words, words)
def test_a_folder_lists_all_its_shards_once(names, pattern, factors):
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(f"{folder}/{name}.tar" for name in names)
        for path in paths:
            pathlib.Path(path).touch()
        assert list(list_shards(folder).urls) == paths
        assert set(list_shards(f"{folder}/*.tar").urls) == set(paths)
        listing = list_shards("::".join([folder, *paths, folder]))
        assert sorted(listing.urls) == paths
        listing = refused(list_shards, f"{folder}/{pattern}", factors or None)
        assert listing is None or set(listing.urls) <= set(paths)
        weights = listing.weights if listing else None
        assert weights is None or (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0)


@often
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_ids_of_shards_follow_each_other_and_leave_none_out(sizes):
    urls = tuple(f"{number}.tar" for number in range(len(sizes)))
    listing = ShardListing(urls, None, tuple(sizes), sum(sizes))
    ids = [i for url, size in zip(urls, sizes, strict=True) for i in list(listing.ids_of(url))[:size]]
    assert ids == list(range(sum(sizes)))
    assert [listing.number_of[url] for url in urls] == list(range(len(urls)))
    unknown = [listing.ids_of(name) for name in ("x.tar", "y.tar")]
    assert not set(unknown[0][:3]) & set(unknown[1][:3]) and min(unknown[0][0], unknown[1][0]) >= sum(sizes)


@often
@given(st.lists(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9), max_size=6), st.integers(1, 12))
def test_hashes_get_the_next_number_once(batches, room):
    ids, number_of = HashIds(room), {}
    for batch in batches:
        numbers = ids(torch.tensor(batch, dtype=torch.int64)).tolist()
        for key, number in zip(batch, numbers, strict=True):
            if key not in number_of and len(number_of) < room:
                number_of[key] = len(number_of)
            assert 0 <= number < room and number_of.get(key, number) == number
    again = HashIds(room)
    again(ids.hashes)
    assert torch.equal(again.hashes, ids.hashes) and ids.hashes.tolist() == list(number_of)


@often
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4))
def test_ranks_share_batches_without_loss_or_repetition(count, batch_size, ranks):
    shares = [shared_batches(count, batch_size, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(count))


@often
@given(st.sets(st.sampled_from(["epoch_1.pt", "epoch_10.pt", "epoch_2_step_30.pt", "epoch_2.pt", "epoch_2_step_4.pt",
                                "epoch_x.pt", "epoch_1.pt.0123abcd.partial", "best.pt"])))  # fmt: skip
def test_the_newest_checkpoint_comes_first(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            pathlib.Path(folder, name).touch()
        found = [pathlib.Path(path).name for path in checkpoints(folder)]
    newest = ["epoch_10.pt", "epoch_2_step_30.pt", "epoch_2_step_4.pt", "epoch_2.pt", "epoch_1.pt"]
    assert found == [name for name in newest if name in names]


@often
@given(st.text(max_size=60), st.sampled_from(["hf_" + "a" * 30, "https://u:pw@h/", "?sig=abc", "Bearer " + "b" * 20]))
def test_hiding_secrets_twice_is_hiding_them_once(text, secret):
    once = redacted(text + " " + secret)
    assert redacted(once) == once and "***" in once
