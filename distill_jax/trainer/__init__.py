"""Training from Python: steps, states and passes over data without configs, files or consoles.

`trainer.io` handles files. Parts of it work without JAX, and so does importing this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_jax.trainer.options import Options
    from distill_jax.trainer.trainer import Trainer, TrainerState

__all__ = ["Options", "Trainer", "TrainerState"]

_MODULES = {"Options": "options", "Trainer": "trainer", "TrainerState": "trainer"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
