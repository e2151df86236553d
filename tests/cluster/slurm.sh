#!/usr/bin/env bash
# A real Slurm of one machine: launch/slurm.sh submitted, preempted, asked to stop, requeued, and launch/rollout_slurm.sh
# requeued too; the same bits as when nobody disturbs them.
#
#   apt install slurm-wlm munge
#   tests/cluster/slurm.sh FOLDER
#
# Needs no root and leaves /etc alone: munge, slurmctld and slurmd run as this user, with everything they write in
# FOLDER. Two partitions: a job in `high` takes the machine from one in `low`, which has a grace of two minutes.
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need slurmctld slurm-wlm slurmd slurm-wlm srun slurm-wlm munged munge

home="$work/slurm"
export SLURM_CONF="$home/slurm.conf"

configure() {
  local host user port
  host="$(hostname -s)" user="$(id -un)" port=$(( 20000 + RANDOM % 20000 ))
  rm -rf "$home"
  mkdir -p "$home/state" "$home/spool"
  head -c 1024 /dev/urandom > "$home/munge.key"
  chmod 600 "$home/munge.key"
  cat > "$SLURM_CONF" << EOF
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$(( port + 1 ))
SlurmUser=$user
SlurmdUser=$user
AuthInfo=socket=$home/munge.socket
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc)
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
EOF
}

start() {
  munged --force --key-file "$home/munge.key" --socket "$home/munge.socket" --pid-file "$home/munged.pid" \
    --log-file "$home/munged.log" --seed-file "$home/munge.seed" 2> /dev/null
  slurmctld
  slurmd
  await 60 "an idle node" ready
}
ready() { sinfo -h -o %t 2> /dev/null | grep -qx idle; }

stop() {
  scancel --user "$(id -un)" 2> /dev/null || true
  for pid in "$home"/*.pid; do kill "$(cat "$pid")" 2> /dev/null || true; done
}
trap stop EXIT

submit() { local said; said="$("$@")"; echo "$said" >&2; echo "${said##* }"; }  # SCRIPT WORD ...: the number of the job
train() { submit launch/slurm.sh --cpu -n 2 --notice 60 "--sbatch=--output=$work/%j.log" \
  "${settings[@]}" "loop.output=$work/$1"; }  # RUN
state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p'; }  # JOB
is() { [[ "$(state "$1")" == "$2" ]]; }  # JOB STATE
restarts() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }  # JOB
again() { (( $(restarts "$1") >= $2 )); }  # JOB TIMES: whether it has been requeued so often
over() { ! squeue -h -j "$1" 2> /dev/null | grep -q .; }  # JOB

disturb() {  # STEP COUNT COMMAND ...: do it after that step, and wait until the job has been requeued
  local step="$1" count="$2"
  shift 2
  await 400 "step $step" beyond "$work/broken" "$step" "$(date +%s)"
  "$@"
  await 300 "restart $count" again "$job" "$count"
  echo "step $(last_step "$work/broken") was the last; the job is $(state "$job"), restarts $(restarts "$job")"
}

begun() { compgen -G "$work/rolled/.units/*" > /dev/null || compgen -G "$work/rolled/*.tar" > /dev/null; }

urgent() { submit sbatch --partition high --job-name urgent --output "$work/urgent.log" --wrap 'echo urgent; sleep 3' > /dev/null; }

make_shards
configure
start
rm -rf "$work/straight" "$work/broken"
say "a run of $steps steps that nobody disturbs"
job="$(train straight)"
await 400 "the end of job $job" over "$job"
is "$job" COMPLETED
say "the same, and after step 3 somebody more important wants the machine"
job="$(train broken)"
disturb 3 1 urgent
say "after step 5 somebody asks it to stop by hand"
disturb 5 2 scancel --signal=USR1 "$job"
say "after step 7 it is requeued from outside: SIGTERM"
disturb 7 3 scontrol requeue "$job"
await 400 "the end of job $job" over "$job"
is "$job" COMPLETED
same_weights "$work/straight" "$work/broken"
say "an array of two roll-outs, of which the first is requeued"
rm -rf "$work/rolled"
job="$(submit launch/rollout_slurm.sh -j 2 -n 1 --cpu "--sbatch=--output=$work/%A-%a.log" "$work/edits" "$work/rolled" \
  --teacher v4e/assets/wan-nano/teacher "${rolling[@]}")"
await 400 "a unit that is safe" begun
scontrol requeue "${job}_0"
await 600 "the end of the array" over "$job"
for tar in "$work/shards/"*.tar; do cmp "$tar" "$work/rolled/${tar##*/}"; done
echo "the tars of both sets are the same to the bit"
