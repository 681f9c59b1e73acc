"""`openclip-ext` in two processes: started as a user starts them, or forked from one that has imported torch."""

import io
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

FORKING = multiprocessing.get_context("forkserver")  # `conftest.py` says what it has imported

LAUNCHERS = {
    # Without a GPU `--cpu --num_processes 2` starts one process; `--multi_gpu` gives two on CPU.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "openclip_ext"],
    "fsdp": ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
             str(pathlib.Path(__file__).parent / "sharded_on_cpu.py")],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "openclip_ext"],
}  # fmt: skip


def launch(launcher, flags, **variables):
    """`openclip-ext` in two processes; `variables` are added to their environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_"))}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""} | variables
    rendezvous = (
        ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if launcher == "torchrun" else ["--main_process_port=0"]
    )
    module, *rest = LAUNCHERS[launcher]
    command = [sys.executable, "-m", module, *rendezvous, *rest, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def fork(launcher, flags, ranks=(0, 1), **variables):
    """What `launch` returns, of processes with the same variables that have torch and OpenCLIP imported already."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if launcher != "torchrun":
        place |= _set_by_accelerate(LAUNCHERS[launcher][1:])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[f"{folder}/{rank}.{name}" for name in ("out", "err")] for rank in ranks]
        processes = [
            FORKING.Process(
                target=_run_forked,
                args=(flags, place | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, *paths),
                kwargs={"sharded": launcher == "fsdp"},
            )
            for rank, paths in zip(ranks, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        out, err = ("".join(map(read, paths)) for paths in zip(*outputs, strict=True))
    return subprocess.CompletedProcess(flags, max(abs(process.exitcode) for process in processes), out, err)


def read(path):
    return pathlib.Path(path).read_text()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_to(descriptor, path):
    """Let what this process writes to a descriptor go to a file, and return a stream to it."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=True)


def _set_by_accelerate(arguments):
    """The variables by which `accelerate launch` tells its processes what they are."""
    before = dict(os.environ)
    variables = prepare_multi_gpu_env(launch_command_parser().parse_args([*arguments, "--main_process_port", "1"]))
    return {
        name: value
        for name, value in variables.items()
        if before.get(name) != value and name.startswith(("ACCELERATE_", "FSDP_"))
    }


def _run_forked(flags, variables, out, err, sharded):
    import torch

    from openclip_ext.cli import main

    os.environ.update(variables)
    sys.path[:0] = variables.get("PYTHONPATH", "").split(os.pathsep)
    sys.stdout, sys.stderr = write_to(1, out), write_to(2, err)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process that a launcher starts
    if sharded:
        import sharded_on_cpu  # noqa: F401
    sys.exit(main([str(flag) for flag in flags]))


TERMS = (
    "--lr 0.05 --loss-term brownian_bridge=0.25 --loss-term geometric_consistency=0.02 "
    "--loss-term feature_separation=0.5"
)
