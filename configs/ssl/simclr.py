"""SimCLR (Chen et al. 2020): two views of an image against all others of the batch.

  python -m distill_jax.main --config=configs/ssl/simclr.py --workdir=runs/simclr

No label is read in training. `eval/` has the accuracy of nearest neighbours and of a probe with few
labels, beside those of raw pixels and of the encoder before training. `:fashion` takes clothes
instead of digits, `:smoke` generated images and a few steps. Where the batch is too large for one
table of similarities, `objective.kwargs.form=ring` keeps a block of it on each device.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "simclr"
    config.objective.kwargs = {"temperature": 0.2}
    config.roles.projector = self_supervised.head()
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.temperature": [0.1, 0.2, 0.5]}
