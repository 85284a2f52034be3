"""CACR (Zheng et al. 2021): attraction and repulsion, each with weights of its own.

  python -m distill_jax.main --config=configs/ssl/cacr.py --workdir=runs/cacr

Three views: with two the attraction has nothing to weigh; the paper has five. The control is
`--config.objective.kwargs.uniform=true`. The loss is negative and says nothing of collapse; see
`train/embedding/`. `:fashion` and `:smoke` as in `simclr.py`.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "cacr"
    config.objective.kwargs = {"t_plus": 1.0, "t_minus": 2.0, "uniform": False}
    config.data.transform_kwargs.views.count = 3
    config.roles.projector = self_supervised.head()
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {
        "objective.kwargs.uniform": [False, True],
        "objective.kwargs.t_minus": [0.9, 2.0],
    }
