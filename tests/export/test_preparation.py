"""The preparation of images is a part of exported graphs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.data import transforms
from distill_jax.export.onnx_model import to_onnx
from distill_jax.export.program import Program

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    "kwargs", [{"crop": 0.8}, {"channel_order": "grey", "mean": (0.5,), "std": (0.2,)}]
)
def test_a_card_is_exported(kwargs):
    transform = transforms.make_prepare(size=16, **kwargs)

    def prepared(weights, inputs):
        seen = transform(jax.random.key(0), inputs, jnp.int32(0))["input"]
        return {"prepared": seen * weights["one"]}

    program = Program(
        function=prepared,
        weights={"one": np.ones((1, 1, 1, 1), np.float32)},
        inputs={"input": jax.ShapeDtypeStruct((20, 30, 3), np.dtype("uint8"))},
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    [found] = onnxruntime.InferenceSession(to_onnx(program)).run(None, {"input": images})
    wanted = prepared(program.weights, {"input": jnp.asarray(images)})["prepared"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
