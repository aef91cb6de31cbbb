#!/usr/bin/env bash
# Measures at real sizes, on random bfloat16 weights, what only a GPU can tell; one of 80 GB, within 40 minutes.
#
#     pip install -e ".[benchmark]" "jax[cuda12]" torch diffusers && bash benchmarks/on_gpu.sh
#
# Every script writes its JSON under benchmarks/results. One that fails, or takes more than its minutes, does not keep
# the others from running.
set -uo pipefail
cd "$(dirname "$0")" || exit

within() { # within MINUTES COMMAND...
  local minutes=$1
  shift
  echo "+ $*"
  timeout "${minutes}m" "$@" || echo "failed or stopped after ${minutes} minutes: $*"
}

within 7 python throughput.py black-forest-labs/FLUX.2-klein-4B --batch 1 4 10 --against diffusers --kernels 30
within 8 python throughput.py black-forest-labs/FLUX.1-dev --batch 1 4 10 --steps 4 --against diffusers
within 5 python throughput.py Qwen/Qwen-Image --batch 1 4 --steps 2 --reward none --against diffusers
within 3 python reward_share.py --model black-forest-labs/FLUX.2-klein-4B --repeats 3
within 3 python reward_share.py --model Tongyi-MAI/Z-Image-Turbo --repeats 3
within 5 python reward_share.py --model black-forest-labs/FLUX.1-dev --repeats 1
within 2 python real_search.py black-forest-labs/FLUX.2-klein-4B --budget 50
within 4 python real_search.py Tongyi-MAI/Z-Image-Turbo --budget 50
within 2 python loading.py black-forest-labs/FLUX.2-klein-4B --networks transformer --ways published diffusers
