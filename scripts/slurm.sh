#!/bin/bash
# Training on several machines under Slurm, with the flags of openclip-ext train:
#
#     sbatch --nodes 4 scripts/slurm.sh --model ViT-B-32 --train-data /shared/cc12m --loss gamma_decomp \
#         --batch-size 512 --precision amp_bf16 --workers 6 --logs /shared/logs --name run
#
#SBATCH --job-name=openclip-ext
#SBATCH --ntasks-per-node=8             # a process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8               # a process and its data workers
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300             # 5 minutes before the time is up, to this script
#SBATCH --requeue                       # after a preemption
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Processes. No launcher is needed: Slurm starts them, and its variables say which is which.
#
# Preemption. SIGUSR1 and SIGTERM end a run after its step, with a checkpoint; the same command goes on from there, bit for
# bit. SIGUSR1 comes before the time is up, and the job goes to the queue again. A job that is preempted gets SIGTERM, and
# is killed after the partition's GraceTime: let that be longer than a step and a checkpoint. What is killed without one, or
# with a machine, goes on from the last checkpoint of --save-every-steps. --rank-timeout ends the processes that are left.
#
# Folders. --logs must be a folder that all machines see: each process writes its part of a loss's state there. Shards may
# be on object storage, from where each process streams its share, once their samples have been counted:
#
#     openclip-ext shards index 's3://bucket/cc12m/{00000..01242}.tar' --out /shared/cc12m --jobs 16
#     … --train-data /shared/cc12m/sizes.json
#
# s3: is read by fsspec, where that is installed with s3fs; 'pipe:aws s3 cp s3://bucket/cc12m/{00000..01242}.tar -' does
# without. Counting goes on where it was interrupted.
#
# State. A loss that remembers samples spreads that over processes where it would take more than a tenth of a process's
# memory; --loss-arg bank_shard=true, or rate_shard=true, asks for it. A run that goes on may have another number of
# processes. simulate_scale.py tells what a loss takes on how many.

set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec openclip-ext train --save-every-steps 1000 "$@" --resume latest
' train "$@" &
step=$! again=false

# srun hands the signal on to all processes. A wait that is interrupted by it is taken up again.
trap 'again=true; kill -USR1 "$step"' USR1
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done
if $again && [ "$status" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
