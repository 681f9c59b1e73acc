"""Questions on pictures in the files in which VQA v2, NLVR2 and SNLI-VE are published, and the same of our own."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from openclip_ext.data.table import Table
from openclip_ext.errors import UserError
from openclip_ext.files import parse_json, read_json

#: Names under which a picture of a number is looked for, in the folder of pictures.
_IMAGE_NAMES = ("{}", "{}.jpg", "{}.png", "COCO_val2014_{:0>12}.jpg", "COCO_train2014_{:0>12}.jpg",
                "COCO_test2015_{:0>12}.jpg")  # fmt: skip
_JSON_LIMIT = 1 << 30  # bytes: VQA's annotations are a third of that
NAMED = 3  # missing pictures, in messages


class Question(NamedTuple):
    """A text on one or two pictures.

    Attributes:
        pictures: paths.
        text: a question, or a statement.
        answers: of annotators as they wrote them, or one class; empty: not known.
        key: by which an official evaluation knows it.
    """

    pictures: tuple[str, ...]
    text: str
    answers: tuple[str, ...]
    key: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """Those of a file whose pictures are there.

    Attributes:
        name: for messages.
        rows: the questions.
        missing: pictures that are not there, each once.
    """

    name: str
    rows: Sequence[Question]
    missing: Sequence[str] = ()

    def remarks(self) -> list[str]:
        """What to say of questions that were left out."""
        if not self.missing:
            return []
        names = ", ".join(self.missing[:NAMED]) + (" and others" if len(self.missing) > NAMED else "")
        return [f"{self.name}: {len(self.missing):,} pictures are missing, and their questions left out ({names})"]


@dataclasses.dataclass(frozen=True)
class QuestionTable(Table):
    """Questions by row number; `rows` holds (paths of the pictures, text).

    Attributes:
        targets: of each row: a class, or annotators' answers by their place in a list, -1 for one that is not in it.
    """

    targets: Sequence[int | Sequence[int]] = ()

    def columns(self, row: int) -> dict[str, Any]:
        return {"targets": self.targets[row]}

    def load(self, row: int) -> tuple[Any, str]:
        """The picture, or the pictures if there are several, and the text."""
        paths, text = self.rows[row]
        pictures = []
        for path in paths:
            with Image.open(path) as image:
                pictures.append(image.convert("RGB"))
        return (pictures[0] if len(pictures) == 1 else pictures), text


def read_questions(task: str, path: str, images: str | None, flag: str) -> Questions:
    """The questions of a task's file, in the order of the file.

    Args:
        task: vqa, nlvr2 or ve.
        path: of VQA the questions; the annotations are the one file beside it with `annotations` for `questions` in its
            name. Of the others JSON, one object per line.
        images: the folder of pictures; None: `images` beside the file.
        flag: how the file was named, for messages.

    Raises:
        UserError: no such file or folder, another format, no question, or none whose pictures are there.
    """
    folder = images or os.path.join(os.path.dirname(path), "images")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file; give {_FORMATS[task][0]}")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {path}: no folder of pictures {folder}; name it with --task-images")
    find = _Finder(folder)
    try:
        found = list(_FORMATS[task][1](path, find))
    except (KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{flag} {path}: cannot be read ({what}); give {_FORMATS[task][0]}") from error
    if not found:
        raise UserError(f"{flag} {path}: holds no question")
    rows = [question for question in found if question.pictures]
    if not rows:
        raise UserError(f"{flag} {path}: none of its pictures is in {folder}, such as {find.missing[0]}")
    return Questions(path, rows, tuple(find.missing))


class _Finder:
    """Paths of pictures by name or number, and those that are missing."""

    def __init__(self, folder: str) -> None:
        self.folder, self.missing = folder, []  # type: str, list[str]
        self._found: dict[tuple[str, ...], str | None] = {}

    def __call__(self, *pictures: tuple[str, ...]) -> tuple[str, ...]:
        """The path of each, of which any name will do; nothing where one is missing."""
        paths = [self._path(names) for names in pictures]
        return tuple(path for path in paths if path is not None) if None not in paths else ()

    def _path(self, names: tuple[str, ...]) -> str | None:
        if names not in self._found:
            paths = (os.path.join(self.folder, name) for name in names)
            self._found[names] = next(filter(os.path.isfile, paths), None)
            if self._found[names] is None:
                self.missing.append(names[0])
        return self._found[names]


def _vqa(path: str, find: _Finder) -> Iterator[Question]:
    annotations = _annotations(path)
    content = read_json(annotations, _JSON_LIMIT) if annotations else {"annotations": []}
    given = {
        str(row["question_id"]): tuple(answer["answer"] for answer in row["answers"]) for row in content["annotations"]
    }
    for row in read_json(path, _JSON_LIMIT)["questions"]:
        names = tuple(dict.fromkeys(name.format(row["image_id"]) for name in _IMAGE_NAMES))
        key = str(row["question_id"])
        yield Question(find(names), row["question"], given.get(key, ()), key)


def _annotations(path: str) -> str | None:
    """The file of annotations beside one of questions: the name that differs least; None: there is none."""
    folder, name = os.path.split(path)
    names = [other for other in os.listdir(folder or ".") if "annotations" in other and other.endswith(".json")]
    wanted = set(name.replace("questions", "annotations").replace(".json", "").split("_")) - {"OpenEnded"}
    exact = [other for other in names if set(other.replace(".json", "").split("_")) - {"OpenEnded"} == wanted]
    return os.path.join(folder, exact[0]) if exact else None


def _lines(path: str) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield parse_json(line)


def _nlvr2(path: str, find: _Finder) -> Iterator[Question]:
    for row in _lines(path):
        stem = row["identifier"].rpartition("-")[0]
        names = [(f"{stem}-img{side}.png", f"{stem}-img{side}.jpg") for side in range(2)]
        answer = str(row["label"]).lower()
        yield Question(find(*names), row["sentence"], (answer,), row["identifier"])


def _ve(path: str, find: _Finder) -> Iterator[Question]:
    for number, row in enumerate(_lines(path)):
        if row["gold_label"] == "-":  # annotators disagreed
            continue
        picture = str(row["Flickr30K_ID"])
        names = (f"{picture}.jpg", f"{picture}.png", picture)
        yield Question(find(names), row["sentence2"], (row["gold_label"],), str(row.get("pairID", number)))


_FORMATS: dict[str, tuple[str, Callable[[str, _Finder], Iterator[Question]]]] = {
    "vqa": ("VQA's questions, with their annotations beside them, such as v2_OpenEnded_mscoco_val2014_questions.json",
            _vqa),
    "nlvr2": ("NLVR2's statements, such as dev.json", _nlvr2),
    "ve": ("SNLI-VE's hypotheses, such as snli_ve_dev.jsonl", _ve),
}  # fmt: skip


def class_table(questions: Questions, classes: Sequence[str], flag: str) -> QuestionTable:
    """Questions with one class each. Raises UserError: one whose answer is none of them."""
    targets = []
    for question in questions.rows:
        (answer,) = question.answers
        if answer not in classes:
            raise UserError(f"{flag} {questions.name}: {question.key} has the label {answer}; use {', '.join(classes)}")
        targets.append(classes.index(answer))
    return QuestionTable(questions.name, [(row.pictures, row.text) for row in questions.rows], targets)


def answer_table(questions: Questions, answers: Sequence[str], normalise: Callable[[str], str]) -> QuestionTable:
    """Questions with annotators' answers by their place in a list; those with no answer in it are left out."""
    place = {answer: number for number, answer in enumerate(answers)}
    rows, targets = [], []
    annotators = max((len(row.answers) for row in questions.rows), default=0)
    for row in questions.rows:
        given = [place.get(normalise(answer), -1) for answer in row.answers]
        if any(number >= 0 for number in given):
            rows.append((row.pictures, row.text))
            targets.append(given + [-1] * (annotators - len(given)))
    return QuestionTable(questions.name, rows, targets)


def frequent_answers(questions: Questions, normalise: Callable[[str], str], most: int) -> list[str]:
    """The answers given most often, the most frequent first, at most so many.

    Raises:
        UserError: no question has an answer.
    """
    counts = collections.Counter(normalise(answer) for row in questions.rows for answer in row.answers)
    if not counts:
        raise UserError(
            f"--train-data {questions.name}: its questions have no answers; put their annotations beside it"
        )
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def covered(questions: Questions, answers: Sequence[str], normalise: Callable[[str], str]) -> float:
    """The share of annotators' answers that a list holds."""
    known = set(answers)
    found = [normalise(answer) in known for row in questions.rows for answer in row.answers]
    return sum(found) / max(1, len(found))
