#!/usr/bin/env bash
# Start the head of a Ray cluster on this machine, with token authentication and a dashboard for this machine only.
# Usage: cluster/head.sh [options of `ray start`], e.g. cluster/head.sh --num-gpus 8
set -euo pipefail
export RAY_AUTH_MODE=token

token="$HOME/.ray/auth_token"
if [[ ! -s "$token" ]]; then
  (umask 077 && ray get-auth-token --generate >/dev/null)
fi
chmod 600 "$token" # Ray creates it readable by every user of the machine

ray start --head --dashboard-host 127.0.0.1 --disable-usage-stats "$@"
