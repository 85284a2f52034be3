"""SSLD: is distillation without labels better with more images, and with mined ones? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_ssld.py \\
      --workdir=runs/paper_ssld

Cui et al. 2021 (arXiv:2103.05959): a student that never sees a label gains from unlabelled images,
most from those that the teacher scores highest in each class. Ten labelled digits a class, the
others and 50 % noise images without labels. Arms: labels alone; the divergence on the labelled
digits (the reference), on everything, on the 60 highest of each class; that with the one-way
divergence; and a fine-tuning on labels after it. Their difference between the two divergences was
0.2 points, which this cannot resolve.
"""

from distill_jax.configs import papers


def get_config():
    config = papers.small("digits", steps=400)
    config.data.corrupt = {"labels_per_class": 10, "outliers": 0.5}
    config.roles.student.kwargs = {"hidden": (32,)}
    config.batch_size = 256

    def distil(per_class: int | None, kind: str = "jeffreys") -> dict:
        kwargs = {"kind": kind} if per_class is None else {"kind": kind, "per_class": per_class}
        return {
            "objective": {"name": "ssld", "kwargs": kwargs},
            "roles": papers.frozen(teacher="teacher"),
        }

    config.study.arms = {
        "labels_alone": {},
        "labelled": distil(0),
        "everything": distil(None),
        "mined": distil(60),
        "mined_one_way": distil(60, "forward"),
        "mined_tuned": {
            "roles": {"student": {"init": "arm:mined"}},
            "optim": {"lr": 0.002},
            "total": "100 steps",
        },
        "teacher": {
            "data": {"corrupt": {"labels_per_class": 0, "outliers": 0.0}},
            "roles": {"student": {"kwargs": {"hidden": (128,)}}},
        },
    }
    config.study.sources = ("teacher",)
    config.study.reference = "labelled"
    config.study.title = "SSLD: unlabelled images, all of them or the mined ones?"
    return config
