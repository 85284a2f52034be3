"""Readers of pretrained weights: safetensors, PyTorch, NumPy and GGUF, without their packages.

`read` gives the tensors of a file by name. Nothing in a file is run, whatever its format.
"""

from distill_jax.weights.checks import check_finite, summary
from distill_jax.weights.common import Spec, Weights, WeightsError
from distill_jax.weights.formats import read
from distill_jax.weights.safetensors import write as write_safetensors

__all__ = [
    "Spec",
    "Weights",
    "WeightsError",
    "check_finite",
    "read",
    "summary",
    "write_safetensors",
]
