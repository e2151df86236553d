#!/usr/bin/env bash
# Train on the machines of a hostfile, whose lines say `HOST slots=RANKS`. Topology only: settings live in the config.
#
#   launch/hosts.sh HOSTFILE [--launcher ssh|pdsh] [--port PORT] [--dry-run] CONFIG [key=value ...]
#
# Every machine sees this folder, its environment and the data under the same paths, and the first one reaches all
# by ssh without a password. ssh starts DeepSpeed's launcher on each; pdsh leaves that to DeepSpeed. A machine that fails
# ends the job with its code; 255 is ssh's, of one that is gone. SIGTERM or SIGUSR1 to this script lets the ranks save and
# stop, with code 75; with pdsh they must be signalled themselves, on one of the machines. DS_ACCELERATOR=cpu for CPUs.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
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
  trap '' USR1
  exec "${command[@]}"
fi

on_node() {  # what machine number $1 runs; SIGUSR1 is for the ranks, and the launchers above them would die of it
  local inside
  inside="$(printf "cd %q && trap '' USR1 && %s" "$PWD" "${DS_ACCELERATOR:+DS_ACCELERATOR=$DS_ACCELERATOR }"
    printf '%q ' "$deepspeed" "${common[@]}" --no_ssh --node_rank "$1" --master_addr "${hosts[0]}" "${train[@]}")"
  [[ -t 1 ]] || inside+="2>&1 | sed -u s/^/${hosts[$1]}:\ /"  # a log: no bars, and who says what
  printf 'stty -onlcr; exec bash -o pipefail -c %q' "$inside"
}

# A terminal, so that what hangs up here ends there; and a machine that has gone without a word is missed in a minute.
reach=(ssh -tt -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=3)
declare -A host_of=()

stop() { kill -HUP "${!host_of[@]}" 2> /dev/null || true; }
ask() {  # the ranks of the first machine to save and stop; all others agree
  ssh -o BatchMode=yes "${hosts[0]}" "pkill -USR1 -P \$(pgrep -d, -f '[l]auncher.launch.*--master_port=$port')" 2> /dev/null || stop
}
trap 'stop; exit 130' INT
trap ask USR1 TERM

for i in "${!hosts[@]}"; do
  command=("${reach[@]}" "${hosts[$i]}" "$(on_node "$i")")
  if [[ -n "$dry" ]]; then printf '%q ' "${command[@]}"; echo; continue; fi
  (trap '' USR1 TERM; exec "${command[@]}" < /dev/null) &
  host_of[$!]="${hosts[$i]}"
done
[[ -z "$dry" ]] || exit 0

while [[ ${#host_of[@]} -gt 0 ]]; do
  code=0 ended=""
  wait -n -p ended "${!host_of[@]}" || code=$?
  [[ -n "${ended:-}" ]] || continue  # a signal came
  if [[ "$code" -ne 0 ]]; then
    echo "hosts.sh: ${host_of[$ended]} ended with code $code" >&2
    sleep 5  # the others may be ending by themselves
    stop
    exit "$code"
  fi
  unset "host_of[$ended]"
done
