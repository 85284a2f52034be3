"""Supervised training on Fashion-MNIST: a baseline, and the teacher of `kd.py`.

  python -m distill_jax.main --config=configs/distill/supervised.py --workdir=runs/supervised

`:full` reads the whole of Fashion-MNIST from its idx files; `:table` takes a table, Adult;
`:pretrained` goes on from EfficientNet-Lite0 as trained on ImageNet, for colour images of 64 pixels
or more; `:smoke` takes seconds on generated data. `docs/your_data.md` has the commands for your own
data.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "full", "table", "pretrained")
    if common.choose(options, ("full", "table")) == "table":
        config = common.table_classifier("adult")
        config.roles.student = config_lib.role("tabular_mlp", hidden=(256, 128))
    else:
        config = common.images(full="full" in options)
        config.roles.student = config_lib.role("convnet", widths=(32, 64, 128))
    config.objective.name = "supervised"
    config.objective.kwargs = {"label_smoothing": 0.0}
    config.total = "20 epochs"
    if "pretrained" in options:
        config.roles.student = config_lib.role()  # the file tells which network it is of
        config.roles.student.init = "package:efficientnet_lite0"
        config.optim.name, config.optim.lr, config.optim.weight_decay = "adamw", 1e-3, 0.01
        config.total = "5 epochs"
    return config
