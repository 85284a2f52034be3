"""Weights of loss terms from evidence, one file each; every module exposes `make`."""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
