"""Knowledge distillation from stored answers: the teacher is asked once, before training.

  python -m distill_jax.main --config=configs/distill/supervised.py --workdir=runs/supervised
  python -m distill_jax.main --config=configs/distill/kd_cached.py --workdir=runs/kd_cached \\
      --config.roles.teacher.init=runs/supervised

The student is that of `kd.py`, bit for bit on CPU where both see as many views, and a step costs
what one without a teacher does. Each image has ten augmented views that come back in turn, as the
stored crops of FKD do (Shen, Xing 2022, arXiv:2112.01528), so that the folder stays small; with
`data.views=0` every epoch has a new one, and as many are stored. A second run with the same teacher
reads what the first has stored. `:full`, `:table` and `:smoke` as in `kd.py`.
"""

from distill_jax.configs.distill import kd


def get_config(arg: str = ""):
    config = kd.get_config(arg)
    if config.data.train_transforms:  # a table has one view
        config.data.views = 10
    config.cache.dir = "runs/kd_answers/seed{seed}"
    return config
