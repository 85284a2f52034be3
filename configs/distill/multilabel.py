"""Distillation of several labels at once: five facts of a person from a census form.

  python -m distill_jax.main --config=configs/distill/multilabel.py:teacher \\
      --workdir=runs/labels_teacher
  python -m distill_jax.main --config=configs/distill/multilabel.py --workdir=runs/labels \\
      --config.roles.teacher.init=runs/labels_teacher

Labels and distillation are of sigmoids, label by label (`distill_jax/objectives/_tasks.py`); the
data say that they are. `:teacher` trains the teacher; `:bilevel` learns a ratio of both terms for
each example from the triangle of student, teacher and labels, `:bilevel,losses` from the two losses
alone; `:focal` takes the focal loss of the labels. `:smoke` takes a few examples and steps.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "teacher", "bilevel", "losses", "focal")
    common.choose(options, ("teacher", "bilevel"))
    common.need(options, "losses", "bilevel")
    config = common.table("adult_labels")
    config.evaluators = {"multilabel": {}}
    config.eval.metric = "held_out/mean_average_precision"
    config.eval.every = "1 epoch"
    config.total = "5 epochs"
    if "focal" in options:
        config.objective.kwargs = {"focal_gamma": 2.0, "class_weights": "balanced"}
    if "teacher" in options:
        config.roles.student = config_lib.role("tabular_mlp", hidden=(256, 256))
        return config
    config.objective.name = "kd"
    config.objective.kwargs = {**config.objective.kwargs, "temperature": 2.0, "alpha": 0.7}
    config.roles.student = config_lib.role("tabular_mlp", hidden=(16,))
    config.roles.teacher = config_lib.role("tabular_mlp", hidden=(256, 256))
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/labels_teacher"
    if "bilevel" in options:
        del config.objective.kwargs["alpha"]
        common.bilevel(config, losses="losses" in options)
        if "losses" not in options:
            config.weighting.kwargs = {"blocks": ("sg", "tg", "st", "s", "t", "g")}
    return config
