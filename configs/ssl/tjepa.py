"""T-JEPA (Thimonier et al. 2025): tokens of some columns of a table from those of others.

  python -m distill_jax.main --config=configs/ssl/tjepa.py --workdir=runs/tjepa

The table is digits, a column for each of 64 pixels, whose columns say much of each other; on tables
of few unrelated columns expect nothing over raw features. No label and no test row is read in
training. What is evaluated is the moving average `target`, its tokens side by side: nearest
neighbours and a probe with few labels, beside raw columns and the same network before training,
which is the control that matters: its tokens side by side are as wide.

Heads of scikit-learn, a perceptron and boosted trees, read the same. `:adult` takes a census table,
`:letter` measurements of letters. Controls: `:no_average` predicts the student's own tokens,
`:collapse` lets them have a gradient too. `:smoke` takes generated rows and a few steps.
"""

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "adult", "letter", "no_average", "collapse")
    common.choose(options, ("no_average", "collapse"))
    name = common.choose(options, ("letter", "adult"), "digits")
    config = self_supervised.table(name)
    config.data.train_transforms = (*config.data.train_transforms, "column_masks")
    config.data.transform_kwargs = {"column_masks": {"context": 0.3, "target": 0.3, "targets": 4}}
    config.objective.name = "tjepa"
    config.roles.predictor = config_lib.role("token_predictor", width=32, depth=1, heads=4)
    average = not options & {"no_average", "collapse"}
    stop = "collapse" not in options
    config.objective.kwargs = {"moving_average": average, "stop_gradient": stop}
    if average:
        config.roles.target = self_supervised.average("student", schedule="linear")
        self_supervised.read_target(config)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"roles.student.kwargs.registers": [0, 1, 4]}
