"""Fine-tuning a pretrained encoder with ten labels a class (Chen et al. 2020, arXiv:2006.10029).

  python -m distill_jax.main --config=configs/ssl/simclr.py --workdir=runs/simclr
  python -m distill_jax.main --config=configs/ssl/finetune.py --workdir=runs/finetune \\
      --config.roles.student.init=runs/simclr#student

Without the override the same encoder is trained from its initialisation, which is what the
fine-tuned one is compared with; `--config.data.corrupt.seed` draws other labels, and
`labels_percent` takes a share of each class instead of a number. `:fashion` takes clothes instead
of digits, `:smoke` generated images and a few steps. To train the last layer alone add
`--config.roles.student.frozen=true --config.objective.kwargs.train_encoder=false`.
"""

from distill_jax.configs import common, self_supervised
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "finetune"
    config.roles.head = config_lib.role("linear_head")
    config.data.train_transforms = ("scale",)
    config.data.transform_kwargs = {}
    config.data.corrupt = {"labels_per_class": 10, "drop_unlabelled": True}
    config.batch_size = 64
    config.total = "200 steps"
    config.optim.lr = 1e-3
    config.eval.every = "50 steps"
    config.eval.metric = "held_out/accuracy"
    for name in list(config.evaluators):
        del config.evaluators[name]
    config.evaluators = {
        "classification": {"role": "prediction"},
        "calibration": {"role": "prediction"},
    }
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"data.corrupt.labels_per_class": [1, 10], "data.corrupt.seed": [0, 1, 2, 3, 4]}
