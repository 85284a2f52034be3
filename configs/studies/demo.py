"""The demo: does a small network learn more from a teacher than from labels alone?

  make demo

A ConvNet teacher, a small student alone, and the same student distilled (Hinton et al. 2015), three
seeds each, on Fashion-MNIST-5k/1k. Each distilled student learns from the teacher of its own seed,
its best checkpoint by held-out accuracy; all arms see the same 4,500 training images and the same
number of steps. The ratio 0.5 was chosen on the held-out images with two other seeds, where 0.9 was
worse than no teacher at all: so short a training learns more slowly from soft targets.
"""

from configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "smoke")
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("convnet", widths=(8, 16, 32))
    config.data.train_transforms = ("normalize",)
    del config.data.transform_kwargs["random_crop"]
    config.total.epochs = 15.0
    config.eval.every.epochs = 1.0
    config.study.arms = {
        "alone": {},
        "kd": {
            "objective": {"name": "kd", "kwargs": {"temperature": 4.0, "alpha": 0.5}},
            "roles": {"teacher": {"init": "arm:teacher", "frozen": True}},
            "evaluators": {"agreement": {}},
        },
        "teacher": {"roles": {"student": {"kwargs": {"widths": (16, 32, 64)}}}},
    }
    config.study.seeds = (0, 1, 2)
    config.study.reference = "alone"
    if "smoke" in options:
        config = common.smoke(config)
        config.study.seeds = (0, 1)
    return config
