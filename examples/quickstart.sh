#!/usr/bin/env bash
# The whole job on a laptop: clips -> teacher -> pairs -> KD -> DMD2 -> evaluation -> Hugging Face folder -> one clip.
#   bash examples/quickstart.sh [--fast] [--videos DIR] [--out DIR] [--seed N]
# Interrupted at any point and started again, it goes on where it was.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."

usage() { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
fast='' videos='' out='' seed=0
while [ $# -gt 0 ]; do
  case $1 in
    --fast) fast=1 ;;
    --videos | --out | --seed) [ $# -gt 1 ] || usage; declare "${1#--}=$2"; shift ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
  shift
done
# Paths are meant from where the command was given.
case $videos in '' | /*) ;; *) videos=$from/$videos ;; esac
case $out in '') out=runs/quickstart${fast:+-fast} ;; /*) ;; *) out=$from/$out ;; esac

. examples/setup.sh
set_up ''
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - began)); }

# --- Sizes: the whole recipe, or each stage shortened ---
clips=4608 pairs=2048 teacher=2400 kd=800 dmd2=400 samples=512 checks=recipe
if [ -n "$fast" ]; then clips=192 pairs=64 teacher=60 kd=20 dmd2=20 samples=16 checks=calls; fi
share=0.1
if [ -n "$videos" ]; then # the recipe's promises are about its own clips; of a small folder, more is held out
  share=0.2 least=32
  [ "$checks" != recipe ] || checks=calls
fi

index=$out/index
tokenizer=(--tokenizer.path "$out/tokenizer")
train=(--holdout "$out/clips/holdout" "${tokenizer[@]}" --train.seed "$seed")

if [ -z "$videos" ]; then
  videos=$out/videos
  say "synthetic clips"
  python -m cosmos_mp synthesize "$videos" "$clips" --seed "$seed"
fi

say "index and encode the clips in $videos"
python -m cosmos_mp index "$videos" --out "$index" --min-frames 9 # a folder of one's own is only read
usable=$(wc -l <"$index/clips.jsonl")
if [ "$usable" -lt "${least:-0}" ]; then
  echo "error: $videos has $usable usable clips, at least $least are needed; $index/rejected.jsonl says why others are not" >&2
  exit 1
fi
python -m cosmos_mp fit-tokenizer "$videos" "$out/tokenizer" --index "$index"
for split in train holdout; do
  python -m cosmos_mp encode tiny_encode --videos "$videos" --index "$index" --out "$out/clips/$split" \
    --split "$split" --holdout_share "$share" --seed "$seed" "${tokenizer[@]}"
done

say "teacher"
python pretrain_scripts/pretrain_teacher.py tiny_teacher --out "$out/teacher" --clips "$out/clips/train" "${train[@]}" \
  --train.iterations "$teacher"

say "pairs: the teacher's 36-step answers"
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 pretrain_scripts/generate_pairs.py tiny_pairs --out "$out/pairs" --clips "$out/clips/train" --teacher "$out/teacher" \
  --count "$pairs" --shard_size $((pairs / 16)) --seed "$seed"

say "KD"
python pretrain_scripts/pretrain_kd.py tiny_kd --out "$out/kd" --pairs "$out/pairs" --teacher "$out/teacher" "${train[@]}" \
  --train.iterations "$kd"

say "DMD2, and beside it DMD2 without GAN (its words go to $out/dmd2_without_gan.log)"
dmd2() { # NAME WEIGHT: one core each; two threads of one run would gain less
  OMP_NUM_THREADS=1 python pretrain_scripts/pretrain_dmd2.py tiny_dmd2 --out "$out/$1" --clips "$out/clips/train" --teacher "$out/teacher" \
    --student "$out/kd" "${train[@]}" --train.iterations "$dmd2" --dmd2.gan_weight "$2"
}
dmd2 dmd2_without_gan 0 >"$out/dmd2_without_gan.log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true' EXIT # it saves and ends when this script does
dmd2 dmd2 0.3
wait "$beside" || { tail -n 5 "$out/dmd2_without_gan.log" >&2; exit 1; }
trap - EXIT

say "Hugging Face folder, loaded again with diffusers"
if [ ! -e "$out/student.checked" ]; then # written last: a folder whose check failed or was interrupted is made anew
  rm -rf "$out/student"
  python -m cosmos_mp convert tiny_sample "$out/dmd2" "$out/student"
  touch "$out/student.checked"
fi

say "one clip from that folder"
first() { python -c 'import json, sys; print(json.loads(sys.stdin.readline())[sys.argv[1]])' "$1" <"$index/clips.jsonl"; }
python -m cosmos_mp sample tiny_sample --student "$out/student" --video "$videos/$(first video)" --prompt="$(first caption)" \
  --out "$out/sample.mp4" "${tokenizer[@]}" --seed "$seed"

say "evaluation"
python -m cosmos_mp evaluate tiny_evaluate --out "$out/evaluation" --clips "$out/clips/holdout" --videos "$videos" --index "$index" \
  --teacher "$out/teacher" --students "KD=$out/kd" "DMD2 without GAN=$out/dmd2_without_gan" "DMD2=$out/dmd2" \
  --samples "$samples" "${tokenizer[@]}" --seed "$seed" --checks "$checks"
printf '\nclip:    %s\nstudent: %s\ndone in %d s\n' "$out/sample.mp4" "$out/student" $((SECONDS - began))
