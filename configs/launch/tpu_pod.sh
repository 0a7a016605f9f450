#!/bin/bash
# The same command on every host of a Cloud TPU slice; JAX finds the others through the metadata.
#
#     TPU=my-slice ZONE=us-west4-a configs/launch/tpu_pod.sh configs/lm_1b.py \
#         --config.data.source.path "/mnt/data/*.jsonl" --config.workdir /mnt/runs/lm_1b
#
# Before paying for a slice: python -m causal_jax.plan --config configs/lm_1b.py --topology v5e:16x16
# A preempted slice comes back empty: run this again, the run goes on from its newest checkpoint.
# Text and run folder must be seen by all hosts under one path (a mounted bucket, a network file
# system); gs:// itself is no path here.

set -eu
: "${TPU:?name of the slice}" "${ZONE:?its zone}"
config=$1
shift
words=$(printf ' %q' "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command \
  "cd causal_jax && pip install -q -e '.[tpu,data]' && \
   python -m causal_jax.train --config '$config' --distributed$words"
