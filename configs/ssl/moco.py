"""MoCo v2 (Chen et al. 2020): small batches against a queue of earlier keys.

  python -m distill_jax.main --config=configs/ssl/moco.py --workdir=runs/moco

The batch is small on purpose: the queue stands in for a large one, and `configs/ssl/simclr.py` with
`--config.batch_size=32` is what to compare with. `train/filled` says how much of the queue is in
use. The average remembers 100 steps, not the paper's 1000: the run is as short as that. `:fashion`
and `:smoke` as in `simclr.py`.
"""

from distill_jax.configs import common, self_supervised


def get_config(arg: str = ""):
    options = common.parse(arg, "fashion")
    config = self_supervised.base("fashion_mnist_5k" if "fashion" in options else "digits")
    config.objective.name = "moco"
    config.objective.kwargs = {"temperature": 0.2, "queue": 512, "dim": 64}
    config.batch_size = 32
    config.roles.projector = self_supervised.head()
    average = {"decay": 0.99, "schedule": "constant"}
    config.roles.target = self_supervised.average("student", **average)
    config.roles.target_projector = self_supervised.average("projector", **average)
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.queue": [32, 128, 512, 1024]}
