"""Trained networks as files of other programs: StableHLO, ONNX, safetensors and LiteRT.

A `Program` is a pure function of named inputs with its weights. Each format is one function from a
program to bytes; nothing here writes files.
"""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
