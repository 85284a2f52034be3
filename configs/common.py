"""Pieces that most configs share."""

from distill_jax.run import config as config_lib

GENERATED = {"mean": (0.506,), "std": (0.182,)}
"""Mean and standard deviation of generated images."""


def parse(arg: str, *options: str) -> set[str]:
    """Splits `file.py:smoke,full` into its options.

    Raises:
      ValueError: for an option that the file does not have.
    """
    given = {part for part in arg.split(",") if part}
    if unknown := given - set(options):
        raise ValueError(f"unknown argument {sorted(unknown)[0]!r}; this file has: {options}")
    return given


def fashion_mnist(*, full: bool = False):
    """A classification config on Fashion-MNIST, or on the 5k/1k part that ships with the package.

    Pixels are scaled by the mean and deviation of the full training set.
    """
    config = config_lib.base()
    config.data.name = "fashion_mnist" if full else "fashion_mnist_5k"
    config.data.train_transforms = ("random_crop", "horizontal_flip", "normalize")
    config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs.random_crop = {"padding": 2}
    config.data.transform_kwargs.normalize = {"mean": (0.286,), "std": (0.353,)}
    config.evaluators = {"classification": {}, "calibration": {}}
    config.optim.name = "nesterov"
    config.optim.lr = 0.1
    config.optim.weight_decay = 5e-4
    config.optim.warmup.epochs = 1.0
    config.eval.every.epochs = 1.0
    config.eval.metric = "held_out/accuracy"
    return config


def smoke(config):
    """Shrinks a config to seconds: generated images, a few steps."""
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 256, "n_test": 64, "image_size": 16, "channels": 1}
    if "normalize" in config.data.transform_kwargs:
        config.data.transform_kwargs.normalize = dict(GENERATED)
    config.batch_size = 32
    config.total = {"steps": 12, "epochs": None, "examples": None}
    config.optim.warmup = {"steps": 2, "epochs": None, "percent": None}
    config.eval.every = {"steps": 6, "epochs": None, "percent": None}
    config.log.every_steps = 4
    shorten(config)
    for changes in config.study.arms.values():
        shorten(changes)
    return config


def shorten(changes):
    """Shortens schedules and queues of an objective to what fits 4 steps on 232 examples."""
    kwargs = changes.get("objective", {}).get("kwargs", {})
    for name in kwargs:
        if name.endswith("_epochs"):
            kwargs[name] = min(kwargs[name], 0.25)
        elif name == "queue":
            kwargs[name] = min(kwargs[name], 96)


def table(name: str):
    """A classification config on a table; columns come scaled from the data set."""
    config = config_lib.base()
    config.data.name = name
    config.objective.name = "supervised"
    config.optim.name = "nesterov"
    config.optim.lr = 0.05
    config.optim.weight_decay = 1e-4
    config.optim.warmup.steps = 30
    return config


def smoke_table(config):
    """Shrinks a config on a table to seconds: generated rows, a few steps."""
    config.data.name = "synthetic_table"
    config.data.kwargs = {"n_train": 512, "n_test": 128}
    config.data.corrupt = {}
    config.batch_size = 32
    config.total = {"steps": 12, "epochs": None, "examples": None}
    config.optim.warmup = {"steps": 2, "epochs": None, "percent": None}
    config.bilevel.warmup = {"steps": 2, "epochs": None, "percent": None}
    config.eval.every = {"steps": 6, "epochs": None, "percent": None}
    config.log.every_steps = 4
    return config
