"""I-JEPA (Assran et al. 2023): tokens of some blocks from the rest of an image.

  python -m distill_jax.main --config=configs/ssl/ijepa.py --workdir=runs/ijepa

No label is read in training. What is evaluated is the moving average `target`, the mean of its
tokens: nearest neighbours and a probe with few labels, beside raw pixels and the encoder before
training. A loss that falls, rises and slowly falls is normal; look at `embedding/target` in the
metrics for collapse. Controls: `:no_average` predicts the student's own tokens, `:collapse` lets
them have a gradient too, `:no_norm` predicts tokens as they are. `:fashion` takes clothes instead
of digits, `:smoke` generated images and a few steps.

As published: four blocks of 15 to 20 % (on a grid of 4x4 that is 2x2), standardized targets, crops
as the only augmentation, fixed positions, the decay of the average rising linearly from 0.996 to 1.
With four times the learning rate and an average of
0.99, targets of different images first become alike, and part again only later.
"""

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "no_average", "collapse", "no_norm")
    common.choose(options, ("no_average", "collapse"))
    name = "fashion_mnist_5k" if "fashion" in options else "digits"
    config = self_supervised.masked(name, "block_masks", targets=4)
    config.data.transform_kwargs.random_resized_crop.flip = 0.0
    config.optim.lr = 5e-4
    config.objective.name = "ijepa"
    average = not options & {"no_average", "collapse"}
    config.objective.kwargs = {
        "target_norm": "no_norm" not in options,
        "moving_average": average,
        "stop_gradient": "collapse" not in options,
    }
    config.roles.predictor = config_lib.role(
        "token_predictor", width=32, depth=2, heads=4, grid=(4, 4)
    )
    if average:
        config.roles.target = self_supervised.average("student", decay=0.996, schedule="linear")
        self_supervised.read_target(config)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"roles.target.decay": [0.99, 0.996, 0.999]}
