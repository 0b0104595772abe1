#!/usr/bin/env bash
# A run under SLURM, from one node to a whole cluster; called from the repository's root with its Python first on PATH:
#
#   sbatch --nodes=1 launch/slurm.sh configs/nano_1gpu.yaml parallel.shard=8
#   sbatch --nodes=256 launch/slurm.sh configs/large.yaml
#
# Environment: RUN_DIR (runs/<the config's name>), PROCESSES of a node (8), RESTARTS after failures in one allocation (3),
# PREFLIGHT=1 to measure every GPU and link first and end where one is slow. All else is the config's.
#
#SBATCH --job-name=trinity
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Lines above: one task a node, which starts the node's processes; all of the node's memory; one log over all requeues.
#
# What ends a run before its time, and what follows:
# - the time limit: 20 minutes before it this script (B:) gets SIGTERM and asks every process to stop. In that time a
#   step, an evaluation and a save must fit; SLURM may be a minute early. (So --time must be well over 20 minutes.)
# - preemption, and `scancel`: SLURM signals the processes itself. It kills after the partition's GraceTime, or KillWait
#   (30 s if the site has not changed it): a save that takes longer is lost, and the one before it counts.
# - a dead node: --requeue lets SLURM start the job again.
#SBATCH --signal=B:TERM@1200
#SBATCH --requeue
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1
config=${1:?usage: sbatch --nodes=N launch/slurm.sh CONFIG.yaml [a.b=value …]}
shift
RUN_DIR=${RUN_DIR:-runs/$(basename "$config" .yaml)}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
failures=0 asked=0

# Not `kill` of srun, which would end the step by force: SLURM signals every process of every node.
trap 'asked=$((asked + 1)); scancel --signal=TERM "$SLURM_JOB_ID"' TERM

every_node() { # every_node SCRIPT [ARGUMENT…]: run it on all nodes; the highest of their exit codes
    # All cores of a node for its task: srun gives it one otherwise. When one node has ended, the others get two minutes
    # to do so too; without that they would wait in a collective for the one that crashed.
    srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=0 --wait=120 \
        python launch/node.py --nodes "$SLURM_JOB_NUM_NODES" --head "$head" --processes "${PROCESSES:-8}" \
        --id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$failures" --run-dir "$RUN_DIR" "$@" &
    local step=$! seen code
    while :; do
        seen=$asked
        wait "$step"
        code=$?
        [ "$asked" = "$seen" ] && return "$code" # else the signal ended `wait`, not the step
    done
}

requeue_if_asked() { # requeue_if_asked CODE: the same job, later; it resumes from the newest complete checkpoint
    [ "$1" = 75 ] || [ "$asked" != 0 ] || return
    # Not a job that somebody cancelled; nor a preempted one, which SLURM requeues by itself.
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
    exit 75
}

if [ -n "${PREFLIGHT:-}" ]; then
    every_node tools/preflight.py --json "$RUN_DIR/preflight.json"
    code=$?
    requeue_if_asked $code
    [ "$code" = 0 ] || exit "$code"
fi
while :; do
    every_node launch/pretrain.py "$config" "run.dir=$RUN_DIR" "$@"
    code=$?
    case $code in
    0 | 2 | 3) exit "$code" ;; # finished; the user's mistake; too many bad steps
    esac
    requeue_if_asked $code
    failures=$((failures + 1))
    echo "slurm.sh: exit code $code; failure $failures, ${RESTARTS:-3} are allowed" >&2
    [ "$failures" -le "${RESTARTS:-3}" ] || exit 1
done
