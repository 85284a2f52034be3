"""Ranking digits for a query image, with a curriculum (MacAvaney et al. 2020, arXiv:2004.14269).

  python -m distill_jax.main --config=configs/language/ranking.py --workdir=runs/ranking
  python -m distill_jax.main --config=configs/language/ranking.py:plain --workdir=runs/plain

Pairs that a weak first-stage ranker has in the right order count more in the first half of the
training. `:plain` is without a curriculum; `:listwise` learns from a softmax over the list and
`:pg_rank` from policy gradients of the nDCG (arXiv:2310.04407). `:smoke` as in
`distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    known = ("plain", "listwise", "pg_rank")
    kind = common.choose(common.parse(arg, *known), known, "curriculum")
    config = config_lib.base()
    config.data.name = "digit_lists"
    config.objective.name = "ranking"
    config.roles.student = config_lib.role("two_tower", hidden=(32,), width=32)
    config.evaluators = {"ranking": {"relevant": 3.0}}
    config.optim.name = "adam"
    config.optim.lr = 0.01
    config.batch_size = 32
    config.total = "400 steps"
    config.eval.every = "100 steps"
    config.eval.metric = "held_out/ndcg10"
    if kind == "pg_rank":
        config.objective.name, config.objective.kwargs = "pg_rank", {}
        config.data.train_transforms = ("gumbel_noise",)
        config.data.transform_kwargs.gumbel_noise = {"rankings": 32}
    elif kind == "listwise":
        config.objective.kwargs = {"rank_loss": "listwise"}
    elif kind == "curriculum":
        config.objective.kwargs = {"ramp": "50 %"}
        config.data.train_transforms = ("ranking_ease",)
        config.data.transform_kwargs.ranking_ease = {"heuristic": "normalized_score"}
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [3e-3, 1e-2, 3e-2], "objective.kwargs.ramp": ["25 %", "50 %", "100 %"]}
