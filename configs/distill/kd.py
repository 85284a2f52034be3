"""Classical knowledge distillation (Hinton et al. 2015) on Fashion-MNIST.

  python -m distill_jax.main --config=configs/distill/supervised.py --workdir=runs/supervised
  python -m distill_jax.main --config=configs/distill/kd.py --workdir=runs/kd \\
      --config.roles.teacher.init=runs/supervised

The teacher is the best checkpoint, by held-out accuracy, of the run in `roles.teacher.init`.
`:full`, `:table` and `:smoke` as in `supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "full", "table")
    if common.choose(options, ("full", "table")) == "table":
        config = common.table_classifier("adult")
        config.roles.student = config_lib.role("tabular_mlp", hidden=(16,))
        config.roles.teacher = config_lib.role("tabular_mlp", hidden=(256, 128))
    else:
        config = common.images(full="full" in options)
        config.roles.student = config_lib.role("convnet", widths=(8, 16, 32))
        config.roles.teacher = config_lib.role("convnet", widths=(32, 64, 128))
    config.objective.name = "kd"
    config.objective.kwargs = {"temperature": 4.0, "alpha": 0.9}
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/supervised"
    config.evaluators.agreement = {}
    config.total = "20 epochs"
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {
        "objective.kwargs.temperature": [1.0, 4.0, 8.0],
        "objective.kwargs.alpha": [0.1, 0.5, 0.9],
    }
