"""Weak to strong: how much of what a supervisor lacks does its student know? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_weak_to_strong.py \\
      --workdir=runs/paper_weak_to_strong

Burns et al. 2023 (arXiv:2312.09390). A linear network on 4 x 4 pixels labels 550 images by parity;
`:at_least_5` takes the other task. The student is pretrained on the digits of 500 other images; its
last layer learns alone or (`full_`) with the others. No arm but the ceilings reads a true label of
its training images: plain training on the weak labels (`naive`, and longer or shorter), with
hard labels (`_hard`) and without pretraining (`_raw`); the confidence loss with two shares and with
a share that is constant; the product target; a chain with a student of middle size.

The share of a student's own prediction is learned for each example in `learned` (TGeo-KD's triangle
without the label, on 50 clean images), beside its controls: a network that is never trained, shares
permuted within the batch, and the same 50 images as further training examples.
"""

from distill_jax.configs import common, weak

CHOSEN = {
    "parity": {"naive": (1e-2, 100), "conf": 3e-3, "full_naive": (1e-3, 800), "full_conf": 3e-3},
    "at_least_5": {
        "naive": (3e-4, 800),
        "conf": 1e-2,
        "full_naive": (1e-3, 100),
        "full_conf": 1e-3,
    },
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
    config, chosen = weak.base(task), CHOSEN[task]
    head, whole = weak.network(), weak.network(body=True)
    middle = {"init": "arm:pretrain_mid#student/**", "freeze": weak.BODY[:1]}
    middle["kwargs"] = {"hidden": (32,)}
    lr = chosen["conf"]
    full = {"ceiling": "ceiling_full", "lr": chosen["full_conf"]}
    own = weak.from_weak(head, alpha=0.75, lr=lr)
    clean = {"data": {"corrupt": {"train_on_outer": "added"}, "kwargs": {"labels": 0}}}
    config.study.arms = {
        "pretrain": weak.pretrain(),
        "pretrain_mid": weak.pretrain((32,)),
        "weak": weak.weak(),
        "ceiling": {"roles": {"student": head}, "optim": {"lr": 1e-2}},
        "ceiling_full": {"roles": {"student": whole}},
        "naive": plain(head, chosen["naive"]),
        "naive_long": plain(head, (lr, 800)),
        "conf_50": weak.from_weak(head, alpha=0.5, lr=lr),
        "conf_75": own,
        "conf_75_constant": weak.from_weak(head, alpha=0.75, ramp=0, lr=lr),
        "product": weak.from_weak(head, alpha=0.75, target="product", lr=lr),
        "mid": plain(middle, (3e-3, 800)),
        "chain": plain(head, chosen["naive"], teacher="mid"),
        "learned": learned(own),
        "learned_frozen": learned(own, control="frozen", zero_init=False),
        "learned_shuffled": learned(own, control="shuffled"),
        "naive_clean": {**plain(head, chosen["naive"], label_weight=1.0), **clean},
        "conf_75_clean": {**weak.from_weak(head, alpha=0.75, lr=lr, label_weight=1.0), **clean},
        "full_naive": plain(whole, chosen["full_naive"], ceiling="ceiling_full"),
        "full_naive_short": plain(whole, (1e-3, 100), ceiling="ceiling_full"),
        "full_conf_75": weak.from_weak(whole, alpha=0.75, **full),
        "full_hard": weak.naive(whole, hard=True, **full),
        "full_hard_conf_75": weak.from_weak(whole, alpha=0.75, hard=True, **full),
        "full_raw": weak.naive(weak.network(body=True, pretrained=False), **full),
    }
    if chosen["full_naive"] == (1e-3, 100):
        del config.study.arms["full_naive_short"]
    config.study.sources = ("pretrain", "pretrain_mid")
    config.study.reference = "naive"
    config.study.title = f"Weak to strong: {task.replace('_', ' ')}"
    return config
