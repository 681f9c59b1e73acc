"""Readers of VQA v2, NLVR2 and SNLI-VE, and generated scenes in their formats."""

import json
import pathlib
import random

import pytest

from openclip_ext.data import scenes
from openclip_ext.data.questions import (
    answer_table,
    class_table,
    covered,
    frequent_answers,
    read_questions,
)
from openclip_ext.errors import UserError
from openclip_ext.evaluation.metrics.vqa import normalise_answer
from openclip_ext.fusion.config import CLASSES


def write(folder, name, content, lines=False):
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    (folder / name).write_text(text)
    return str(folder / name)


def write_pictures(folder, *names):
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        (folder / "images" / name).write_bytes(scenes.picture([("red", "circle")], random.Random(0)))


def write_vqa(folder, answers):
    """As VQA v2 is published, by its names."""
    rows = [
        {"question_id": 10 * number, "image_id": number, "question": f"{number}?"} for number in range(len(answers))
    ]
    marks = [{"question_id": 10 * number, "image_id": number, "multiple_choice_answer": "x",
              "answers": [{"answer": one, "answer_confidence": "yes", "answer_id": place}
                          for place, one in enumerate(given)]}
             for number, given in enumerate(answers)]  # fmt: skip
    write(folder, "v2_mscoco_val2014_annotations.json", {"annotations": marks})
    write(folder, "v2_mscoco_train2014_annotations.json", {"annotations": []})
    return write(folder, "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": rows})


def test_vqa_is_read_with_the_annotations_of_its_split(tmp_path):
    write_pictures(tmp_path, "COCO_val2014_000000000000.jpg", "COCO_val2014_000000000001.jpg")
    path = write_vqa(tmp_path, [["yes"] * 10, ["two"] * 9 + ["2"], ["no"] * 10])
    found = read_questions("vqa", path, None, "--vqa")
    assert [(row.text, row.answers, row.key) for row in found.rows] == [
        ("0?", ("yes",) * 10, "0"), ("1?", ("two",) * 9 + ("2",), "10"),
    ]  # fmt: skip
    assert found.missing == ("2",)
    (remark,) = found.remarks()
    assert remark.endswith("1 pictures are missing, and their questions left out (2)")


def test_answers_are_numbered_by_how_often_they_are_given(tmp_path):
    write_pictures(tmp_path, *(f"{number}.png" for number in range(3)))
    path = write_vqa(tmp_path, [["yes"] * 7 + ["no"] * 3, ["Two"] * 9 + ["2"], ["blue"]])
    found = read_questions("vqa", path, None, "--vqa")
    answers = frequent_answers(found, normalise_answer, 2)
    assert answers == ["2", "yes"]
    table = answer_table(found, answers, normalise_answer)
    assert table.targets == [[1] * 7 + [-1] * 3, [0] * 10] and table.columns(0) == {"targets": table.targets[0]}
    assert covered(found, answers, normalise_answer) == pytest.approx(17 / 21)
    picture, text = table.load(1)
    assert text == "1?" and picture.size == (32, 32)


def test_nlvr2_has_two_pictures_and_a_truth(tmp_path):
    write_pictures(tmp_path, "dev-850-0-img0.png", "dev-850-0-img1.png", "dev-1-0-img0.png")
    rows = [{"identifier": "dev-850-0-0", "sentence": "Two.", "label": "True", "left_url": "", "right_url": ""},
            {"identifier": "dev-850-0-1", "sentence": "Three.", "label": "False"},
            {"identifier": "dev-1-0-0", "sentence": "Four.", "label": "False"}]  # fmt: skip
    found = read_questions("nlvr2", write(tmp_path, "dev.json", rows, lines=True), None, "--nlvr2")
    table = class_table(found, CLASSES["nlvr2"], "--nlvr2")
    assert table.targets == [1, 0] and len(found.rows[0].pictures) == 2 and found.missing == ("dev-1-0-img1.png",)
    pictures, text = table.load(0)
    assert len(pictures) == 2 and text == "Two."


def test_snli_ve_leaves_out_what_annotators_disagree_on(tmp_path):
    write_pictures(tmp_path, "36979.jpg")
    rows = [{"Flickr30K_ID": "36979", "sentence2": "A man.", "gold_label": "entailment", "pairID": "a"},
            {"Flickr30K_ID": "36979", "sentence2": "A dog.", "gold_label": "-", "pairID": "b"},
            {"Flickr30K_ID": 36979, "sentence2": "A cat.", "gold_label": "contradiction", "pairID": "c"}]  # fmt: skip
    found = read_questions("ve", write(tmp_path, "dev.jsonl", rows, lines=True), str(tmp_path / "images"), "--snli-ve")
    assert class_table(found, CLASSES["ve"], "--snli-ve").targets == [0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence2": "x"}\n', "cannot be read (lacks 'gold_label')"),
        ("{\n", "cannot be read"),
        ("\n", "holds no question"),
        ('{"Flickr30K_ID": "1", "sentence2": "x", "gold_label": "entailment"}\n', "none of its pictures is in"),
    ],
)
def test_a_file_of_another_format_is_one_line(tmp_path, content, message):
    write_pictures(tmp_path, "0.jpg")
    (tmp_path / "dev.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        read_questions("ve", str(tmp_path / "dev.jsonl"), None, "--snli-ve")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="--vqa x.json: no such file; give VQA's questions"):
        read_questions("vqa", "x.json", None, "--vqa")
    path = write(tmp_path, "dev.jsonl", [])
    with pytest.raises(UserError, match="no folder of pictures .*name it with --task-images"):
        read_questions("ve", path, None, "--snli-ve")
    write_pictures(tmp_path, "0.png")
    questions = read_questions("vqa", write(tmp_path, "a_questions.json", {"questions": [
        {"question_id": 0, "image_id": 0, "question": "?"}]}), None, "--train-data")  # fmt: skip
    with pytest.raises(UserError, match="its questions have no answers"):
        frequent_answers(questions, normalise_answer, 10)


def test_a_label_that_is_no_class_is_said(tmp_path):
    write_pictures(tmp_path, "0.png")
    rows = [{"Flickr30K_ID": "0", "sentence2": "x", "gold_label": "maybe", "pairID": "7"}]
    found = read_questions("ve", write(tmp_path, "dev.jsonl", rows, lines=True), None, "--snli-ve")
    with pytest.raises(UserError, match="7 has the label maybe; use entailment, neutral, contradiction"):
        class_table(found, CLASSES["ve"], "--snli-ve")


# Scenes.


def test_scenes_are_a_function_of_the_seed_and_read_as_published_sets(tmp_path):
    paths = [scenes.write_scenes(str(tmp_path / name), {"train": 12, "val": 6}) for name in ("a", "b")]
    for key in paths[0]:
        task, split = key.split("/")
        if task == "pairs":
            continue
        assert pathlib.Path(paths[0][key]).read_text() == pathlib.Path(paths[1][key]).read_text()
        found = read_questions(task, paths[0][key], None, "--x")
        assert len(found.rows) == (12 if split == "train" else 6) and not found.missing
        assert all(row.answers for row in found.rows)
        if task in CLASSES:
            assert len(class_table(found, CLASSES[task], "--x")) == len(found.rows)


def test_what_is_said_of_scenes_holds():
    scene = [("red", "circle"), ("blue", "circle"), ("green", "square")]
    assert scenes.caption(scene) == "a red circle left of a blue circle left of a green square"
    said = dict(scenes.questions(scene))
    assert said["how many shapes are there?"] == "3" and said["how many red shapes are there?"] == "1"
    assert said["is there a triangle?"] == "no" and said["what color is the square?"] == "green"
    assert "what color is the circle?" not in said and said["what shape is on the left?"] == "circle"
    for draw in range(200):
        rng = random.Random(draw)
        text, kind = scenes.hypothesis(scene, rng)
        if kind != "neutral":
            _, _, _, colour, shape = text.split()
            assert ((colour, shape) in scene) == (kind == "entailment")
        text, holds = scenes.statement((scene, [("blue", "square")]), rng)
        if text == "there is a square in both images":
            assert holds
        if text == "there is a circle in both images" or "yellow" in text:
            assert not holds
