#!/bin/bash
# Train one student on several hosts: run this on each of them, with the same HEAD, HOSTS, CACHE, STUDENT and OUT.
#
#     HEAD=node1:29500 HOSTS=2 HOST=0 CACHE=… STUDENT=… OUT=/shared/runs/student bash recipes/cluster/train-host.sh
#
# HOST counts the hosts from 0. OUT is on a disk that all hosts see. PROCESSES is the number of GPUs of a host.
set -eu

# shellcheck disable=SC2086  # TRAIN_OPTIONS holds several words
exec torchrun --nnodes "$HOSTS" --node-rank "$HOST" --nproc-per-node "${PROCESSES:-8}" \
    --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" -m kd.cli \
    train --cache "$CACHE" --student "$STUDENT" --out "$OUT" ${TRAIN_OPTIONS:-}
