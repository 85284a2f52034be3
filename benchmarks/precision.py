"""Test accuracy of small networks trained in bfloat16 against float32, five seeds each.

  python benchmarks/precision.py --out=benchmarks/results/precision.json

A ConvNet with batch norm and a vision transformer learn the digits of scikit-learn from their
labels. Differences are paired by seed: initialization and order of examples are the same.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import _record

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnet": ("convnet", {"widths": (16, 32)}),
    "vit": ("vit", {"width": 48, "depth": 4, "heads": 3, "patch_size": 2}),
}
SEEDS = 5


def get_config(net: str) -> Any:
    """Returns the study of one network."""
    from distill_jax.run import config as config_lib

    config = config_lib.base()
    config.data.name, config.objective.name = "digits", "supervised"
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    kind, kwargs = NETS[net]
    config.roles.student = config_lib.role(kind, **kwargs)
    config.optim.name, config.optim.lr = "adamw", 1e-3
    config.batch_size, config.total, config.eval.every = 64, "20 epochs", "5 epochs"
    config.log.tensorboard, config.evaluators = False, {"classification": {}}
    config.study.arms = {"float32": {}, "bfloat16": {"precision": "bfloat16"}}
    config.study.reference, config.study.seeds = "float32", tuple(range(SEEDS))
    config.study.title = f"Precision: {net}"
    return config


def measure(net: str) -> dict[str, Any]:
    """Runs one study and returns accuracies by arm and seed, and the paired difference."""
    from distill_jax.report import statistics

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "distill_jax.main", "--mode=study"]
        command += [f"--config={__file__}:{net}", f"--workdir={folder}/study"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=env, stdout=sys.stderr)
        study = json.loads(pathlib.Path(folder, "study", "study.json").read_text())
    accuracy = {
        arm: {seed: run["metrics"]["test/accuracy"] for seed, run in entry["seeds"].items()}
        for arm, entry in study["arms"].items()
    }
    pairs = [accuracy["bfloat16"][seed] - accuracy["float32"][seed] for seed in accuracy["float32"]]
    difference = statistics.estimate(pairs)
    return {
        "test/accuracy": accuracy,
        "means": {arm: statistics.estimate(list(v.values())).mean for arm, v in accuracy.items()},
        "bfloat16_minus_float32": {
            "mean": difference.mean,
            "se": difference.se,
            "interval": difference.interval,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report = {
        "results": {net: measure(net) for net in NETS},
        "seeds": list(range(SEEDS)),
        "versions": _record.versions("jax", "jaxlib", "flax", "optax"),
    }
    _record.write(report, options.out, show=True)


if __name__ == "__main__":
    main()
