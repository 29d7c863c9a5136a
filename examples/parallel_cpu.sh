#!/usr/bin/env bash
# KD and DMD2 as the quickstart runs them, shortened, in one process and as TP2 x CP2 over four; then both in one table.
#   bash examples/parallel_cpu.sh [--fast] [--out DIR]
# Interrupted at any point and started again, it goes on where it was.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."

usage() { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
fast='' out=''
while [ $# -gt 0 ]; do
  case $1 in
    --fast) fast=1 ;;
    --out) [ $# -gt 1 ] || usage; out=$2; shift ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
  shift
done
case $out in '') out=runs/parallel${fast:+-fast} ;; /*) ;; *) out=$from/$out ;; esac

. examples/setup.sh
set_up ''
export OMP_NUM_THREADS=1 # a rank each for the cores; two threads of one rank would only wait for one another
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - began)); }

clips=1024 pairs=128 teacher=300 iterations=60 samples=64
if [ -n "$fast" ]; then clips=128 pairs=32 teacher=20 iterations=10 samples=8; fi
# Four latent frames, two for each rank of cp: the discriminator judges them in pairs.
shape=(--diffusion.latent_shape 16 4 8 8)
tokenizer=(--tokenizer.path "$out/tokenizer")
train=(--holdout "$out/clips/holdout" "${tokenizer[@]}" "${shape[@]}")
lengths=(--train.iterations "$iterations" --train.save_every "$iterations" --train.picture_every "$iterations")

say "clips, teacher and pairs"
python -m cosmos_mp synthesize "$out/videos" "$clips" --frames 13
python -m cosmos_mp index "$out/videos" --out "$out/index" --min-frames 13
python -m cosmos_mp fit-tokenizer "$out/videos" "$out/tokenizer" --index "$out/index" --frames 13
for split in train holdout; do
  python -m cosmos_mp encode tiny_encode --videos "$out/videos" --index "$out/index" --out "$out/clips/$split" --split "$split" \
    --clip.frames 13 "${tokenizer[@]}"
done
python pretrain_scripts/pretrain_teacher.py tiny_teacher --out "$out/teacher" --clips "$out/clips/train" "${train[@]}" \
  --train.iterations "$teacher" --train.picture_every 0
python pretrain_scripts/generate_pairs.py tiny_pairs --out "$out/pairs" --clips "$out/clips/train" --teacher "$out/teacher" \
  --count "$pairs" --shard_size 32 "${shape[@]}"

stages() { # NAME LAUNCHER...: KD, then DMD2 from it, with the launcher's layout
  local name=$1
  shift
  say "KD and DMD2: $name"
  "$@" pretrain_scripts/pretrain_kd.py tiny_kd --out "$out/$name/kd" --pairs "$out/pairs" --teacher "$out/teacher" "${train[@]}" \
    "${lengths[@]}" "${layout[@]}"
  "$@" pretrain_scripts/pretrain_dmd2.py tiny_dmd2 --out "$out/$name/dmd2" --clips "$out/clips/train" --teacher "$out/teacher" \
    --student "$out/$name/kd" "${train[@]}" "${lengths[@]}" "${layout[@]}"
}
layout=()
stages one python
layout=(--parallel.tp 2 --parallel.cp 2)
stages tp2cp2 torchrun --standalone --nproc_per_node 4

say "one table"
python -m cosmos_mp evaluate tiny_evaluate --out "$out/evaluation" --clips "$out/clips/holdout" --videos "$out/videos" --index "$out/index" \
  --teacher "$out/teacher" --students "KD=$out/one/kd" "KD TP2xCP2=$out/tp2cp2/kd" "DMD2=$out/one/dmd2" "DMD2 TP2xCP2=$out/tp2cp2/dmd2" \
  --samples "$samples" "${tokenizer[@]}" "${shape[@]}" --checks calls
python - "$out" <<'END'
import sys
from pathlib import Path

from cosmos_mp.training.logs import read_log

for stage in ("kd", "dmd2"):
    one, other = (read_log(Path(sys.argv[1]) / name / stage / "log.jsonl") for name in ("one", "tp2cp2"))
    terms = [(one[key][1], other[key][1]) for key in one if key.startswith("terms/")]
    worst = max(abs(ours - theirs).max() / abs(ours).max() for ours, theirs in terms)
    print(f"{stage}: losses of TP2 x CP2 and of one process differ by at most {worst:.1e}, relative, over {len(one['seconds'][0])} iterations")
END
printf 'done in %d s\n' $((SECONDS - began))
