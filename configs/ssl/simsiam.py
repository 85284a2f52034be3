"""SimSiam (Chen, He 2021): one view predicts another, whose gradient is stopped.

  python -m distill_jax.main --config=configs/ssl/simsiam.py --workdir=runs/simsiam

No label is read in training. `eval/` has the accuracy of nearest neighbours and of a probe with few
labels, beside those of raw pixels and of the encoder before training. It is the method that
collapses most easily: `embedding/` in the metrics says whether it does, and
`--config.objective.kwargs.stop_gradient=False` shows what that looks like. `:fashion` takes clothes
instead of digits, `:smoke` generated images and a few steps.

As published: SGD with momentum, three layers in the projector, the last normalized without gain and
shift, and a predictor with a narrow hidden layer.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "simsiam"
    config.roles.projector = self_supervised.head(128, (128, 128), last_norm=True)
    config.roles.predictor = self_supervised.head(128, (32,))
    config.optim.name = "momentum"
    config.optim.lr = 0.1
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [0.03, 0.1, 0.3]}
