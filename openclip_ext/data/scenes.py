"""Generated scenes: one to three coloured shapes in a row, with captions, questions and statements about them.

Everything is a function of a seed. Files are in the formats of VQA v2, NLVR2 and SNLI-VE, pairs in shards.
"""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image, ImageDraw

from openclip_ext.data.pack import pack

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
NUMBERS = ("zero", "one", "two", "three")
#: A shape in a scene: colour and kind.
Thing = tuple[str, str]
Scene = list[Thing]

SPLITS = {"train": 3000, "val": 300}


def write_scenes(folder: str, sizes: dict[str, int] | None = None, seed: int = 0) -> dict[str, str]:
    """Write `pairs/SPLIT` (shards), and for each split a file of `vqa`, `nlvr2` and `ve` with its pictures.

    Args:
        folder: made anew.
        sizes: samples by split; None: `SPLITS`.
        seed: of all that is drawn.

    Returns:
        Paths by `TASK/SPLIT`; of `pairs` the folders of shards.
    """
    shutil.rmtree(folder, ignore_errors=True)
    paths = {}
    for number, (split, size) in enumerate((sizes or SPLITS).items()):
        rng = random.Random(1000 * seed + number)
        shards = os.path.join(folder, "pairs", split)
        scenes = _draw_scenes(rng, size, distinct=split != "train")
        pack([(picture(scene, rng), caption(scene)) for scene in scenes], shards, samples_per_shard=250, progress=False)
        paths[f"pairs/{split}"] = shards
        for task, write in _WRITERS.items():
            place = os.path.join(folder, task)
            os.makedirs(os.path.join(place, "images"), exist_ok=True)
            paths[f"{task}/{split}"] = write(place, split, size, rng)
    return paths


def _draw_scenes(rng: random.Random, size: int, distinct: bool) -> list[Scene]:
    """As many; distinct ones, so that each caption has one picture, up to 1,884."""
    scenes: dict[Any, Scene] = {}
    while len(scenes) < size:
        scene = draw_scene(rng)
        scenes.setdefault(caption(scene) if distinct else len(scenes), scene)
    return list(scenes.values())


def draw_scene(rng: random.Random) -> Scene:
    return [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(rng.randint(1, 3))]


def picture(scene: Scene, rng: random.Random) -> bytes:
    """A PNG of the shapes from left to right, of sizes and in places that vary a little, on a grey that does too."""
    grey = rng.randint(225, 255)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    width = IMAGE_SIZE / len(scene)
    for place, (colour, shape) in enumerate(scene):
        radius = rng.uniform(3.5, 5.0)
        x, y = width * (place + 0.5) + rng.uniform(-0.3, 0.3), IMAGE_SIZE / 2 + rng.uniform(-8, 8)
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLOURS[colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def caption(scene: Scene) -> str:
    """What there is, from left to right."""
    things = [f"a {colour} {shape}" for colour, shape in scene]
    return " left of ".join(things)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """(question, answer) of all that can be asked."""
    asked = [("how many shapes are there?", str(len(scene)))]
    for colour in COLOURS:
        shapes = [shape for other, shape in scene if other == colour]
        asked.append((f"how many {colour} shapes are there?", str(len(shapes))))
        if len(shapes) == 1:
            asked.append((f"what shape is {colour}?", shapes[0]))
    for shape in SHAPES:
        colours = [colour for colour, other in scene if other == shape]
        if len(colours) == 1:
            asked.append((f"what color is the {shape}?", colours[0]))
        asked.append((f"is there a {shape}?", "yes" if colours else "no"))
    if len(scene) > 1:
        asked.append(("what shape is on the left?", scene[0][1]))
        asked.append(("what color is on the right?", scene[-1][0]))
    return asked


def statement(scenes: tuple[Scene, Scene], rng: random.Random) -> tuple[str, bool]:
    """A statement on two scenes, and whether it holds."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    has_shape, has_colour = ([any(thing[n] == x for thing in scene) for scene in scenes]
                             for n, x in ((1, shape), (0, colour)))  # fmt: skip
    left, right = map(len, scenes)
    number = rng.randint(1, 3)
    return rng.choice([
        (f"there is a {shape} in both images", all(has_shape)),
        (f"there is a {colour} shape in the left image", has_colour[0]),
        (f"there is a {colour} shape in the right image", has_colour[1]),
        ("the left image has more shapes than the right image", left > right),
        (f"one of the images has {NUMBERS[number]} shapes", number in (left, right)),
    ])  # fmt: skip


def hypothesis(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A sentence on a scene, and whether that entails, leaves open, or contradicts it."""
    colour, shape = rng.choice(scene)
    kind = rng.choice(("entailment", "neutral", "contradiction"))
    if kind == "neutral":
        return rng.choice([f"the {shape} was drawn by a child", f"somebody likes the {colour} {shape}"]), kind
    if kind == "contradiction":
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in scene]
        colour, shape = rng.choice(absent)
    return f"there is a {colour} {shape}", kind


def _scenes_with(rng: random.Random, size: int, label: Callable[[Any], Any], make: Callable[[], Any]) -> Iterator[Any]:
    """As many as asked for, each the one of four draws whose label has come least."""
    counts: dict[Any, int] = {}
    for _ in range(size):
        drawn = [make() for _ in range(4)]
        chosen = min(drawn, key=lambda one: counts.get(label(one), 0))
        counts[label(chosen)] = counts.get(label(chosen), 0) + 1
        yield chosen


def _write_vqa(folder: str, split: str, size: int, rng: random.Random) -> str:
    asked, given = [], []

    def make() -> tuple[Scene, tuple[str, str]]:
        scene = draw_scene(rng)
        return scene, rng.choice(questions(scene))

    for number, (scene, (question, answer)) in enumerate(_scenes_with(rng, size, lambda one: one[1][1], make)):
        key = number + (0 if split == "train" else 1_000_000)
        _write_picture(folder, f"{key}.png", scene, rng)
        asked.append({"question_id": key, "image_id": key, "question": question})
        given.append({"question_id": key, "image_id": key, "answers": [{"answer": answer}]})
    _write_json(os.path.join(folder, f"{split}_annotations.json"), {"annotations": given})
    return _write_json(os.path.join(folder, f"{split}_questions.json"), {"questions": asked})


def _write_nlvr2(folder: str, split: str, size: int, rng: random.Random) -> str:
    rows = []

    def make() -> tuple[tuple[Scene, Scene], tuple[str, bool]]:
        scenes = draw_scene(rng), draw_scene(rng)
        return scenes, statement(scenes, rng)

    for number, (scenes, (sentence, holds)) in enumerate(_scenes_with(rng, size, lambda one: one[1][1], make)):
        for side, scene in enumerate(scenes):
            _write_picture(folder, f"{split}-{number}-0-img{side}.png", scene, rng)
        rows.append({"identifier": f"{split}-{number}-0-0", "sentence": sentence, "label": str(holds)})
    return _write_lines(os.path.join(folder, f"{split}.json"), rows)


def _write_ve(folder: str, split: str, size: int, rng: random.Random) -> str:
    rows = []
    for number in range(size):
        scene = draw_scene(rng)
        sentence, kind = hypothesis(scene, rng)
        _write_picture(folder, f"{split}-{number}.png", scene, rng)
        rows.append({"Flickr30K_ID": f"{split}-{number}", "sentence2": sentence, "gold_label": kind})
    return _write_lines(os.path.join(folder, f"{split}.jsonl"), rows)


_WRITERS = {"vqa": _write_vqa, "nlvr2": _write_nlvr2, "ve": _write_ve}


def _write_picture(folder: str, name: str, scene: Scene, rng: random.Random) -> None:
    with open(os.path.join(folder, "images", name), "wb") as file:
        file.write(picture(scene, rng))


def _write_json(path: str, content: Any) -> str:
    with open(path, "w") as file:
        json.dump(content, file)
    return path


def _write_lines(path: str, rows: list[dict]) -> str:
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
