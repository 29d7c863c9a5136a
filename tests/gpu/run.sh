#!/usr/bin/env bash
# All tests that need a GPU, then the benchmarks, on one card and inside 8 minutes. Not run on a GPU yet.
#   bash tests/gpu/run.sh [--out DIR]
# Takes the python at hand, such as a container's, with what the package and its tests need; nothing is installed. What the card lacks is
# skipped and named (Transformer Engine, nvcc). Video decoding by DALI comes with the real-data pipeline. DIR (runs/gpu) gets gpu.json, the
# numbers and the tests' outcome, and tests.log. Ends with 1 if a test failed or a kernel computed something else, and with 130 after Ctrl-C,
# which keeps what was found until then.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/../.."

usage() { sed -n '2,3s/^# \{0,1\}//p' "$0"; exit 2; }
out=runs/gpu
while [ $# -gt 0 ]; do
  case $1 in
    --out) [ $# -gt 1 ] || usage; out=$2; case $out in /*) ;; *) out=$from/$out ;; esac; shift ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
  shift
done

export TRITON_INTERPRET=0 OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=python
command -v python >/dev/null 2>&1 || python=python3
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "error: torch sees no GPU: run this where nvidia-smi shows one, with a python whose torch has CUDA first on PATH" >&2
  exit 1
fi
mkdir -p "$out"
rm -f "$out/gpu.json" "$out/tests.xml" "$out/tests.log"
began=$SECONDS code=0 tested=130 # what pytest ended with, once it has
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - began)); }
left() { echo $((470 - SECONDS + began)); } # of 8 minutes, with some seconds to write the results

# shellcheck disable=SC2329 # the trap calls it
interrupted() {
  trap '' INT # a second one must not lose what the first one kept
  "$python" tests/gpu/outcome.py "$out" "$tested" || true
  exit 130
}
trap interrupted INT # after what runs has ended: Ctrl-C reaches that too, as timeout leaves it in the foreground

if command -v nvcc >/dev/null 2>&1 && [ ! -f cosmos_mp/kernels/libcanny_cuda.so ]; then
  say "building libcanny_cuda.so"
  timeout --foreground --signal=INT --kill-after=10 90 "$python" setup.py -q build_ext --inplace || echo "it was not built; what needs it is skipped"
fi

say tests
# Each file that has tests marked gpu. The build and they are told to end after 240 s, so that some 230 s are left to the benchmarks.
if timeout --foreground --signal=INT --kill-after=10 $(($(left) - 230)) "$python" -m pytest -q -m gpu --show-capture=no --tb=short \
  --durations=5 --junitxml "$out/tests.xml" tests/gpu tests/backends/test_transformer_engine.py tests/training/test_optim.py 2>&1 |
  tee -i "$out/tests.log"; then tested=0; else tested=${PIPESTATUS[0]}; fi

say benchmarks
# A row that has begun takes its time; what is not begun by then is left out, and said to be.
timeout --foreground --signal=INT --kill-after=10 "$(left)" "$python" -m cosmos_mp bench gpu --json "$out/gpu.json" --limit $(($(left) - 40)) || code=1

"$python" tests/gpu/outcome.py "$out" "$tested" || code=1
say "done"
exit "$code"
