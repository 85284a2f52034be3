"""When is a teacher worth having: gain against labels, quality of the teacher, and length.

  python -m distill_jax.main --mode=study --config=configs/studies/gains.py:labels \\
      --workdir=runs/gains_labels
  python tools/gains_page.py --out=docs/results/gains runs/gains_labels ...

A perceptron with 128 hidden units learns from all of Fashion-MNIST at 14 x 14 pixels, five seeds an
arm, 2,000 steps of batch 128 unless a study varies them.

* `:labels`: 5, 20, 100 or 500 labels a class, other ones in each seed, and 50,000 other images
  without one. `alone` drops these. `kd` asks a ConvNet about them that learned from all labels,
  `own` (`kd` again) one that learned from the same few: self-training.
* `:teacher`: all labels; ConvNets trained for 50, 200 and 1,000 steps and, with crops and flips,
  for 8,000. The default.
* `:length`: all labels; the longest of these teachers, and students trained for 500, 2,000, 8,000
  and 32,000 steps, from stored outputs (`runs/gains_length_outputs`).

Every point of every method, `alone` too, is the best of three or four settings by the mean accuracy
over seeds on 5,000 held-out images: for `alone`, rates and lengths (`:labels`, where 2,000 steps
may be too many) or rates; for the others, weights. The rate of the others is 0.1.
"""

from collections.abc import Mapping
from typing import Any

from distill_jax.configs import common, distillation
from distill_jax.run import config as config_lib

LABELS = (5, 20, 100, 500)
TEACHERS = {"50": 50, "200": 200, "1000": 1000, "long": 8000}
LENGTHS = (500, 2000, 8000, 32000)
RATES = (0.03, 0.1, 0.3)
WEIGHTS = {"kd": (0.5, 0.8, 0.95), "dist": (0.1, 0.3, 1.0)}
ALPHAS = (0.8, 0.95, 0.99)
"""Of `kd` where few have labels, each of which then weighs as much as all it stands for."""

AUGMENTED = ("random_crop", "horizontal_flip", "downscale", "normalize")


def taught(method: str, weight: float, teacher: str) -> dict[str, Any]:
    """An arm of a method; `weight` is alpha for `kd`, a share of the published one for others."""
    if method == "kd":
        arm = distillation.arm("kd")
        arm["objective"]["kwargs"] = {"alpha": weight, "temperature": 4.0}
    else:
        arm = distillation.arm(method, scale=weight)
    return {**arm, "roles": {"teacher": {"init": f"arm:{teacher}", "frozen": True}}}


def trained(steps: int, lr: float | None = None) -> dict[str, Any]:
    return {"total": f"{steps} steps", **({} if lr is None else {"optim": {"lr": lr}})}


def few(labels: int, *, drop: bool) -> dict[str, Any]:
    kept = {"labels_per_class": labels, "drop_unlabelled": drop, "seed": "run"}
    return {"data": {"corrupt": kept}}


def convnet(steps: int, **changes: Any) -> dict[str, Any]:
    network = {"model": "convnet", "kwargs": {"widths": (16, 32, 64)}}
    return {**trained(steps, 0.1), "roles": {"student": network}, **changes}


def points(study: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, Any]]]]:
    """Returns the teachers' arms, and for each point of each method its settings, as arms."""
    views = {"train_transforms": AUGMENTED, "transform_kwargs": {"random_crop": {"padding": 2}}}
    long = convnet(TEACHERS["long"], data=views)
    teachers, found = {"teacher_long": long}, {}
    if study == "labels":
        for labels in LABELS:
            batch = {"batch_size": min(128, 8 * labels)}
            teachers[f"teacher_{labels}"] = convnet(1000, **few(labels, drop=True), **batch)
            found[f"alone_{labels}"] = {
                f"{steps}_{round(100 * lr)}": {
                    **few(labels, drop=True),
                    **trained(steps, lr),
                    **batch,
                }
                for steps in (200, 2000)
                for lr in (0.03, 0.1)
            }
            for name, teacher in (("kd", "teacher_long"), ("own", f"teacher_{labels}")):
                found[f"{name}_{labels}"] = {
                    f"{round(100 * alpha)}": {
                        **taught("kd", alpha, teacher),
                        **few(labels, drop=False),
                    }
                    for alpha in ALPHAS
                }
    elif study == "teacher":
        found["alone_0"] = {f"{round(100 * lr)}": {"optim": {"lr": lr}} for lr in RATES}
        for level, steps in TEACHERS.items():
            if level != "long":
                teachers[f"teacher_{level}"] = convnet(steps)
            for method, weights in WEIGHTS.items():
                found[f"{method}_{level}"] = {
                    f"{round(100 * weight)}": taught(method, weight, f"teacher_{level}")
                    for weight in weights
                }
    else:
        for steps in LENGTHS:
            found[f"alone_{steps}"] = {f"{round(100 * lr)}": trained(steps, lr) for lr in RATES}
            for method, weights in WEIGHTS.items():
                found[f"{method}_{steps}"] = {
                    f"{round(100 * weight)}": {
                        **taught(method, weight, "teacher_long"),
                        **trained(steps),
                        "cache": {"dir": "runs/gains_length_outputs/seed{seed}"},
                    }
                    for weight in weights
                }
    return teachers, found


def arms_of(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{point}-{name}": arm for point, own in settings.items() for name, arm in own.items()}


def get_config(arg: str = ""):
    known = ("labels", "teacher", "length")
    study = common.choose(common.parse(arg, *known), known, "teacher")
    config = common.fashion_mnist(full=True)
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(128,))
    config.evaluators = {"classification": {}}
    config.data.held_out = 1 / 12
    config.data.train_transforms = ("downscale", "normalize")
    config.data.eval_transforms = ("downscale", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.optim.lr = 0.1
    config.optim.warmup = "4 %"
    config.batch_size = 128
    config.total = "2000 steps"
    config.eval.every = "100 %"
    teachers, found = points(study)
    config.study.replicas = "yes"
    config.study.tuned_by = "mean"
    config.study.arms = {**teachers, **arms_of(found)}
    config.study.tuned = {
        point: tuple(f"{point}-{name}" for name in settings) for point, settings in found.items()
    }
    config.study.sources = tuple(teachers)
    config.study.reference = next(iter(found))
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.title = {
        "labels": "Gain of a teacher against labels per class",
        "teacher": "Gain of a teacher against its quality",
        "length": "Gain of a teacher against the length of training",
    }[study]
    return config
