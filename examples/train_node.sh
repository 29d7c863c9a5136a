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
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU) || true
  if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) || true
  fi
  [ "$gpus" -gt 0 ] || fail "nvidia-smi shows no GPU here: say how many processes to start with --gpus N"
fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus $gpus: not a number above 0"

# A container has all that is needed; elsewhere .venv is made.
if ! (cd pretrain_scripts && python -c 'import cosmos_mp') 2>/dev/null; then
  . examples/setup.sh
  set_up ''
fi

set_environment
command=(python "$script" "${words[@]}")
[ -n "$(type -P torchrun)" ] || fail "no torchrun on PATH: it lies beside the python that has torch, so activate that environment"
launcher=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$gpus")
print_environment
print_command "${launcher[@]}" "${command[@]:1}"
check() { RANK=0 LOCAL_RANK=0 WORLD_SIZE=$gpus "${command[@]}" "$@"; }
if is_dry_run "${words[@]}"; then
  check
  exit
fi
check --dry-run >/dev/null # a wrong option is named once, before anything starts
mkdir -p runs # for what NCCL writes when a rank is lost

# torchrun ends with 1 and a traceback where a process ends with 75, and gives the others 30 s from then or from a signal, which may cut a
# save short. So it is not told of either: signals go to the processes themselves, and 75 is noted here and ends well for torchrun.
notes=$(mktemp -d)
trap 'rm -r "$notes"' EXIT
# shellcheck disable=SC2329 # one_rank calls it
lines() { trap '' INT TERM; exec sed -u "$1"; } # a signal ends the stage, not what reads its last words
# shellcheck disable=SC2329 # bash -c calls it
one_rank() { # NOTES COMMAND...: what torchrun starts for each GPU
  local notes=$1 code=0
  shift
  trap : INT TERM
  if [ "$RANK" -gt 0 ]; then # only the first draws progress bars. The others' lines come whole, and their errors say whose they are.
    export TQDM_DISABLE=1
    exec > >(lines '') 2> >(lines "s/^/[rank $RANK] /" >&2)
  fi
  (echo "$BASHPID" >"$notes/pid.$RANK" && exec "$@") || code=$? # the stage's own number: it hears signals, and its children do not
  echo "$code" >"$notes/code.$RANK"
  [ "$code" -eq 75 ] || exit "$code"
}
export -f lines one_rank
tell() { # SIGNAL: fails where no process has started yet
  local file told=1
  for file in "$notes"/pid.*; do
    ! kill "-$1" "$(cat "$file")" || told=0
  done 2>/dev/null
  return "$told"
}
signal='' # still to be told
trap 'signal=TERM' TERM HUP QUIT
trap 'signal=TERM; trap "signal=KILL" INT' INT # a second Ctrl-C does not wait for the save
# In a session of its own, where Ctrl-C does not reach it.
setsid "${launcher[@]}" --log-dir "$notes" --no-python bash -c 'one_rank "$@"' one_rank "$notes" "${command[@]}" &
launched=$! code=0
while kill -0 "$launched" 2>/dev/null; do # a signal would end `wait`, and one that comes as it begins could be slept through
  [ -z "$signal" ] || ! tell "$signal" || signal=''
  sleep 1 || true # Ctrl-C ends it too
done
wait "$launched" || code=$?

if [ "$code" -eq 0 ]; then
  ! grep -qx 75 "$notes"/code.* || code=75
  exit "$code"
fi
# The stage's code is that of the first to fail; those after it were told to end.
while read -r file; do
  read -r ended <"$file"
  case $ended in
    0 | 75) ;;
    *) echo "error: rank ${file##*.} ended first, with $ended" >&2; exit "$ended" ;;
  esac
done < <(find "$notes" -name 'code.*' -printf '%T@ %p\n' | sort -n | cut -d ' ' -f 2-)
exit "$code"
