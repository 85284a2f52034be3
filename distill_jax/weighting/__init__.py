"""Weightings: per-example weights of loss terms. Every module defines `make`."""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
