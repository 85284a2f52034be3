"""iBOT (Zhou et al. 2022): DINO, and masked patches that match what the average says of them.

  python -m distill_jax.main --config=configs/ssl/ibot.py --workdir=runs/ibot

No label is read in training. What is evaluated is the moving average `target`: nearest neighbours
and a probe with few labels, beside raw pixels and the encoder before training. `prototype_entropy`
and `patch_prototype_entropy` in the metrics are 0 where one prototype takes everything. `:dinov2`
has the losses of DINOv2 (Oquab et al. 2023): assignments balanced over the batch, heads of their
own for patches, and KoLeo. `:fashion` takes clothes instead of digits, `:smoke` generated images
and a few steps.

As published: half of the views are masked, by blocks of 10 to 50 % of their patches; the class
token is the representation. Far fewer prototypes than for ImageNet. Not as published: a temperature
of 0.02 in place of 0.04, with which all assignments became uniform here within 50 steps.
"""

from distill_jax.configs import common, self_supervised

PROTOTYPES = 64


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion", "dinov2")
    name = "fashion_mnist_5k" if "fashion" in options else "digits"
    config = self_supervised.base(name, "vit")
    # Small crops have another grid of patches.
    config.roles.student.kwargs.update({"pool": "cls", "positions": "fourier", "mask_token": True})
    config.objective.name = "ibot"
    config.objective.kwargs = {
        "num_prototypes": PROTOTYPES,
        "freeze_prototypes": "1 epoch",
        "temperature": 0.02,
    }
    self_supervised.add_clusters(config, prototypes=PROTOTYPES)
    if "dinov2" in options:
        config.objective.kwargs.update(
            {"centring": "sinkhorn", "shared_head": False, "spread_weight": 0.1}
        )
        self_supervised.add_clusters(config, prototypes=PROTOTYPES, role="patch_")
    self_supervised.add_local_views(config, name)
    patch_size = config.roles.student.kwargs.patch_size
    config.data.train_transforms = (*config.data.train_transforms, "patch_masks")
    config.data.transform_kwargs.patch_masks = {"patch_size": patch_size}
    self_supervised.standardize(config)
    self_supervised.read_target(config)
    config.optim.lr = 5e-4
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.temperature": [0.02, 0.04, 0.07]}
