"""Distillation of a language model token by token, on the Python standard library's sources.

  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/lm
  python -m distill_jax.main --config=configs/language/kd.py --workdir=runs/lm_kd \\
      --config.roles.teacher.init=runs/lm

The teacher is the best checkpoint, by held-out bits per byte, of the run in `roles.teacher.init`;
the student has less than a quarter of its parameters. `:top` compares them on the teacher's 16
most probable tokens and all others as one, as for large vocabularies. `:smollm2` distils
SmolLM2-135M into a student of 1.8 M parameters on plays of Shakespeare, see
`studies/smollm2.py`. `:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "top", "smollm2")
    common.choose(options, ("top", "smollm2"))
    config = common.text()
    config.total = "600 steps"
    config.objective.name = "token_kd"
    config.objective.kwargs = {"alpha": 0.5}
    if "smollm2" in options:
        common.smollm2(config, teacher=True)
        config.objective.kwargs.alpha = 0.8
        return config
    config.roles.teacher = config_lib.role("transformer", width=64, depth=3, heads=4)
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/lm"
    config.roles.student = config_lib.role("transformer", width=32, depth=2, heads=2)
    if "top" in options:
        config.roles.teacher.kwargs.top = 16
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.alpha": [0.25, 0.5, 0.75], "optim.lr": [1e-3, 2e-3, 4e-3]}
