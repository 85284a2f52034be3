"""Learned trust on images: TGeo-KD, its rivals and its controls, on Fashion-MNIST-5k/1k.

  python -m distill_jax.main --mode=study --config=configs/studies/trust_images.py \\
      --workdir=runs/trust_images

Hu et al. 2024 (arXiv:2312.15112) against a constant ratio, published re-weighting rules and
controls that break what the method claims: a frozen random ratio network, ratios shuffled within
the batch, their mean, and training on the training loss. All arms have the same steps, batch,
optimizer and held-out split (10 % of the training part). Weightings learn from one half of it, the
other half chooses: `kd_tuned` is the constant ratio of the best held-out accuracy. `kd_*_more`
arms train on the first half as well, and `kd_tuned_more` is the best of these; `*_all_data` arms
train on both halves.

`:class` and `:random` damage the teacher on 30 % of the classes or of the examples, `:noisy`
changes 30 % of the training labels (teacher and held-out labels stay clean), `:outliers` adds
noise images with random labels to the training part (the teacher is trained without), with fewer
arms.
`:full` reads the whole of Fashion-MNIST; `:smoke` takes seconds on generated images.
"""

from distill_jax.configs import common, trust
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    faults = trust.SCENARIOS | trust.OUTLIERS
    options = common.parse(arg, "full", *faults)
    fault = common.choose(options, faults)
    config = common.fashion_mnist(full="full" in options)
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("convnet", widths=(8, 16, 32))
    config.data.train_transforms = ("normalize",)
    del config.data.transform_kwargs["random_crop"]
    config.data.corrupt = faults.get(fault, {})
    config.total = "8 epochs"
    config.eval.every = "2 epochs"
    config.data.outer = 0.5
    config.bilevel.every = 2
    config.bilevel.warmup = "1 epoch"
    config.bilevel.outer_batch = 0.5
    config.bilevel.optim.lr = 3e-3
    teacher: dict = {"roles": {"student": {"kwargs": {"widths": (16, 32, 64)}}}}
    if fault in ("noisy", "outliers"):  # trained on clean data
        teacher["data"] = {"corrupt": dict.fromkeys(faults[fault], 0.0)}
    config.study.arms = trust.arms(teacher=teacher, temperature=4.0, hidden=(128,), full=not fault)
    config.study.tuned = trust.tuned(full=not fault)
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "kd_50"
    config.study.title = f"Learned trust, images{': ' + fault if fault else ''}"
    return config
