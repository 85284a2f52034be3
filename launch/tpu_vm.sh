#!/bin/bash
# Trains on a Cloud TPU VM or slice with plain gcloud.
#
#   export TPU=distill ZONE=us-central2-b ACCELERATOR=v4-32 VERSION=tpu-ubuntu2204-base
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh install
#   launch/tpu_vm.sh run --config=configs/distill/kd.py --workdir=/mnt/runs/kd
#   launch/tpu_vm.sh watch --config=configs/distill/kd.py --workdir=/mnt/runs/kd
#   launch/tpu_vm.sh delete
#
# install copies the repository, makes a virtual environment on every worker and, where NFS is set to
# SERVER:/SHARE, mounts it at /mnt/runs. The workdir must be seen by all workers of a slice. run
# starts the program on all workers. watch runs it, and while the TPU is preempted or gone makes a new
# one and runs the same command, which continues; it gives up after ATTEMPTS. stop asks the program
# to save and end. Optional: PROJECT, SPOT=1, NFS, ATTEMPTS (20). DRY_RUN=1 prints the commands.

set -eu

usage() {
    echo "usage: launch/tpu_vm.sh create|install|run|watch|stop|delete [flags of distill_jax.main]" >&2
    exit 2
}

[[ $# -ge 1 ]] || usage
action=$1
shift

: "${TPU:?name of the TPU}" "${ZONE:?zone, such as us-central2-b}"
ATTEMPTS=${ATTEMPTS:-20}
where=("--zone=$ZONE")
if [[ -n ${PROJECT:-} ]]; then where+=("--project=$PROJECT"); fi

do_() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_all() {
    do_ gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"
}

state() {
    gcloud compute tpus tpu-vm describe "$TPU" "${where[@]}" --format='value(state)' 2>/dev/null ||
        echo ABSENT
}

create() {
    : "${ACCELERATOR:?type, such as v4-32}" "${VERSION:?runtime, such as tpu-ubuntu2204-base}"
    local options=("--accelerator-type=$ACCELERATOR" "--version=$VERSION")
    if [[ -n ${SPOT:-} ]]; then options+=(--spot); fi
    do_ gcloud compute tpus tpu-vm create "$TPU" "${where[@]}" "${options[@]}"
}

install() {
    local archive
    archive=$(mktemp -d)/distill_jax.tar.gz
    do_ git archive --format=tar.gz --prefix=distill_jax/ --output="$archive" HEAD
    do_ gcloud compute tpus tpu-vm scp "$archive" "$TPU:distill_jax.tar.gz" "${where[@]}" --worker=all
    on_all "tar xzf distill_jax.tar.gz && cd distill_jax && python3 -m venv .venv &&
        .venv/bin/pip install --quiet -c constraints.txt -e . 'jax[tpu]'"
    if [[ -n ${NFS:-} ]]; then
        on_all "sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/runs &&
            (mountpoint -q /mnt/runs || sudo mount -t nfs $(printf %q "$NFS") /mnt/runs)"
    fi
}

train() {
    [[ $# -ge 1 ]] || usage
    on_all "cd distill_jax && DISTILL_JAX_PROCESSES=tpu .venv/bin/python -m distill_jax.main$(
        printf ' %q' "$@"
    )"
}

remove() {
    do_ gcloud compute tpus tpu-vm delete "$TPU" "${where[@]}" --quiet
}

watch() {
    local attempt found
    if [[ -n ${DRY_RUN:-} ]]; then
        train "$@"
        echo "# and while the TPU is found preempted or gone, up to $ATTEMPTS times:"
        remove
        create
        install
        train "$@"
        return
    fi
    for ((attempt = 0; attempt <= ATTEMPTS; attempt++)); do
        if [[ $(state) == READY ]] && train "$@"; then return 0; fi
        found=$(state)
        if [[ $found == READY ]]; then
            echo "the program failed; its output says why" >&2
            return 1
        fi
        echo "the TPU is $found; making a new one ($attempt of $ATTEMPTS)" >&2
        if [[ $found != ABSENT ]]; then remove || true; fi
        # Spot capacity comes and goes: what fails now is tried again.
        if ! { create && install; }; then sleep 60; fi
    done
    echo "given up after $ATTEMPTS attempts" >&2
    return 75
}

case $action in
    create) create ;;
    install) install ;;
    run) train "$@" ;;
    watch) watch "$@" ;;
    stop) on_all "pkill -TERM -u \"\$USER\" -f 'python -m [d]istill_jax.main' || true" ;;
    delete) remove ;;
    *) usage ;;
esac
