"""Pieces of the studies that test a paper's claim at a small scale."""

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
    config.total = steps
    config.eval.every = steps
    config.log.every_steps = 100
    config.log.tensorboard = False
    config.study.seeds = (1, 2, 3, 4, 5)  # seed 0 served to set some of the studies up
    return config


def frozen(**arms: str) -> dict:
    """Roles that are networks of other arms."""
    return {role: {"init": f"arm:{arm}", "frozen": True} for role, arm in arms.items()}
