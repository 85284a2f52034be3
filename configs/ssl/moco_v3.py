"""MoCo v3 (Chen, Xie, He 2021): momentum contrast within the batch, with a predictor.

  python -m distill_jax.main --config=configs/ssl/moco_v3.py --workdir=runs/moco_v3

`:vit` takes a vision transformer with the paper's temperature for it; its patch projection learns,
where the paper freezes it. `:fashion` and `:smoke` as in `simclr.py`.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "vit")
    name, arch = "fashion_mnist_5k" if "fashion" in options else "digits", "convnet"
    if "vit" in options:
        arch = "vit"
    config = self_supervised.base(name, arch)
    config.objective.name = "moco_v3"
    config.objective.kwargs = {"temperature": 0.2 if "vit" in options else 1.0}
    config.roles.projector = self_supervised.head(last_norm=True)
    config.roles.predictor = self_supervised.head(last_norm=True)
    config.roles.target = self_supervised.average("student")
    config.roles.target_projector = self_supervised.average("projector")
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.temperature": [0.2, 0.5, 1.0]}
