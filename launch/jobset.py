"""Prints a Kubernetes JobSet that trains on several hosts and restarts after preemption.

  python launch/jobset.py --name=kd --image=REGISTRY/distill_jax:TAG --hosts=4 --claim=runs \\
      --resource=nvidia.com/gpu=8 -- --config=configs/distill/kd.py --workdir=/runs/kd |
      kubectl apply -f -

Each host has one pod, and each pod one process with all its devices. The persistent volume claim
`--claim` is mounted at /runs; all pods must be able to write to it. Processes find each other by
the address of pod 0, which the JobSet makes a host name (distill_jax/run/processes.py). A deleted
pod gets SIGTERM, saves and exits with 75. When a pod fails, all pods are recreated, up to
`--restarts` times, and the same command continues. Exit codes 2 (a user error) and 3 (a non-finite
loss) end the JobSet. For TPUs:
`--resource=google.com/tpu=4 --select=cloud.google.com/gke-tpu-topology=4x4 ...`.

The manifest is JSON, which kubectl accepts like YAML. It needs JobSet 0.6 or newer. This script
only prints; it sends nothing.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

WORKERS, PORT, FATAL = "workers", 8476, (2, 3)


def manifest(
    args: Sequence[str],
    *,
    name: str,
    image: str,
    hosts: int,
    claim: str,
    restarts: int = 50,
    grace: int = 120,
    resources: Mapping[str, str] | None = None,
    select: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the JobSet.

    Args:
      args: flags of `distill_jax.main`.
      name: of the JobSet; also the name of its network.
      image: container image with the package and its configs in the working directory.
      hosts: pods.
      claim: persistent volume claim for runs.
      restarts: after failures and preemption.
      grace: seconds between SIGTERM and the end of a pod.
      resources: limits of each pod by name.
      select: labels of the nodes.
    """
    environment = {
        "JAX_COORDINATOR_ADDRESS": f"{name}-{WORKERS}-0-0.{name}:{PORT}",
        "JAX_NUM_PROCESSES": str(hosts),
    }
    # JOB_COMPLETION_INDEX, the process id, is set by Kubernetes in an indexed job.
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        "command": ["python", "-m", "distill_jax.main", *args],
        "env": [{"name": key, "value": value} for key, value in environment.items()]
        if hosts > 1
        else [],
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
        "resources": {"limits": dict(resources or {})},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "nodeSelector": dict(select or {}),
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
    }
    job = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,  # one pod less is no pod at all: the JobSet restarts them together
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "train",
                        "operator": "In",
                        "values": list(FATAL),
                    },
                }
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [
                    {
                        "name": "fatal",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": WORKERS, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.rpartition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return key, value


def _name(text: str) -> str:
    # A pod's host name is <name>-workers-0-<index>, at most 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError("lower-case letters, digits and '-', at most 40")
    return text


def main(argv: Sequence[str]) -> int:
    """Prints the manifest of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", type=_name, required=True, help="name of the JobSet")
    parser.add_argument("--image", required=True, help="container image")
    parser.add_argument("--hosts", type=int, default=1, help="number of pods")
    parser.add_argument("--claim", required=True, help="persistent volume claim for /runs")
    parser.add_argument("--restarts", type=int, default=50, help="most restarts")
    parser.add_argument("--grace", type=int, default=120, help="seconds to save the state")
    parser.add_argument(
        "--resource", type=_pair, action="append", default=[], help="NAME=COUNT per pod"
    )
    parser.add_argument(
        "--select", type=_pair, action="append", default=[], help="NAME=VALUE, a node selector"
    )
    parser.add_argument("args", nargs="*", help="`--`, then flags of distill_jax.main")
    flags = parser.parse_args(argv)
    if flags.hosts < 1 or not flags.args:
        parser.error("needs --hosts of 1 or more and, behind --, flags of distill_jax.main")
    found = manifest(
        flags.args,
        name=flags.name,
        image=flags.image,
        hosts=flags.hosts,
        claim=flags.claim,
        restarts=flags.restarts,
        grace=flags.grace,
        resources=dict(flags.resource),
        select=dict(flags.select),
    )
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
