"""Processes that die: the others end, and say which one it was."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from launching import FORKING, fork, free_port, write_to
from openclip_ext.errors import UserError
from openclip_ext.training.watch import watched

TIMEOUT = 4.0


def work(rank, size, port, connection, errors):
    """A rank that takes a step for each word it is sent."""
    sys.stderr = write_to(2, errors)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        with watched(rank, size, TIMEOUT):
            while (word := connection.recv()) != "end":
                if word == "interrupt":
                    raise KeyboardInterrupt
                if word == "fail":
                    raise ZeroDivisionError("nothing left")
                dist.all_reduce(torch.ones(1))
                connection.send("stepped")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


class Ranks:
    """Processes of one group, without a launcher that would end them together."""

    def __init__(self, size, folder):
        port = free_port()
        self.errors = [folder / f"{rank}.txt" for rank in range(size)]
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = FORKING.Pipe()
            process = FORKING.Process(target=work, args=(rank, size, port, there, str(self.errors[rank])), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def send(self, word, *ranks):
        for rank in ranks:
            self.pipes[rank].send(word)

    def ends(self, *ranks):
        """(exit code, what they wrote to stderr, seconds until then) of ranks."""
        start, ends = time.monotonic(), []
        for rank in ranks:
            self.processes[rank].join(60)
            seconds = time.monotonic() - start
            ends.append((self.processes[rank].exitcode, self.errors[rank].read_text(), seconds))
        return ends

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def three_ranks(tmp_path):
    """Which have taken a step together."""
    ranks = Ranks(3, tmp_path)
    ranks.send("step", 0, 1, 2)
    assert [pipe.recv() for pipe in ranks.pipes] == ["stepped"] * 3
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("dead", "signal_number", "named"),
    [
        (1, signal.SIGKILL, "rank 1 ("),
        (0, signal.SIGKILL, "rank 0, which keeps the store of the ranks, has died"),
        (0, signal.SIGSTOP, "rank 0, which keeps the store of the ranks, has died"),
    ],
)
def test_ranks_end_when_one_is_killed_or_stands_still(three_ranks, dead, signal_number, named):
    others = [rank for rank in range(3) if rank != dead]
    os.kill(three_ranks.processes[dead].pid, signal_number)
    three_ranks.send("step", *others)
    for code, errors, seconds in three_ranks.ends(*others):
        assert code == 2 and seconds < TIMEOUT + 3  # on a busy machine
        (line,) = [line for line in errors.splitlines() if "ends too" in line]
        assert line.removeprefix("openclip-ext: ").startswith(named) and "Traceback" not in errors


def test_ranks_end_when_one_has_an_error_and_say_which(three_ranks):
    three_ranks.send("fail", 2)
    three_ranks.send("step", 0, 1)
    (failed,) = three_ranks.ends(2)
    assert failed[0] == 1 and "ZeroDivisionError: nothing left" in failed[1].splitlines()[-1]
    for code, errors, _ in three_ranks.ends(0, 1):
        assert code == 2 and "rank 2 has ended: ZeroDivisionError: nothing left; rank" in errors


def test_ranks_end_when_only_one_takes_an_interrupt_at_once(three_ranks):
    three_ranks.send("interrupt", 2)
    three_ranks.send("step", 0, 1)
    for code, errors, seconds in three_ranks.ends(0, 1):
        assert code == 2 and seconds < TIMEOUT + 3
        assert "rank 2 has ended: interrupted; rank" in errors


def test_ranks_that_end_one_after_another_are_not_dead(three_ranks):
    for rank in (2, 0, 1):
        three_ranks.send("end", rank)
        ((code, errors, _),) = three_ranks.ends(rank)
        assert code == 0 and "ends too" not in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_no_other_ends(train_flags, tmp_path, rank):
    finished = fork("torchrun", train_flags("--rank-timeout", 1), ranks=[rank])
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    *_, line = finished.stderr.splitlines()
    assert line.startswith(f"openclip-ext: --rank-timeout 1: rank {rank} of 2 has not met the others in this time")
    assert not (tmp_path / "logs").exists()


def test_a_training_of_which_a_rank_is_killed_ends(train_flags):
    command = [sys.executable, "-m", "openclip_ext"]
    command += train_flags("--epochs", 500, "--rank-timeout", TIMEOUT, "--save-frequency", 0)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | place | {"RANK": r, "LOCAL_RANK": r}
        )
        for r in "01"
    ]
    try:
        next(line for line in processes[0].stderr if "Train Epoch: 0 " in line)
        processes[1].kill()
        start = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert time.monotonic() - start < 5 * TIMEOUT and processes[0].returncode == 2 and "Traceback" not in errors
    *_, line = errors.strip().splitlines()
    assert line.startswith("openclip-ext: rank 1 (") and "has died" in line and "--resume latest" in line
