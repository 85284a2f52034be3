"""Weak to strong: how much of what a supervisor lacks does its student know? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_weak_to_strong.py \\
      --workdir=runs/paper_weak_to_strong

Burns et al. 2023 (arXiv:2312.09390). A linear network on 4 x 4 pixels labels 550 images by parity;
`:at_least_5` takes the other task. The student is pretrained on the digits of 500 other images, and
its last layer learns, without any true label but in `ceiling`: from the weak labels alone
(`naive`), and with the confidence loss, whose share of own predictions rises or is constant. Rates
and lengths are chosen by `benchmarks/weak_sweep.py`, which also has the product target, the chain
of students and the training of all layers.

The share of a student's own prediction is learned for each example in `learned` (TGeo-KD's triangle
without the label, on 50 clean images), beside its controls: a network that is never trained, shares
permuted within the batch, and the same 50 images as further training examples.
"""

from distill_jax.configs import common, weak

CHOSEN = {
    "parity": {"naive": (1e-2, 100), "conf": 3e-3},
    "at_least_5": {"naive": (3e-4, 800), "conf": 1e-2},
}
"""Rates and lengths, as the held-out images of other divisions choose: `weak_sweep.json`."""


def learned(arm: dict, *, control: str = "none", **network) -> dict:
    """A share for each example, from student and supervisor, learned from clean held-out images."""
    roles = {"weighting": {"model": "ratio_mlp", "kwargs": {"hidden": (32,), **network}}}
    weighting = {
        "name": "trilateral",
        "kwargs": {"blocks": ("st", "s", "t")},
        "loss_terms": ("weak_labels", "confidence"),
        "control": control,
    }
    outer = {"optim": {"lr": 1e-2}, "warmup": "5 %", "outer_batch": 0.75}
    return {
        **arm,
        "roles": {**arm["roles"], **roles},
        "weighting": weighting,
        **({} if control == "frozen" else {"bilevel": outer}),
    }


def plain(student: dict, chosen: tuple[float, int], **kwargs) -> dict:
    """Training on the weak labels at a rate and for a length."""
    lr, steps = chosen
    return {**weak.naive(student, lr=lr, **kwargs), "total": f"{steps} steps"}


def get_config(arg: str = ""):
    options = common.parse(arg, "at_least_5")
    task = "at_least_5" if options else "parity"
    config, chosen, head = weak.base(task), CHOSEN[task], weak.network()
    lr = chosen["conf"]
    own = weak.from_weak(head, alpha=0.75, lr=lr)
    clean = {"data": {"corrupt": {"train_on_outer": "added"}, "kwargs": {"labels": 0}}}
    config.study.arms = {
        "pretrain": weak.pretrain(),
        "weak": weak.weak(),
        "ceiling": {"roles": {"student": head}, "optim": {"lr": 1e-2}},
        "naive": plain(head, chosen["naive"]),
        "conf_50": weak.from_weak(head, alpha=0.5, lr=lr),
        "conf_75": own,
        "conf_75_constant": weak.from_weak(head, alpha=0.75, ramp=0, lr=lr),
        "learned": learned(own),
        "learned_frozen": learned(own, control="frozen", zero_init=False),
        "learned_shuffled": learned(own, control="shuffled"),
        "naive_clean": {**plain(head, chosen["naive"], label_weight=1.0), **clean},
        "conf_75_clean": {**weak.from_weak(head, alpha=0.75, lr=lr, label_weight=1.0), **clean},
    }
    config.study.sources = ("pretrain",)
    config.study.reference = "naive"
    config.study.questions = {
        "own predictions": ("conf_75", "naive", "conf_50", "conf_75_constant", "weak", "ceiling"),
        "a learned share": ("learned", "conf_75", "conf_75_constant", "learned_frozen"),
        "clean images": ("learned", "conf_75_clean", "naive_clean", "learned_shuffled"),
    }
    config.study.title = f"Weak to strong: {task.replace('_', ' ')}"
    return config
