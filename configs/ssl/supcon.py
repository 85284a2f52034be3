"""SupCon (Khosla et al. 2020): views of a class attract each other. Labels are read.

  python -m distill_jax.main --config=configs/ssl/supcon.py --workdir=runs/supcon

Compare with `configs/ssl/look.py`, which leaves a class its parts. `:fashion` and `:smoke` as in
`simclr.py`.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "supcon"
    config.objective.kwargs = {"temperature": 0.1}
    config.roles.projector = self_supervised.head()
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.temperature": [0.07, 0.1, 0.3]}
