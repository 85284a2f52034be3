"""Learned trust in attack detection: which attack is it, many classes and few examples of some.

  python -m distill_jax.main --mode=study --config=configs/studies/trust_attack.py \\
      --workdir=runs/trust_attack

The arms, budgets, controls and faults of `trust_images.py`, for perceptrons on the embedded KDD99
attack types (2,414 distinct records, 7 classes, no "normal" class), compared by macro-F1.
`:nsl_kdd` reads NSL-KDD from the folder given with `--config.data.kwargs.path=...` and tells
normal traffic from four kinds of attack.
"""

from distill_jax.configs import common, trust
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "nsl_kdd", *trust.SCENARIOS)
    fault = common.choose(options, trust.SCENARIOS)
    config = common.table("nsl_kdd" if "nsl_kdd" in options else "kdd99_attack_types")
    if "nsl_kdd" in options:
        config.data.kwargs.path = ""
    config.evaluators = {"imbalance": {}, "classification": {}, "calibration": {}}
    config.roles.student = config_lib.role("tabular_mlp", hidden=(16,))
    config.data.held_out = 0.2
    config.data.outer = 0.5  # of these; the rest chooses
    config.data.corrupt = trust.SCENARIOS.get(fault, {})
    config.batch_size = 128
    config.total = "600 steps"
    config.eval.every = "100 steps"
    config.eval.metric = "held_out/macro_f1"
    config.bilevel.every = 2
    config.bilevel.warmup = "30 steps"
    config.bilevel.outer_batch = 0.5
    config.bilevel.optim.lr = 3e-3
    teacher: dict = {
        "roles": {"student": {"kwargs": {"hidden": (256, 128)}}},
    }
    if fault == "noisy":
        teacher["data"] = {"corrupt": {"label_noise": 0.0}}
    config.study.arms = trust.arms(teacher=teacher, temperature=1.5, hidden=(32,), full=not fault)
    config.study.tuned = trust.tuned(full=not fault)
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "kd_50"
    config.study.metric = "test/macro_f1"
    data = ", NSL-KDD" if "nsl_kdd" in options else ""
    config.study.title = f"Learned trust, attack detection{data}{': ' + fault if fault else ''}"
    return config
