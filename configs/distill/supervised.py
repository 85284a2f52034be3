"""Supervised training on Fashion-MNIST: a baseline, and the teacher of `kd.py`.

  python -m distill_jax.main --config=configs/distill/supervised.py --workdir=runs/supervised

`:full` reads the whole of Fashion-MNIST from its idx files; `:smoke` takes seconds on generated
images.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "full")
    config = common.images(full="full" in options)
    config.objective.name = "supervised"
    config.objective.kwargs = {"label_smoothing": 0.0}
    config.roles.student = config_lib.role("convnet", widths=(32, 64, 128))
    config.total = "20 epochs"
    return config
