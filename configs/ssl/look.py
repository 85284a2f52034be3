"""LOOK (Feng et al. 2022): the label of most of the nearest neighbours. Labels are read.

  python -m distill_jax.main --config=configs/ssl/look.py --workdir=runs/look

The number of neighbours goes with the batch and the number of classes: as many as a class has views
in the batch, or fewer. `:fashion` and `:smoke` as in `simclr.py`.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "look"
    config.objective.kwargs = {"neighbours": 20, "temperature": 0.1}
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.neighbours": [5, 20, 100]}
