#!/usr/bin/env bash
# Roll out on one machine, one rank per accelerator, or N ranks on a CPU. Topology only: settings live in the config.
#
#   launch/rollout.sh [-n RANKS] [--dry-run] TRIPLETS OUT --config FILE [key=value ...]
#
# Ranks may be killed at any time, and the next run may have another number of them.
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

ranks="" dry=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    -n) [[ $# -ge 2 ]] || usage; ranks="$2"; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -h|--help|-*) usage ;;
    *) break ;;
  esac
done
[[ $# -ge 2 ]] || usage

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks="${ranks:-$(( gpus > 0 ? gpus : 1 ))}"
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || { echo "rollout.sh: -n wants a number of ranks, not '$ranks'" >&2; exit 2; }
[[ "$gpus" -gt 0 ]] || export DS_ACCELERATOR=cpu

port=$(( 20000 + RANDOM % 20000 ))  # two runs on one machine must not meet
command=(deepspeed --num_gpus "$ranks" --master_port "$port" --no_local_rank --module data_tools.cli rollout "$@")
if [[ -n "$dry" ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
exec "${command[@]}"
