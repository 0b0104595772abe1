#!/usr/bin/env bash
# Run under SLURM, on one node or a whole cluster. Submit from the repository's root, with its Python first on PATH:
#
#   sbatch --nodes=1 launch/slurm.sh configs/nano_1gpu.yaml parallel.shard=8
#   sbatch --nodes=256 launch/slurm.sh configs/large.yaml
#
# Environment: RUN_DIR (runs/<the config's name>), PROCESSES a node (8), RESTARTS after failures in one allocation (3),
# PREFLIGHT=1 to measure every GPU and link first and end if one is slow. All other settings are in the config.
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
# The options above: one task a node, which starts the node's processes; all of the node's memory; one log for all
# requeues.
#
# Early ends of a run:
# - Time limit: 20 minutes before it, this script (B:) gets SIGTERM and asks every process to stop. A step, an evaluation
#   and a save must fit into that time; SLURM may be a minute early. --time must be well over 20 minutes.
# - Preemption and `scancel`: SLURM signals the processes itself and kills them after the partition's GraceTime, or after
#   KillWait (default 30 s). A save that takes longer is lost; the run resumes from the checkpoint before it.
# - Node failure: --requeue lets SLURM start the job again.
#SBATCH --signal=B:TERM@1200
#SBATCH --requeue
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1
config=${1:?usage: sbatch --nodes=N launch/slurm.sh CONFIG.yaml [a.b=value …]}
shift
RUN_DIR=${RUN_DIR:-runs/$(basename "$config" .yaml)}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
failures=0 stop_requests=0

# scancel signals every process of every node; `kill` of srun would end the step by force.
trap 'stop_requests=$((stop_requests + 1)); scancel --signal=TERM "$SLURM_JOB_ID"' TERM

every_node() { # every_node SCRIPT [ARGUMENT…]: run it on all nodes; returns the highest exit code
    # --cpus-per-task: srun would give the task one core. --wait: when one node has ended, the others get two minutes;
    # otherwise they would wait in a collective for a node that crashed.
    srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=0 --wait=120 \
        python launch/node.py --nodes "$SLURM_JOB_NUM_NODES" --head "$head" --processes "${PROCESSES:-8}" \
        --id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$failures" --run-dir "$RUN_DIR" "$@" &
    local step=$! before code
    while :; do
        before=$stop_requests
        wait "$step"
        code=$?
        [ "$stop_requests" = "$before" ] && return "$code" # otherwise a signal ended `wait`, not the step
    done
}

requeue_if_stopped() { # requeue_if_stopped CODE: requeue a job that was asked to stop; it resumes from its checkpoint
    [ "$1" = 75 ] || [ "$stop_requests" != 0 ] || return
    # A job in another state was cancelled, or preempted; SLURM requeues a preempted job itself.
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
    exit 75
}

if [ -n "${PREFLIGHT:-}" ]; then
    every_node tools/preflight.py --json "$RUN_DIR/preflight.json"
    code=$?
    requeue_if_stopped $code
    [ "$code" = 0 ] || exit "$code"
fi
while :; do
    every_node launch/pretrain.py "$config" "run.dir=$RUN_DIR" "$@"
    code=$?
    case $code in
    0 | 2 | 3) exit "$code" ;; # finished; user mistake; too many bad steps
    esac
    requeue_if_stopped $code
    failures=$((failures + 1))
    echo "slurm.sh: exit code $code; failure $failures, ${RESTARTS:-3} allowed" >&2
    [ "$failures" -le "${RESTARTS:-3}" ] || exit 1
done
