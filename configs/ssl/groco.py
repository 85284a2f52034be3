"""GroCo (Shvetsova et al. 2023): positives before the hardest negatives, by a sorting network.

  python -m distill_jax.main --config=configs/ssl/groco.py --workdir=runs/groco

With the paper's gentle comparators the loss stays far above 0. Of ten classes the hardest negatives
are mostly of the anchor's own: fewer of them are worth a try on such data. `:fashion` and `:smoke`
as in `simclr.py`.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "groco"
    config.objective.kwargs = {"negatives": 10, "steepness": 1.0}
    config.roles.projector = self_supervised.head()
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {
        "objective.kwargs.negatives": [5, 10, 20],
        "objective.kwargs.steepness": [1.0, 10.0],
    }
