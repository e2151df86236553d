#!/usr/bin/env bash
# Submit a roll-out to Slurm as an array of independent one-node jobs. Topology only: settings live in the config.
#
#   launch/rollout_slurm.sh [-j JOBS] [-n RANKS_PER_JOB] [--cpu] [--sbatch=OPTION ...] [--dry-run]
#                           TRIPLETS OUT --config FILE [key=value ...]
#
# --sbatch=--partition=gpu hands an option on to sbatch. The jobs need not run at the same time; each does its share and
# then what others have not begun. A preempted job is requeued by Slurm and goes on; jobs may be cancelled, and
# arrays of another size submitted into the same OUT, which all of them must see under this path.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

jobs=1 ranks=8 dry="" gpus=1 extra=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    -j) [[ $# -ge 2 ]] || usage; jobs="$2"; shift 2 ;;
    -n) [[ $# -ge 2 ]] || usage; ranks="$2"; shift 2 ;;
    --cpu) gpus=""; shift ;;
    --sbatch=*) extra+=("${1#--sbatch=}"); shift ;;
    --dry-run) dry=1; shift ;;
    -*) usage ;;
    *) break ;;
  esac
done
[[ $# -ge 2 ]] || usage
for number in "$jobs" "$ranks"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || { echo "rollout_slurm.sh: wants a whole number, not '$number'" >&2; exit 2; }
done

command=(sbatch --job-name v4e-rollout --array "0-$(( jobs - 1 ))" --nodes 1 --ntasks 1 --requeue --open-mode append
  --output 'rollout-%A-%a.log' ${gpus:+--gpus-per-node "$ranks"} "${extra[@]}" launch/rollout.sh -n "$ranks" "$@")
if [[ -n "$dry" ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
exec "${command[@]}"
