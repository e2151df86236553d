#!/usr/bin/env bash
# Submit a training to Slurm, which runs it again after preemption. Topology only: settings live in the config.
#
#   launch/slurm.sh [-N NODES] [-n RANKS_PER_NODE] [--cpu] [--notice SECONDS] [--sbatch=OPTION ...] [--dry-run]
#                   CONFIG [key=value ...]
#
# --sbatch=--partition=gpu hands an option on to sbatch. SECONDS before the time limit, and on preemption where the
# cluster says SlurmctldParameters=preempt_send_user_signal, the ranks get SIGUSR1, save, and end with code 75; then, and
# only then, the job is requeued, and goes on from its checkpoint. Say a time longer than a checkpoint takes.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "slurm.sh: $1" >&2; exit 2; }

submit() {
  local nodes=1 ranks=8 notice=300 dry="" device=gpu extra=()
  while [[ $# -gt 0 ]]; do
    case "$1" in
      -N) [[ $# -ge 2 ]] || usage; nodes="$2"; shift 2 ;;
      -n) [[ $# -ge 2 ]] || usage; ranks="$2"; shift 2 ;;
      --notice) [[ $# -ge 2 ]] || usage; notice="$2"; shift 2 ;;
      --cpu) device=cpu; shift ;;
      --sbatch=*) extra+=("${1#--sbatch=}"); shift ;;
      --dry-run) dry=1; shift ;;
      -*) usage ;;
      *) break ;;
    esac
  done
  [[ $# -ge 1 ]] || usage
  for number in "$nodes" "$ranks" "$notice"; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || die "wants a whole number, not '$number'"
  done
  local command=(sbatch --job-name v4e --nodes "$nodes" --ntasks-per-node 1 --requeue --open-mode append
    --signal "USR1@$notice" --output 'slurm-%j.log')
  [[ "$device" == cpu ]] || command+=(--gpus-per-node "$ranks")
  command+=("${extra[@]}" launch/slurm.sh --job "$ranks" "$device" "$@")
  if [[ -n "$dry" ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
  exec "${command[@]}"
}

job() {  # on the first node: one task on each, then requeue what was asked to stop
  local ranks="$1" device="$2" first port code=0
  shift 2
  first="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  first="${first%%$'\n'*}"  # a pipe into head may kill scontrol, and pipefail this job
  port=$(( 20000 + SLURM_JOB_ID % 20000 ))
  (( ${SLURM_RESTART_COUNT:-0} == 0 )) || set -- "$@" --resume auto  # began anew, it would lose what it saved
  # --wait ends the other nodes a minute after one has failed; at once would hide the codes of those that are saving.
  srun --ntasks-per-node 1 --kill-on-bad-exit=0 --wait 60 \
    launch/slurm.sh --node "$ranks" "$device" "$first" "$port" "$@" || code=$?
  [[ "$code" -ne 75 ]] || scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}

node() {  # on every node: DeepSpeed's launcher for its ranks
  local ranks="$1" device="$2" first="$3" port="$4" hosts
  shift 4
  trap '' USR1  # it is for the ranks; the launchers above them would die of it
  [[ "$device" != cpu ]] || export DS_ACCELERATOR=cpu
  hosts="$(mktemp)"
  # shellcheck disable=SC2064  # the name as it is now
  trap "rm -f '$hosts'" EXIT
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks/" > "$hosts"
  deepspeed --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$first" --master_port "$port" \
    --no_local_rank --module v4e.cli train "$@"
}

case "${1:-}" in
  --job) shift; job "$@" ;;
  --node) shift; node "$@" ;;
  *) submit "$@" ;;
esac
