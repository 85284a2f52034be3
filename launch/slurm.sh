#!/bin/bash
# Trains under SLURM, one process a node with all its devices, and continues after preemption.
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh \
#       --config=configs/distill/kd.py --workdir=runs/kd
#
# Arguments are flags of distill_jax.main; options of sbatch come before the script. The workdir must be
# on a file system that all nodes see. Processes find each other by the variables of the SLURM step
# (distill_jax/run/processes.py). 120 seconds before the time limit, and at preemption, the program gets
# SIGTERM, saves and exits with 75. The job is then requeued. It is also requeued after 143, a signal
# that came before there was anything to save. Any other exit code ends the job. PYTHON is the path of
# the interpreter. DRY_RUN=1 prints the commands.
#
#SBATCH --job-name=distill_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@120

set -u

PYTHON=${PYTHON:-.venv/bin/python}
PREEMPTED=75
TERMINATED=143 # the signal came before the program could handle it

run() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch [OPTIONS] launch/slurm.sh --config=FILE --workdir=DIR ..." >&2
    exit 2
fi

# The signal is for the step. This shell must outlive it to requeue the job.
trap ':' TERM

# --wait: ends a process that hangs in a collective after its peers have ended.
# --kill-on-bad-exit=0: processes that save together must not end each other meanwhile.
run srun --kill-on-bad-exit=0 --wait=120 "$PYTHON" -m distill_jax.main "$@"
code=$?

if [[ $code -eq $PREEMPTED || $code -eq $TERMINATED || -n ${DRY_RUN:-} ]]; then
    run scontrol requeue "${SLURM_JOB_ID:-JOB_ID}"
fi
exit "$code"
