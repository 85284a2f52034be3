"""PS-KD: do a network's own past predictions make better targets? Fashion-MNIST-5k/1k.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_ps_kd.py \\
      --workdir=runs/paper_ps_kd

Kim et al. 2021 (arXiv:2006.12000) report lower error, negative log-likelihood and AURC (area under
the risk-coverage curve) than cross-entropy, and that label smoothing worsens AURC where PS-KD does
not. Arms: cross-entropy, label smoothing, PS-KD with two final shares, and two controls on its
table: labels in place of predictions, which is cross-entropy but for rounding (what rounding does
in so many steps is the floor under every difference), and the uniform distribution, which is label
smoothing with the same ramp. All arms have the same network, steps and optimizer; the last state
is compared.

The comparison is of `test/nll`; `--config.study.metric=test/aurc` or `test/accuracy` compares the
same finished runs by another measure. `:smoke` takes seconds on generated images.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def ps_kd(alpha: float, table: str = "predictions") -> dict:
    return {"objective": {"name": "ps_kd", "kwargs": {"alpha": alpha, "table": table}}}


def get_config():
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(256, 256))
    config.data.train_transforms = ("horizontal_flip", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.optim.lr = 0.05
    config.total = "40 epochs"
    config.eval.every = "5 epochs"
    config.study.arms = {
        "ce": {},
        "ls_10": {"objective": {"kwargs": {"label_smoothing": 0.1}}},
        "ps_kd_40": ps_kd(0.4),
        "ps_kd_80": ps_kd(0.8),
        "labels": ps_kd(0.8, "label"),
        "uniform": ps_kd(0.8, "uniform"),
    }
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "ce"
    config.study.metric = "test/nll"
    config.study.title = "Progressive self-distillation"
    return config
