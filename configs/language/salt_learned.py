"""How much to trust a teacher at each token, learned from held-out text.

  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/lm
  python -m distill_jax.main --config=configs/language/salt_learned.py --workdir=runs/lm_ratio \\
      --config.roles.teacher.init=runs/lm

SALT (arXiv:2410.18779) gives the teacher the weight omega in the first stage and none later. Here a
small network sees the cross-entropy and the divergence of a token and gives each its weight. It
learns by the bilevel step from the next tokens of held-out documents, which select nothing.
`:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    common.parse(arg)
    config = common.text()
    config.objective.name = "token_kd"
    config.roles.teacher = config_lib.role("transformer", width=64, depth=3, heads=4)
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/lm"
    config.roles.student = config_lib.role("transformer", width=32, depth=2, heads=2)
    config.total = "600 steps"
    common.bilevel(config, losses=True)
    config.bilevel.warmup = "50 steps"
    config.data.held_out = 0.04
    return config
