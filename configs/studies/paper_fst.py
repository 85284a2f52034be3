"""FST: does an average that looks ahead label better than one that does not? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_fst.py \\
      --workdir=runs/paper_fst

Du et al. 2022 (arXiv:2209.06993): a mean teacher that is advanced by virtual steps of the student
gives better pseudo-labels. Here classification with five labels a class and the other digits
without. Arms: labels alone, the mean teacher (the reference), one with a faster average, one with
four times the steps (the compute of K = 3), one and three deep virtual steps, three wide ones.
"""

from distill_jax.configs import papers


def get_config():
    config = papers.small("digits", steps=600, lr=0.05)
    config.data.corrupt = {"labels_per_class": 5}
    config.roles.student.kwargs = {"hidden": (128,), "dropout": 0.3}
    config.batch_size = 256

    def teacher(*, decay: float = 0.99, **changes) -> dict:
        return {
            "objective": {"name": "self_training", "kwargs": {"threshold": 0.7}},
            "roles": {"teacher": {"ema_of": "student", "decay": decay}},
            **changes,
        }

    config.study.arms = {
        "labels_alone": {},
        "mean_teacher": teacher(),
        "fresher": teacher(decay=0.96),
        "same_compute": teacher(total="2400 steps"),
        "deep_1": teacher(lookahead={"steps": 1}),
        "deep_3": teacher(lookahead={"steps": 3}),
        "wide_3": teacher(lookahead={"steps": 3, "kind": "wide"}),
    }
    config.study.reference = "mean_teacher"
    config.study.title = "FST: does looking ahead help a mean teacher?"
    return config
