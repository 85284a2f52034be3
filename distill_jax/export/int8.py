"""Post-training quantisation of an ONNX model to 8 bits by ONNX Runtime.

Convolutions and products of matrices get int8 weights, one scale a channel, and uint8 activations
whose ranges are those that calibration examples show (QDQ format). Everything else stays float32.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

import contextlib
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from distill_jax.export.program import require

OPERATORS = ("Conv", "MatMul", "Gemm")


def to_int8(model: bytes, batches: Iterable[Mapping[str, np.ndarray]]) -> bytes:
    """Returns the quantised model.

    ONNX Runtime quantises from file to file: a temporary folder is written and removed.

    Args:
      model: of `to_onnx`.
      batches: inputs `{name: [b, ...]}` by which activations are calibrated, training examples.

    Raises:
      ExportError: onnxruntime is not installed.
    """
    require("onnxruntime", extra="export", what="onnx_int8")
    quantization = require("onnxruntime.quantization", extra="export", what="onnx_int8")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = pathlib.Path(folder, "model.onnx"), pathlib.Path(folder, "int8.onnx")
        source.write_bytes(model)
        quantization.quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return target.read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps advice about graph optimisation, which `onnx_simplify` has done, off the console."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before)
