# What the trials of this folder share: a working folder, tiny shards, and a training of some seconds. Sourced.
# shellcheck shell=bash
# shellcheck disable=SC2034  # some is for those who source it
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
work="$(mkdir -p "${1:?usage: $0 FOLDER}" && cd "$1" && pwd)"
cd "$root"
export PATH="$work/bin:$root/.venv/bin:/usr/sbin:/sbin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONUNBUFFERED=1
mkdir -p "$work/bin"

steps=10
settings=(configs/nano/video4edit.yaml "loop.data=$work/shards" "loop.steps=$steps" loop.batch=2 loop.micro_batch=1
  loop.save_every=2 loop.log_every=1 loop.wandb.mode=disabled)

say() { printf '\n== %s\n' "$*"; }
die() { echo "$0: $*" >&2; exit 1; }

need() {  # PROGRAM PACKAGE ...: skip, in words, where one is not installed
  while [[ $# -gt 0 ]]; do
    command -v "$1" > /dev/null || { echo "SKIP: no $1 (apt install $2)"; exit 77; }
    shift 2
  done
}

make_shards() {  # eight edits of the world, rolled out by wan-nano's teacher
  [[ ! -e "$work/shards/manifest.json" ]] || return 0
  python -c 'import sys; from data_tools.world import write_triplets; write_triplets(sys.argv[1], 8, "train", 0)' "$work/raw"
  python -m data_tools.cli ingest "$work/raw/triplets.jsonl" "$work/edits" --height 64 --width 64
  python -m data_tools.cli evolve "$work/edits"
  python -m data_tools.cli rollout "$work/edits" "$work/shards" --teacher v4e/assets/wan-nano/teacher "${rolling[@]}"
}
rolling=(height=64 width=64 teacher_frames=9 guidance=1 attention=matmul fold_text_padding=true threads=1 batch=2
  samples_per_shard=4 wandb.mode=disabled)

last_step() {  # RUN [TIME]: the last that its journal has, or the last after that time
  awk -F '[:,]' -v since="${2:-0}" '/"step":/ && $4 > since {last = $2} END {print last + 0}' "$1/journal.jsonl" 2> /dev/null
}

await() {  # SECONDS WHAT COMMAND ...: until the command succeeds
  local until=$(( SECONDS + $1 )) what="$2"
  shift 2
  until "$@"; do
    (( SECONDS < until )) || die "waited in vain for $what"
    sleep 0.2
  done
}

beyond() { (( $(last_step "$1" "$3" || echo 0) >= $2 )); }  # RUN STEP TIME: whether that was logged after TIME

same_weights() {  # RUN RUN: to the bit, averages too
  local name
  for name in weights average; do
    cmp "$1/weights/student/$name.safetensors" "$2/weights/student/$name.safetensors"
  done
  echo "weights and averages are the same to the bit"
}
