#!/usr/bin/env bash
# The main job on the embedded default: train a LoRA, evaluate it, show base and fine-tuned.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
cores=$(getconf _NPROCESSORS_ONLN)
launch="accelerate launch --quiet --num_machines 1 --mixed_precision no --dynamo_backend no"

# Without the last flag Accelerate would leave all but one CPU core idle.
$launch --num_processes 1 --num_cpu_threads_per_process "$cores" train/lora.py output=runs/demo
# An evaluation keeps to one thread per process on a CPU, so that its numbers are always the same.
if command -v nvidia-smi >/dev/null || [ "$cores" = 1 ]; then
    $launch --num_processes 1 eval/evaluate.py run=runs/demo
else
    $launch --num_processes $((cores < 4 ? cores : 4)) --cpu eval/evaluate.py run=runs/demo
fi
echo "base above, fine-tuned below: $(ls -d runs/demo/previews/step-*/grid.png | tail -n 1)"
