"""Barlow Twins (Zbontar et al. 2021): features of two views agree, and differ from each other.

  python -m distill_jax.main --config=configs/ssl/barlow_twins.py --workdir=runs/barlow_twins

No label is read in training. `eval/` has the accuracy of nearest neighbours and of a probe with few
labels, beside those of raw pixels and of the encoder before training. `:fashion` takes clothes
instead of digits, `:smoke` generated images and a few steps.

As published the projector is as wide as there is room for: here wider than the encoder and no wider
than the batch, beyond which the correlation cannot become the identity.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "barlow_twins"
    config.objective.kwargs = {"trade_off": 0.0051}
    config.roles.projector = self_supervised.head(128, (128, 128), last_bias=False)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.trade_off": [0.0051, 0.02, 0.08]}
