"""Masked methods and DINO on a small ViT and all of Fashion-MNIST, with schedules for its length.

  python -m distill_jax.main --mode=study --config=configs/studies/ssl_masked.py \\
      --workdir=runs/ssl_masked

MAE, I-JEPA, DINO, iBOT, LeJEPA and SimCLR train one ViT, 64 wide and four blocks deep, on 7 x 7
patches of 4 x 4 pixels without a label: 8,000 steps of batch 64, about ten passes over the images.
Frozen features, the means over patches of the four blocks side by side, of the moving average where
a method has one, are judged by a linear probe of 10,000 labels and by 20 nearest neighbours; raw
pixels and the ViT before training are measured beside each. Neighbours are looked up in whitened
features too (`knn_whitened_accuracy`), whose smallest variance held-out images choose. The last
state counts.

Differences from `configs/ssl/`, which are for 600 steps on digits: smaller patches, more steps, the
rates of `RATES`, moving averages that forget their start in this many steps. `:tune` compares
four trials per method after 2,000 steps on held-out training images, with one seed: the rates of
`TRIED`, and the one change of `OTHER` at the rate of `RATES`. `:mae`, `:ijepa`, `:dino`, `:ibot`,
`:lejepa` and `:simclr` run one method; `:twice` trains all, and `:mae,twice` one, for 16,000 steps,
with schedules and averages of that length. One seed of all takes four to five hours of a core:
`--config.study.seeds=1,` runs one, and the same command with more of them continues.
`tools/results_page.py --add` joins what several machines have run. `:smoke` takes seconds on
generated images.

`:digits` asks why MAE and I-JEPA did little in `ssl_images.py`, with its 600 steps: `mae_unit` sees
pixels from 0 to 1, `mae` standardized ones, `mae_tokens` is judged by all tokens side by side in
place of their mean; `ijepa_student` is judged by its student, `ijepa_95` has an average that
forgets its start in 600 steps, where that of `ijepa` keeps 0.3 of it. About 20 minutes.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from distill_jax.configs import common, self_supervised

PATCH, GRID = 4, (7, 7)
PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0)
RATES = {"simclr": 1e-3, "mae": 3e-3, "ijepa": 1e-3, "dino": 3e-3, "ibot": 1e-3, "lejepa": 1e-3}
TRIED = (5e-4, 1e-3, 3e-3)
OTHER = {
    "simclr": {"objective.kwargs.temperature": 0.5},
    "mae": {"data.transform_kwargs.random_masks.ratio": 0.6},
    "ijepa": {"data.transform_kwargs.block_masks.targets": 2},
    "dino": {"objective.kwargs.temperature": 0.02},
    "ibot": {"objective.kwargs.temperature": 0.04},
    "lejepa": {"objective.kwargs.trade_off": 0.02},
}
"""What else `:tune` tries of each method."""


def method(name: str, reference, *, steps: int, lr: float, changes: Mapping[str, Any]) -> dict:
    """The arm of a method: what its config changes in the study's."""
    module = importlib.import_module(f"distill_jax.configs.ssl.{name}")
    config = module.get_config("fashion")
    if "normalize" not in config.data.eval_transforms:
        self_supervised.standardize(config)
    token = {"mask_token": True, "pool": "cls"} if name == "ibot" else {}
    config.roles.student = reference.roles.student.copy_and_resolve_references()
    config.roles.student.kwargs.update(token)
    transforms = config.data.transform_kwargs
    for masks in {"random_masks", "block_masks", "patch_masks"} & set(transforms):
        transforms[masks].patch_size = PATCH
    if "local_views" in transforms:  # crops of 14 pixels have no patches of 4
        *chain, crop, last = transforms.local_views.transforms
        crop = (crop[0], {**crop[1], "size": 4 * PATCH})
        transforms.local_views.transforms = (*chain, crop, last)
    for role, spec in config.roles.items():
        if role in ("decoder", "predictor"):
            spec.kwargs.update({"width": 32, "grid": GRID})
        if spec.ema_of:
            spec.decay = self_supervised.forgetting(steps)
    for key in ("total", "eval", "batch_size", "log", "evaluators"):
        config[key] = reference[key]
    if "target" in config.roles:
        judged = {key: {**kwargs, "role": "target"} for key, kwargs in config.evaluators.items()}
        config.evaluators = judged
    for key in ("name", "weight_decay", "warmup", "schedule"):
        config.optim[key] = reference.optim[key]
    config.optim.lr, config.data.name = lr, reference.data.name
    config.update_from_flattened_dict(changes)
    return self_supervised.as_arm(config, reference)


def digits():
    """The study of `:digits`."""
    config = self_supervised.base("digits", "vit")
    config.eval.every = config.total
    config.objective.name = "mae"
    config.data.transform_kwargs = {}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    reference = config.copy_and_resolve_references()

    def own(name: str):
        found = importlib.import_module(f"distill_jax.configs.ssl.{name}").get_config()
        found.eval.every = config.total
        return found

    def judged(found, **kwargs):
        found.evaluators = {name: kwargs for name in config.evaluators}
        return found

    unit, forgetting = own("mae"), own("ijepa")
    unit.data.train_transforms = ("scale", *unit.data.train_transforms[1:])
    unit.data.eval_transforms = ("scale",)
    forgetting.roles.target.decay = self_supervised.forgetting(600)
    arms = {
        "mae_unit": unit,
        "mae": own("mae"),
        "mae_tokens": judged(own("mae"), output="tokens"),
        "ijepa": own("ijepa"),
        "ijepa_student": judged(own("ijepa"), role="student"),
        "ijepa_95": forgetting,
    }
    config.study.arms = {
        name: self_supervised.as_arm(found, reference) for name, found in arms.items()
    }
    config.study.reference = "mae_unit"
    config.study.metric = "test/few_label_accuracy_5_per_class"
    config.study.seeds = (1, 2, 3, 4, 5)
    config.study.title = "Why masked methods did little on digits"
    return config


def get_config(arg: str = ""):
    options = common.parse(arg, "tune", "digits", "twice", *RATES)
    length = common.choose(options, ("tune", "digits", "twice"), "")
    if length == "digits":
        common.choose(options, ("digits", *RATES))
        return digits()
    steps = {"tune": 2000, "twice": 16_000}.get(length, 8000)
    config = self_supervised.base("fashion_mnist", "vit")
    config.roles.student.kwargs.update({"patch_size": PATCH, "positions": "fourier"})
    config.batch_size = 64
    config.total = f"{steps} steps"
    config.eval.every = "100 %" if length == "tune" else "2000 steps"
    config.optim.warmup = "10 %"
    config.optim.weight_decay = 0.05
    config.evaluators = {
        "knn": {"output": "last_blocks", "whiten": (1e-6, 1e-4, 1e-3)},
        "probe": {"output": "last_blocks", "c": PENALTIES, "max_examples": 10_000},
        "representation": {"output": "last_blocks"},
    }
    config.eval.metric = "held_out/probe_accuracy"
    config.objective.name = "simclr"
    # What makes views and masks is each arm's own.
    config.data.transform_kwargs = {}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    reference = config.copy_and_resolve_references()
    names = [name for name in RATES if name in options] or list(RATES)
    found: dict[str, dict[str, tuple[float, Mapping[str, Any]]]] = {}
    for name in names:
        found[name] = {name: (RATES[name], {})}
        if length == "tune":
            found[name] = {f"{name}-{round(1e4 * lr)}e-4": (lr, {}) for lr in TRIED}
            found[name][f"{name}-other"] = (RATES[name], OTHER[name])
    arms = {
        arm: method(name, reference, steps=steps, lr=lr, changes=changes)
        for name, trials in found.items()
        for arm, (lr, changes) in trials.items()
    }
    config.study.arms = arms
    if length == "tune":
        config.evaluators.knn.controls = config.evaluators.probe.controls = False
        del config.evaluators.knn["whiten"]
        config.study.tuned = {name: tuple(trials) for name, trials in found.items()}
    config.study.reference = next(iter(arms))
    config.study.metric = "test/probe_accuracy"
    config.study.seeds = (0,) if length == "tune" else (1, 2, 3, 4, 5)
    config.study.title = "Masked methods on Fashion-MNIST" + {
        "tune": ", rates",
        "twice": ", twice as long",
    }.get(length, "")
    return config
