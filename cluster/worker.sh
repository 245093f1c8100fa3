#!/usr/bin/env bash
# Join this machine to the cluster whose head is at HEAD_ADDRESS (address:port, as cluster/head.sh printed it).
# Usage: cluster/worker.sh HEAD_ADDRESS [options of `ray start`], e.g. cluster/worker.sh 10.0.0.1:6379 --num-gpus 8
set -euo pipefail
export RAY_AUTH_MODE=token

address="${1:?give the address of the head, e.g. cluster/worker.sh 10.0.0.1:6379}"
shift
token="$HOME/.ray/auth_token"
if [[ ! -s "$token" ]]; then
  echo "cluster/worker.sh: no token in $token: copy the head's file of that name here, mode 600" >&2
  exit 1
fi
chmod 600 "$token"

ray start --address "$address" --disable-usage-stats "$@"
