"""distill_jax: learning from supervision signals in JAX.

Public names are imported when they are first used, so that `import distill_jax` is fast and does
not load JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Trainer": "trainer",
    "TrainerState": "trainer",
    "Options": "trainer",
    "Model": "core.api",
    "Objective": "core.api",
    "ExampleWeighting": "core.api",
    "Terms": "core.api",
    "TrainState": "core.api",
    "Bilevel": "core.bilevel",
    "WeightedObjective": "core.weighted_objective",
    "hypergradient": "core.hypergradient",
    "from_linen": "models.adapters",
    "from_nnx": "models.adapters",
    "to_nnx": "models.adapters",
    "load": "run.load",
}
"""Public names, by the module that defines them."""

_MODULES = ("data", "evaluators", "losses", "models", "objectives", "weighting", "weights")

__all__ = [
    "Bilevel",
    "ExampleWeighting",
    "Model",
    "Objective",
    "Options",
    "Terms",
    "TrainState",
    "Trainer",
    "TrainerState",
    "WeightedObjective",
    "__version__",
    "data",
    "evaluators",
    "from_linen",
    "from_nnx",
    "hypergradient",
    "load",
    "losses",
    "models",
    "objectives",
    "to_nnx",
    "weighting",
    "weights",
]

if TYPE_CHECKING:
    from distill_jax import data, evaluators, losses, models, objectives, weighting, weights
    from distill_jax.core.api import ExampleWeighting, Model, Objective, Terms, TrainState
    from distill_jax.core.bilevel import Bilevel
    from distill_jax.core.hypergradient import hypergradient
    from distill_jax.core.weighted_objective import WeightedObjective
    from distill_jax.models.adapters import from_linen, from_nnx, to_nnx
    from distill_jax.run.load import load
    from distill_jax.trainer import Options, Trainer, TrainerState


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"distill_jax.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"distill_jax.{name}")
    raise AttributeError(f"module 'distill_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
