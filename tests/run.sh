#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest: bash tests/run.sh tests/models -k rope
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
set_up test
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
python -m pytest -q -n 2 -m 'not quickstart'
# The quickstart has the machine to itself.
OMP_NUM_THREADS=2 python -m pytest -q -m quickstart
