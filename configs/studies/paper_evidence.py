"""Does a weak supervisor judge better with a strong network's evidence for both sides? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_evidence.py \\
      --workdir=runs/paper_evidence

The kernel of Lang et al. 2025 (arXiv:2501.13124), where strong models debate, weak ones learn to
judge, and an ensemble of these labels the data of a strong student. Here a classifier of the ten
digits shows a linear judge on 4 x 4 pixels, for each parity, the 4, 8 or 16 pixels that speak for
it (`objectives/argued.py`). Students learn from one judge without evidence (`naive`), from three
that were trained on 150, 200 and 250 images (`ensemble`), from one with evidence (`evidence`) or
three (`evidence_ensemble`), and from judges with the evidence of the side that the classifier
favours (`one_sided`) or with its answer (`told`): the control for evidence that gives it away.
"""

from distill_jax.configs import weak

PIXELS = (4, 8, 16)
EVEN, ODD = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)
ARGUER = {"teacher_arguer": {"init": "arm:arguer", "frozen": True, "classes": (EVEN, ODD)}}


def judge(sides: str, pixels: int = 8) -> dict:
    """A weak network that sees arguments."""
    arm = weak.weak()
    return {
        **arm,
        "objective": {"name": "argued", "kwargs": {"sides": sides, "pixels": pixels}},
        "roles": {**arm["roles"], **ARGUER},
        "evaluators": {"classification": {"role": "prediction"}},
    }


def taught(*judges: str, sides: str, pixels: tuple[int, ...] = (8,)) -> dict:
    """A student of the mean of judges."""
    arm = weak.from_weak(weak.network(), alpha=0.0, lr=3e-3)
    teachers = tuple(f"teacher{i or ''}" for i in range(len(judges)))
    kwargs = {"teachers": teachers, "pixels": pixels, "sides": sides, "beside": ("ceiling",)}
    arm["objective"] = {"name": "argued_to_strong", "kwargs": {"alpha": 0.0, **kwargs}}
    arm["roles"] |= {} if sides == "neither" else ARGUER
    arm["roles"] |= weak.frozen(**dict(zip(teachers, judges, strict=True)))
    return {**arm, "evaluators": {"gap_recovered": {"weak": "weak"}}}


def get_config():
    config = weak.base("parity", steps=400)
    fewer = {f"judge_{n}": weak.weak(examples=n) for n in (150, 200)}
    config.study.arms = {
        "pretrain": weak.pretrain(),
        "arguer": {
            "roles": {"student": {"kwargs": {"num_classes": 10}}},
            "data": {"kwargs": {"stage": "pretrain", "task": "digit"}},
        },
        "ceiling": {"roles": {"student": weak.network()}, "optim": {"lr": 1e-2}},
        "judge": weak.weak(),
        **fewer,
        **{f"judge_evidence_{n}": judge("both", n) for n in PIXELS},
        "judge_one_sided": judge("own"),
        "judge_told": judge("answer"),
        "naive": taught("judge", sides="neither"),
        "ensemble": taught(*fewer, "judge", sides="neither", pixels=(8, 8, 8)),
        "evidence": taught("judge_evidence_8", sides="both"),
        "evidence_ensemble": taught(
            *(f"judge_evidence_{n}" for n in PIXELS), sides="both", pixels=PIXELS
        ),
        "one_sided": taught("judge_one_sided", sides="own"),
        "told": taught("judge_told", sides="answer"),
    }
    config.study.sources = ("pretrain", "arguer", *fewer)
    config.study.reference = "naive"
    config.study.title = "Evidence for weak supervisors"
    return config
