#!/usr/bin/env bash
# A few iterations of a stage under Nsight: `nsys` draws a timeline of all its processes, `ncu` measures one range's kernels in one process.
#   bash examples/profile_nsight.sh nsys kd|dmd2|teacher PRESET [options of the stage] [--report FILE] [--gpus N] [--dry-run]
#   bash examples/profile_nsight.sh ncu kd|dmd2|teacher PRESET [options of the stage] [--report FILE] [--range NAME] [--dry-run]
# Trains 15 iterations in runs/profile, the window over 10..14; --out, --train.iterations, --profile.start and --profile.stop change that.
# Not run on a GPU: tests/examples/test_profile_nsight.py runs it with stand-ins for nsys and ncu.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/superpod/lib.sh

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 3 ] && [[ $1 =~ ^(nsys|ncu)$ && $2 =~ ^(kd|dmd2|teacher)$ && $3 != -* ]] || usage
# Of an option given twice the last counts. Pictures between the window's iterations would be profiled too.
tool=$1 stage=$2 words=("$3" --out runs/profile --profile.kind nsight --train.iterations 15 --train.picture_every 0)
report=runs/profile/$tool range=blk0.attn
shift 3
while [ $# -gt 0 ]; do
  case $1 in
    --report) [ $# -gt 1 ] || usage; report=$2; shift ;;
    --range) [ $# -gt 1 ] && [ "$tool" = ncu ] || usage; range=$2; shift ;;
    *) words+=("$1") ;;
  esac
  shift
done

# The window opens by cudaProfilerStart: nothing outside it is recorded.
if [ "$tool" = nsys ]; then
  profiler=(nsys profile -s none -t 'nvtx,cuda' -o "$report" --force-overwrite true)
  profiler+=('--capture-range=cudaProfilerApi' '--capture-range-end=stop')
  command=(bash examples/train_node.sh "$stage" "${words[@]}")
else # it runs every kernel some forty times: in one process, since a collective run again would wait for ranks that are not there
  profiler=(ncu --set full --nvtx --nvtx-include "$range/" --clock-control none --profile-from-start off -o "$report" -f)
  set_environment
  command=(python "$(script_of "$stage")" "${words[@]}")
fi
print_command "${profiler[@]}" "${command[@]}"
if is_dry_run "${words[@]}"; then
  exec "${command[@]}"
fi
command -v "$tool" >/dev/null || fail "no $tool on PATH: it comes with the CUDA toolkit and with NVIDIA's containers"
mkdir -p "$(dirname "$report")"
exec "${profiler[@]}" "${command[@]}"
