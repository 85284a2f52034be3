"""Masked thought: does hiding a part of the solutions help to solve problems?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_masked_thought.py \\
      --workdir=runs/paper_masked_thought

Chen et al. 2024 (arXiv:2403.02178): fine-tuning on solutions of which a share is hidden, with the
clean tokens as targets, solves more problems. Here on arithmetic chains, few enough to be learned
by heart. Arms: plain training; hidden tokens replaced by the mask token or by random ones; and as
controls dropout, and questions that are targets too. `benchmarks/masked_thought.py` chooses a rate
for each arm, and has hidden questions and smoothed labels as well.
"""

from distill_jax.configs import common
from distill_jax.core import chains


def get_config(arg: str = ""):
    common.parse(arg)
    config = common.chains()
    config.total = "400 steps"
    config.optim.warmup = "40 steps"
    config.log.every_steps = 100
    config.log.tensorboard = False

    def hidden(rate: float, token: int) -> dict:
        options = {"rate": rate, "ramp": 267, "mask_token": token}
        return {
            "data": {
                "train_transforms": ("next_token", "masked_thought"),
                "transform_kwargs": {"masked_thought": options},
            }
        }

    config.study.arms = {
        "sft": {},
        "masked": hidden(0.1, chains.MASK),
        "random": hidden(0.1, -1),
        "dropout": {"roles": {"student": {"kwargs": {"dropout": 0.1}}}},
        "whole": {"data": {"transform_kwargs": {"next_token": {"whole": True}}}},
    }
    config.study.reference = "sft"
    config.study.seeds = (1, 2, 3, 4, 5)
    config.study.metric = "test/accuracy"
    config.study.title = "Masked thought on arithmetic chains"
    return config
