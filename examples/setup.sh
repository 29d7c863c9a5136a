# shellcheck shell=bash
# Sourced: makes .venv beside the code with the CPU set, once, and puts it first on PATH. Needs Python 3.11 or 3.12.
# An interrupted installation is taken up again; a finished one is recognised by the versions it was made for.

torch_pin=torch==2.13.0 # exactly this one: a range may bring gigabytes of CUDA libraries to a machine without a GPU

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 with its venv module found; install one (Debian: apt-get install python3 python3-venv)" >&2
  return 1
}

set_up() { # extras, such as "test"
  local root stamp wanted python sum found
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  stamp=$root/.venv/.installed
  if [ ! -x "$root/.venv/bin/python" ] || ! "$root/.venv/bin/python" -c '' 2>/dev/null; then
    python=$(find_python) || return 1
    echo "setting up $root/.venv with $("$python" --version)"
    "$python" -m venv --clear "$root/.venv" || return 1
  fi
  sum=$({ cat "$root/setup.py" "$root"/csrc/* 2>/dev/null || true; } | cksum) # of all that an installation compiles
  wanted="$torch_pin $1 $sum" found=$(cat "$stamp" 2>/dev/null || true)
  # What was installed with the tests' packages has all that the rest needs.
  if [ "$found" != "$wanted" ] && [ "$found" != "$torch_pin ${1:-test} $sum" ]; then
    if ! { "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch_pin" &&
      "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch_pin" -e "$root${1:+[$1]}" &&
      echo "$wanted" >"$stamp"; }; then
      echo "error: the installation failed; run the same command again to go on" >&2
      return 1
    fi
  fi
  export PATH="$root/.venv/bin:$PATH"
  # Small tensors come and go all the time: keep their memory instead of handing it back to the kernel and faulting it in again.
  export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000
}
