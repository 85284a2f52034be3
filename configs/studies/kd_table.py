"""The table of distillation methods on small images: every method, two pairs of networks.

  python -m distill_jax.main --mode=study --config=configs/studies/kd_table.py \\
      --workdir=runs/kd_table
  python -m distill_jax.main --mode=study --config=configs/studies/kd_table.py:mlp \\
      --workdir=runs/kd_table_mlp

Fashion-MNIST-5k/1k at 14 x 14 pixels. The teacher is a ConvNet of widths 16, 32, 64; the student a
ConvNet of widths 4, 8, 16, or with `:mlp` a perceptron with 64 hidden units, which has no feature
maps: methods that need them are left out. Five seeds, 10 epochs of batch 64 and the same optimizer
for every arm; each student learns from the teacher of its own seed.

Weights are the published ones (configs/distillation.py) times 1, 0.1 or 0.01. Which, was chosen
for every method by held-out accuracy with a seed of its own: `:tune` runs that choice (and
`:tune,mlp`), `SCALES` has its result. `:smoke` takes seconds on generated images.
"""

from distill_jax.configs import common, distillation
from distill_jax.run import config as config_lib

SCALES = {
    "convnet": {
        0.1: "crd crd_batch dist dkd ickd js kd nst pkt review_kd sp",
        0.01: "ab at cc cross_entropy fitnet ft reverse_kl rkd srrl",
    },
    "mlp": {
        0.1: "crd crd_batch cross_entropy dkd reverse_kl rkd",
        0.01: "dist kd pkt srrl",
    },
}
"""Methods by the scale of their weights; 1 for those left out."""

STUDENTS = {
    "convnet": ("convnet", {"widths": (4, 8, 16)}),
    "mlp": ("mlp", {"hidden": (64,)}),
}
TEACHER = {"model": "convnet", "kwargs": {"widths": (16, 32, 64)}}


def get_config(arg: str = ""):
    options = common.parse(arg, "mlp", "tune")
    student = "mlp" if "mlp" in options else "convnet"
    model, kwargs = STUDENTS[student]
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role(model, **kwargs)
    config.data.train_transforms = ("downscale", "normalize")
    config.data.eval_transforms = ("downscale", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.batch_size = 64
    config.optim.lr = 0.05
    config.total = "10 epochs"
    config.eval.every = "2 epochs"
    config.checkpoint.keep = 1
    pair = {"maps": student == "convnet", "equal": False, "light": True}
    config.study.arms = {"alone": {}, "teacher": {"roles": {"student": TEACHER}}}
    config.study.title = (
        f"Distillation methods, ConvNet to {'MLP' if student == 'mlp' else 'ConvNet'}"
    )
    if "tune" in options:
        for scale in distillation.GRID:
            found = distillation.arms(**pair, scales=dict.fromkeys(distillation.METHODS, scale))
            config.study.arms.update({f"{n}_{round(100 * scale)}": a for n, a in found.items()})
        config.study.seeds = (100,)
        config.study.metric = "held_out/accuracy"
    else:
        scales = {name: scale for scale, names in SCALES[student].items() for name in names.split()}
        config.study.arms.update(distillation.arms(**pair, scales=scales))
        config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "alone"
    return config
