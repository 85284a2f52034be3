"""BYOL (Grill et al. 2020): one view predicts what a moving average says of another.

  python -m distill_jax.main --config=configs/ssl/byol.py --workdir=runs/byol

No label is read in training. `eval/` has the accuracy of nearest neighbours and of a probe with few
labels, beside those of raw pixels and of the encoder before training. `embedding/` in the metrics
says whether representations stay apart. `:fashion` takes clothes instead of digits,
`:no_predictor` leaves the predictor out, `:smoke` takes generated images and a few steps.

An average remembers about 1 / (1 - decay) steps, 100 here: the published 0.996 is for 10^5 steps.
The predictor's ablation shows in long runs only, as the average barely moves in short ones.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "no_predictor")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "byol"
    config.roles.projector = self_supervised.head()
    if "no_predictor" in options:
        config.objective.kwargs = {"predictor": False}
    else:
        config.roles.predictor = self_supervised.head()
    config.roles.target = self_supervised.average("student")
    config.roles.target_projector = self_supervised.average("projector")
    config.roles.target_projector.decay = config.roles.target.get_ref("decay")
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"roles.target.decay": [0.9, 0.97, 0.99], "optim.lr": [1e-3, 2e-3]}
