"""Training on the rows that a linear rule prefers (InstructMining, Cao et al. 2023, 2307.06290).

  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/lm
  python -m distill_jax.main --config=configs/language/instruct_mining.py --workdir=runs/mined \\
      --config.roles.teacher.init=runs/lm

Rows are short pieces of the Python standard library's sources (`data/stdlib_snippets.py`). The rule
here is an example: it prefers long, new and hard pieces that parse. Your own is fitted by
`fit_rule`, as in `benchmarks/instruct_mining.py`, which tests what it predicts. `:all` trains on
all rows. `:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "all")
    config = common.text("stdlib_snippets")
    config.data.kwargs = {"length": 64}
    config.data.held_out = 0.1
    config.total = "600 steps"
    config.roles.student = config_lib.role("transformer", width=64, depth=2, heads=2)
    config.objective.name = "next_token"
    if "all" not in options:
        rule = {"length": -0.01, "novelty": -0.3, "parses": -0.1, "nll": -0.05}
        config.objective.name = "instruct_mining"
        config.objective.kwargs = {"rule": rule, "share": 0.25}
        config.roles.teacher = config_lib.role("transformer", width=64, depth=3, heads=4)
        config.roles.teacher.frozen, config.roles.teacher.init = True, "runs/lm"
    return config
