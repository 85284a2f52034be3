"""Distillation of a language model on its own samples (GKD), on the standard library's sources.

  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/lm
  python -m distill_jax.main --config=configs/language/gkd.py --workdir=runs/lm_gkd \\
      --config.roles.teacher.init=runs/lm

Teacher and student as in `kd.py`. `:on_policy` distils on samples alone, with the reverse
divergence. `:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "on_policy")
    config = common.text()
    config.total = "600 steps"
    config.objective.name = "gkd"
    config.objective.kwargs = {
        "on_policy": 0.5,
        "divergence": "jensen_shannon",
        "prompt": 32,
        "new_tokens": 32,
    }
    config.roles.teacher = config_lib.role("transformer", width=64, depth=3, heads=4)
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/lm"
    config.roles.student = config_lib.role("transformer", width=32, depth=2, heads=2)
    if "on_policy" in options:
        config.objective.kwargs.on_policy, config.objective.kwargs.divergence = 1.0, "reverse"
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.on_policy": [0.25, 0.5, 1.0], "optim.lr": [1e-3, 2e-3, 4e-3]}
