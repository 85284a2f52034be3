"""DINO continued from an encoder that was trained elsewhere, with new heads (as RAD-DINO 2024).

  python -m distill_jax.main --config=configs/ssl/dino.py --workdir=runs/dino
  python -m distill_jax.main --config=configs/ssl/continual.py --workdir=runs/continual \\
      --config.roles.student.init=runs/dino#target

The encoder and its moving average both start from the average of the first run; nothing else is
taken over: heads, prototypes, centre and optimizer are new. Public models come like that, and a
naive restart loses what they know. Hence heads learn alone in the first epochs, the learning rate
is small, and the average is slow from the start. The encoder to beat is the average of the first
run, which `--mode=eval` of its config and folder measures; `knn_accuracy_initial` and the like are
of a network that was never trained. `:fashion` takes clothes instead of digits, `:smoke` generated
images and a few steps.
"""

from distill_jax.configs.ssl import dino


def get_config(arg: str = ""):
    config = dino.get_config(arg)
    config.roles.student.init = "runs/dino#target"
    config.objective.kwargs.heads_only = "3 epochs"
    config.optim.lr = 2e-4
    for role in ("target", "target_projector", "target_prototypes"):
        config.roles[role].decay = 0.996
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"objective.kwargs.heads_only": ["0 epochs", "3 epochs"], "optim.lr": [1e-4, 5e-4]}
