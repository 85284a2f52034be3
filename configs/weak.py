"""Pieces of the studies of weak supervision on the digits of scikit-learn (`data/weak_digits.py`).

The stages are runs of their own, arms of a study: `pretrain` learns the ten digits, `weak` is the
supervisor, a linear network on 4 x 4 pixels, and `ceiling` is the student trained on true labels.
"""

from typing import Any

from distill_jax.run import config as config_lib

BODY = ("Dense_0*", "Dense_1*")
"""Layers of the student but the last."""

PRETRAINED = "arm:pretrain#student/**"


def base(task: str, *, steps: int = 800):
    """A network that learns the task from true labels; the arms change it."""
    config = config_lib.base()
    config.data.name = "weak_digits"
    config.data.kwargs = {"stage": "student", "task": task, "split_seed": "run"}
    config.data.train_transforms = ("scale",)
    config.data.eval_transforms = ("scale",)
    config.data.outer = 0.5
    config.batch_size = 64
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(256, 256))
    config.evaluators = {"classification": {}}
    config.optim.name = "adam"
    config.optim.lr = 1e-3
    config.optim.warmup = "5 %"
    config.total = f"{steps} steps"
    config.eval.every = "100 %"
    config.log.every_steps = 100
    config.log.tensorboard = False
    config.study.seeds = (1, 2, 3, 4, 5)
    config.study.replicas = "yes"
    return config


def frozen(**arms: str) -> dict:
    """Roles that are networks of other arms."""
    return {role: {"init": f"arm:{arm}", "frozen": True} for role, arm in arms.items()}


def pretrain(hidden: tuple[int, ...] = (256, 256)) -> dict:
    """An encoder that learns the ten digits with a last layer that is left behind."""
    return {
        "objective": {"name": "finetune"},
        "roles": {
            "student": {"kwargs": {"hidden": hidden, "num_classes": 0}},
            "head": {"model": "linear_head"},
        },
        "data": {"kwargs": {"stage": "pretrain", "task": "digit"}},
        "evaluators": {"classification": {"role": "prediction"}},
        "optim": {"lr": 3e-3},
    }


def weak(**data: Any) -> dict:
    """The supervisor: linear on the means of squares of 2 x 2 pixels."""
    return {
        "roles": {"student": {"kwargs": {"hidden": (), "pool": 2}}},
        "data": {"kwargs": {"stage": "weak", **data}},
        "optim": {"lr": 1e-2},
    }


def network(*, body: bool = False, pretrained: bool = True, **kwargs: Any) -> dict:
    """The student's role.

    Args:
      body: whether all its layers learn, or the last alone.
      pretrained: whether it starts from the layers of `pretrain`.
      **kwargs: of the network.
    """
    role: dict[str, Any] = {"kwargs": kwargs} if kwargs else {}
    role |= {"init": PRETRAINED} if pretrained else {}
    return {**role, "freeze": () if body else BODY}


def from_weak(
    student: dict, *, lr: float = 1e-3, teacher: str = "weak", ceiling: str = "ceiling", **kwargs
) -> dict:
    """An arm that learns from the labels of another arm alone.

    Args:
      student: its role, see `network`.
      lr: learning rate.
      teacher: the arm that labels.
      ceiling: the arm with which the gap is measured.
      **kwargs: of the objective.
    """
    return {
        "objective": {"name": "weak_to_strong", "kwargs": {"beside": ("ceiling",), **kwargs}},
        "roles": {"student": student, **frozen(teacher=teacher, ceiling=ceiling)},
        "data": {"kwargs": {"labels": 0}},
        "evaluators": {"gap_recovered": {}},
        "optim": {"lr": lr},
    }


def naive(student: dict, **kwargs) -> dict:
    """Plain training on the weak labels."""
    return from_weak(student, alpha=0.0, **kwargs)
