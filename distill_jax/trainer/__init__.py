"""Training from Python: steps, states and passes over data without configs, files or consoles."""

from distill_jax.trainer.options import Options
from distill_jax.trainer.trainer import Trainer, TrainerState

__all__ = ["Options", "Trainer", "TrainerState"]
