"""DINO (Caron et al. 2021): a student matches how its moving average assigns views to prototypes.

  python -m distill_jax.main --config=configs/ssl/dino.py --workdir=runs/dino

No label is read in training. What is evaluated is the moving average `target`: nearest neighbours
and a probe with few labels, beside raw pixels and the encoder before training. The student also
sees four small crops of each image. `prototype_entropy` in the metrics is 0 where one prototype
takes everything; a loss that stays at the logarithm of the number of prototypes says that
assignments are uniform. `:sinkhorn` balances assignments in place of centring, `:fashion` takes
clothes instead of digits, `:smoke` generated images and a few steps. A transformer of this size
collapses on so few images; `configs/ssl/ibot.py`, whose loss has this one in it, trains one.

As published: AdamW, heads without batch normalization, a bottleneck of their width before the
prototypes, which stay as they are in the first epoch. Far fewer prototypes than for ImageNet.
"""

from distill_jax.configs import common, self_supervised

PROTOTYPES = 128


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "sinkhorn")
    name = "fashion_mnist_5k" if "fashion" in options else "digits"
    config = self_supervised.base(name)
    config.objective.name = "dino"
    config.objective.kwargs = {
        "num_prototypes": PROTOTYPES,
        "centring": "sinkhorn" if "sinkhorn" in options else "mean",
        "freeze_prototypes": "1 epoch",
    }
    self_supervised.add_clusters(config, prototypes=PROTOTYPES)
    self_supervised.add_local_views(config, name)
    self_supervised.read_target(config)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.temperature": [0.02, 0.04, 0.07]}
