"""LeJEPA (Balestriero, LeCun 2025): views agree, and embeddings are an isotropic normal cloud.

  python -m distill_jax.main --config=configs/ssl/lejepa.py --workdir=runs/lejepa

No label is read in training; no moving average, no stopped gradient. `eval/` has the accuracy of
nearest neighbours and of a probe with few labels, beside those of raw pixels and of the encoder
before training. The published small-scale numbers were not reached by others who tried. `:vit`
takes a transformer instead of a convolutional network, `:collapse` weighs isotropy by 0, a control,
`:fashion` takes clothes instead of digits, `:smoke` generated images and a few steps.

As published: two global views and small crops, a projector with batch normalization, a weight of
0.05. Narrower, with fewer directions.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "vit", "collapse")
    name = "fashion_mnist_5k" if "fashion" in options else "digits"
    config = self_supervised.base(name, "vit" if "vit" in options else "convnet")
    if "vit" in options:  # small crops have another grid of patches
        config.roles.student.kwargs.positions = "fourier"
    config.objective.name = "lejepa"
    config.objective.kwargs = {"trade_off": 0.0 if "collapse" in options else 0.05}
    config.roles.projector = self_supervised.head(features=32)
    self_supervised.add_local_views(config, name)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.trade_off": [0.02, 0.05, 0.1]}
