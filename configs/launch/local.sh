#!/bin/bash
# Several processes on this machine, over loopback: to try out what a cluster will do.
#
#     configs/launch/local.sh 2 configs/quickstart.py:smoke --config.workdir runs/two

set -u
count=$1
config=$2
shift 2
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-8476} JAX_NUM_PROCESSES=$count
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}
pids=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i python -m causal_jax.train --config "$config" "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
