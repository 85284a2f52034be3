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
# install copies the repository, makes a virtual environment on every worker (with its own Python, because
# the Python of the runtime is older than 3.11) and, if NFS is set to SERVER:/SHARE, mounts it at
# /mnt/runs. All workers of a slice must see the workdir. run starts the program on all workers.
# watch runs it until it is done or exits with 2 or 3 (launch/README.md). After any other exit code it
# runs the same command again, which continues; if the TPU was preempted or is gone, it makes a new one.
# It gives up after ATTEMPTS. stop asks the program to save and exit; stop watch first.
# Optional: PROJECT, SPOT=1, NFS, ATTEMPTS (20). DRY_RUN=1 prints the commands.

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
    # Joined by &&: within a condition, as watch calls it, errexit is off.
    archive=$(mktemp -d)/distill_jax.tar.gz &&
        do_ git archive --format=tar.gz --prefix=distill_jax/ --output="$archive" HEAD &&
        do_ gcloud compute tpus tpu-vm scp "$archive" "$TPU:distill_jax.tar.gz" "${where[@]}" \
            --worker=all &&
        on_all "tar xzf distill_jax.tar.gz && cd distill_jax &&
            PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&
            python3 -m uv venv --quiet --clear --seed --python 3.11 .venv &&
            .venv/bin/pip install --quiet -c constraints.txt -e . 'jax[tpu]'" &&
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

# Prints the state; where it stays READY, as it may for a while after a preemption, in two minutes.
settled() {
    local found i
    for ((i = 0; i < 12; i++)); do
        found=$(state)
        if [[ $found != READY ]]; then break; fi
        sleep 10
    done
    echo "$found"
}

watch() {
    local attempt code found bare=
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
        found=$(state)
        if [[ $found == READY && -n $bare ]]; then
            if ! install; then
                sleep 60
                continue
            fi
            bare=
        fi
        if [[ $found == READY ]]; then
            code=0
            train "$@" || code=$?
            case $code in
                0) return 0 ;;
                2 | 3)
                    echo "the program ended with $code; its output says why" >&2
                    return "$code"
                    ;;
            esac
            found=$(settled)
            if [[ $found == READY ]]; then
                echo "the program ended with $code; again ($attempt of $ATTEMPTS)" >&2
                continue
            fi
        fi
        echo "the TPU is $found; making a new one ($attempt of $ATTEMPTS)" >&2
        if [[ $found != ABSENT ]]; then remove || true; fi
        # Spot capacity comes and goes: what fails now is tried again.
        bare=yes
        create || sleep 60
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
