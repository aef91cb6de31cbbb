#!/bin/bash
# A batch run on a TPU slice of several hosts: `examples/tpu_pod.sh NAME ZONE PROMPTS RUN`
#
# ses_jax is installed on every host; PROMPTS and RUN lie on a file system that all hosts share (Filestore, or a bucket
# mounted with gcsfuse). After any end the same command goes on with what is left, on a slice of any size.
#
# The TPU_ variables make every host a machine of its own with its four chips (v4, v5e, v5p, v6e), so that a lost host
# costs its own prompts only; `--mesh` is of these chips. Without them all hosts' chips start and end together.
gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command "
  export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_VISIBLE_CHIPS=0,1,2,3
  ses-jax batch '$3' --out '$4' \
    --model Tongyi-MAI/Z-Image-Turbo --reward pick --report hps clip --budget 50 \
    --mesh data=4 --resume --distributed"
