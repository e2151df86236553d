#!/usr/bin/env bash
# What to run, in order, when real weights are at hand for the first time: docs/first-day-with-14B.md.
#
#   launch/first_day.sh --teacher MODEL --student MODEL --config FILE --edits FILE --out FOLDER [OPTION ...] [key=value ...]
#
# MODEL is a diffusers folder or a Hub id; FILE of the edits is what v4e-shards ingest takes. key=value is for the training.
#   --stages 1-10          only these, such as 5 or 2-4 (all)      --dry-run       print the commands
#   --height 480           of the clips                            --width 832
#   --frames 81            the teacher's clip                      --fewer "49 25" shorter ones to compare with
#   --steps 100            of the training                         -n RANKS        of it (one a GPU)
#   --rolling "steps=50"   settings of v4e-shards rollout          --dtype fp32    of the comparisons, or bf16
#   --tolerance 0          of the comparisons, as a share of the largest value: what is taken for rounding
#   --original-student FOLDER, --original-teacher FOLDER           the same models in their authors' format
# Edits, prompts, roll-outs and training go on where they stopped; other stages are done again. One that finds
# something wrong ends with a code other than 0, and so does the script; after 1, 4, 5 and 6 it is you who has to look.
set -euo pipefail

usage() { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "first_day.sh: $1" >&2; exit 2; }

teacher="" student="" config="" edits="" out="" stages=1-10 dry="" height=480 width=832 frames=81 fewer="49 25" steps=100
ranks=() gpus=() rolling=() dtype=fp32 tolerance=0 original_student="" original_teacher=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --dry-run) dry=1; shift; continue ;;
    -*) [[ $# -ge 2 ]] || usage ;;
  esac
  case "$1" in
    --teacher) teacher="$2" ;;
    --student) student="$2" ;;
    --config) config="$2" ;;
    --edits) edits="$2" ;;
    --out) out="$2" ;;
    --stages) stages="$2" ;;
    --height) height="$2" ;;
    --width) width="$2" ;;
    --frames) frames="$2" ;;
    --fewer) fewer="$2" ;;
    --steps) steps="$2" ;;
    --rolling) read -ra rolling <<< "$2" ;;
    -n) ranks=(-n "$2") gpus=(--gpus "$2") ;;
    --dtype) dtype="$2" ;;
    --tolerance) tolerance="$2" ;;
    --original-student) original_student="$2" ;;
    --original-teacher) original_teacher="$2" ;;
    -*) usage ;;
    *) break ;;
  esac
  shift 2
done
for needed in teacher student config edits out; do
  [[ -n "${!needed}" ]] || die "--$needed is not said; nothing is assumed here"
done
[[ "$stages" =~ ^([0-9]+)(-([0-9]+))?$ ]] || die "--stages is a number or two, as 2-4, not '$stages'"
from="${BASH_REMATCH[1]}" to="${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}"

go() { if [[ -n "$dry" ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
fidelity() {  # MODEL ORIGINAL
  go python -m data_tools.fidelity "$1" --original "$2" --height "$height" --width "$width" --dtype "$dtype" \
    --tolerance "$tolerance"
}
roll() {  # FRAMES
  go launch/rollout.sh "${ranks[@]}" "$out/edits" "$out/shards-$1" --teacher "$teacher" "teacher_frames=$1" "${rolling[@]}"
  go v4e-shards verify "$out/shards-$1"
  go v4e-shards stats "$out/shards-$1"
  go v4e-shards look "$out/shards-$1" --codec "$teacher"
}

stage_1() { go v4e doctor --output "$out"; }
stage_2() { fidelity "$student" "$original_student"; }
stage_3() { fidelity "$teacher" "$original_teacher"; }
stage_4() {
  go v4e-shards ingest "$edits" "$out/edits" --height "$height" --width "$width"
  go v4e-shards evolve "$out/edits"
}
stage_5() { roll "$frames"; }
stage_6() { for count in $fewer; do roll "$count"; done; }
stage_7() { go v4e plan "$config" "${gpus[@]}" "${places[@]}" "$@"; }
stage_8() { go launch/one_node.sh "${ranks[@]}" "$config" "${places[@]}" "$@"; }
stage_9() { go python -m data_tools.curves "$out/train"; }
stage_10() { go v4e export "$out/train" "$out/student"; }

titles=("" "what this machine lacks" "the student runs as in diffusers" "the teacher runs as in diffusers" "the edits"
  "the teacher at $frames frames" "the teacher at fewer frames: $fewer" "what the training needs" "$steps steps" "its curves"
  "the student as a folder")
log_every=$(( steps > 20 ? steps / 20 : 1 ))
warmup=$(( steps / 10 ))  # a config's own is for a long run, and so few steps would never reach its rate
places=("teacher=$teacher" "student=$student" "loop.data=$out/shards-$frames" "loop.output=$out/train" "loop.steps=$steps"
  "loop.log_every=$log_every" "loop.schedule.warmup=$warmup")
for (( number = from; number <= to && number < ${#titles[@]}; number++ )); do
  echo "== $number. ${titles[$number]}"
  "stage_$number" "$@"
done
