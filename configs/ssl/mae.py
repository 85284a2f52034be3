"""MAE (He et al. 2022): pixels of hidden patches from a quarter of an image.

  python -m distill_jax.main --config=configs/ssl/mae.py --workdir=runs/mae

No label is read in training. `eval/` has the accuracy of nearest neighbours and of a probe with few
labels, beside those of raw pixels and of the encoder before training: frozen features of this
method are known to be weak, so fine-tune the encoder (`configs/ssl/finetune.py`) before judging it.
`:fashion` takes clothes instead of digits, `:smoke` generated images and a few steps.

As published: three quarters hidden, crops as the only augmentation, flipped at random where they
show clothes, fixed positions, pixels standardized patch by patch, AdamW with b2 = 0.95. Patches of
digits are often flat: `epsilon` is the square of a tenth of the deviation of pixels, in place of
1e-6.
"""

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    name = "fashion_mnist_5k" if "fashion" in options else "digits"
    config = self_supervised.masked(name, "random_masks", ratio=0.75)
    config.objective.name = "mae"
    config.objective.kwargs = {"norm_pix": True, "epsilon": 0.01}
    config.roles.decoder = config_lib.role(
        "token_predictor", width=64, depth=2, heads=4, grid=(4, 4)
    )
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"data.transform_kwargs.random_masks.ratio": [0.5, 0.625, 0.75]}
