"""A learned ratio that falls back to the tuned constant: for your own teacher, student and data.

  python -m distill_jax.main --mode=study --config=configs/studies/safe_ratio.py \\
      --workdir=runs/safe_ratio

In each seed by itself, and by held-out examples alone:

1. `kd_tuned` is the constant ratio that has the most of the selecting examples right. Ratio 0 is
   the labels alone, ratio 1 the teacher alone.
2. `tgeo_around` learns ratios around it (`Trilateral.centre`): their mean stays, and only
   differences between examples are learned, from the outer examples.
3. `safe` is `tgeo_around` where that has more of the selecting examples right than `kd_tuned`, by
   more than one standard error of the paired difference; otherwise it is `kd_tuned`.

`kd_tuned_more` is the tuned constant trained once more, with the outer examples in its training
part: what they are worth without a learned ratio. The suite in `docs/results/trust_suite.md` is
the evidence for this procedure. It costs the constants, which may go side by side, and one learned
run of about 2.7 steps a step. Replace the data and the networks by your own, and give the
held-out part some hundreds of examples: half of them decide.

`:noisy` and `:class` show what it does under known faults: 45 % of the labels name the next class;
and the teacher is wrong on 30 % of the classes besides.
"""

from distill_jax.configs import common, trust
from distill_jax.run import config as config_lib

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
TEMPERATURE = 4.0
FAULTS = {
    "noisy": {"label_noise": 0.45, "label_noise_kind": "pair"},
    "class": {
        "label_noise": 0.45,
        "label_noise_kind": "pair",
        "teacher_damage": 0.3,
        "teacher_damage_kind": "class",
    },
}


def get_config(arg: str = ""):
    fault = common.choose(common.parse(arg, *FAULTS), FAULTS)
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(128,))
    config.evaluators = {"classification": {}}
    config.data.held_out = 0.1
    config.data.outer = 0.5
    config.data.corrupt = FAULTS.get(fault, {})
    config.data.train_transforms = ("downscale", "normalize")
    config.data.eval_transforms = ("downscale", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.optim.lr = 0.05
    config.optim.warmup = "4 %"
    config.total = "1000 steps"
    config.eval.every = "20 %"
    config.bilevel.warmup = "1 epoch"
    config.bilevel.optim.lr = 1e-2
    teacher = {
        "roles": {"student": {"model": "convnet", "kwargs": {"widths": (16, 32, 64)}}},
        "optim": {"lr": 0.1},
    }
    if fault:  # trained on clean labels; its damage is put into its answers
        teacher["data"] = {"corrupt": dict.fromkeys(("label_noise", "teacher_damage"), 0.0)}
    constants = {f"kd_{100 * r:.0f}": trust.kd(r, temperature=TEMPERATURE) for r in RATIOS}
    config.study.arms = {
        "teacher": teacher,
        **constants,
        "kd_tuned_more": trust.tuned_more(temperature=TEMPERATURE),
        "tgeo_around": trust.around(temperature=TEMPERATURE, hidden=(128,)),
    }
    config.study.tuned = {"kd_tuned": tuple(constants)}
    config.study.tuned_by = "seed"
    config.study.fallback = {"safe": ("tgeo_around", "kd_tuned")}
    config.study.reference = "kd_tuned"
    config.study.replicas = "yes"
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.questions = {
        "is a learned ratio worth it": ("safe", "kd_tuned", "tgeo_around", "teacher"),
        "or more training examples": ("safe", "kd_tuned_more"),
    }
    config.study.title = "A learned ratio with a fallback"
    return config
