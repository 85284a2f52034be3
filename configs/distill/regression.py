"""Distillation of a real value: how diabetes progressed within a year, from ten measurements.

  python -m distill_jax.main --config=configs/distill/regression.py:teacher \\
      --workdir=runs/value_teacher
  python -m distill_jax.main --config=configs/distill/regression.py --workdir=runs/value \\
      --config.roles.teacher.init=runs/value_teacher

The student learns from the label and from the value that the teacher gives, both by squared error
in standard deviations of the training part (`distill_jax/objectives/_tasks.py`); `:huber` takes
Huber's loss of both. `:teacher` trains the teacher; `:bilevel` learns a weight of each term for
each example from the two losses. `:smoke` takes a few examples and steps.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "teacher", "bilevel", "huber")
    common.choose(options, ("teacher", "bilevel"))
    config = common.table("diabetes")
    config.data.held_out = 0.2
    config.batch_size = 64
    config.optim.lr = 0.01
    config.optim.weight_decay = 1e-2
    config.evaluators = {"regression": {}}
    config.eval.metric, config.eval.mode = "held_out/rmse", "min"
    config.eval.every = "10 epochs"
    config.total = "60 epochs"
    loss = "huber" if "huber" in options else "squared_error"
    config.objective.kwargs = {"regression_loss": loss}
    if "teacher" in options:
        config.roles.student = config_lib.role("mlp", hidden=(64, 64))
        return config
    config.objective.name = "kd"
    config.objective.kwargs = {"regression_loss": loss, "alpha": 0.7}
    config.roles.student = config_lib.role("mlp", hidden=(4,))
    config.roles.teacher = config_lib.role("mlp", hidden=(64, 64))
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/value_teacher"
    if "bilevel" in options:
        config.objective.kwargs = {"regression_loss": loss}
        common.bilevel(config, losses=True)
        config.weighting.loss_terms = (loss, "distillation")
        config.bilevel.outer_loss = (loss,)
    return config
