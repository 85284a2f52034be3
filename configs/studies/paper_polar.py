"""A harmonizer of conflicting label sources: does it know when one of them is wrong? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_polar.py \\
      --workdir=runs/paper_polar

Zhao et al. 2023 (arXiv:2306.16564). Eight rules vote on the parity of some images, one of them
twice, and a linear model votes on all (`data/weak_rules.py`); no label of the training part is
read. A perceptron learns from all votes by a linear, square, norm or max aggregate; beside it the
majority vote, the model's votes alone, and true labels (`oracle`). Compared is the calibration
error of the risk of the model's votes, `test/risk_ece`, beside the accuracy and the error that is
left when the riskiest tenth of the votes is corrected. Each arm has two rates, of which the
held-out images choose by accuracy.
"""

from distill_jax.configs import weak

RATES = {"slow": 3e-4, "fast": 1e-3}


def get_config():
    config = weak.base("parity", steps=400)
    config.data.name = "weak_rules"
    config.data.kwargs = {"split_seed": "run"}
    config.data.outer = 0.0
    config.evaluators = {"classification": {}, "vote_risk": {}}
    config.roles.student.kwargs = {"hidden": (64,)}
    arms = {
        name: {"objective": {"name": "pareto", "kwargs": {"aggregate": name}}}
        for name in ("linear", "square", "norm", "max", "majority")
    }
    alone = {"aggregate": "linear", "source": 9}
    arms["model_alone"] = {"objective": {"name": "pareto", "kwargs": alone}}
    arms["oracle"] = {"data": {"kwargs": {"labels": None}}}
    every = {
        name: {f"{name}_{rate}": {**arm, "optim": {"lr": lr}} for rate, lr in RATES.items()}
        for name, arm in arms.items()
    }
    config.study.arms = {name: arm for found in every.values() for name, arm in found.items()}
    config.study.tuned = {name: tuple(found) for name, found in every.items()}
    config.study.metric = "test/risk_ece"
    config.study.reference = "linear_fast"
    config.study.questions = {
        "risk": ("square", "linear", "norm", "max", "majority", "model_alone", "oracle"),
    }
    config.study.title = "POLAR: who of several sources is wrong?"
    return config
