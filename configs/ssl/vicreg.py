"""VICReg (Bardes et al. 2022): views agree, features vary, features are not correlated.

  python -m distill_jax.main --config=configs/ssl/vicreg.py --workdir=runs/vicreg

No label is read in training. `eval/` has the accuracy of nearest neighbours and of a probe with few
labels, beside those of raw pixels and of the encoder before training.
`--config.objective.kwargs.variance=0 --config.objective.kwargs.covariance=0` leaves the agreement
alone, which collapses. `:fashion` takes clothes instead of digits, `:smoke` generated images and a
few steps.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "vicreg"
    config.objective.kwargs = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    config.roles.projector = self_supervised.head(128, (128, 128), last_bias=False)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.covariance": [0.0, 1.0, 4.0]}
