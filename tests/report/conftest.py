import json

import pytest

from openclip_ext.cli import main


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run's folder by hand: what a run of two epochs of two steps would leave."""

    def make(name, *, recall=(), losses=(), **params):
        folder = tmp_path / "logs" / name
        (folder / "checkpoints").mkdir(parents=True)
        if params:
            lines = {"name": name, "logs": "logs", "precision": "amp"} | params
            (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        rows = [{"step": step, "epoch": step // 2, "loss": value, "lr": 0.1} for step, value in enumerate(losses)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"epoch": epoch, "text_to_image_R@1": v, "num_samples": 9} for epoch, v in enumerate(recall, start=1)]
        (folder / "checkpoints" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture
def show(tmp_path):
    """A function from arguments to the exit code and the JSON of `openclip-ext report`."""

    def run(*arguments):
        out = tmp_path / "report"
        code = main(["report", *(str(argument) for argument in arguments), "--out", str(out)])
        return code, json.loads((out / "report.json").read_text()) if code == 0 else None

    return run
