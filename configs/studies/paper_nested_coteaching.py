"""Noisy labels: compressed features and co-teaching. Fashion-MNIST-5k/1k, 40 % wrong labels.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_nested_coteaching.py \\
      --workdir=runs/paper_nested_coteaching

Chen et al. 2022 (arXiv:2206.13140) report that nested dropout alone resists wrong labels, and most
together with co-teaching (Han et al. 2018, arXiv:1804.06872) as a second stage. Every arm trains
two networks for as many steps and predicts by the mean of their logits, so that the gain of an
ensemble is no arm's advantage: `ce`, `dropout` and `nested` train them apart. The arms that end in
`_then_co` start from the networks of 20 epochs of `ce` or `nested` and co-teach for 10 more at a
tenth of the learning rate; `ce_then_co` tells what the second stage does alone.

The forget rate is the rate of noise, as published: no method knows it in practice. The held-out
part has clean labels, and selection by it is a hidden budget of clean labels, the same for all.
`keep`, the number of features at prediction, is not searched: it is sigma.
`:smoke` takes seconds on generated images.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib

SIGMA, NOISE = 10.0, 0.4


def pair(*, nested: bool = False, forget: float = 0.0, dropout: float = 0.0, **kwargs) -> dict:
    """Two networks; with nested dropout their last layers are networks of their own."""
    own = {"forget_rate": forget, **kwargs}
    kwargs = {"dropout": dropout}
    if nested:
        kwargs["num_classes"] = 0
    roles: dict = {role: {"kwargs": kwargs} for role in ("student", "peer")}
    if nested:
        own |= {"sigma": SIGMA, "keep": int(SIGMA)}
        head = {"model": "projector", "kwargs": {"features": 10}}
        roles |= {"head": head, "peer_head": head}
    return {"objective": {"name": "nested_coteaching", "kwargs": own}, "roles": roles}


def second_stage(first: str, **kwargs) -> dict:
    """Co-teaching from the networks of another arm."""
    arm = pair(forget=NOISE, split=True, **kwargs)
    roles = {r: {**spec, "init": f"arm:{first}#{r}"} for r, spec in arm["roles"].items()}
    return {**arm, "roles": roles, "total": "10 epochs", "optim": {"lr": 0.005}}


def get_config():
    config = common.fashion_mnist()
    config.objective.name = "nested_coteaching"
    config.roles.student = config_lib.role("mlp", hidden=(256, 256), num_classes=10)
    config.roles.peer = config_lib.role("mlp", hidden=(256, 256), num_classes=10)
    config.data.train_transforms = ("horizontal_flip", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.data.corrupt = {"label_noise": NOISE}
    config.evaluators = {
        "classification": {"role": "prediction"},
        "calibration": {"role": "prediction"},
    }
    config.optim.lr = 0.05
    config.total = "30 epochs"
    config.eval.every = "5 epochs"
    first = {"total": "20 epochs"}
    config.study.arms = {
        "ce": pair(),
        "dropout": pair(dropout=0.5),
        "nested": pair(nested=True),
        "co": pair(forget=NOISE, ramp="10 epochs"),
        "ce_first": {**pair(), **first},
        "nested_first": {**pair(nested=True), **first},
        "ce_then_co": second_stage("ce_first"),
        "nested_then_co": second_stage("nested_first", nested=True),
    }
    config.study.sources = ("ce_first", "nested_first")
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "ce"
    config.study.title = "Learning with noisy labels"
    return config
