# shellcheck shell=bash
# Sourced by the launchers of this folder and by ../train_node.sh: environment, Slurm job, requeue.
# Not run on a GPU or under a real Slurm; tests/examples/test_launch.py runs it with stand-ins for Slurm's commands.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
warning=120 # seconds between Slurm's signal and the end of a job, as in --signal=B:SIGTERM@120

fail() { echo "error: $*" >&2; exit 1; }

# --- Environment ---

names=() # what default() has set, for the container
default() { # NAME VALUE: unless the caller's environment says otherwise
  export "$1=${!1-$2}"
  names+=("$1")
}

set_environment() {
  # FSDP overlaps its all-gathers with computing on several streams. One hardware queue, which megatron's own overlap wants on Hopper, would
  # put them one after the other.
  unset CUDA_DEVICE_MAX_CONNECTIONS
  # Ranks come from Slurm; these, left over in the shell that submitted, would win and be the same in every task.
  unset RANK LOCAL_RANK WORLD_SIZE

  default NCCL_NVLS_ENABLE 0 # NVLink SHARP keeps buffers of its own on every GPU; the four networks need that memory
  default NCCL_DEBUG WARN    # what NCCL itself has to say about a failed link is in no Python message
  # A rank that waits in vain gives up after parallel.timeout. What each was doing then is written down, where it outlives the container.
  default TORCH_NCCL_DUMP_ON_TIMEOUT 1
  default TORCH_FR_DUMP_TEMP_FILE "$root/runs/nccl_trace_${SLURM_JOB_ID:-$$}_rank_"
  # Not TORCH_NCCL_AVOID_RECORD_STREAMS, which older recipes set: it is the rule since torch 2.8, and naming it only warns.

  # Student, fake score and teacher take turns with pieces of different sizes: without this the allocator's memory falls into fragments.
  default PYTORCH_ALLOC_CONF expandable_segments:True
  # srun sets no limit, and every rank of a node would start one thread per core.
  default OMP_NUM_THREADS 8

  # Compute nodes reach no internet: a file that is missing is then an error at once, not minutes of retries.
  default HF_HUB_OFFLINE 1
  default TRANSFORMERS_OFFLINE 1

  default PYTHONUNBUFFERED 1 # lines reach the log when they are printed; a killed task's last ones too
  default PYTHONNOUSERSITE 1 # a torch in somebody's ~/.local would hide the container's
  # Package and scripts are both this checkout's; the image brings what they need.
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  names+=(PYTHONPATH)
}

# What the tasks will see, also where it was set elsewhere. By prefix, so that tokens and passwords stay out of the log.
print_environment() {
  echo "== environment"
  env | LC_ALL=C grep -E '^(NCCL|TORCH|PYTORCH|NVTE|CUDA|OMP|MASTER|PYTHON|TQDM|COSMOS_MP|UCX)_?[A-Z0-9_]*=|^(HF_HUB|TRANSFORMERS)_OFFLINE=' | LC_ALL=C sort
}

# --- Stages ---

script_of() { # STAGE
  case $1 in
    pairs) echo pretrain_scripts/generate_pairs.py ;;
    teacher | kd | dmd2) echo "pretrain_scripts/pretrain_$1.py" ;;
    *) fail "unknown stage $1: pairs, teacher, kd or dmd2" ;;
  esac
}

is_dry_run() { # WORDS...
  local word
  for word in "$@"; do
    [ "$word" != --dry-run ] || return 0
  done
  return 1
}

print_command() { # WORDS...: quoted, so that it can be pasted
  echo "== command"
  printf '%q ' "$@"
  echo
}

# --- Slurm ---

set_master() { # the first node; a port by the job's number, so that two jobs that meet on a node do not meet on a port
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  [ -n "${hosts[0]:-}" ] || fail "scontrol show hostnames named no host for $SLURM_JOB_NODELIST"
  export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that the kernel hands out
  names+=(MASTER_ADDR MASTER_PORT)
}

# A task takes the GPU with its number on the node: one more has none, one fewer leaves one idle and paid for.
check_tasks() {
  local gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  gpus=${gpus##*:} # "h100:8" is 8
  [ -n "$gpus" ] || fail "Slurm names no GPUs of this job: submit it with --gpus-per-node"
  [ "${SLURM_NTASKS_PER_NODE:-1}" = "$gpus" ] ||
    fail "${SLURM_NTASKS_PER_NODE:-1} task(s) but $gpus GPU(s) per node: give --ntasks-per-node and --gpus-per-node the same number"
}

check_image() { # sets image
  image=${COSMOS_MP_IMAGE:-}
  [ -n "$image" ] || fail "COSMOS_MP_IMAGE names no container image; $root/examples/superpod/README.md says how one is made"
  case $image in
    *.sqsh | /* | ./*) # a file, and by its whole path, since pyxis takes a bare name for one in a registry
      [ -f "$image" ] || fail "COSMOS_MP_IMAGE=$image: no such file"
      image=$(realpath "$image")
      ;;
  esac
}

asked() { sed -n "s/^#SBATCH --$1=//p" "$0"; } # OPTION: its value in the batch script

# Runs a stage as a job step, one task per GPU, and sends the job back to the queue where the stage has saved. Ends the script.
launch() { # STAGE PRESET [options] -- [other preset] [more options]
  local stage=$1 preset=$2 words=() dry='' patience=$warning script image command join
  script=$(script_of "$stage")
  shift 2
  while [ "$1" != -- ]; do
    words+=("$1")
    shift
  done
  shift
  if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    preset=$1
    shift
  fi
  words=("$script" "$preset" "${words[@]}" "$@") # of an option given twice the last counts
  ! is_dry_run "$@" || dry=1

  check_image
  cd "$root" || fail "$root is gone"
  set_environment
  default TQDM_MININTERVAL 60 # seconds: a log keeps every redraw of a progress bar
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    check_tasks
    set_master
  elif [ -z "$dry" ]; then
    fail "this is no Slurm job: submit it with sbatch, or add --dry-run"
  else # checked for as many processes as the file that was called asks for
    export SLURM_PROCID=0 SLURM_NTASKS="${SLURM_NTASKS:-$(($(asked nodes) * $(asked ntasks-per-node)))}"
  fi

  # A rank that ends leaves the others this long: to finish their save after 75, to be killed after an error, since they wait for it.
  # Pairs are made by each rank alone: one that is done must not end the others.
  [ "$stage" != pairs ] || patience=0
  # An image's own values of variables win over ours unless they are named.
  printf -v join '%s,' "${names[@]}"
  command=(
    srun --label "--wait=$patience" --kill-on-bad-exit=0
    "--container-image=$image"
    "--container-mounts=$root:$root${COSMOS_MP_MOUNTS:+,$COSMOS_MP_MOUNTS}"
    "--container-workdir=$root"
    --no-container-mount-home
    "--container-env=${join%,}"
    python "${words[@]}"
  )
  print_environment
  print_command "${command[@]}"
  if [ -n "$dry" ]; then
    echo "== check"
    python "${words[@]}"
    exit
  fi
  run_step "${command[@]}"
}

run_step() { # COMMAND...
  local code=0 signalled='' step
  mkdir -p "$root/runs" # for TORCH_FR_DUMP_TEMP_FILE
  echo "== job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1))"
  "$@" &
  step=$!
  # Slurm signals this script alone. srun must not be sent SIGTERM: it would kill the tasks at once. scancel with a signal reaches the tasks
  # and neither srun nor this script; the stages save and end with 75. Signals may be repeated.
  trap 'signalled=1; echo "== signal: the tasks are told to save and end"; scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
  # Looked at once a second: a signal would end `wait`, and one that comes as it begins could be slept through.
  while kill -0 "$step" 2>/dev/null; do
    sleep 1
  done
  wait "$step" || code=$?

  # srun gives the highest code of its tasks. What is killed counts 128 and more, so one task that crashed outweighs the others' 75.
  case $code in
    0) ;;
    75) requeue "the stage has saved" ;;
    143) # SIGTERM found a stage that has nothing to save, such as pairs, whose finished shards stand
      [ -z "$signalled" ] || requeue "the stage was ended by the signal" ;;
    *) echo "== failed with $code: not requeued" >&2 ;;
  esac
  exit "$code"
}

requeue() { # REASON
  # A job that its owner cancels gets SIGTERM too: it is no longer running then and must not come back. Nor needs one that Slurm requeues.
  if [[ $(scontrol show job "$SLURM_JOB_ID" || true) != *JobState=RUNNING* ]]; then
    echo "== $1; the job is being ended by Slurm and is not requeued from here"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "== $1; requeued"
  else
    echo "== $1, but the job could not be requeued: submit the same command again to go on" >&2
  fi
}
