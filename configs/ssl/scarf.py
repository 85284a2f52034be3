"""SCARF (Bahri et al. 2022): a row of a table and the same row with cells of other rows agree.

  python -m distill_jax.main --config=configs/ssl/scarf.py --workdir=runs/scarf

No label and no test row is read in training. Nearest neighbours, a probe with few labels, and heads
of scikit-learn are measured beside raw columns and the network before training; gradient-boosted
trees on raw columns are the figure to beat. `:adult` takes a census table in place of letters,
`:smoke` generated rows and a few steps.

As published: one view is the row as it is, in the other 60 % of the cells are those of other rows,
and the temperature is 1. The network is that of `configs/ssl/tjepa.py`, not a perceptron.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "adult")
    config = self_supervised.table("adult" if "adult" in options else "letter")
    config.data.train_transforms = ("views",)
    config.data.transform_kwargs = {"views": self_supervised.CORRUPTED}
    config.objective.name = "simclr"
    config.objective.kwargs.temperature = 1.0
    config.roles.projector = self_supervised.head()
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.temperature": [0.1, 0.3, 1.0]}
