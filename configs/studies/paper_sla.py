"""SLA: rotations as labels beside the classes, against rotations as noise. Fashion-MNIST, 1,000.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_sla.py \\
      --workdir=runs/paper_sla

Lee et al. 2020 (arXiv:1910.05872) report that augmenting by rotation (`da`) or a second task
(`mt`) does little or harm, that joint labels help when the views are aggregated (`sla_ag`), and
that half of the gain remains in one pass by self-distillation (`sla_sd`). `sla_si` is the joint
head on the upright image alone; it is trained as `sla_ag` is. `da_ag` aggregates the views of `da`,
and tells what averaging alone gives. Every arm of four views runs 256 images in each step;
`baseline_256` has as many upright ones, and `baseline` has 64 in as many steps.

The training part is a fifth of Fashion-MNIST-5k. `:smoke` takes seconds on generated images.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def sla(mode: str, role: str, *, features: int = 0, classes: int | None = None) -> dict:
    arm = {
        "objective": {"name": "sla", "kwargs": {"mode": mode, "rotations": 4}},
        "evaluators": {"classification": {"role": role}, "calibration": {"role": role}},
    }
    roles = {}
    if features:
        roles["joint"] = {"model": "projector", "kwargs": {"features": features}}
    if classes is not None:
        roles["student"] = {"kwargs": {"num_classes": classes}}
    return {**arm, "roles": roles} if roles else arm


def get_config():
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(256, 256), num_classes=10)
    config.data.held_out = 0.8  # what is left to train on is the low-data regime of the paper
    config.data.train_transforms = ("horizontal_flip", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.batch_size = 64
    config.total = "800 steps"
    config.optim.lr = 0.05
    config.optim.warmup = "40 steps"
    config.eval.every = "200 steps"
    config.study.arms = {
        "baseline": {},
        "baseline_256": {"batch_size": 256},
        "da": sla("da", "single"),
        "da_ag": sla("da", "aggregated"),
        "mt": sla("mt", "single", features=4),
        "sla_si": sla("sla", "single", features=40, classes=0),
        "sla_ag": sla("sla", "aggregated", features=40, classes=0),
        "sla_sd": sla("sla_sd", "student", features=40),
    }
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "baseline_256"
    config.study.title = "Label augmentation by rotation"
    return config
