"""Fine-tuning and evaluation of the four tasks on generated scenes, by the command line."""

import json
import pathlib

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from fusion_models import CONFIG
from launching import fork
from openclip_ext.cli import main
from openclip_ext.data.questions import read_questions
from openclip_ext.data.scenes import write_scenes
from openclip_ext.evaluation.fusion import predictions
from openclip_ext.evaluation.loading import load_model
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics, score_metrics
from openclip_ext.evaluation.ranks import ALONE
from openclip_ext.fusion.config import CLASSES
from openclip_ext.fusion.loading import load_fusion, load_head
from openclip_ext.fusion.model import FusionModel

EVAL_FLAG = {"vqa": "--vqa", "nlvr2": "--nlvr2", "ve": "--snli-ve", "retrieval": "--retrieval"}
COMMON = ("--batch-size", "24", "--epochs", "1", "--workers", "0", "--device", "cpu", "--precision", "fp32",
          "--lr", "1e-3", "--warmup", "2", "--log-every-n-steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory, model_config):
    """A folder of scenes and of runs: of pre-training, and of each task from there; and the scenes' paths."""
    root = tmp_path_factory.mktemp("stages")
    data = write_scenes(str(root / "scenes"), {"train": 48, "val": 14})
    (root / "fusion.json").write_text(json.dumps(CONFIG | {"layers": 1, "decoder_layers": 1, "dropout": 0.0}))
    starts = {"pretrain": root / "fusion.json", "assign": "pretrain", "nlvr2": "assign", "vqa": "pretrain",
              "ve": "pretrain", "retrieval": "pretrain"}  # fmt: skip
    for stage, start in starts.items():
        flags = ["--fusion", str(start if stage == "pretrain" else root / start), "--logs", str(root), "--name", stage,
                 "--train-data", data.get(f"{stage}/train", data["pairs/train"]), *COMMON]  # fmt: skip
        if stage == "pretrain":
            flags += ["--model", "tiny-test", "--model-config", model_config]
        else:
            flags += ["--task", stage]
        assert main(["train", *flags]) == 0
    return root, data


def evaluate(root, data, task, *flags):
    out = root / f"{task}-eval.json"
    source = data.get(f"{task}/val", data["pairs/val"])
    words = ["eval", "--fusion", str(root / task), EVAL_FLAG[task], source, "--out", str(out), "--device", "cpu",
             "--workers", "0", "--batch-size", "4", "--no-feature-cache", *flags]  # fmt: skip
    assert main(words) == 0
    return json.loads(out.read_text())["tasks"]


def losses(root, stage, name):
    return [json.loads(line)[name] for line in (root / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "ve", "assign"])
def test_a_task_starts_from_the_encoder_and_towers_before_it(stages, task):
    root, _ = stages
    before = "assign" if task == "nlvr2" else "pretrain"
    start, end = (load_fusion(str(root / name))[1] for name in (before, task))
    weight = "encoder.layers.0.linear1.weight"
    drift = (end["loss"][weight] - start["loss"][weight]).abs().max()
    assert 0 < drift < 0.01  # two steps at 1e-3
    assert (end["state_dict"]["visual.conv1.weight"] - start["state_dict"]["visual.conv1.weight"]).abs().max() < 0.01
    assert end["task"] == task and len(losses(root, task, f"{task}_loss")) == 2
    if task in ("nlvr2", "assign"):
        assert "encoder.twins.0.linear1.weight" in end["loss"]


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "ve"])
def test_scores_are_those_of_a_loop_over_questions(stages, task):
    root, data = stages
    (result,) = evaluate(root, data, task).values()
    model = load_model(str(root / task), device="cpu")
    _, content = load_fusion(str(root / task))
    fusion = FusionModel(model.model).eval()
    head = load_head(content, model.tokenizer, fusion.state_widths, model.device)
    rows = read_questions(task, data[f"{task}/val"], None, "--x").rows
    names = CLASSES.get(task, content["answers"])
    one_by_one = [answer for row in rows for answer in predictions(model, content, [row], names, 1, ALONE)]
    right = [answer == row.answers[0] for answer, row in zip(one_by_one, rows, strict=True)]
    assert result["num_samples"] == 14 and result["scores"]["accuracy"] == pytest.approx(sum(right) / 14)
    assert head.task == task


def test_matching_ranks_the_first_candidates_again(stages):
    root, data = stages
    found = evaluate(root, data, "retrieval", "--rerank", "5")
    assert set(found) == {"retrieval-val", "retrieval-val-reranked"}
    plain, again = found["retrieval-val"]["scores"], found["retrieval-val-reranked"]["scores"]
    assert plain["text_to_image_R@5"] == pytest.approx(again["text_to_image_R@5"])  # the same five, in another order
    assert again["text_to_image_R@10"] == pytest.approx(plain["text_to_image_R@10"])
    one = evaluate(root, data, "retrieval", "--rerank", "1")["retrieval-val-reranked"]["scores"]
    assert one == pytest.approx(plain)


def test_scores_of_pairs_are_ranked_as_features_are():
    image, text = normalize(torch.randn(7, 5), dim=1), normalize(torch.randn(12, 5), dim=1)
    owner = torch.cat([torch.arange(7), torch.randint(0, 7, (5,))])
    scores = image @ text.T
    assert score_metrics(scores, scores.T, owner) == pytest.approx(retrieval_metrics(image, text, owner))


@pytest.mark.slow
def test_two_processes_score_as_one(stages, tmp_path):
    root, data = stages
    one = evaluate(root, data, "vqa")
    out = tmp_path / "two.json"
    result = fork("torchrun", ["eval", "--fusion", root / "vqa", "--vqa", data["vqa/val"], "--out", out, "--device",
                               "cpu", "--workers", "0", "--batch-size", "4", "--no-feature-cache"])  # fmt: skip
    assert result.returncode == 0, result.stderr
    for task, values in json.loads(out.read_text())["tasks"].items():
        assert values["scores"] == one[task]["scores"]


@pytest.mark.parametrize("task", ["vqa", pytest.param("nlvr2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_batch(stages, tmp_path, task):
    root, data = stages
    start = root / ("assign" if task == "nlvr2" else "pretrain")
    flags = ["train", "--fusion", start, "--task", task, "--train-data", data[f"{task}/train"], "--logs", tmp_path,
             *COMMON, "--opt", "timm/sgd", "--lr", "0.05"]  # fmt: skip
    assert main([str(flag) for flag in (*flags, "--batch-size", 24, "--name", "one")]) == 0
    result = fork("torchrun", [*flags, "--batch-size", 12, "--name", "two"])
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path, "one", f"{task}_loss"), losses(tmp_path, "two", f"{task}_loss")
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-5)


def test_exported_towers_score_in_openclip_as_here(stages, tmp_path, capsys):
    root, data = stages
    folder = tmp_path / "export"
    assert main(["export", str(root / "retrieval"), "--to", "open_clip", "--out", str(folder)]) == 0
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    ours = load_model(str(root / "retrieval"), device="cpu")
    images = torch.rand(3, 3, 32, 32)
    tokens = ours.tokenizer(["a red circle", "a blue square", "a circle"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images, normalize=True), ours.encode_images(images))
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), ours.encode_texts(tokens))
    assert not any("encoder" in name for name in model.state_dict())


def test_an_answer_list_that_covers_a_part_says_so(stages, tmp_path, capsys):
    root, data = stages
    answers = tmp_path / "answers.json"
    answers.write_text('["Yes", "no", "three"]')
    flags = ["train", "--fusion", str(root / "pretrain"), "--task", "vqa", "--train-data", data["vqa/train"], "--logs",
             str(tmp_path), "--name", "few", "--answers", str(answers), *COMMON, "--batch-size", "4"]  # fmt: skip
    assert main(flags) == 0
    log = (tmp_path / "few" / "out.log").read_text()
    assert "the list of 3 answers has" in log and "questions are left out" in log
    assert load_fusion(str(tmp_path / "few"))[1]["answers"] == ["yes", "no", "3"]


def test_a_missing_picture_is_named_in_the_log_and_the_note(stages, tmp_path):
    root, data = stages
    copy = write_scenes(str(tmp_path / "scenes"), {"val": 6})
    next(pathlib.Path(copy["ve/val"]).parent.glob("images/*")).unlink()
    out = tmp_path / "eval.json"
    flags = ["--snli-ve", copy["ve/val"], "--out", str(out), "--device", "cpu", "--no-feature-cache"]
    assert main(["eval", "--fusion", str(root / "ve"), *flags]) == 0
    (result,) = json.loads(out.read_text())["tasks"].values()
    assert result["num_samples"] == 5 and "1 pictures are missing" in result["note"]


def test_wrong_runs_and_files_are_one_line(stages, tmp_path, capsys):
    root, data = stages
    (tmp_path / "other.json").write_text(json.dumps(CONFIG | {"layers": 3}))
    plain = ["--device", "cpu", "--no-feature-cache"]
    train = ["train", "--train-data", data["vqa/train"], "--logs", str(tmp_path), "--name", "x", *COMMON]
    other, latest = str(tmp_path / "other.json"), str(root / "vqa" / "checkpoints" / "epoch_1.pt")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    for command, message in [
        (["eval", "--vqa", data["vqa/val"], *plain], "is for fusion models; name one with --fusion"),
        (["eval", "--fusion", str(root / "ve"), "--vqa", data["vqa/val"], *plain], "was trained --task ve; give a run"),
        (["eval", "--fusion", str(root / "ve"), "--retrieval", data["pairs/val"], *plain], "has no matching head"),
        (["eval", "--fusion", "nowhere", "--vqa", data["vqa/val"], *plain], "--fusion nowhere: no such file"),
        ([*train, "--fusion", str(root / "vqa"), "--task", "ve"], "--train-data"),
        ([*train, "--fusion", str(root / "pretrain"), "--task", "vqa", "--answers", str(tmp_path / "bad.json")],
         "must be a list of texts"),
        ([*train, "--fusion", str(root / "pretrain"), "--task", "vqa", "--resume", str(root / "pretrain" / "checkpoints"
         / "epoch_1.pt")], "was trained without --task; to start from it, give it as --fusion"),
        ([*train, "--fusion", other, "--task", "vqa", "--model", "tiny-test", "--resume", latest],
         "its fusion model has layers=1, and --fusion says layers=3"),
    ]:  # fmt: skip
        capsys.readouterr()
        assert main(command) == 2, command
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
        assert len(error) == 1 and message in error[0], (command, error)
