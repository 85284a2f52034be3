"""SALT: does a smaller teacher help a language model at the beginning of its training?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_salt.py \\
      --workdir=runs/paper_salt

Rawat et al. 2024 (arXiv:2410.18779): distillation from a smaller teacher for the first fifth of the
steps beats training on the next token alone at equal steps; distillation throughout is worse. Here
on the standard library's sources as bytes, with a teacher of a tenth of the student's parameters
that was trained for as many steps. Arms: the next token alone; SALT; SALT_DS, whose first stage is
on the half of the rows that a teacher of a fifth of the steps, the scout, finds hard, yet
learnable; the uniform distribution in the teacher's place, which has no content; distillation
throughout (RKD); and the next token alone with a warm-up of one step, the setting in which a first
comparison favoured SALT.

`:learned` goes further than the paper: a small network gives each token its omega, from the
triangle of student, teacher and target, and learns by the bilevel step from half of the held-out
text, which then selects nothing. Beside it are SALT, the next token alone, constants throughout
(`constant_10`, `constant_30`; RKD has .67), of which held-out bits choose one, and the controls
whose network never learns (`frozen`) and whose omegas are permuted in the batch (`shuffled`).

All arms have the same steps and warm-up, and each its own learning rate. `:rates` is the sweep that
chose them: five rates for every arm with the seed 0, compared by held-out bits per byte; the study
has other seeds. The constants have the rate of `alone`, the controls that of `learned`.
"""

from distill_jax.configs import common, papers
from distill_jax.run import config as config_lib

RATES = {"alone": 8e-3, "salt": 8e-3, "uniform": 16e-3, "rkd": 8e-3, "cold": 4e-3}
RATES |= dict.fromkeys(("constant_10", "constant_30", "learned", "frozen", "shuffled"), 8e-3)
RATES |= {"salt_ds": 4e-3}
"""The best rates of the sweep."""

OUTER_RATE = 1e-2


def get_config(arg: str = ""):
    options = common.parse(arg, "rates", "learned")
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

    def salt(name: str = "salt", **kwargs):
        return {"objective": {"name": name, "kwargs": {"omega": 2 / 3, **kwargs}}}

    teacher = {"roles": papers.frozen(teacher="teacher")}

    def learned(control: str, **network):
        seen = {"blocks": ("sg", "tg", "st", "s", "t"), "compact": True}
        weighting = {"name": "trilateral", "kwargs": seen, "control": control}
        roles = papers.frozen(teacher="teacher")
        roles["weighting"] = {"model": "ratio_mlp", "kwargs": {"hidden": (32,), **network}}
        outer = {"every": 2, "outer_batch": 1.0, "warmup": "80 steps", "optim": {"lr": OUTER_RATE}}
        arm = {"objective": {"name": "token_kd"}, "weighting": weighting, "roles": roles}
        return arm if control == "frozen" else {**arm, "bilevel": outer}

    if "learned" in options:
        methods = {
            "alone": {},
            "salt": salt() | teacher,
            "constant_10": salt(teaching="100 %", omega=0.1) | teacher,
            "constant_30": salt(teaching="100 %", omega=0.3) | teacher,
            "learned": learned("none"),
            "frozen": learned("frozen", zero_init=False),
            "shuffled": learned("shuffled"),
        }
        config.study.tuned = {"constant": ("constant_10", "constant_30")}
    else:
        both = {"roles": papers.frozen(teacher="teacher", teacher_scout="scout")}
        methods = {
            "alone": {},
            "salt": salt() | teacher,
            "salt_ds": salt(name="salt_ds") | both,
            "uniform": salt(labels="uniform"),
            "rkd": salt(teaching="100 %") | teacher,
            "cold": {},
        }
    arms = {}
    for name, changes in methods.items():
        warmup = {"warmup": "1 step"} if name == "cold" else {}
        rates = {name: RATES[name]}
        if "rates" in options:
            rates = {f"{name}_{1e3 * lr:.0f}e3": lr for lr in (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)}
        arms |= {arm: {**changes, "optim": {"lr": lr, **warmup}} for arm, lr in rates.items()}
    small = {"student": {"kwargs": {"width": 8, "depth": 1}}}
    arms["teacher"] = {"roles": small, "optim": {"lr": 16e-3}}
    config.study.sources = ("teacher",)
    if "learned" not in options:
        arms["scout"] = {**arms["teacher"], "total": "160 steps"}
        config.study.sources = ("teacher", "scout")
    config.study.arms = arms
    config.study.seeds = (0,) if "rates" in options else (1, 2, 3, 4, 5)
    config.study.reference = "alone_8e3" if "rates" in options else "alone"
    config.study.metric = "held_out/bits_per_byte" if "rates" in options else "test/bits_per_byte"
    config.study.title = "SALT: a small teacher at the beginning"
    if "learned" in options:
        config.study.title = "SALT: a learned weight for each token"
    return config
