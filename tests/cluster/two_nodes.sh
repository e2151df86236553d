#!/usr/bin/env bash
# Two nodes on one machine: a training over launch/hosts.sh and real sshd on loopback addresses, one node killed.
#
#   apt install openssh-server openssh-client pdsh procps util-linux
#   tests/cluster/two_nodes.sh FOLDER
#
# Needs root, because sshd gives a terminal as root alone, and no configuration: keys and settings lie in FOLDER. A rank a node.
# A run that nobody disturbs; the same with a full disk on one node, a request to stop, a node killed and a node frozen,
# each time by the same command; a third one by pdsh, with a node killed. All end with the same bits.
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need sshd openssh-server ssh openssh-client pdsh pdsh pgrep procps prlimit util-linux
[[ $EUID -eq 0 ]] || { echo "SKIP: not root (sudo), without whom sshd gives no terminal"; exit 77; }

nodes=(127.0.0.2 127.0.0.3)
port=$(( 20000 + RANDOM % 20000 ))
keys="$work/ssh"

prepare() {  # throwaway keys, and an ssh that knows these nodes alone
  rm -rf "$keys"
  mkdir -p "$keys"
  chmod 700 "$keys"
  for name in user host; do ssh-keygen -q -t ed25519 -N '' -f "$keys/$name"; done
  cp "$keys/user.pub" "$keys/authorized"
  for node in "${nodes[@]}"; do echo "[$node]:$port $(cut -d' ' -f1,2 "$keys/host.pub")"; done > "$keys/known"
  printf '%s\n' "Port $port" "IdentityFile $keys/user" 'IdentitiesOnly yes' "UserKnownHostsFile $keys/known" \
    'StrictHostKeyChecking yes' 'LogLevel ERROR' > "$keys/config"
  printf '#!/usr/bin/env bash\nexec %q -F %q "$@"\n' "$(PATH=/usr/bin:/bin command -v ssh)" "$keys/config" > "$work/bin/ssh"
  chmod +x "$work/bin/ssh"
  printf '%s slots=1\n' "${nodes[@]}" > "$work/hosts"
  mkdir -p /run/sshd  # where sshd drops its privileges
}

boot() {  # NODE
  printf '%s\n' "ListenAddress $1:$port" "HostKey $keys/host" "AuthorizedKeysFile $keys/authorized" "PidFile $keys/$1.pid" \
    'PermitRootLogin yes' 'PasswordAuthentication no' 'UsePAM no' 'StrictModes no' 'SetEnv OMP_NUM_THREADS=1' > "$keys/$1.conf"
  "$(command -v sshd)" -f "$keys/$1.conf" -E "$keys/$1.log"
  await 10 "the sshd of $1" ssh -o BatchMode=yes "$1" true
}

tree() { echo "$1"; for child in $(pgrep -P "$1"); do tree "$child"; done; }  # PID: it and all below it
alive() { [[ ! -e "$keys/$1.pid" ]] || tree "$(cat "$keys/$1.pid")"; }  # NODE: its processes
rank_of() { for pid in $(alive "$1"); do grep -qsz '^RANK=' "/proc/$pid/environ" && echo "$pid"; done; }  # NODE

signal() {  # SIGNAL NODE: to all of its processes at once
  local pids
  mapfile -t pids < <(alive "$2")
  kill "-$1" "${pids[@]}"
  echo "SIG$1 to the ${#pids[@]} processes of $2"
}

no_room() { prlimit --fsize=1000 --pid "$(rank_of "$1")"; echo "the rank of $1 cannot write files any more"; }  # NODE

shut_down() { for node in "${nodes[@]}"; do signal KILL "$node" > /dev/null 2>&1 || true; done; }
trap shut_down EXIT

by=(--launcher ssh)
train() { exec launch/hosts.sh "$work/hosts" "${by[@]}" "${settings[@]}" "loop.output=$work/$1"; }  # RUN, in a shell of its own

broken_at() {  # RUN STEP CODES COMMAND ...: go on, do it after that step; how and when does the job end?
  local run="$1" step="$2" wanted="$3" code=0 began
  shift 3
  train "$run" &
  job=$!
  await 300 "step $step" beyond "$work/$run" "$step" "$(date +%s)"
  "$@"
  began=$SECONDS
  wait "$job" || code=$?
  echo "the job ended $(( SECONDS - began )) s later with code $code"
  [[ "$code" =~ ^($wanted)$ && $(( SECONDS - began )) -lt 60 ]] || die "code $wanted within a minute was wanted"
}

ask() { kill -TERM "$job"; echo "SIGTERM to launch/hosts.sh"; }

nobody_left() { [[ -z "$(rank_of "${nodes[0]}")$(rank_of "${nodes[1]}")" ]] || die "ranks are left"; }

prepare
make_shards
for node in "${nodes[@]}"; do boot "$node"; done
rm -rf "$work/straight" "$work/broken" "$work/by_pdsh"
say "a run of $steps steps that nobody disturbs"
(train straight)
say "after step 3 the second node's disk is full"
broken_at broken 3 "1|7" no_room "${nodes[1]}"
nobody_left
say "after step 3 the script is asked to stop"
broken_at broken 3 75 ask
nobody_left
say "after step 5 the second node is killed"
broken_at broken 5 255 signal KILL "${nodes[1]}"
nobody_left
say "the node is back; after step 7 it freezes, and answers nobody"
boot "${nodes[1]}"
broken_at broken 7 7 signal STOP "${nodes[1]}"
signal KILL "${nodes[1]}"
nobody_left
say "the node is back, and the same command goes on"
boot "${nodes[1]}"
(train broken)
same_weights "$work/straight" "$work/broken"
say "another run, by pdsh; after step 3 the second node is killed"
by=(--launcher pdsh)
broken_at by_pdsh 3 "[1-9][0-9]*" signal KILL "${nodes[1]}"
nobody_left
say "the node is back, and the same command goes on"
boot "${nodes[1]}"
(train by_pdsh)
same_weights "$work/straight" "$work/by_pdsh"
