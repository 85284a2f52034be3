"""What the configs of self-supervised pretraining share: data, views, encoders and evaluation."""

from distill_jax.run import config as config_lib

SIZES = {"digits": 8, "fashion_mnist_5k": 28, "fashion_mnist": 28}

# Half of the area at least: on 8x8 digits smaller crops no longer show which digit it is.
DIGITS = (
    ("rotation", {"degrees": 20.0}),
    ("random_resized_crop", {"area": (0.5, 1.0), "flip": 0.0}),
    ("color_jitter", {"brightness": 0.4, "contrast": 0.0}),
    ("gaussian_noise", {"std": 0.05}),
    ("random_erasing", {"probability": 0.5, "area": (0.05, 0.2)}),
)
CLOTHES = (
    ("random_resized_crop", {"area": (0.3, 1.0)}),
    ("color_jitter", {}),
    ("gaussian_blur", {"probability": 0.5, "sigma": (0.1, 1.5)}),
)
CORRUPTED = {"count": 2, "transforms": (), "second": (("feature_corruption", {"share": 0.6}),)}
VIEWS = {"digits": DIGITS, "fashion_mnist_5k": CLOTHES, "fashion_mnist": CLOTHES}


def base(name: str = "digits", arch: str = "convnet"):
    """A config of pretraining without an objective: the last state counts, no label is read.

    Args:
      name: "digits" or "fashion_mnist_5k".
      arch: of the encoder, the role `student`: "convnet", or "vit" with 16 patches.
    """
    config = config_lib.base()
    config.data.name = name
    config.data.train_transforms = ("scale", "views")
    config.data.eval_transforms = ("scale",)
    config.data.transform_kwargs.views = {"count": 2, "transforms": VIEWS[name]}
    config.batch_size = 128
    config.total = "600 steps"
    config.roles.student = encoder(arch, image_size=SIZES[name])
    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.weight_decay = 1e-4
    config.optim.warmup = "30 steps"
    config.evaluators = {"knn": {}, "few_label_probe": {}, "representation": {}}
    config.eval.every = "300 steps"
    config.eval.metric = "held_out/knn_accuracy"
    config.log.every_steps = 50
    return config


def table(name: str = "letter"):
    """A config like `base` on a table, with a transformer over columns and heads of scikit-learn.

    Args:
      name: "letter", "adult", or "digits", whose 64 pixels are the columns.
    """
    config = base()
    config.data.name = name
    columns = ("columns",) if name == "digits" else ()
    config.data.train_transforms = config.data.eval_transforms = columns
    config.data.transform_kwargs = {}
    # All tokens side by side are the representation, as in T-JEPA.
    sizes = {"width": 32, "depth": 2, "heads": 4, "registers": 1, "pool": "flat"}
    config.roles.student = config_lib.role("tabular_transformer", num_classes=0, **sizes)
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.0
    config.evaluators.downstream = {}
    config.eval.every = config.total  # heads take longer than the steps between
    return config


def encoder(arch: str, *, image_size: int, **kwargs):
    """The role of an encoder: a small network without a head."""
    if arch == "convnet":
        return config_lib.role("convnet", **{"num_classes": 0, "widths": (16, 32, 64), **kwargs})
    sizes = {"width": 64, "depth": 4, "heads": 4, "patch_size": image_size // 4, "pool": "mean"}
    return config_lib.role("vit", **{"num_classes": 0, **sizes, **kwargs})


def head(features: int = 64, hidden: tuple[int, ...] = (128,), **kwargs):
    """The role of a projection or prediction head with batch normalization."""
    return config_lib.role("projector", features=features, hidden=hidden, batch_norm=True, **kwargs)


def average(source: str, *, decay: float = 0.99, schedule: str = "cosine"):
    """The role of a moving average of another role."""
    role = config_lib.role()
    role.ema_of = source
    role.decay = decay
    role.decay_schedule = schedule
    return role


def forgetting(steps: int) -> float:
    """Returns the first decay of an average, rising to 1 in so many steps, that forgets its start.

    A decay that rises from d to 1 linearly or by a cosine leaves `exp(-(1 - d) steps / 2)` of the
    network before training in the average: with the published 0.996 nothing in 188,000 steps, but
    0.3 in 600. Here it is `exp(-15)`.
    """
    return 1 - 30 / steps


def add_clusters(config, *, prototypes: int, role: str = ""):
    """Adds heads that assign embeddings to prototypes, and their moving averages.

    Args:
      config: from `base`.
      prototypes: their number.
      role: prefix of the roles, "patch_" for heads of patches.
    """
    projector = config_lib.role("projector", features=64, hidden=(128,))
    config.roles[f"{role}projector"] = projector
    config.roles[f"{role}prototypes"] = config_lib.role("prototypes", count=prototypes)
    averages = {f"target_{role}{head}": f"{role}{head}" for head in ("projector", "prototypes")}
    for target, source in averages.items():
        config.roles[target] = average(source)
    if "target" not in config.roles:
        config.roles.target = average("student")


def add_local_views(config, name: str, *, count: int = 4):
    """Adds small crops of half the size, after those that `views` has."""
    crop = ("random_resized_crop", {"area": (0.15, 0.5), "flip": 0.0, "size": SIZES[name] // 2})
    rest = [item for item in VIEWS[name] if item[0] not in ("random_resized_crop", "rotation")]
    config.data.train_transforms = (*config.data.train_transforms, "local_views")
    config.data.transform_kwargs.local_views = {"count": count, "transforms": (*rest, crop)}


def masked(name: str, masks: str, **kwargs):
    """A config like `base` for methods that hide patches of one view, a crop, as published.

    Pixels are standardized, see `standardize`.

    Args:
      name: of the data set.
      masks: transform that hides patches.
      **kwargs: of it.
    """
    config = base(name, "vit")
    config.roles.student.kwargs.positions = "fourier"
    config.data.train_transforms = ("scale", "random_resized_crop", masks)
    crop = next(item for item in VIEWS[name] if item[0] == "random_resized_crop")
    own = {"patch_size": config.roles.student.kwargs.patch_size, **kwargs}
    config.data.transform_kwargs = {crop[0]: crop[1], masks: own}
    config.optim.kwargs = {"b2": 0.95}
    standardize(config)
    return config


def standardize(config):
    """Lets networks see standardized pixels, in views too, as a ViT with fixed positions should.

    Positions are of the size of a standardized pixel: beside pixels from 0 to 1, tokens would say
    where they are and little of what is there, and all images would look alike: on digits, 9 % of
    the size of an untrained token differs between images, and 24 % if pixels are standardized.
    """
    for key in ("views", "local_views"):
        if key in config.data.transform_kwargs:
            chain = config.data.transform_kwargs[key].transforms
            config.data.transform_kwargs[key].transforms = (*chain, "normalize")
    if "views" in config.data.transform_kwargs:
        config.data.eval_transforms = ("scale", "normalize")
    else:
        config.data.train_transforms = ("normalize", *config.data.train_transforms[1:])
        config.data.eval_transforms = ("normalize",)


def read_target(config):
    """Lets evaluators read the moving average `target` in place of the student."""
    config.evaluators = {evaluator: {"role": "target"} for evaluator in config.evaluators}


def as_arm(config, reference) -> dict:
    """Returns what a config changes in another, as an arm of a study over the other."""
    before = config_lib.flatten(reference)
    arm: dict = {}
    for path, value in config_lib.flatten(config).items():
        if path not in before or before[path] != value:
            node = arm
            *groups, key = path.split(".")
            for group in groups:
                node = node.setdefault(group, {})
            node[key] = value
    return arm
