"""StableHLO by `jax.export`: one artifact for CPU, CUDA and TPU, with a batch of any size.

The artifact is versioned: JAX reads those of at least the last six months
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

from collections.abc import Sequence

import jax

from distill_jax.export.program import Program, any_batch, require, symbolic_batch

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    program: Program, *, platforms: Sequence[str] = PLATFORMS, weights: str = "inside"
) -> bytes:
    """Returns a serialized `jax.export.Exported`.

    Its call takes `{input: [b, ...]}` and returns `{output: [b, ...]}`; with weights apart it takes
    `{path: array}` before them, the tensors of a safetensors file.

    Args:
      program: what to export.
      platforms: those of `jax.export`.
      weights: "inside" as constants, or "apart".

    Raises:
      ExportError: flatbuffers is not installed.
    """
    require("flatbuffers", extra="export", what="stablehlo")
    named = program.named_weights
    tree = jax.tree.structure(program.weights)

    def apart(weights, inputs):
        leaves = [weights[name] for name in named]  # in tree order, which is not that of a dict
        return program.traced(jax.tree.unflatten(tree, leaves), inputs)

    def inside(inputs):
        return program.traced(program.weights, inputs)

    batch = program.batch(symbolic_batch())
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in named.items()}
    function, arguments = (apart, (shapes, batch)) if weights == "apart" else (inside, (batch,))
    with any_batch():
        exported = jax.export.export(jax.jit(function), platforms=platforms)(*arguments)
    return bytes(exported.serialize())
