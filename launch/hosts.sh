#!/usr/bin/env bash
# Train on the machines of a hostfile, whose lines say `HOST slots=RANKS`. Topology only: settings live in the config.
#
#   launch/hosts.sh HOSTFILE [--launcher ssh|pdsh] [--port PORT] [--dry-run] CONFIG [key=value ...]
#
# Every machine sees this folder, its environment and the data under the same paths, and the first one reaches all
# by ssh without a password. ssh starts DeepSpeed's launcher on each; pdsh leaves that to DeepSpeed. A machine that fails
# ends the job with its code: 75 is a run that was asked to stop and has saved itself.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "hosts.sh: $1" >&2; exit 2; }

launcher=ssh port="" dry=""
[[ $# -ge 1 && "$1" != -* ]] || usage
hostfile="$1"; shift
while [[ $# -gt 0 ]]; do
  case "$1" in
    --launcher) [[ $# -ge 2 ]] || usage; launcher="$2"; shift 2 ;;
    --port) [[ $# -ge 2 ]] || usage; port="$2"; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -*) usage ;;
    *) break ;;
  esac
done
[[ $# -ge 1 ]] || usage
[[ -r "$hostfile" ]] || die "no such hostfile: $hostfile"
[[ "$launcher" == ssh || "$launcher" == pdsh ]] || die "--launcher is ssh or pdsh, not '$launcher'"
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ {print $1}' "$hostfile")
[[ ${#hosts[@]} -ge 1 ]] || die "$hostfile names no host"
awk '!/^[[:space:]]*(#|$)/ && !/[[:space:]]slots=[1-9][0-9]*[[:space:]]*$/ {exit 1}' "$hostfile" ||
  die "every line of $hostfile must be HOST slots=RANKS"

hostfile="$(realpath "$hostfile")"
port="${port:-$(( 20000 + RANDOM % 20000 ))}"  # two runs must not meet
deepspeed="$(command -v deepspeed || echo deepspeed)"
common=(--hostfile "$hostfile" --master_port "$port" --no_local_rank)
train=(--module v4e.cli train "$@")

if [[ "$launcher" == pdsh ]]; then
  command=("$deepspeed" "${common[@]}" --force_multi --launcher pdsh "${train[@]}")
  if [[ -n "$dry" ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
  exec "${command[@]}"
fi

on_node() {  # what machine number $1 runs; SIGUSR1 is for the ranks, and the launchers above them would die of it
  printf "cd %q && trap '' USR1 && %s" "$PWD" "${DS_ACCELERATOR:+DS_ACCELERATOR=$DS_ACCELERATOR }"
  printf '%q ' "$deepspeed" "${common[@]}" --no_ssh --node_rank "$1" --master_addr "${hosts[0]}" "${train[@]}"
}

pids=()
for i in "${!hosts[@]}"; do
  command=(ssh -tt -o BatchMode=yes "${hosts[$i]}" "$(on_node "$i")")  # a terminal: what hangs up here ends there
  if [[ -n "$dry" ]]; then printf '%q ' "${command[@]}"; echo; continue; fi
  "${command[@]}" < /dev/null &
  pids+=($!)
done
[[ -z "$dry" ]] || exit 0

stop() { kill "${pids[@]}" 2> /dev/null || true; }
trap 'stop; exit 130' INT TERM
for _ in "${pids[@]}"; do
  code=0; wait -n || code=$?
  if [[ "$code" -ne 0 ]]; then sleep 5; stop; exit "$code"; fi  # the others may be ending by themselves
done
