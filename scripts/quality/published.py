"""What the READMEs say of the results: the short table, the full ones, and the pictures, of the runs kept here."""

import itertools
import os
import shutil

from runs.intervals import format_interval
from runs.marks import put_between_marks

from .store import open_store
from .summary import draw, markdown, summarise
from .trained import TRAINED

SCRIPTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = os.path.join(SCRIPTS, "quality", "runs.jsonl")
MARKS = ("<!-- quality -->", "<!-- /quality -->")
SHORT_MARKS = ("<!-- measured -->", "<!-- /measured -->")

#: Rows of the short table, and what they are called.
ROWS = {
    "clip": "`clip`",
    "dcl": "`dcl`",
    "batch_corrected": "`batch_corrected`",
    "gamma_decomp": "`gamma_decomp`",
    "gamma_decomp+caption_words=1": "`gamma_decomp`, `caption_words=1`",
    "clip+accumulate=1024": "`clip`, 1,024 by accumulation",
    "dcl+accumulate=1024": "`dcl`, 1,024 by accumulation",
}
#: Its columns: task, batch size, and what it is called.
COLUMNS = (
    ("stream", 16, "stream, 16"),
    ("stream", 64, "stream, 64"),
    ("stream", 256, "stream, 256"),
    ("stream2", 32, "stream2, 32"),
    ("flickr", 64, "features, 64"),
    ("digits", 32, "digits, 32"),
    ("photos", 64, "photos, 64"),
    ("digits_lora", 32, "LoRA, 32"),
    ("digits_tuned", 32, "at 1e-5, 32"),
)


def publish(runs: str) -> None:
    """Keep the runs of a file, if there is one, in `runs.jsonl` beside this; make READMEs and pictures of those."""
    if os.path.exists(runs):
        shutil.copyfile(runs, RUNS)
    records = summarise(open_store(RUNS))
    put_between_marks(markdown(records), os.path.join(SCRIPTS, "README.md"), MARKS)
    put_between_marks(short_table(records), os.path.join(os.path.dirname(SCRIPTS), "README.md"), SHORT_MARKS)
    for task, of_task in itertools.groupby(records, key=lambda record: record["task"]):
        draw(list(of_task), os.path.join(os.path.dirname(RUNS), f"{task}.png"))


def short_table(records: list[dict]) -> str:
    """One line per method of `ROWS`, one column per entry of `COLUMNS` of which something was measured."""
    scores: dict[tuple, str] = {
        (record["task"], record["batch_size"], record["method"]): format_interval(record["score"], record["half_width"])
        for record in records
        if record["scale"] == "fixed" or record["task"] in TRAINED
    }
    columns = [column for column in COLUMNS if any((*column[:2], method) in scores for method in ROWS)]
    lines = ["| | " + " | ".join(name for *_, name in columns) + " |", "|---|" + "---|" * len(columns)]
    for method, name in ROWS.items():
        cells = (scores.get((task, size, method), "–") for task, size, _ in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
