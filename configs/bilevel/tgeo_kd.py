"""TGeo-KD (Hu et al. 2024, arXiv:2312.15112) on Fashion-MNIST: a ratio for each example.

  python -m distill_jax.main --config=configs/distill/supervised.py --workdir=runs/supervised
  python -m distill_jax.main --config=configs/bilevel/tgeo_kd.py --workdir=runs/tgeo_kd \\
      --config.roles.teacher.init=runs/supervised

A small network turns the trilateral geometry of student, teacher and label into the share of the
distillation term, and learns by the exact gradient of the held-out loss after the student's step,
every fourth step from the second epoch on. The paper leaves that rule open. One half of the
held-out part teaches it, the other chooses the checkpoint (`data.outer`). The mean ratio is free,
as in the paper; once you have tuned a constant ratio, learn around it (`centre`) and fall back to
it where the learned one is not better: `configs/studies/safe_ratio.py`. `weighting.control`
makes the controls: frozen (with `--config.roles.weighting.kwargs.zero_init=false`), shuffled,
batch_mean, joint. `:full` and `:smoke` as in `configs/distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "full")
    config = common.images(full="full" in options)
    config.objective.name = "kd"
    config.objective.kwargs = {"temperature": 4.0}
    config.roles.student = config_lib.role("convnet", widths=(8, 16, 32))
    config.roles.teacher = config_lib.role("convnet", widths=(32, 64, 128))
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/supervised"
    config.roles.weighting = config_lib.role("ratio_mlp", hidden=(128,))
    config.weighting.name = "trilateral"
    config.bilevel.every = 4
    config.bilevel.warmup = "1 epoch"
    config.bilevel.outer_batch = 0.5
    config.bilevel.optim.lr = 3e-3
    config.evaluators = {"classification": {}, "calibration": {}, "trust": {}}
    config.total = "20 epochs"
    return config
