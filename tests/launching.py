"""`openclip-ext` in two processes, started as a user starts them."""

import os
import pathlib
import subprocess
import sys

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


TERMS = (
    "--lr 0.05 --loss-term brownian_bridge=0.25 --loss-term geometric_consistency=0.02 "
    "--loss-term feature_separation=0.5"
)
