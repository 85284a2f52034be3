"""A learned ratio of teacher and label for each token of a text.

  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/lm
  python -m distill_jax.main --config=configs/language/token_ratio.py --workdir=runs/token_ratio \\
      --config.roles.teacher.init=runs/lm

`language/kd` with `alpha` replaced by the output of a small network, which sees the triangle of
student, teacher and target at each token (`weighting/trilateral.py`, compact). It learns from the
gradient of the loss on held-out text after the student's step. `weighting.control` makes the
controls. `:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs.language import kd

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    common.parse(arg)
    config = kd.get_config()
    config.objective.kwargs = {}
    config.weighting.name = "trilateral"
    config.weighting.kwargs = {"blocks": ("sg", "tg", "st", "s", "t"), "compact": True}
    config.roles.weighting = config_lib.role("ratio_mlp", hidden=(32,))
    config.bilevel.every = 4
    config.bilevel.warmup = "100 steps"
    config.bilevel.outer_batch = 0.5
    config.bilevel.optim.lr = 3e-3
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"bilevel.optim.lr": [1e-3, 3e-3, 1e-2], "weighting.control": ["none", "shuffled"]}
