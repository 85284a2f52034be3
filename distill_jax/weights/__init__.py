"""Readers of pretrained weights: safetensors, PyTorch and NumPy, without PyTorch.

`read` gives the tensors of a file by name. Nothing in a file is run, whatever its format.
"""

from distill_jax.weights.checks import check_finite, summary
from distill_jax.weights.common import Spec, Weights, WeightsError
from distill_jax.weights.formats import read

__all__ = ["Spec", "Weights", "WeightsError", "check_finite", "read", "summary"]
