#!/usr/bin/env bash
# One stage on the GPUs of this machine, one process each.
#   bash examples/train_node.sh kd|dmd2|pairs|teacher PRESET [options of the stage] [--gpus N] [--dry-run]
# Ends with the stage's own code: 75 = a signal ended it after saving, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/superpod/lib.sh

usage() { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] && [[ $1 != -* && $2 != -* ]] || usage
script=$(script_of "$1") gpus='' words=()
shift
while [ $# -gt 0 ]; do
  case $1 in
    --gpus) [ $# -gt 1 ] || usage; gpus=$2; shift ;;
    *) words+=("$1") ;;
  esac
  shift
done
if [ -z "$gpus" ]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
  [ "$gpus" -gt 0 ] || fail "nvidia-smi shows no GPU here: say how many processes to start with --gpus N"
fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus $gpus: not a number above 0"

# A container has all that is needed; elsewhere .venv is made.
if ! (cd pretrain_scripts && python -c 'import cosmos_mp') 2>/dev/null; then
  . examples/setup.sh
  set_up ''
fi

set_environment
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=$gpus MASTER_ADDR=127.0.0.1
command=(python "$script" "${words[@]}")
print_environment
print_command "${command[@]}"
if is_dry_run "${words[@]}"; then
  exec "${command[@]}"
fi
"${command[@]}" --dry-run >/dev/null # a wrong option is named once, before anything starts
mkdir -p runs # for what NCCL writes when a rank is lost
MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT

# Not torchrun, measured with torch 2.13: it ends with 1 and a traceback when its processes end with 75, and leaves the others 30 s from the
# first one's end or from a signal, which may cut a save short.
pids=()
lines() { trap '' INT TERM; exec sed -u "$1"; } # Ctrl-C ends the stage, not what reads its last words
tell() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
stop=''
trap 'stop=TERM; tell TERM' TERM
trap '${stop:+tell KILL}; stop=TERM; tell TERM' INT # a second Ctrl-C does not wait for the save
for ((rank = 0; rank < gpus; rank++)); do
  export RANK=$rank LOCAL_RANK=$rank
  if [ "$rank" -eq 0 ]; then
    "${command[@]}" &
  else # only the first draws progress bars. The others' lines come whole, and their errors say whose they are.
    TQDM_DISABLE=1 "${command[@]}" > >(lines '') 2> >(lines "s/^/[rank $rank] /" >&2) &
  fi
  pids+=($!)
  [ -z "$stop" ] || kill -TERM $! 2>/dev/null || true # the signal came while it was started
done

# One that fails ends the run, since the others wait for it: they are told to end, and have 15 s to say whom they miss. Those that have saved
# wait for the rest. Looked at once a second: `wait -n` of bash 5.2 forgets some that end together, and may sleep through a signal.
code=0 deadline=''
while [ ${#pids[@]} -gt 0 ]; do
  sleep 1 || true # Ctrl-C ends it too
  failed=0
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    case $status in
      0) ;;
      75) [ "$code" -ne 0 ] || code=75 ;;
      *)
        [ -n "$deadline" ] || echo "error: rank $i ended with $status; the others are told to end" >&2
        [ "$status" -le "$failed" ] || failed=$status
        ;;
    esac
  done
  if [ "$failed" -ne 0 ] && [ -z "$deadline" ]; then # what ends after this was told to
    code=$failed deadline=$((SECONDS + 15))
    tell TERM
  fi
  [ -z "$deadline" ] || [ "$SECONDS" -lt "$deadline" ] || tell KILL
done
exit "$code"
