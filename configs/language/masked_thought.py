"""Masked thought: a solution is learned from its question and from a part of the lines before.

  python -m distill_jax.main --config=configs/language/masked_thought.py --workdir=runs/masked

On arithmetic chains (`data/arithmetic_chains.py`), whose every line a parser checks. The share of
hidden tokens rises to `data.transform_kwargs.masked_thought.rate` over two thirds of training;
`:plain` hides none. `:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common


def get_config(arg: str = ""):
    options = common.parse(arg, "plain")
    config = common.chains()
    config.total = "600 steps"
    if not options:
        config.data.train_transforms = ("next_token", "masked_thought")
        config.data.transform_kwargs.masked_thought = {"rate": 0.2, "ramp": 400}
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {
        "data.transform_kwargs.masked_thought.rate": [0.1, 0.2, 0.4],
        "optim.lr": [1.5e-3, 3e-3, 6e-3],
    }
