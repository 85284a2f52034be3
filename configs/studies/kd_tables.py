"""Distillation methods on two tables: a wide perceptron teaches a narrow one.

  python -m distill_jax.main --mode=study --config=configs/studies/kd_tables.py \\
      --workdir=runs/kd_letter

* letters, 16 measurements, 26 classes; the student has 16 hidden units;
* `:nsl_kdd`, NSL-KDD, 41 columns, five classes, from the folder of
  `--config.data.kwargs.path=...`; the student has 8. The test part has kinds of attack that
  training lacks.

The teacher, of 256 and 128 hidden units, is trained anew in each seed. Labels alone and the eight
methods of `kd_full.py`, five seeds; names of methods, `:nsl_kdd,kd,js`, leave the others out.
`:settings` compares lengths and learning rates of student and teacher on held-out rows; `CHOSEN`
has the result. Weights are the published ones (`configs/distillation.py`) times 1, 0.1 or 0.01,
rates that of labels alone or a quarter of it: `:tune` compares the six on held-out rows, and
`SCALES` has the result. Both have three seeds of their own.
"""

import itertools

from distill_jax.configs import common, distillation
from distill_jax.run import config as config_lib

TABLES = ("letter", "nsl_kdd")
HIDDEN = {"letter": 16, "nsl_kdd": 8}
TEACHER = {"model": "tabular_mlp", "kwargs": {"hidden": (256, 128)}}
SCALES: dict[str, dict[str, tuple[float, float]]] = {
    "letter": {
        **dict.fromkeys(("crd_batch", "dkd", "js", "kd", "pkt"), (0.01, 1.0)),
        "cross_entropy": (0.01, 0.25),
        "dist": (0.1, 1.0),
        "srrl": (0.01, 1.0),
    },
    "nsl_kdd": {
        "crd_batch": (0.1, 1.0),
        "kd": (0.01, 1.0),
        **dict.fromkeys(("dist", "dkd", "srrl"), (0.01, 0.25)),
        **dict.fromkeys(("cross_entropy", "js", "pkt"), (0.1, 0.25)),
    },
}
"""Scale of the weight and share of the learning rate of a method, as `:tune` chose them."""

LENGTHS = {"letter": (60, 200), "nsl_kdd": (4, 12)}
RATES = (0.1, 0.2, 0.4)
SHARES = (1.0, 0.25)
"""Of the student's learning rate alone: what a method adds to the loss makes steps larger."""

CHOSEN = {
    "letter": {"student": (200, 0.2), "teacher": (60, 0.4)},
    "nsl_kdd": {"student": (12, 0.4), "teacher": (12, 0.1)},
}
"""Epochs and learning rate."""


def get_config(arg: str = ""):
    options = common.parse(arg, "tune", "settings", *TABLES, *distillation.EIGHT)
    name = common.choose(options, TABLES, "letter")
    kind = common.choose(options, ("tune", "settings"))
    if kind == "settings":
        common.choose(options, ("settings", *distillation.EIGHT))
    methods = [m for m in distillation.EIGHT if m in options] or distillation.EIGHT
    config = common.table(name)
    if name == "nsl_kdd":
        config.data.kwargs = {"path": ""}
    config.evaluators = {"classification": {}, "calibration": {}, "imbalance": {}}
    config.roles.student = config_lib.role("tabular_mlp", hidden=(HIDDEN[name],))
    config.data.held_out = 0.2
    config.batch_size = 128
    epochs, config.optim.lr = CHOSEN[name]["student"]
    config.total = f"{epochs} epochs"
    config.optim.warmup = "5 %"
    config.eval.every = "25 %"
    config.checkpoint.keep = 1
    config.log.every_steps = 500
    config.study.replicas = "auto"

    def arm(role: str, epochs: int, lr: float) -> dict:
        own = {"total": f"{epochs} epochs", "optim": {"lr": lr}}
        return {**own, "roles": {"student": TEACHER}} if role == "teacher" else own

    if kind == "settings":
        config.study.arms = {
            f"{role}_epochs{epochs}_lr{round(1e3 * lr)}e-3": arm(role, epochs, lr)
            for role in ("student", "teacher")
            for epochs in LENGTHS[name]
            for lr in RATES
        }
        config.study.reference = next(iter(config.study.arms))
    else:
        config.study.arms = {"alone": {}, "teacher": arm("teacher", *CHOSEN[name]["teacher"])}
        config.study.reference = "alone"
        lr = config.optim.lr

        def taught(method: str, scale: float, share: float) -> dict:
            return {**distillation.arm(method, scale=scale), "optim": {"lr": share * lr}}

        for method in methods:
            if kind == "tune":
                for scale, share in itertools.product(distillation.GRID, SHARES):
                    arm_name = f"{method}_{round(100 * scale)}_lr{round(100 * share)}"
                    config.study.arms[arm_name] = taught(method, scale, share)
            else:
                config.study.arms[method] = taught(method, *SCALES[name][method])
    config.study.seeds = (100, 101, 102) if kind else (0, 1, 2, 3, 4)
    config.study.metric = f"{'held_out' if kind else 'test'}/accuracy"
    config.study.title = f"Distillation methods on {name}, wide to narrow"
    return config
