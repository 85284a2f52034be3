"""Can digits that training never showed be recognized by their attributes?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_zero_shot.py \\
      --workdir=runs/paper_zero_shot

Mapping to attributes, after the survey of Chen et al. 2021 (arXiv:2112.10006). A perceptron learns
the seven segments of eight digits (`data/attribute_digits.py`), others in each seed, and chooses
between the other two. Control: signatures that are dealt to digits at random (`shuffled`), at two
rates each, of which the held-out images choose.
"""

from distill_jax.configs import papers

RATES = {"slow": 0.02, "fast": 0.1}


def get_config():
    config = papers.small("attribute_digits", steps=400, split_seed="run")
    config.evaluators = {"multilabel": {}, "attributes": {}}
    config.optim.warmup = "5 %"
    config.eval.metric = "held_out/macro_f1"
    config.study.replicas = "yes"
    kinds = {"segments": False, "shuffled": True}
    config.study.arms = {
        f"{kind}_{rate}": {"data": {"kwargs": {"shuffled": value}}, "optim": {"lr": lr}}
        for kind, value in kinds.items()
        for rate, lr in RATES.items()
    }
    config.study.tuned = {kind: tuple(f"{kind}_{rate}" for rate in RATES) for kind in kinds}
    config.study.reference = "shuffled_fast"
    config.study.questions = {"attributes": ("segments", "shuffled")}
    config.study.metric = "test/zero_shot_accuracy"
    config.study.title = "Digits recognized by attributes"
    return config
