"""Runs that kills.py and elastic.py interrupt, and how two of them are compared."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]

MLP = {"roles.student.model": "mlp", "roles.student.kwargs.hidden": "(16,)"}
KD = "configs/distill/kd.py:smoke"

SCENARIOS: dict[str, tuple[str, Mapping[str, object]]] = {
    "kd_convnet": (KD, {}),
    "ema_teacher": (
        KD,
        {
            **MLP,
            "roles.teacher.model": "",
            "roles.teacher.frozen": False,
            "roles.teacher.init": "none",
            "roles.teacher.ema_of": "student",
            "roles.teacher.decay": 0.9,
            "optim.name": "adamw",
            "optim.lr": 0.003,
        },
    ),
    "ps_kd_table": (
        "configs/distill/supervised.py:smoke",
        {**MLP, "objective.name": "ps_kd", "roles.student.kwargs.batch_norm": True},
    ),
    "crd_bank": (
        KD,
        {
            **MLP,
            "objective.name": "crd",
            "objective.kwargs.negatives": "memory",
            "objective.kwargs.num_negatives": 64,
            "objective.kwargs.dim": 16,
            **{
                f"roles.{role}.{key}": value
                for role in ("projector", "projector_of_teacher")
                for key, value in (("model", "projector"), ("kwargs.features", 16))
            },
        },
    ),
    "tgeo_bilevel": ("configs/bilevel/tgeo_kd.py:smoke", MLP),
}
"""Name: config and what it changes. Between them they have every part of a state: parameters, two
optimizers, a moving average, batch statistics, a table and a bank of a row for each example."""

COMMON = {"log.tensorboard": False, "log.every_steps": 5, "eval.every": 10}


def flags(name, workdir, *, teacher, changes):
    """Returns the arguments of `distill_jax.main` for a scenario."""
    config, own = SCENARIOS[name]
    values = {"roles.teacher.init": str(teacher), **COMMON, **own, **changes}
    if name == "ps_kd_table":
        del values["roles.teacher.init"]
    return [
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{path}={value}" for path, value in values.items()),
    ]


def train_teacher(folder):
    subprocess.run(
        [
            *(sys.executable, "-m", "distill_jax.main"),
            *("--config=configs/distill/supervised.py:smoke", f"--workdir={folder}"),
            "--config.log.tensorboard=false",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        timeout=600,
    )


def rows(workdir):
    """Complete lines of the log, without times."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def result(workdir):
    """What a run says of itself, without times."""
    found = json.loads((pathlib.Path(workdir) / "result.json").read_text())
    return {k: v for k, v in found.items() if k != "compute"}


def arrays(folder):
    """Every array of a step, by item and path, as it lies on the disk."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    found = {}
    for item in sorted(p for p in pathlib.Path(folder).iterdir() if p.is_dir()):
        if item.name == "meta":
            continue
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(epath.Path(item)).tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        read = handler.restore(
            epath.Path(item), args=ocp.args.PyTreeRestore(restore_args=restore_args)
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(read)[0]:
            found[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def step_folders(workdir):
    """The finished steps of a run."""
    folder = pathlib.Path(workdir) / "checkpoints"
    found = [p for p in folder.glob("*") if p.name.isdigit() and (p / "digest.json").exists()]
    return {int(p.name): p for p in sorted(found, key=lambda p: int(p.name))}


def byte_equal(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and x.shape == b[k].shape and x.tobytes() == b[k].tobytes()
        for k, x in a.items()
    )
