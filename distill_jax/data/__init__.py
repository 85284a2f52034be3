"""Data sources, the step-indexed loader, and transforms that run on the device."""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
