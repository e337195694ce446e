#!/bin/bash
# Build one cache on a Ray cluster that runs already. OUT is a folder that all nodes see, or s3://BUCKET/PATH.
#
#     RAY_ADDRESS=head:6379 WORKERS=16 TEACHER=… DATA=… OUT=… bash recipes/cluster/ray-build.sh
#
# A cluster: `ray start --head --port=6379` on one machine, `ray start --address=head:6379` on the others. kd must be installed on all.
set -eu

# shellcheck disable=SC2086  # BUILD_OPTIONS holds several words
exec kd cache build --teacher "$TEACHER" --data "$DATA" --out "$OUT" --engine ray --workers "$WORKERS" ${BUILD_OPTIONS:-}
