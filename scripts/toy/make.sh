#!/usr/bin/env bash
# Makes the toy world's models from nothing; about two hours on two CPU cores. Each step resumes.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
launch="accelerate launch --quiet --config_file configs/accelerate/cpu.yaml"
recipe=configs/toy/recipe

$launch scripts/toy/train_vae.py --config $recipe/vae.yaml
[ -d runs/toy-init ] || python scripts/toy/assemble.py vae=runs/toy-vae/vae output=runs/toy-init
[ -d runs/toy-world ] || python scripts/toy/world.py output=runs/toy-world count=6000 seed=1 varied=true
# Two processes of one thread each; the result is the same with one process, but for rounding.
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 train/full.py --config $recipe/base.yaml
$launch scripts/toy/train_clip.py --config $recipe/clip.yaml
$launch scripts/toy/checker.py --config $recipe/checker.yaml
python scripts/toy/install.py
python scripts/toy/measure.py
