"""HARD: does an augmentor that learns pass on a symmetry that the student has never seen?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_hard.py \\
      --workdir=runs/paper_hard

Nix et al. 2023 (arXiv:2305.14890): distillation on learned augmentations transfers what the teacher
is invariant to. Signals at 30 of 40 circular shifts; the teacher has learned all 40, tested are the
other 10. Arms: labels alone, distillation (the reference), distillation on random affine warps that
do not learn, HARD, HARD without keeping the teacher's answer, and distillation on all shifts, the
bound above. Nobody tells the augmentor that shifts matter.
"""

from distill_jax.configs import papers
from distill_jax.run import config as config_lib


def get_config():
    config = papers.small("shifted_signals", steps=1000, lr=2e-3)
    config.data.train_transforms = ()
    config.data.eval_transforms = ()
    config.optim.name = "adam"
    config.roles.student = config_lib.role("mlp", hidden=(128, 128))
    config.study.title = "HARD: do learned augmentations transfer an invariance?"
    teacher = papers.frozen(teacher="teacher")
    kd = {"objective": {"name": "divergence", "kwargs": {"kind": "forward"}}, "roles": teacher}

    def hard(**weights: float) -> dict:
        augmentor = {"model": "augmentor_affine", "kwargs": {"border": "wrap", "scale": 0.1}}
        kwargs = {"temperature": 1.0, "bound": 3.0, **weights}
        return {
            "objective": {"name": "hard", "kwargs": kwargs},
            "roles": {**teacher, "augmentor": augmentor},
        }

    config.study.arms = {
        "alone": {},
        "kd": kd,
        "random": hard(student_weight=0.0, teacher_weight=0.0),
        "hard": hard(teacher_weight=2.0),
        "hard_unguarded": hard(teacher_weight=0.0),
        "all_shifts": {**kd, "data": {"kwargs": {"shifts": (0, 40)}}},
        "teacher": {
            "data": {"kwargs": {"shifts": (0, 40), "n_train": 8000}},
            "roles": {"student": {"kwargs": {"hidden": (256, 256)}}},
        },
    }
    config.study.sources = ("teacher",)
    config.study.reference = "kd"
    return config
