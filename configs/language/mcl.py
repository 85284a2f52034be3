"""Pre-training an encoder of source code by courses (MCL, Chen et al. 2023, arXiv:2305.03981).

  python -m distill_jax.main --config=configs/language/mcl.py --workdir=runs/mcl
  python -m distill_jax.main --config=configs/language/mcl.py:electra --workdir=runs/electra

The student says of each byte of the Python standard library's sources whether it was replaced by a
small generator, swapped or inserted, and both go back to its mistakes. `:electra` has replaced
bytes alone, `:courses` all three without corrections, `:mlm` restores masked bytes by itself.
`:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    known = ("electra", "courses", "mlm")
    kind = common.choose(common.parse(arg, *known), known)
    config = common.text()
    config.data.train_transforms = ("next_token", "token_courses")
    config.objective.name = "mcl"
    config.evaluators = {"representation": {}}
    config.eval.metric, config.eval.mode = "held_out/rankme", "max"
    encoder = {"layout": "llama", "causal": False, "head": "masked", "activation": "silu"}
    config.roles.student = config_lib.role("transformer", width=128, depth=3, heads=4, **encoder)
    config.total = "600 steps"
    if kind == "mlm":
        config.objective.kwargs = {"courses": ()}
        return config
    config.roles.student.kwargs.head = "none"
    config.roles.generator = config_lib.role("transformer", width=64, depth=2, heads=2, **encoder)
    config.roles.detector = config_lib.role("projector", features=3)
    if kind == "electra":
        config.objective.kwargs = {"courses": ("replaced",), "correction": False}
    elif kind == "courses":
        config.objective.kwargs = {"correction": False}
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [1e-3, 2e-3, 4e-3], "objective.kwargs.detection_weight": [10.0, 50.0]}
