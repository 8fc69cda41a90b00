# What the templates of this folder share: one training process per GPU, and a job that is put back
# into the queue where its run was interrupted and has saved. Sourced by them, in the folder that
# sbatch was called from. "$@" is the entry and its arguments, with output=DIR among them.
#
#   PYTHON              the interpreter (.venv/bin/python)
#   IDLE_REQUEUES       how often in a row a job goes back into the queue without a step done (3)
#
# The job ends with the run's exit code: 0 done, 2 a mistake, 138 and 143 interrupted and saved.
# docs/cluster.md says why it is done this way.
set -uo pipefail

say() { printf 'slurm: %s\n' "$*"; }

output=""
for word in "$@"; do
    case "$word" in output=*) output="${word#output=}" ;; esac
done
if [ -z "$output" ] || [ ! -f "${1-}" ]; then
    say "usage: sbatch scripts/slurm/NAME.sbatch train/lora.py --config FILE output=DIR [key=value ...]"
    exit 2
fi
python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
    say "PYTHON=$python is not there: run \`make setup\` in $PWD, or give PYTHON=FILE"
    exit 2
fi

# The signals are for the training processes. This shell outlives them, to put the job back.
trap : TERM USR1

# A number of its own for each job, below those that the kernel gives away.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR

# srun gives each task its number. Processes that are through wait for the others, two minutes at
# most: killed at the first that ends (--kill-on-bad-exit=1), they could not say that they saved.
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
             exec "$@"' task "$python" "$@"
code=$?

# Whether the job had to make room. One that was cancelled is told to end by the same signal.
preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

# requeue.txt: the last step that was saved, and how often in a row the job went back without one
# more.
requeue() {
    local step last=0 idle=0 file="$output/requeue.txt"
    step="$(sed -n 's/.*"step": *\([0-9][0-9]*\).*/\1/p' "$output/interrupted.json" 2>/dev/null)"
    [ ! -f "$file" ] || read -r last idle <"$file"
    if [ "${step:-0}" -gt "$last" ]; then last="$step" idle=0; else idle=$((idle + 1)); fi
    if [ "$idle" -gt "${IDLE_REQUEUES:-3}" ]; then
        say "interrupted $idle times without a step done (the last is $last): not put back. Give" \
            "more --time, or fewer seconds in --signal=USR1@SECONDS; then submit it again"
        rm -f "$file"
        return
    fi
    mkdir -p "$output" && printf '%s %s\n' "$last" "$idle" >"$file"
    say "interrupted, step $last is saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM does not take it back: submit it again"
}

case "$code" in
    0) rm -f "$output/requeue.txt" ;;
    138) requeue ;; # SIGUSR1: the time is nearly up
    143) if preempted; then requeue; else say "ended by SIGTERM: submit it again to go on"; fi ;;
    2) say "a mistake in what was asked for: see above" ;;
    *) say "failed with exit code $code: see above" ;;
esac
exit "$code"
