"""The CIFAR-100 distillation benchmark (Tian et al. 2020, arXiv:1910.10699): thirteen pairs.

  python -m distill_jax.main --mode=study --workdir=runs/kd_cifar100/resnet56-resnet20 \\
      --config=configs/studies/kd_cifar100.py:resnet56-resnet20

Arms: the student alone, distillation of .1 cross-entropy and .9 T^2 KL at T 4 (Hinton et al. 2015),
and the teacher, which each student takes from its own seed after the last epoch. 240 epochs of
batch 64; momentum .9, weight decay 5e-4 on all parameters; the rate .05, or .01 for ShuffleNets and
MobileNets, falls tenfold after epochs 150, 180 and 210; random crops and flips. All 50,000 images
are trained on: nothing is selected, the last state counts. `configs/published.py` has the figures
that were published for every pair.

`:all` adds every method of `configs/distillation.py` with its published weights; here:

- Features of a stage are its last block's output behind the ReLU; of wide ResNets, which activate
  in the next block, the sum before norm and ReLU. `ab` and the teacher of `review_kd` take them
  before the ReLU, of wide ResNets behind the norm.
- `cc` is the successive form, weight .02, of embeddings projected to 128 features.
- `dkd` has the beta of `DKD_BETA`, 8 for pairs that are not in it (of resnet110-resnet20 and
  resnet50-vgg8 none was published), T 4, and a warm-up of 20 epochs.
- `fsp` compares flows between consecutive stages, the first of which is the stem.

Deviations: the published `fsp`, `ab` and `ft` begin with a phase of their own (flows or boundaries
alone; a paraphraser trained before the student), where here all is learned together from the start.
The scale of `ab` and `ft`: see `configs/distillation.py`.

`:<teacher>-<student>` names the pair (`PAIRS`); without it resnet56-resnet20. `:smoke` trains a few
steps on generated images, and combines: `:vgg13-vgg8,smoke`, as does `:all`.
Published figures stand beside ours.
"""

from distill_jax.configs import common, distillation, published, trust
from distill_jax.run import config as config_lib

NETWORKS = {
    **{f"wrn-{n}": ("wide_resnet", {"variant": f"wrn-{n}"}) for n in ("40-2", "16-2", "40-1")},
    **{
        f"resnet{n}": ("resnet", {"variant": f"resnet{n}"})
        for n in ("20", "32", "56", "110", "8x4", "32x4")
    },
    "resnet50": ("resnet_four_stages", {"variant": "resnet50"}),
    "vgg8": ("vgg", {"variant": "vgg8"}),
    "vgg13": ("vgg", {"variant": "vgg13"}),
    "mobilenet_v2": ("mobilenet_v2", {"width_multiplier": 0.5}),
    "shufflenet_v1": ("shufflenet_v1", {"groups": 3}),
    "shufflenet_v2": ("shufflenet_v2", {"variant": "1x"}),
}
PAIRS = {
    f"{teacher}-{student}": (teacher, student)
    for teacher, student in (
        ("wrn-40-2", "wrn-16-2"),
        ("wrn-40-2", "wrn-40-1"),
        ("resnet56", "resnet20"),
        ("resnet110", "resnet20"),
        ("resnet110", "resnet32"),
        ("resnet32x4", "resnet8x4"),
        ("vgg13", "vgg8"),
        ("vgg13", "mobilenet_v2"),
        ("resnet50", "mobilenet_v2"),
        ("resnet50", "vgg8"),
        ("resnet32x4", "shufflenet_v1"),
        ("resnet32x4", "shufflenet_v2"),
        ("wrn-40-2", "shufflenet_v1"),
    )
}
STAGES = {"vgg": (2, 3, 4, 5), "mobilenet_v2": (1, 2, 3, 4), "resnet_four_stages": (1, 2, 3, 4)}
"""The stages that features are taken from, where they are not the first three."""

DKD_BETA = {
    "resnet56-resnet20": 2.0,
    "resnet110-resnet32": 2.0,
    "vgg13-vgg8": 6.0,
    "vgg13-mobilenet_v2": 6.0,
    "wrn-40-2-wrn-16-2": 6.0,
    "wrn-40-2-wrn-40-1": 6.0,
}
"""Zhao et al. 2022, the configs of the authors' program; 8 for the other pairs."""

LR, LOW_LR = 0.05, 0.01
TEMPERATURE, ALPHA = 4.0, 0.9


def get_config(arg: str = ""):
    options = common.parse(arg, "all", *PAIRS)
    pair = common.choose(options, PAIRS, "resnet56-resnet20")
    teacher, student = PAIRS[pair]
    config = config_lib.base()
    config.data.name = "cifar100"
    config.data.held_out = 0.0
    config.data.train_transforms = ("random_crop", "horizontal_flip", "normalize")
    config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs.random_crop = {"padding": 4}
    config.data.transform_kwargs.normalize = {
        "mean": (0.5071, 0.4867, 0.4408),
        "std": (0.2675, 0.2565, 0.2761),
    }
    config.objective.name = "supervised"
    model, kwargs = NETWORKS[student]
    config.roles.student = config_lib.role(model, **kwargs)
    config.evaluators = {"classification": {}, "calibration": {}}
    config.batch_size = 64
    config.total = "240 epochs"
    config.optim.name = "momentum"
    config.optim.lr = LOW_LR if "net_v" in student else LR
    config.optim.schedule = "step"
    config.optim.schedule_kwargs = {"milestones": (150 / 240, 180 / 240, 210 / 240), "factor": 0.1}
    config.optim.weight_decay = 5e-4
    config.optim.decay_mask = ((r".", True),)
    config.eval.metric = ""
    config.checkpoint.every = "10 epochs"
    config.checkpoint.keep = 1
    model, kwargs = NETWORKS[teacher]
    config.study.arms = {
        "alone": {},
        "kd": {**trust.kd(ALPHA, temperature=TEMPERATURE), "evaluators": {"agreement": {}}},
        "teacher": {
            "roles": {"student": {"model": model, "kwargs": kwargs}},
            "optim": {"lr": LR},
        },
    }
    if "all" in options:
        # FSP compares Gram matrices of stages of equal widths: networks of one family.
        equal = "fsp" in published.CIFAR100[pair]
        methods = distillation.arms(maps=True, equal=equal, scales={})
        projectors = methods["crd"]["roles"]
        methods["cc"]["objective"]["kwargs"] = {"weight": 0.02, "form": "successive"}
        methods["cc"]["roles"] = projectors
        methods["crd"]["objective"]["kwargs"]["num_negatives"] = 16384
        methods["dkd"]["objective"]["kwargs"] |= {
            "beta": DKD_BETA.get(pair, 8.0),
            "warmup": "20 epochs",
        }
        config.study.arms.update({name: a for name, a in methods.items() if name != "kd"})
        for role, name in (("student", student), ("teacher", teacher)):
            numbers = STAGES.get(NETWORKS[name][0], (1, 2, 3))
            stages = tuple(f"stage{i}" for i in numbers)
            before = tuple(f"{stage}_pre" for stage in stages)
            wide = name.startswith("wrn")
            features = tuple(f"{stage}_raw" for stage in stages) if wide else stages
            stem = "stage1" if NETWORKS[name][0] == "vgg" else "stem_raw" if wide else "stem"
            # Knowledge review asks the teacher, alone, for features before the activation.
            reviewed = before if role == "teacher" else stages
            named = {
                "fitnet": features[1],
                "ft": features[-1],
                "sp": features[-1:],
                **dict.fromkeys(("at", "nst", "vid"), features),
                "fsp": (stem, *features),
                "ab": before,
                "review_kd": (*reviewed, "embedding"),
            }
            for arm, found in named.items():
                if arm in config.study.arms:
                    key = f"{role}_stage" + "s" * (arm not in ("fitnet", "ft"))
                    config.study.arms[arm].objective.kwargs[key] = found
    figures, arms = published.CIFAR100[pair], config.study.arms
    config.study.published = {n: round(x / 100, 4) for n, x in figures.items() if n in arms}
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "alone"
    config.study.title = f"CIFAR-100, {teacher} to {student}"
    return config
