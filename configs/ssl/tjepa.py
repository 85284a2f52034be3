"""T-JEPA (Thimonier et al. 2025): tokens of some columns of a table from those of others.

  python -m distill_jax.main --config=configs/ssl/tjepa.py --workdir=runs/tjepa

The table is digits, a column for each of 64 pixels, whose columns say much of each other; on tables
of few unrelated columns expect nothing over raw features. No label and no test row is read in
training. What is evaluated is the moving average `target`, its tokens side by side: nearest
neighbours and a probe with few labels, beside raw columns and the same network before training,
which is the control that matters: its tokens side by side are as wide.

`:adult` takes a census table, `:collapse` the student's own tokens, with gradient, as targets,
`:smoke` generated rows and a few steps.
"""

from configs import common, self_supervised
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "adult", "collapse", "smoke")
    config = self_supervised.base()
    config.data.train_transforms = ("columns", "column_masks")
    config.data.eval_transforms = ("columns",)
    config.data.transform_kwargs = {"column_masks": {"context": 0.3, "target": 0.3, "targets": 4}}
    if options & {"adult", "smoke"}:
        config.data.name = "adult"
        config.data.train_transforms, config.data.eval_transforms = ("column_masks",), ()
    config.objective.name = "tjepa"
    config.roles.student = config_lib.role(
        "tabular_transformer", num_classes=0, width=32, depth=2, heads=4, registers=1, pool="flat"
    )
    config.roles.predictor = config_lib.role("token_predictor", width=32, depth=1, heads=4)
    if "collapse" in options:
        config.objective.kwargs = {"moving_average": False, "stop_gradient": False}
    else:
        config.roles.target = self_supervised.average("student", schedule="linear")
        self_supervised.read_target(config)
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.0
    return smoke(config) if "smoke" in options else config


def smoke(config):
    """Shrinks the config to seconds: generated rows, a few steps."""
    config.data.name = "synthetic_table"
    config.data.kwargs = {"n_train": 256, "n_test": 64}
    config.batch_size = 32
    config.total.steps = 4
    config.optim.warmup.steps = 1
    config.eval.every.steps = 4
    config.log.every_steps = 2
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"roles.student.kwargs.registers": [0, 1, 4]}
