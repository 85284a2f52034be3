"""Pieces of the studies that test a paper's claim at a small scale."""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def small(name: str, *, steps: int, lr: float = 0.05, **data):
    """A perceptron on a small data set; no checkpoint is chosen, the last state counts."""
    config = config_lib.base()
    config.data.name = name
    config.data.kwargs = data
    config.data.train_transforms = ("scale",)
    config.data.eval_transforms = ("scale",)
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(64,))
    config.evaluators = {"classification": {}}
    config.optim.name = "nesterov"
    config.optim.lr = lr
    config.total.steps = steps
    config.eval.every.steps = steps
    config.log.every_steps = 100
    config.log.tensorboard = False
    config.study.seeds = (1, 2, 3, 4, 5)  # seed 0 served to set some of the studies up
    return config


def smoke(config):
    """Shrinks a study to seconds: a few steps, two seeds, on generated images where it can be."""
    if config.data.name == "digits":
        config = common.smoke(config)
    config.total = {"steps": 4, "epochs": None, "examples": None}
    config.optim.warmup = {"steps": None, "epochs": None, "percent": None}
    config.eval.every = {"steps": 4, "epochs": None, "percent": None}
    config.log.every_steps = 2
    for changes in config.study.arms.values():
        if "total" in changes:
            changes.total.steps = 4
    config.study.seeds = (0, 1)
    return config


def frozen(**arms: str) -> dict:
    """Roles that are networks of other arms."""
    return {role: {"init": f"arm:{arm}", "frozen": True} for role, arm in arms.items()}
