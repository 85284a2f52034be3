"""T-JEPA on three tables with larger contexts, and for twice the steps.

  python -m distill_jax.main --mode=study --config=configs/studies/tjepa.py --workdir=runs/tjepa

In `ssl_tables.py` a transformer over columns is worse after T-JEPA than before it. There, as
`column_masks` has by default, three tenths of the columns predict others, four sets of them: of 16
columns five say little of a row. Here half of the columns predict one set of a quarter.

* letters, 16 columns, 26 classes;
* `:census`, Census-Income, 40 columns, 33 of them categories, 6.2 % of the rows positive;
* `:nsl_kdd`, NSL-KDD, 41 columns, five classes, from the folder of
  `--config.data.kwargs.path=...`; the test part has kinds of attack that training lacks.

Arms: `tjepa` with the masks and the rate that letters chose, `twice` for twice the steps, and
`small`, as long as `tjepa`, with the masks of `ssl_tables.py`. Tokens of the moving average side by
side are judged frozen by a linear probe, a perceptron and boosted trees of scikit-learn on 4,000
labels, all beside raw columns (categories as indicators) and the same network before training. The
last state counts. Three seeds.

`:tune` compares three contexts at two rates on held-out rows, by the linear probe, with a seed of
its own. A table takes 20 to 40 minutes of a shared core, `:tune` on letters 15.
"""

import itertools

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib

STEPS = 4000
TABLES = {"letter": "letter", "census": "census_income", "nsl_kdd": "nsl_kdd"}
CONTEXTS, RATES = (0.5, 0.8, 0.9), (1e-3, 3e-3)
CHOSEN = 0.5, 3e-3
"""Context and learning rate, from `:tune` on letters."""

SMALL = {"context": 0.3, "target": 0.3, "targets": 4}


def arm(masks: dict, lr: float, *, steps: int = STEPS) -> dict:
    """T-JEPA with these masks, and an average that forgets its start in so many steps."""
    return {
        "data": {"transform_kwargs": {"column_masks": masks}},
        "optim": {"lr": lr},
        "total": f"{steps} steps",
        "eval": {"every": f"{steps} steps"},
        "roles": {"target": {"decay": self_supervised.forgetting(steps)}},
    }


def around(context: float) -> dict:
    """Masks of this context and one set of half of the other columns."""
    return {"context": context, "target": (1 - context) / 2, "targets": 1}


def get_config(arg: str = ""):
    options = common.parse(arg, "tune", *TABLES)
    name = common.choose(options, TABLES, "letter")
    config = self_supervised.table(TABLES[name])
    if name == "nsl_kdd":
        config.data.kwargs = {"path": ""}
    config.batch_size = 64
    config.optim.warmup = "5 %"
    config.log.every_steps = 200
    config.roles.student.kwargs.width = 16
    config.data.train_transforms = (*config.data.train_transforms, "column_masks")
    config.objective.name = "tjepa"
    config.roles.predictor = config_lib.role("token_predictor", width=32, depth=1, heads=4)
    config.roles.target = self_supervised.average("student", schedule="linear")
    judged = {"role": "target", "max_examples": 4000}
    config.evaluators = {
        "probe": {**judged, "c": (1e-3, 1e-2, 1e-1, 1.0)},
        "representation": {"role": "target"},
    }
    config.eval.metric = "held_out/probe_accuracy"
    context, lr = CHOSEN
    if "tune" in options:
        config.study.arms = {
            f"context{round(100 * c)}_lr{round(1e4 * r)}e-4": arm(around(c), r)
            for c, r in itertools.product(CONTEXTS, RATES)
        }
        config.study.seeds, config.study.metric = (100,), "held_out/probe_accuracy"
        config.study.reference = next(iter(config.study.arms))
    else:
        config.evaluators.downstream = judged
        config.study.arms = {
            "tjepa": arm(around(context), lr),
            "twice": arm(around(context), lr, steps=2 * STEPS),
            "small": arm(SMALL, lr),
        }
        config.study.seeds, config.study.metric = (1, 2, 3), "test/probe_accuracy"
        config.study.reference = "small"
    config.study.title = f"T-JEPA with larger contexts: {TABLES[name]}"
    return config
