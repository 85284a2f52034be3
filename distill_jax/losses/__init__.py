"""Per-example losses: pure functions that return one value per example, `[b]`."""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
