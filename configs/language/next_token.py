"""A small language model on the Python standard library's sources, byte by byte.

  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/lm

Your own text: `--config.data.name=text_folder --config.data.kwargs.path=FOLDER`, see
`docs/your_data.md`. `:smollm2` trains the student of `language/kd:smollm2` alone. `:smoke` as in
`distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "smollm2")
    config = common.text()
    config.objective.name = "next_token"
    config.roles.student = config_lib.role("transformer", width=64, depth=3, heads=4)
    config.total = "600 steps"
    if "smollm2" in options:
        common.smollm2(config, teacher=False)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [1e-3, 2e-3, 4e-3], "optim.warmup": ["30 steps", "100 steps"]}
