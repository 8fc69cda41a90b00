#!/usr/bin/env bash
# The main job on the embedded default: train a LoRA, evaluate it, show base and fine-tuned.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
# Without the last flag Accelerate would leave all but one CPU core idle.
launch="accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no
        --dynamo_backend no --num_cpu_threads_per_process $(getconf _NPROCESSORS_ONLN)"

$launch train/lora.py output=runs/demo
$launch eval/evaluate.py run=runs/demo
echo "base above, fine-tuned below: $(ls -d runs/demo/previews/step-*/grid.png | tail -n 1)"
