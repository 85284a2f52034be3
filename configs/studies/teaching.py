"""Teaching: must the student see what the teacher sees?

  python -m distill_jax.main --mode=study --config=configs/studies/teaching.py \\
      --workdir=runs/teaching

Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov 2022, "Knowledge distillation: A good teacher is
patient and consistent" (arXiv:2106.05237, section 3.1 and figure 2): the teacher sees the student's
crop ("same"), a crop of its own ("independent"), or always the plain image ("fixed"), whose answers
are stored once. "mixed" gives both the same mixture of two crops: their function matching. The
students learn from the teacher alone, temperature 1, as in the paper.

Each student learns from the teacher of its own seed. All arms have the same images, steps and
augmentation of what the student sees, "mixed" excepted. Images have 14 x 14 pixels.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config():
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("convnet", widths=(8, 16, 32))
    config.data.train_transforms = ("downscale", *config.data.train_transforms)
    config.data.eval_transforms = ("downscale", *config.data.eval_transforms)
    config.total = "20 epochs"
    config.eval.every = "2 epochs"
    taught = {
        "objective": {"name": "kd", "kwargs": {"temperature": 1.0, "alpha": 1.0}},
        "roles": {"teacher": {"init": "arm:teacher", "frozen": True}},
        "evaluators": {"agreement": {}},
    }
    stored = {"dir": "runs/teaching_answers/seed{seed}"}
    crops = tuple(config.data.train_transforms)
    config.study.arms = {
        "teacher": {"roles": {"student": {"kwargs": {"widths": (16, 32, 64)}}}},
        "alone": {},
        "same": taught,
        "independent": {**taught, "data": {"teacher_view": "independent"}},
        "fixed": {**taught, "data": {"teacher_view": "clean"}, "cache": stored},
        "mixed": {**taught, "data": {"train_transforms": (*crops, "mixup")}},
    }
    config.study.sources = ("teacher",)
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "same"
    config.study.title = "Consistent and inconsistent teaching"
    return config
