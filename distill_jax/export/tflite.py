"""LiteRT (TFLite) flatbuffers, converted from StableHLO by `litert-converter` without TensorFlow.

The batch is of a fixed size, since LiteRT has no symbols. https://ai.google.dev/edge/litert
"""

import jax

from distill_jax.core.errors import ExportError
from distill_jax.export.program import Program, require


def to_tflite(program: Program, *, batch_size: int = 1) -> bytes:
    """Returns a TFLite model with one signature, `serving_default`, of the program's names.

    Args:
      program: what to export.
      batch_size: size of the batch, a part of the model.

    Raises:
      ExportError: litert-converter is not installed, or it cannot convert the program.
    """
    converter = require("litert_converter.converter_api_ext", extra="tflite", what="tflite")
    ir = require("litert_converter.mlir.ir", extra="tflite", what="tflite")
    passes = require("litert_converter.mlir.passmanager", extra="tflite", what="tflite")
    exported = jax.export.export(
        jax.jit(lambda inputs: program.traced(program.weights, inputs)), platforms=("cpu",)
    )(program.batch(batch_size))
    outputs = jax.tree.unflatten(exported.out_tree, [None] * len(exported.out_avals))
    try:
        context = ir.Context()
        converter.prepare_mlir_context(context)
        with context:
            module = ir.Module.parse(exported.mlir_module())
            operation = module.operation
            names = sorted(program.inputs), sorted(outputs)
            converter.set_signature(operation, "serving_default", *names)
            config = converter.ConvertToTFLConfig()
            converter.run_convert_to_tfl_passes(module, passes.PassManager(), config)
            return bytes(converter.export_flatbuffer_to_bytes(operation))
    except Exception as error:  # of the compiler, of many kinds
        first = str(error).strip().partition("\n")[0][:200]
        raise ExportError(
            f"litert-converter cannot convert it: {first}",
            where="formats: tflite",
            hint="export it as onnx or stablehlo",
        ) from error
