"""Mugs (Zhou et al. 2022) without its local groups: contrast of instances and clusters in one.

  python -m distill_jax.main --config=configs/ssl/mugs.py --workdir=runs/mugs

No label is read in training. What is evaluated is the moving average `target`: nearest neighbours
and a probe with few labels, beside raw pixels and the encoder before training. `:instances` and
`:clusters` leave the other part without weight, `:fashion` takes clothes instead of digits,
`:smoke` generated images and a few steps.
"""

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib

PROTOTYPES, QUEUE, WIDTH = 64, 2048, 64


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "instances", "clusters")
    name = "fashion_mnist_5k" if "fashion" in options else "digits"
    config = self_supervised.base(name)
    config.objective.name = "mugs"
    config.objective.kwargs = {
        "num_prototypes": PROTOTYPES,
        "freeze_prototypes": "1 epoch",
        "queue": QUEUE,
        "dim": WIDTH,
        "instance_weight": 0.0 if "clusters" in options else 0.5,
        "cluster_weight": 0.0 if "instances" in options else 0.5,
    }
    self_supervised.add_clusters(config, prototypes=PROTOTYPES)
    self_supervised.add_local_views(config, name)
    self_supervised.read_target(config)
    head = {"features": WIDTH, "hidden": (128,)}
    config.roles.instance_projector = config_lib.role("projector", **head)
    config.roles.instance_predictor = config_lib.role("projector", **head)
    config.roles.target_instance_projector = self_supervised.average("instance_projector")
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.contrast_temperature": [0.1, 0.2, 0.4]}
