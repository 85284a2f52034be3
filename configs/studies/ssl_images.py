"""The table of self-supervised methods on small images: few labels, and nearest neighbours.

  python -m distill_jax.main --mode=study --config=configs/studies/ssl_images.py \\
      --workdir=runs/ssl_images

Digits of 8 x 8 pixels, 1,296 of them without labels; 600 steps of batch 128 for every arm, networks
of one shape for each of two groups: a ConvNet, and a ViT with 16 patches for methods that mask
patches. Frozen embeddings, of the moving average where the method is evaluated on it, are judged by
a linear probe of 1, 2, 5 and 10 labels a class and by 20 nearest neighbours; raw pixels and the
encoder before training are measured beside each. No state is chosen: the last counts. Objective,
heads, views and optimizer of an arm are those of its config in `configs/ssl/`, not tuned for this
table.

Further studies of the same kind, each a claim of a paper:
`:imbalanced`, CACR against SimCLR where the largest class is twenty times the smallest;
`:parity` and `:halves`, LOOK against SupCon and cross-entropy where training sees two coarse
classes and the probe asks for ten. `:smoke` takes seconds on generated images.
"""

import importlib

from distill_jax.configs import common, self_supervised

CONVNET = (
    "simclr",
    "moco",
    "moco_v3",
    "cacr",
    "groco",
    "clip",
    "byol",
    "simsiam",
    "barlow_twins",
    "vicreg",
    "lejepa",
    "dino",
)
VIT = ("ibot", "mae", "ijepa")
GROUPS = {"parity": (0, 1) * 5, "halves": (0,) * 5 + (1,) * 5}


def method(name: str, reference, **kwargs) -> dict:
    """The arm of a method: what its config changes in the study's."""
    config = importlib.import_module(f"distill_jax.configs.ssl.{name}").get_config()
    config.objective.kwargs.update(kwargs)
    for key in ("total", "eval", "batch_size", "log"):
        config[key] = reference[key]
    return self_supervised.as_arm(config, reference)


def views(arm: dict, count: int, chain) -> dict:
    """The arm with so many views of each image."""
    kwargs = {"views": {"count": count, "transforms": chain}}
    return {**arm, "data": {"train_transforms": ("scale", "views"), "transform_kwargs": kwargs}}


def coarser(arm: dict, groups: tuple[int, ...]) -> dict:
    """The arm with labels of groups of classes in training."""
    data = arm.get("data", {})
    kwargs = {**data.get("transform_kwargs", {}), "coarse_labels": {"groups": groups}}
    used = (*data.get("train_transforms", ("scale",)), "coarse_labels")
    return {**arm, "data": {**data, "train_transforms": used, "transform_kwargs": kwargs}}


def get_config(arg: str = ""):
    options = common.parse(arg, "imbalanced", *GROUPS)
    config = self_supervised.base("digits")
    config.eval.every = config.total
    config.objective.name = "simclr"
    chain = config.data.transform_kwargs.views.transforms
    # What makes views and masks is each arm's own.
    del config.data.transform_kwargs["views"]
    config.data.train_transforms = ("scale",)
    reference = config.copy_and_resolve_references()
    simclr = method("simclr", reference)
    vit = self_supervised.as_arm(self_supervised.base("digits", "vit"), reference)["roles"]
    three = {
        "simclr_3_views": views(simclr, 3, chain),
        "cacr": views(method("cacr", reference), 3, chain),
    }
    coarse = GROUPS.get(common.choose(options, ("imbalanced", *GROUPS)))
    if "imbalanced" in options:
        config.data.corrupt.imbalance = 20.0
        uniform = method("cacr", reference, uniform=True)
        arms = {**three, "cacr_uniform": views(uniform, 3, chain)}
        config.study.reference = "simclr_3_views"
    elif coarse is not None:
        weak = dict(chain)  # one view of each image
        cross_entropy = {
            "objective": {"name": "supervised"},
            "data": {"train_transforms": ("scale", *weak), "transform_kwargs": weak},
            "roles": {"student": {"kwargs": {"num_classes": 10}}},
        }
        arms = {
            "cross_entropy": cross_entropy,
            "supcon": method("supcon", reference),
            "look": method("look", reference),
        }
        arms = {"simclr": simclr, **{name: coarser(arm, coarse) for name, arm in arms.items()}}
        config.study.reference = "supcon"
    else:
        arms = {name: method(name, reference) for name in (*CONVNET, *VIT)}
        arms |= three
        arms["simclr_vit"] = {**simclr, "roles": {**simclr.get("roles", {}), **vit}}
        config.study.reference = "simclr"
    config.study.arms = arms
    config.study.metric = "test/few_label_accuracy_5_per_class"
    config.study.seeds = (1, 2, 3, 4, 5)
    config.study.title = "Self-supervised methods on digits" + (
        ", classes of unequal size"
        if "imbalanced" in options
        else ", trained on coarser classes"
        if coarse
        else ""
    )
    return config
