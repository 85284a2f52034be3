"""Several labels, and a real value: does a teacher help, and a learned weight of each example?

  python -m distill_jax.main --mode=study --config=configs/studies/tasks.py --workdir=runs/tasks
  python -m distill_jax.main --mode=study --config=configs/studies/tasks.py:regression \\
      --workdir=runs/tasks_regression

Data, networks and settings are those of `configs/distill/multilabel.py` and `regression.py`; no
arm's settings were searched for. Each student learns from the teacher of its own seed.
"""

from distill_jax.configs.distill import multilabel, regression

from distill_jax.configs import common

_OF_BILEVEL = ("every", "warmup", "outer_batch", "outer_loss", "optim")


def get_config(arg: str = ""):
    values = "regression" in common.parse(arg, "regression")
    task = regression if values else multilabel
    config, kd = task.get_config("teacher"), task.get_config()
    large = {"roles": {"student": {"kwargs": config.roles.student.kwargs.to_dict()}}}
    config.roles.student = kd.roles.student
    teacher = {"teacher": {"init": "arm:teacher", "frozen": True}}
    config.study.arms = {
        "teacher": large,
        "alone": {},
        "kd": {"objective": _objective(kd), "roles": teacher},
    }
    rules = (
        {"by_losses": "bilevel"}
        if values
        else {"triangle": "bilevel", "by_losses": "bilevel,losses"}
    )
    for arm, options in rules.items():
        learned = task.get_config(options)
        config.study.arms[arm] = {
            "objective": _objective(learned),
            "roles": {**teacher, "weighting": _named(learned.roles.weighting, "model", "kwargs")},
            "weighting": _named(learned.weighting, "name", "kwargs", "loss_terms"),
            "bilevel": _named(learned.bilevel, *_OF_BILEVEL),
        }
    config.study.sources = ("teacher",)
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "alone"
    config.study.metric = "test/rmse" if values else "test/mean_average_precision"
    config.study.title = "A real value: diabetes" if values else "Five labels at once: Adult"
    return config


def _objective(config):
    return {"name": "kd", "kwargs": config.objective.kwargs.to_dict()}


def _named(group, *names):
    return {name: group.to_dict()[name] for name in names}
