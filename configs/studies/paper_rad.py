"""RAD: which examples to ask a teacher about, who may be wrong where it matters? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_rad.py \\
      --workdir=runs/paper_rad

Baykal et al. 2023 (arXiv:2210.01213): asking about the examples of smallest margin fails where the
teacher is wrong on just these; the robust distribution does not, and costs little otherwise. Five
labels a class and 100 questions. "planted" arms have a teacher that is made wrong on the 15 % of
the pool of smallest margin. Arms: even draws, smallest margins (with planted errors the reference),
the robust policy; and that with half of the true error rate. The scout saw the labelled digits
alone.
"""

from distill_jax.configs import papers


def get_config():
    config = papers.small("digits", steps=300)
    config.data.corrupt = {"labels_per_class": 5}
    config.batch_size = 256

    def ask(policy: str, *, error_rate: float = 0.03, planted: float = 0.0) -> dict:
        kwargs = {"policy": policy, "budget": 100, "error_rate": error_rate, "planted": planted}
        return {
            "objective": {"name": "active_distillation", "kwargs": kwargs},
            "roles": papers.frozen(teacher="teacher", teacher_scout="scout"),
        }

    config.study.arms = {
        "margin_planted": ask("margin", planted=0.15),
        "uniform_planted": ask("uniform", planted=0.15),
        "robust_planted": ask("robust", error_rate=0.18, planted=0.15),
        "robust_planted_half": ask("robust", error_rate=0.09, planted=0.15),
        "margin": ask("margin"),
        "uniform": ask("uniform"),
        "robust": ask("robust"),
        "scout": {},
        "teacher": {
            "data": {"corrupt": {"labels_per_class": 0}},
            "roles": {"student": {"kwargs": {"hidden": (128,)}}},
        },
    }
    config.study.sources = ("scout", "teacher")
    config.study.reference = "margin_planted"
    config.study.title = "RAD: which examples to ask a teacher about?"
    return config
