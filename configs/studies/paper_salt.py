"""SALT: does a smaller teacher help a language model at the beginning of its training?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_salt.py \\
      --workdir=runs/paper_salt

Rawat et al. 2024 (arXiv:2410.18779): distillation from a smaller teacher for the first fifth of the
steps beats training on the next token alone at equal steps; distillation throughout is worse. Here
on the standard library's sources as bytes, with a teacher of a tenth of the student's parameters
that was trained for as many steps. Arms: the next token alone; SALT; the uniform distribution in
the teacher's place, which has no content; distillation throughout (RKD); and the next token alone
with a warm-up of one step, the setting in which a first comparison favoured SALT.

All arms have the same steps and warm-up, and each its own learning rate. `:rates` is the sweep that
chooses them: three rates for every arm with the seed 0, compared by held-out bits per byte. Give
what it finds as `--config.study.arms.alone.optim.lr=...`, and so on; the study has other seeds.
"""

from distill_jax.configs import common, papers
from distill_jax.run import config as config_lib

RATES = {"alone": 16e-3, "salt": 16e-3, "uniform": 16e-3, "rkd": 16e-3, "cold": 16e-3}
"""Before the sweep: a rate at which the next token alone learns well."""


def get_config(arg: str = ""):
    options = common.parse(arg, "rates")
    config = common.text()
    config.data.kwargs = {"length": 64, "test_fraction": 0.02}
    config.objective.name = "next_token"
    config.roles.student = config_lib.role("transformer", width=32, depth=2, heads=2)
    config.total = "800 steps"
    config.optim.warmup = "80 steps"
    config.eval.every = "800 steps"
    config.eval.batch_size = 256
    config.log.every_steps = 200
    config.log.tensorboard = False

    def salt(**kwargs):
        return {"objective": {"name": "salt", "kwargs": {"omega": 2 / 3, **kwargs}}}

    teacher = {"roles": papers.frozen(teacher="teacher")}
    methods = {
        "alone": {},
        "salt": salt() | teacher,
        "uniform": salt(labels="uniform"),
        "rkd": salt(teaching="100 %") | teacher,
        "cold": {},
    }
    arms = {}
    for name, changes in methods.items():
        warmup = {"warmup": "1 step"} if name == "cold" else {}
        rates = {name: RATES[name]}
        if "rates" in options:
            rates = {f"{name}_{1e3 * lr:.0f}e3": lr for lr in (8e-3, 16e-3, 32e-3)}
        arms |= {arm: {**changes, "optim": {"lr": lr, **warmup}} for arm, lr in rates.items()}
    small = {"student": {"kwargs": {"width": 8, "depth": 1}}}
    arms["teacher"] = {"roles": small, "optim": {"lr": 16e-3}}
    config.study.arms = arms
    config.study.sources = ("teacher",)
    config.study.seeds = (0,) if "rates" in options else (1, 2, 3, 4, 5)
    config.study.reference = "alone_16e3" if "rates" in options else "alone"
    config.study.metric = "held_out/bits_per_byte" if "rates" in options else "test/bits_per_byte"
    config.study.title = "SALT: a small teacher at the beginning"
    return config
