#!/bin/bash
# A batch run on a SLURM cluster, a process a GPU: `sbatch examples/slurm.sh PROMPTS RUN`
#
# RUN lies on a file system that all nodes share. After any end - time limit, lost node, scancel - the same command goes
# on with what is left, with any number of nodes.
#SBATCH --job-name=ses-jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --output=ses-jax-%j.log

# --kill-on-bad-exit=0 and --no-kill: a lost process costs its own prompts only, and those until the next start.
# A model larger than one GPU takes a process a node: --ntasks-per-node=1, JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 and
# `--mesh data=1,model=8`.
srun --label --kill-on-bad-exit=0 ses-jax batch "$1" --out "$2" \
  --model Tongyi-MAI/Z-Image-Turbo --reward pick --report hps clip --budget 50 \
  --resume --distributed
