"""The studies of papers at twice their length, and where the data has more, with all of it.

  python -m distill_jax.main --mode=study --config=configs/studies/longer.py:fst \\
      --workdir=runs/longer_fst
  python tools/claims_page.py --out=docs/results/papers runs/longer_*

`:NAME` is the study `paper_NAME.py` with twice the steps or epochs in every arm. `:NAME,full` takes
all of Fashion-MNIST in place of the 5k/1k that ships with the package, for as many epochs as
before, which is twelve times the steps (`sla`: for as many steps); other data cannot grow. Nothing
is tuned anew, and durations other than that of training, such as a warm-up, stay.
"""

import importlib

from distill_jax.configs import common
from distill_jax.core.errors import ConfigError

PAPERS = (
    "evidence",
    "ferkd",
    "fst",
    "hard",
    "meta_dmoe",
    "nested_coteaching",
    "polar",
    "predictions",
    "ps_kd",
    "rad",
    "rfc",
    "sla",
    "ssld",
    "weak_to_strong",
    "zero_shot",
)


def twice(total: float | str) -> float | str:
    """Doubles a duration: a number of steps, or text such as "20 epochs".

    >>> twice("20 epochs"), twice(300)
    ('40 epochs', 600)
    """
    if isinstance(total, str):
        number, unit = total.split()
        return f"{2 * float(number):g} {unit}"
    return 2 * total


def get_config(arg: str = ""):
    options = common.parse(arg, "full", *PAPERS)
    name = common.choose(options, PAPERS, "ps_kd")
    config = importlib.import_module(f"distill_jax.configs.studies.paper_{name}").get_config()
    full = "full" in options
    if full and config.data.name != "fashion_mnist_5k":
        what = f"{name!r} already has all of {config.data.name}"
        raise ConfigError(what, where="--config", hint=f"{name!r} without 'full'")
    for arm in config.study.arms.values():
        if "cache" in arm:  # another teacher than that of the shorter study
            arm.cache.dir = arm.cache.dir.replace("runs/", f"runs/longer_{'full_' * full}")
        if "total" in arm and not full:
            arm.total = twice(arm.total)
    if full:
        config.data.name = "fashion_mnist"
        config.study.title += ", all of Fashion-MNIST"
    else:
        config.total = twice(config.total)
        config.study.title += ", twice as long"
    return config
