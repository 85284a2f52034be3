"""Distillation methods on all of Fashion-MNIST: three pairs of networks, and few labels.

  python -m distill_jax.main --config=configs/studies/kd_full.py:teacher --workdir=runs/kd_teacher
  python -m distill_jax.main --mode=study --config=configs/studies/kd_full.py:mlp \\
      --workdir=runs/kd_full_mlp

54,000 training, 6,000 held-out and 10,000 test images at 14 x 14 pixels. One teacher, a ConvNet of
widths 32, 64, 128 (94,186 parameters), learns for 20 epochs from mirrored images. It teaches

* `:convnet`, a ConvNet of widths 4, 8, 16 (1,702 parameters), 20 epochs;
* `:mlp`, a perceptron with 128 hidden units (26,506), 20 epochs;
* `:vit`, a ViT 32 wide and two blocks deep on 2 x 2 patches of 7 x 7 pixels (27,594), 20 epochs.

Eight methods and labels alone, five seeds; `:all` has every method whose weight was chosen for the
student, 25 for `:convnet`. With `:mlp,few` 500 labels of each class are known, and a student sees
the other images without theirs, for 5 epochs; `alone` trains on the labelled images. `dkd` and the
memory of `crd` use the class of every image and have no place there. Names of methods,
`:convnet,js,srrl`, leave the others out.

`:settings` compares lengths and learning rates of labels alone on held-out images, and augmented
ones; `CHOSEN` and `FEW_CHOSEN` have the result. Weights are the published ones
(`configs/distillation.py`) times 1, 0.1 or 0.01: `:tune` compares them on held-out images, and
`SCALES` has the result (of `:vit` for 10 epochs at a rate of 0.003). `:settings` and `:tune` have a
seed of their own. `crd`, `review_kd`, `rkd` and `vid`, whose steps cost a multiple of the
student's, have the scales that `kd_table.py` chose on 5,000 images.

Images of students are not augmented, which made labels alone worse, so the teacher's outputs are
stored once for all runs; methods on feature maps ask the teacher in each step. A study that is
started again with more seeds or methods (`:convnet,kd` and then `:convnet`) in the same folder runs
those alone. Budgets, in time of one core: half an hour for each of the four studies and 20 minutes
for its `:tune`; three and a half hours for `:convnet,all`, and two and a half for its `:tune`.
"""

import itertools
from collections.abc import Sequence

from distill_jax.configs import common, distillation
from distill_jax.core.errors import ConfigError
from distill_jax.run import config as config_lib

STUDENTS = {
    "convnet": ("convnet", {"widths": (4, 8, 16)}),
    "mlp": ("mlp", {"hidden": (128,)}),
    "vit": ("vit", {"width": 32, "depth": 2, "heads": 2, "patch_size": 7}),
}
NAMES = {"convnet": "ConvNet", "mlp": "MLP", "vit": "ViT"}
TEACHER = {"model": "convnet", "kwargs": {"widths": (32, 64, 128)}, "frozen": True}
FOLDER = "runs/kd_teacher"
METHODS = tuple(name for name, method in distillation.METHODS.items() if not method.equal)
FEW = ("kd", "cross_entropy", "dist", "js", "srrl", "crd_batch", "pkt", "jeffreys")
LABELLED = ("dkd", "crd")
"""Methods that use the class of every image."""

POSTERIOR = {**distillation.POSTERIOR, "kernel_sizes": (1,)}
"""Of VID: with its three convolutions a step costs six times as much."""

ONLINE = ("sp",)
"""Methods on feature maps of the teacher alone, which is not stored."""

SCALES = {
    "convnet": {
        1.0: "jeffreys simkd standardized vid",
        0.1: "crd cross_entropy dist ickd js pkt review_kd srrl",
        0.01: "ab at cc crd_batch dkd fitnet ft kd nst reverse_kl rkd sp tf_kd",
    },
    "mlp": {1.0: "dist js kd", 0.1: "cross_entropy srrl", 0.01: "crd_batch dkd pkt"},
    "vit": {1.0: "js kd", 0.1: "crd_batch cross_entropy dist dkd srrl", 0.01: "pkt"},
    "few": {1.0: "crd_batch dist jeffreys js kd pkt srrl", 0.1: "cross_entropy"},
}
"""Methods by the scale of their weights that `:tune` chose."""

RATES = {"convnet": (0.05, 0.1, 0.2), "mlp": (0.02, 0.05, 0.1), "vit": (1e-3, 3e-3, 1e-2)}
LENGTHS = {"convnet": (10, 20), "mlp": (10, 20, 40), "vit": (10, 20)}
LABELS = 500
"""Of each class in the setting with few."""

FEW_STEPS, FEW_RATES = (1000, 3000, 10000), (0.02, 0.05, 0.1)
FEW_CHOSEN = 3000, 0.05
"""Steps and learning rate of few labels alone."""

CHOSEN = {"convnet": (20, 0.1), "mlp": (20, 0.05), "vit": (20, 1e-2)}
"""Epochs and learning rate of the students."""

CHAIN = ("downscale", "normalize")
FLIPS = {"data": {"train_transforms": ("downscale", "horizontal_flip", "normalize")}}
CROPS = {
    "data": {
        "train_transforms": ("downscale", "random_crop", "horizontal_flip", "normalize"),
        "transform_kwargs": {"random_crop": {"padding": 1}},
    }
}


def settings(pair: str) -> dict[str, dict]:
    """Labels alone at every length and learning rate, and augmented at one of them."""
    arms = {}
    for epochs, lr in itertools.product(LENGTHS[pair], RATES[pair]):
        name = f"epochs{epochs}_lr{round(1e4 * lr)}e-4"
        arms[name] = {"total": f"{epochs} epochs", "optim": {"lr": lr}}
    epochs, lr = CHOSEN[pair]
    arm = {"total": f"{epochs} epochs", "optim": {"lr": lr}}
    return arms | {"flips": {**arm, **FLIPS}, "crops": {**arm, **CROPS}}


def few_settings(labels: dict) -> dict[str, dict]:
    """The images with labels alone, at every length and learning rate."""
    return {
        f"steps{steps}_lr{round(1e4 * lr)}e-4": {
            **labels,
            "total": f"{steps} steps",
            "optim": {"lr": lr},
        }
        for steps, lr in itertools.product(FEW_STEPS, FEW_RATES)
    }


def scales(setting: str) -> dict[str, float]:
    """The scale of the weight of each method that was tuned."""
    return {name: scale for scale, names in SCALES[setting].items() for name in names.split()}


def methods(options: set[str], pair: str, setting: str) -> Sequence[str]:
    """Names of the methods to run: those of the options, all, or eight.

    Raises:
      ConfigError: a method that does not fit, or has no scale where `:tune` is not to choose one.
    """
    admitted = [
        name
        for name in METHODS
        if (pair == "convnet" or not distillation.METHODS[name].maps)
        and not (setting == "few" and name in LABELLED)
    ]
    tuned = admitted if "tune" in options else scales(setting)
    if "all" in options:
        return [name for name in admitted if name in tuned]
    named = [name for name in METHODS if name in options]
    if unfit := set(named) - set(admitted):
        what = f"{min(unfit)} is not among the methods of this student"
        raise ConfigError(what, where="--config", hint=f"available: {', '.join(admitted)}")
    if untuned := [name for name in named if name not in tuned]:
        what = f"no scale of the weight of {untuned[0]} was chosen for this student"
        hint = f"':{setting},tune,{untuned[0]}' compares three; SCALES has what it chose"
        raise ConfigError(what, where="--config", hint=hint)
    return named or (FEW if setting == "few" else distillation.EIGHT)


def get_config(arg: str = ""):
    own = ("teacher", "settings", "tune", "all", "few")
    options = common.parse(arg, *own, *STUDENTS, *METHODS)
    common.choose(options, ("teacher", "settings", "tune"))
    apart = {"teacher": ("all", "few", *STUDENTS, *METHODS), "settings": ("all", *METHODS)}
    for option, without in {**apart, "all": METHODS}.items():
        if option in options:
            common.choose(options, (option, *without))
    few = "few" in options
    pair = common.choose(options, STUDENTS, "mlp" if few else "convnet")
    if few and pair != "mlp":
        raise ConfigError(f"few does not go with {pair}", where="--config", hint="':mlp,few'")
    setting = "few" if few else pair
    names = methods(options, pair, setting)
    config = common.fashion_mnist(full=True)
    model, kwargs = STUDENTS[pair]
    epochs, lr = CHOSEN[pair]
    config.objective.name = "supervised"
    config.roles.student = config_lib.role(model, **kwargs)
    config.data.train_transforms = config.data.eval_transforms = CHAIN
    del config.data.transform_kwargs["random_crop"]
    config.total = f"{epochs} epochs"
    config.optim.lr = lr
    config.optim.warmup = "5 %"
    if pair == "vit":
        config.optim.name, config.optim.weight_decay = "adamw", 0.05
    config.eval.every = "25 %"
    config.log.every_steps = 500
    config.log.tensorboard = False
    config.checkpoint.keep = 1
    if "teacher" in options:
        config.roles.student = config_lib.role("convnet", **TEACHER["kwargs"])
        config.update(FLIPS)
        config.total = "20 epochs"
        config.optim.lr = 0.1
        return config
    alone = {}
    if few:
        config.data.corrupt = {"labels_per_class": LABELS, "seed": "run"}
        config.total = "5 epochs"
        steps, rate = FEW_CHOSEN
        alone = {"data": {"corrupt": {"drop_unlabelled": True}}, "batch_size": 64}
        alone |= {"total": f"{steps} steps", "optim": {"lr": rate}}

    def taught(scale: dict[str, float]) -> dict[str, dict]:
        found = {}
        for name in names:
            arm = found[name] = distillation.arm(name, scale=scale[name], light=True)
            roles = arm.get("roles", {})
            for role, part in (("teacher", ""), ("teacher_head", "#student/Dense_0")):
                if role in roles:
                    own = TEACHER if role == "teacher" else roles[role]
                    roles[role] = {**own, "init": f"{FOLDER}{part}"}
            if name == "vid":
                roles["posterior"] = {**roles["posterior"], "kwargs": POSTERIOR}
            if "teacher" in roles and name not in ONLINE and not distillation.METHODS[name].maps:
                folder = f"{FOLDER}_outputs" + "_few/seed{seed}" * few
                arm["cache"] = {"dir": folder, "outputs": ("logits", "embedding")}
        return found

    def scaled() -> dict[str, dict]:
        found = {}
        for scale in distillation.GRID:
            own = taught(dict.fromkeys(names, scale))
            found |= {f"{name}_{round(100 * scale)}": arm for name, arm in own.items()}
        return found

    config.study.arms = {"alone": alone}
    config.study.reference = "alone"
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.metric = "test/accuracy"
    if "settings" in options:
        config.study.arms = few_settings(alone) if few else settings(pair)
        config.study.reference = next(iter(config.study.arms))
        config.study.replicas = "auto"
    elif "tune" in options:
        config.study.arms.update(scaled())
    else:
        config.study.arms.update(taught(scales(setting)))
    if options & {"settings", "tune"}:
        config.study.seeds, config.study.metric = (100,), "held_out/accuracy"
    config.study.title = f"All of Fashion-MNIST, ConvNet to {NAMES[pair]}"
    if few:
        config.study.title += f", {LABELS} labels a class"
    return config
