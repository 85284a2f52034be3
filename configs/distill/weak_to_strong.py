"""Weak-to-strong generalization (Burns et al. 2023, arXiv:2312.09390) on scikit-learn's digits.

  python -m distill_jax.main --config=configs/distill/weak_to_strong.py:weak --workdir=runs/weak
  python -m distill_jax.main --config=configs/distill/weak_to_strong.py:pretrain \\
      --workdir=runs/pretrain
  python -m distill_jax.main --config=configs/distill/weak_to_strong.py --workdir=runs/strong

`:weak` trains the supervisor, a linear network on 4 x 4 pixels, and `:pretrain` the body of the
student on the ten digits. The student learns parity from the labels of the supervisor alone. Its
body starts from `runs/pretrain` (`**`: the layers that both have) and does not change.
`configs/studies/paper_weak_to_strong.py` has the ceiling, the baselines and the controls.
"""

from distill_jax.configs import common, weak
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    known = ("weak", "pretrain")
    kind = common.choose(common.parse(arg, *known), known)
    config = weak.base("parity")
    config.study.seeds, config.study.replicas = (), "no"
    if kind == "pretrain":
        return config_lib.override(config, weak.pretrain())
    if kind == "weak":
        return config_lib.override(config, weak.weak())
    config = config_lib.override(config, weak.from_weak(weak.network(), alpha=0.5))
    config.objective.kwargs.beside = ()
    del config.roles["ceiling"], config.evaluators["gap_recovered"]
    config.evaluators.agreement = {}
    config.roles.teacher = config_lib.role("mlp", hidden=(), pool=2)
    config.roles.teacher.frozen, config.roles.teacher.init = True, "runs/weak"
    config.roles.student.init = "runs/pretrain#student/**"
    return config
