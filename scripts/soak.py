"""A training of two processes that is killed, signalled and starved of disk at random moments, and resumed each time.

Its data has broken pictures, a shard that breaks off and one that is none. A run that nobody disturbs takes a third of
the minutes, the disturbed one as long as it needs to come to the same epoch, with the same weights, optimizer, state of
the loss and rows of metrics, bit for bit. Writes soak.json and soak.png (steps over time, and what happened when); code
1: they differ, a process hung or ended with a traceback, or memory grew.

    python scripts/soak.py --minutes 20 --seed 0 --out runs/soak-0
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import torch

from openclip_ext.data import digits
from openclip_ext.data.index import index
from openclip_ext.data.pack import pack

RANKS = 2
SAVED_EPOCHS = 2  # between checkpoints that are compared
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
#: What happens, with its weight.
ACTIONS = {"kill a rank": 3, "kill all": 3, "SIGTERM": 2, "SIGUSR1": 1, "SIGINT": 1, "starve, kill all": 2, "starve": 1}
EXPECTED = {"SIGTERM": 0, "SIGUSR1": 0, "SIGINT": 130}


def make_data(folder: Path, seed: int) -> None:
    """Shards of digits, of which some are damaged."""
    pairs = [(image, caption) for image, caption, _ in digits.digit_splits()["train"][:768]]
    pack(pairs, str(folder), samples_per_shard=64, progress=False)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as shard, open(path, "r+b") as file:
            for member in shard.getmembers()[2::49]:
                file.seek(member.offset_data)
                file.write(bytes(8))
    cut, none = random.Random(seed).sample(sorted(folder.glob("*.tar")), 2)
    cut.write_bytes(cut.read_bytes()[:30_000])
    none.write_bytes(b"no tar" * 1000)
    index(str(folder), skip_unreadable=True, progress=False)


class Job:
    """A run in two processes, started anew; its errors go to files of their own."""

    def __init__(self, out: Path, name: str, *flags: object) -> None:
        self.run, self.started = out / "logs" / name, time.monotonic()
        command = [
            sys.executable, "-m", "openclip_ext", "train", "--model", "tiny", "--model-config", out / "tiny.json",
            "--train-data", out / "shards", "--logs", out / "logs", "--name", name, "--resume", "latest",
            "--loss", "gamma_decomp", "--loss-arg", "gamma=0.5", "--recent-batches", 4, "--recent-check", 3,
            "--loss-arg", "recent_enough=inf", "--ema", 0.9,
            "--aug-cfg", "scale=(0.5,1.0)", "--batch-size", 16, "--workers", 1, "--device", "cpu",
            "--precision", "fp32", "--lr", 1e-4, "--warmup", 10, "--lr-scheduler", "const", "--epochs", 100_000,
            "--log-every-n-steps", 1, "--save-every-steps", 7, "--keep-last", 3, "--save-frequency", SAVED_EPOCHS,
            "--rank-timeout", 10, *flags,
        ]  # fmt: skip
        with contextlib.closing(socket.socket()) as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        fixed = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        self.errors = [out / f"{name}-{rank}.err" for rank in range(RANKS)]
        self.processes = []
        for rank, path in enumerate(self.errors):
            variables = {key: str(value) for key, value in (fixed | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            with open(path, "w") as file:
                self.processes.append(subprocess.Popen(
                    list(map(str, command)), env=os.environ | variables, stdout=file, stderr=file
                ))  # fmt: skip

    @property
    def resumed(self) -> bool:
        """Whether it has come to where it takes steps."""
        return "Train Epoch" in self.errors[0].read_text()

    @property
    def alive(self) -> list[subprocess.Popen]:
        return [process for process in self.processes if process.poll() is None]

    def tell(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                self.processes[rank].send_signal(number)

    def starve(self, size: int) -> None:
        """Let no file of the first process grow beyond `size` bytes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.processes[0].pid).rlimit(psutil.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def memory(self) -> int:
        """Resident bytes of both processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return sum(psutil.Process(process.pid).memory_info().rss for process in self.processes)
        return 0

    def end(self, timeout: float = 60) -> list[int] | None:
        """Exit codes; None: a process hung, and was killed."""
        try:
            return [process.wait(timeout) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.tell(signal.SIGKILL, list(range(RANKS)))
            return None

    def tracebacks(self) -> int:
        """Of processes that were not killed: what data workers say after that is not theirs to mend."""
        return sum(
            path.read_text().count("Traceback")
            for process, path in zip(self.processes, self.errors, strict=True)
            if process.returncode != -signal.SIGKILL
        )


def rows_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows_of(run)[-1:]), default=-1)


@dataclasses.dataclass
class Timeline:
    """What happened when, in seconds: (time, step, bytes) of a run, and of events more."""

    points: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)
    events: list[dict] = dataclasses.field(default_factory=list)

    def watch(self, job: Job, began: float, seconds: float, goal: Path | None = None) -> None:
        """Follow a job for so long, or until it ends, or has reached its goal."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and job.alive and not (goal and goal.exists()):
            self.points.append((time.monotonic() - began, last_step(job.run), job.memory()))
            time.sleep(0.5)

    def follow(self, job: Job, began: float, seconds: float, steps: int, goal: Path) -> None:
        """Likewise, until it has taken so many steps, or until so many seconds after `began`."""
        begins = None
        while job.alive and not goal.exists() and time.monotonic() - began < seconds:
            step = last_step(job.run) if job.resumed else None
            begins = step if begins is None else begins
            if not steps or (step is not None and begins is not None and step - begins >= steps):
                return
            self.watch(job, began, 0.5, goal)


def undisturbed(out: Path, seconds: float) -> Timeline:
    job, timeline = Job(out, "whole", "--max-minutes", seconds / 60), Timeline()
    timeline.watch(job, job.started, seconds + 120)
    codes = job.end()
    if codes != [0] * RANKS:
        raise SystemExit(f"the undisturbed run ended with {codes}; see {job.errors[0]}")
    return timeline


def disturbed(out: Path, goal: Path, seconds: float, most_steps: int, rng: random.Random) -> Timeline:
    """Until it has the checkpoint `goal`; what happens, and after how many steps, is drawn from `rng`."""
    timeline, began = Timeline(), time.monotonic()
    while not goal.exists() and time.monotonic() - began < seconds:
        job = Job(out, "disturbed")
        action = rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        rank = rng.randrange(RANKS)
        steps = 0 if rng.random() < 0.1 else rng.randint(1, most_steps)  # 0: while it starts
        if not steps and action == "kill a rank":
            action = "kill all"  # a rank that waits for one that never comes is told of in a test
        timeline.follow(job, began, seconds, steps, goal)
        timeline.watch(job, began, rng.uniform(0, 1), goal)
        if goal.exists():
            job.tell(signal.SIGTERM, list(range(RANKS)))
            job.end()
            break
        event = {"seconds": time.monotonic() - began, "step": last_step(job.run), "action": action}
        if action.startswith("starve"):
            job.starve(30_000)
            timeline.watch(job, began, rng.uniform(1, 8), goal)
            job.starve(resource.RLIM_INFINITY)
            if action == "starve":
                timeline.watch(job, began, rng.uniform(1, 8), goal)
        number = signal.Signals[action].value if action in EXPECTED else signal.SIGKILL
        job.tell(number, [rank] if action == "kill a rank" else list(range(RANKS)))
        told = time.monotonic()
        event |= {"codes": job.end(), "took": time.monotonic() - told, "tracebacks": job.tracebacks()}
        if action == "kill a rank":
            event |= {"rank": rank, "last_line": job.errors[1 - rank].read_text().splitlines()[-1:]}
        if event["tracebacks"] or event["codes"] is None:
            event["errors"] = [path.read_text()[-3000:] for path in job.errors]
        timeline.events.append(event)
        print(json.dumps({key: value for key, value in event.items() if key != "errors"}), flush=True)
    return timeline


def differing(found, expected, path: str = "") -> list[str]:
    """Where two checkpoints differ, if only in a bit."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return [where for key in expected for where in differing(found[key], expected[key], f"{path}/{key}")]
    if isinstance(expected, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [where for number, pair in pairs for where in differing(*pair, f"{path}/{number}")]
    if isinstance(expected, torch.Tensor):
        same = found.dtype == expected.dtype and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        return [] if same and torch.equal(found.isnan(), expected.isnan()) else [path]
    return [] if found == expected else [path]


def compare(out: Path, name: str) -> dict:
    """Checkpoints of this name, and rows up to it, of both runs."""
    runs = [out / "logs" / run for run in ("disturbed", "whole")]
    contents = [torch.load(run / "checkpoints" / name, weights_only=True) for run in runs]
    for content in contents:
        del content["name"]
    steps = contents[1]["clock"]["step"]
    rows = [[row | {"samples_per_second": 0} for row in rows_of(run) if row["step"] < steps] for run in runs]
    return {"steps": steps, "differing": differing(*contents), "rows_equal": rows[0] == rows[1], "rows": len(rows[0])}


def memory_growth(timeline: Timeline) -> float:
    """Of the undisturbed run: the median of its last quarter over that of its second."""
    used = [memory for _, step, memory in timeline.points if step > 0 and memory]
    quarter = len(used) // 4
    return statistics.median(used[-quarter:]) / statistics.median(used[quarter : 2 * quarter]) if quarter else 1.0


def draw(path: Path, whole: Timeline, troubled: Timeline) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    for label, timeline in (("nobody disturbs", whole), ("disturbed", troubled)):
        axes.plot([time / 60 for time, *_ in timeline.points], [step for _, step, _ in timeline.points], label=label)
    for number, action in enumerate(ACTIONS):
        events = [event for event in troubled.events if event["action"] == action]
        axes.scatter([event["seconds"] / 60 for event in events], [event["step"] for event in events],
                     marker="ovsPXD^"[number], zorder=3, label=f"{action} ({len(events)})")  # fmt: skip
    axes.set(xlabel="minutes", ylabel="optimizer step")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--events", type=int, default=30, help="about so many times it is disturbed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="is emptied first")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    make_data(out / "shards", args.seed)
    (out / "tiny.json").write_text(json.dumps(MODEL))
    whole = undisturbed(out, 20 * args.minutes)
    goals = sorted((out / "logs/whole/checkpoints").glob("epoch_*.pt"), key=lambda path: path.stat().st_mtime)
    goals = [path for path in goals if "_step_" not in path.name]
    if not goals:
        raise SystemExit(f"--minutes {args.minutes}: too short for {SAVED_EPOCHS} epochs; give more")
    goal = out / "logs" / "disturbed" / "checkpoints" / goals[-1].name
    steps = torch.load(goals[-1], weights_only=True)["clock"]["step"]
    most_steps = max(10, 2 * steps // args.events)
    troubled = disturbed(out, goal, 240 * args.minutes, most_steps, random.Random(args.seed))
    counts = collections.Counter(event["action"] for event in troubled.events)
    report = {"minutes": args.minutes, "seed": args.seed, "checkpoint": goal.name, "by_action": counts,
              "memory_growth": memory_growth(whole), "events": troubled.events}  # fmt: skip
    report |= (
        compare(out, goal.name) if goal.exists() else {"differing": ["it did not come so far"], "rows_equal": False}
    )
    report["hangs"] = sum(event["codes"] is None for event in troubled.events)
    report["tracebacks"] = sum(event["tracebacks"] for event in troubled.events)
    (out / "soak.json").write_text(json.dumps(report, indent=1))
    draw(out / "soak.png", whole, troubled)
    good = not report["differing"] and report["rows_equal"] and not report["hangs"] and not report["tracebacks"]
    print(f"{len(troubled.events)} times disturbed, {report.get('steps')} steps: differing {report['differing'][:5]}, "
          f"rows equal {report['rows_equal']}, hangs {report['hangs']}, tracebacks {report['tracebacks']}, memory "
          f"{report['memory_growth']:.2f} times")  # fmt: skip
    return 0 if good and report["memory_growth"] < 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
