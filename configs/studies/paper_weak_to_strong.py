"""Weak to strong: how much of what a supervisor lacks does its student know? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_weak_to_strong.py \\
      --workdir=runs/paper_weak_to_strong

Burns et al. 2023 (arXiv:2312.09390). A linear network on 4 x 4 pixels labels 550 images by parity;
`:at_least_5` takes the other task. The student is pretrained on the digits of 500 other images; its
last layer learns alone or (`full_`) with the others. No arm but the ceilings reads a true label of
its training images: plain training on the weak labels (`naive`), stopped early (`_short`), with
hard labels (`_hard`) and without pretraining (`_raw`); the confidence loss with two shares and with
a share that is constant; the product target; a chain with a student of middle size. Rates and
lengths are those that `benchmarks/weak_sweep.py` chooses on other divisions.

The share of a student's own prediction is learned for each example in `learned` (TGeo-KD's triangle
without the label, on 50 clean images), beside its controls: a network that is never trained, shares
permuted within the batch, and the same 50 images as further training examples.
"""

from distill_jax.configs import common, weak

RATES = {"parity": 1e-3, "at_least_5": 1e-3}


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


def get_config(arg: str = ""):
    options = common.parse(arg, "at_least_5")
    task = "at_least_5" if options else "parity"
    config, lr = weak.base(task), RATES[task]
    head, whole = weak.network(), weak.network(body=True)
    short = {"total": "100 steps"}
    full = {"lr": lr, "ceiling": "ceiling_full"}
    confident = weak.from_weak(head, alpha=0.5, lr=lr)
    mid = {
        "kwargs": {"hidden": (32,)},
        "init": "arm:pretrain_mid#student/**",
        "freeze": weak.BODY[:1],
    }
    clean = {"data": {"corrupt": {"train_on_outer": "added"}, "kwargs": {"labels": 0}}}
    config.study.arms = {
        "pretrain": weak.pretrain(),
        "weak": weak.weak(),
        "ceiling": {"roles": {"student": head}, "optim": {"lr": lr}},
        "ceiling_full": {"roles": {"student": whole}, "optim": {"lr": lr}},
        "naive": weak.naive(head, lr=lr),
        "naive_short": {**weak.naive(head, lr=lr), **short},
        "conf_50": confident,
        "conf_75": weak.from_weak(head, alpha=0.75, lr=lr),
        "conf_50_constant": weak.from_weak(head, alpha=0.5, ramp=0, lr=lr),
        "pretrain_mid": weak.pretrain((32,)),
        "mid": weak.naive(mid, lr=3e-3),
        "chain": weak.naive(head, lr=lr, teacher="mid"),
        "product": weak.from_weak(head, target="product", lr=lr),
        "learned": learned(confident),
        "learned_frozen": learned(confident, control="frozen", zero_init=False),
        "learned_shuffled": learned(confident, control="shuffled"),
        "naive_clean": {**weak.naive(head, lr=lr, label_weight=1.0), **clean},
        "conf_50_clean": {**weak.from_weak(head, alpha=0.5, lr=lr, label_weight=1.0), **clean},
        "full_naive": weak.naive(whole, **full),
        "full_naive_short": {**weak.naive(whole, **full), **short},
        "full_conf_75": weak.from_weak(whole, alpha=0.75, **full),
        "full_hard": weak.naive(whole, hard=True, **full),
        "full_hard_conf_75": weak.from_weak(whole, alpha=0.75, hard=True, **full),
        "full_raw": weak.naive(weak.network(body=True, pretrained=False), **full),
    }
    config.study.sources = ("pretrain", "pretrain_mid")
    config.study.reference = "naive"
    config.study.title = f"Weak to strong: {task.replace('_', ' ')}"
    return config
