"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023) on pairs that an image makes by itself.

  python -m distill_jax.main --config=configs/ssl/clip.py --workdir=runs/clip
  python -m distill_jax.main --config=configs/ssl/clip.py:sigmoid,halves --workdir=runs/siglip

A pair is two views of an image; with `:halves` its upper and lower half, which show different
things. `:sigmoid` asks of each pair by itself whether it is one. `train/scale` is one over the
learned temperature. `:fashion` and `:smoke` as in `simclr.py`.
"""

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "sigmoid", "halves", "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "clip"
    config.objective.kwargs = {"pairing": "sigmoid" if "sigmoid" in options else "softmax"}
    if "halves" in options:
        config.data.train_transforms = ("scale", "halves")
        del config.data.transform_kwargs["views"]
    config.roles.projector = self_supervised.head()
    start = {"initial": 0.1, "bias": -10.0} if "sigmoid" in options else {"initial": 0.07}
    config.roles.temperature = config_lib.role("temperature", **start)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"batch_size": [64, 256, 512]}
