"""Predictions as pretraining: do pseudo-labels help before the labels, or beside them? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_predictions.py \\
      --workdir=runs/paper_predictions

Guo 2020 to 2023 (arXiv:2011.09031): a network finetuned on few labels labels other data; the
pretrained network learns from these labels and is finetuned on the few. It helps when labels are
few. Here 25 or 200 of 550 images have their parity, the network is pretrained on the digits of 500
others, and `pseudo_then` takes 400 steps on soft pseudo-labels and 400 on labels; `hard_then` on
hard ones. Beside it: labels alone for 400 steps (`finetune`, which makes the pseudo-labels) and for
the 1,200 of all stages (`finetune_long`), and both kinds of labels at once for 800 (`joint`).
"""

from distill_jax.configs import weak

FEW = (25, 200)


def arms(n: int) -> dict[str, dict]:
    student = {"init": weak.PRETRAINED}
    few = {"data": {"kwargs": {"examples": n}}, "batch_size": 24 if n == 25 else 64}

    def pseudo(*, labels: int = 0, **kwargs) -> dict:
        arm = weak.naive(student, teacher=f"finetune_{n}", **kwargs)
        arm["objective"]["kwargs"]["beside"] = ()
        del arm["roles"]["ceiling"], arm["evaluators"]
        return {**arm, "data": {"kwargs": {"labels": labels}}}

    return {
        f"finetune_{n}": {"roles": {"student": student}, **few},
        f"finetune_long_{n}": {"roles": {"student": student}, **few, "total": "1200 steps"},
        f"pseudo_{n}": pseudo(),
        f"pseudo_hard_{n}": pseudo(hard=True),
        f"pseudo_then_{n}": {"roles": {"student": {"init": f"arm:pseudo_{n}"}}, **few},
        f"hard_then_{n}": {"roles": {"student": {"init": f"arm:pseudo_hard_{n}"}}, **few},
        f"joint_{n}": {**pseudo(labels=n, label_weight=1.0), "total": "800 steps"},
    }


def get_config():
    config = weak.base("parity", steps=400)
    config.study.arms = {"pretrain": weak.pretrain()} | {
        k: v for n in FEW for k, v in arms(n).items()
    }
    config.study.sources = ("pretrain",)
    config.study.reference = "finetune_25"
    config.study.questions = {
        f"{n} labels": (
            f"pseudo_then_{n}",
            f"finetune_long_{n}",
            *(f"{name}_{n}" for name in ("finetune", "pseudo", "hard_then", "joint")),
        )
        for n in FEW
    }
    config.study.title = "Predictions for pretraining"
    return config
