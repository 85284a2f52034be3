"""ONNX and StableHLO give what the network gives, whatever the network and the batch."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

import distill_jax as dj
from distill_jax.core.errors import ExportError
from distill_jax.export import flatten, onnx_graph
from distill_jax.export.onnx_model import OPSET, to_onnx
from distill_jax.export.onnx_ops import RULES
from distill_jax.export.program import Program
from distill_jax.export.stablehlo import to_stablehlo

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMAGES = {"input": jax.ShapeDtypeStruct((8, 8, 3), np.uint8)}
TABLE = {
    "categorical": jax.ShapeDtypeStruct((3,), np.int32),
    "numeric": jax.ShapeDtypeStruct((4,), np.float32),
}
CARDINALITIES = (3, 5, 7)
NETWORKS = {
    "convnet": {"widths": (4, 8)},
    "vit": {"width": 12, "depth": 1, "heads": 3},
    "mlp": {"hidden": (8,)},
    "wide_deep": {"hidden": (8,)},
    "tabular_transformer": {"width": 8, "depth": 1, "heads": 2},
}
TOKENS = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "bert")]
SLOW = {
    "resnet": {"depth": 8},
    "tabular_mlp": {"hidden": (8,)},
    "deepfm": {"hidden": (8,)},
    "dcnv2": {"hidden": (8,)},
    "mobilenet_v2": {"width_multiplier": 0.1, "expansion": 1},
    "vgg": {},
    "wide_resnet": {"depth": 10, "width_multiplier": 1},
    "shufflenet_v1": {},
    "shufflenet_v2": {},
    "resnet_four_stages": {},
}


def draw(inputs, n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256 if x.dtype == np.uint8 else 9, (n, *x.shape)).astype(x.dtype)
        if x.dtype.kind in "iu"
        else rng.normal(size=(n, *x.shape)).astype(x.dtype)
        for name, x in inputs.items()
    }


def redrawn(tree):
    """Weights of which none is trivial: gains, variances, shifts and class tokens too."""
    rng = np.random.default_rng(1)

    def draw_one(path, x):
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        return np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw_one, tree)


def program_of(name, kwargs):
    table = name.startswith(("tabular", "wide_deep", "deepfm", "dcn"))
    extra = {"cardinalities": CARDINALITIES} if table else {}
    model = getattr(dj.models, name).make(num_classes=5, **kwargs, **extra)
    inputs = TABLE if table else IMAGES
    prepare = lambda x: x if table else x["input"].astype(jnp.float32) / 255 - 0.5  # noqa: E731
    weights = redrawn(model.init(jax.random.key(0), prepare(draw(inputs, 2))))

    def function(weights, x):
        outputs, _ = model.apply(*weights, prepare(x), train=False, rngs=None)
        return {**outputs, "probabilities": jax.nn.softmax(outputs["logits"])}

    return Program(function=function, weights=weights, inputs=inputs, metadata={"note": "x"})


def onnx_call(data):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options)
    names = [output.name for output in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, dict(x)), strict=True))


def check(program, data, sizes=(1, 7, 64), tolerance=1e-4):
    call = onnx_call(data)
    for n in sizes:
        x = draw(program.inputs, n, seed=n)
        wanted, found = program.function(program.weights, x), call(x)
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            spread = max(1.0, float(np.std(value)))
            np.testing.assert_allclose(
                found[key], value, atol=tolerance * spread, rtol=tolerance, err_msg=key
            )


@pytest.mark.parametrize(
    "name",
    [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_every_architecture(name):
    """All its endpoints, with a batch of any size; nothing of it is left outside."""
    program = program_of(name, (NETWORKS | SLOW)[name])
    data = to_onnx(program)
    check(program, data, sizes=(1, 7))
    model = onnx.load_from_string(data)
    assert [x.version for x in model.opset_import] == [OPSET]
    assert all(not node.domain for node in model.graph.node)
    assert {p.key: p.value for p in model.metadata_props} == {"batch": "b", "note": "x"}
    shapes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
              for x in model.graph.input]  # fmt: skip
    assert all(shape[0] == "b" for shape in shapes)
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    moves = sum(node.op_type == "Transpose" for node in model.graph.node)
    if name in ("convnet", "resnet") and convolutions:
        # One at the entry, and one for each endpoint that leaves with channels last.
        assert moves <= 1 + len(model.graph.output)


@pytest.mark.parametrize("layout", TOKENS)
def test_transformers_over_tokens(layout):
    """Positions, masks and pooling are constants of a length that is known."""
    model = dj.models.transformer.make(vocabulary=9, layout=layout, width=16, depth=1, heads=2)
    inputs = {"input": jax.ShapeDtypeStruct((6,), np.int32)}
    weights = redrawn(model.init(jax.random.key(0), draw(inputs, 2)["input"] % 9))
    program = Program(
        function=lambda w, x: model.apply(*w, x["input"] % 9, train=False, rngs=None)[0],
        weights=weights,
        inputs=inputs,
    )
    check(program, to_onnx(program), sizes=(1, 3))


def test_constants_have_the_names_of_their_parameters():
    program = program_of("mlp", {"hidden": (8, 8)})
    model = onnx.load_from_string(to_onnx(program))
    names = {x.name for x in model.graph.initializer}
    assert {"0/Dense_0/kernel", "0/Dense_1/kernel", "0/Dense_2/bias"} <= names
    kernels = [x for x in model.graph.initializer if x.name == "0/Dense_1/kernel"]
    stored = onnx.numpy_helper.to_array(kernels[0])
    np.testing.assert_array_equal(stored, program.named_weights["0/Dense_1/kernel"])


def test_equal_constants_are_stored_once():
    big = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    data = to_onnx(of(lambda x: (x @ big) @ big.copy(), (4,)))
    assert sum(x.dims == [4, 4] for x in onnx.load_from_string(data).graph.initializer) == 1


def of(function, shape, dtype=np.float32, weights=None):
    """A program of one input and one output."""
    return Program(
        function=lambda w, x: {"y": function(x["x"])},
        weights=weights or {},
        inputs={"x": jax.ShapeDtypeStruct(shape, dtype)},
    )


X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
IDS = np.array([0, 4, 9, -1], np.int32)
OPERATIONS = {
    "unary": lambda x: sum(
        f(x)
        for f in (jnp.exp, jnp.tanh, jnp.abs, jnp.sign, jnp.floor, jnp.ceil, jnp.sin, jnp.cos)
    ),
    "roots": lambda x: jnp.sqrt(x * x) + lax.rsqrt(x * x + 1) + jnp.log1p(x * x) + jnp.expm1(x),
    "smooth": lambda x: jax.nn.sigmoid(x) + lax.erf(x) + lax.erfc(x) + jax.nn.softplus(x),
    "powers": lambda x: x**2 + x**3 + (x * x + 1) ** -1 + jnp.exp2(x) + (x * x) ** 0.3,
    "activations": lambda x: jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.elu(x) + jax.nn.relu6(x),
    "rounds": lambda x: jnp.round(4 * x) + lax.round(4 * x) + x % 0.3,
    "compares": lambda x: jnp.where((x > 0) & (x != 1) | ~(x <= -1), x, 2.0) + (x == x[:, :1, :]),
    "finite": lambda x: jnp.where(jnp.isfinite(x / jnp.maximum(x, 0)), x, 0.0),
    "clips": lambda x: jnp.clip(x, -0.5, 0.5) + jnp.minimum(x, 0.1) + jnp.maximum(-x, 0.0),
    "reductions": lambda x: x.sum(1) + x.max(1) * x.min(1) + x.prod(2)[:, :5],
    "means": lambda x: x.mean((1, 2))[:, None] + x.mean(2),
    "logic": lambda x: ((x > 0).all(1) | (x > 1).any(1)).astype(jnp.float32),
    "argmax": lambda x: (x.argmax(1) + x.argmin(1)).astype(jnp.float32),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1) + jax.nn.softmax(x, axis=1),
    "log_softmax": lambda x: jax.nn.log_softmax(x) + jax.nn.logsumexp(x, 1, keepdims=True),
    "shapes": lambda x: x.transpose(0, 2, 1).reshape(x.shape[0], -1)[:, 2:20:3],
    "flips": lambda x: x[:, ::-1] + jnp.flip(x, 2) + jnp.roll(x, 2, axis=1),
    "pads": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1)), constant_values=3)[:, 1:],
    "joins": lambda x: jnp.concatenate([x, jnp.zeros_like(x), x[:, :2]], 1),
    "splits": lambda x: jnp.stack(jnp.split(x, 3, axis=1), 1),
    "takes": lambda x: jnp.take(x, jnp.clip(IDS, 0, 4), axis=2) + x[:, :, IDS % 5],
    "rows": lambda x: jnp.take_along_axis(x, (x[:, :2] > 0).astype(int) + 3, axis=1) + x[:, :2],
    "one_row": lambda x: jnp.take_along_axis(x, x[:, :, 0].argmax(1)[:, None, None], axis=1)[:, 0],
    "chosen": lambda x: jnp.take_along_axis(x, x[:, 0].argmax(1)[:, None, None], axis=2),
    "fills": lambda x: jnp.take(x, IDS, axis=2, mode="fill", fill_value=7.0),
    "clipped": lambda x: jnp.take(x, IDS, axis=1, mode="clip"),
    "sums": lambda x: jnp.cumsum(x, 1) + lax.cumsum(x, 2, reverse=True),
    "products": lambda x: jnp.einsum("bij,bkj->bik", x, x) + jnp.einsum("bij,kj->bik", x, X),
    "contracted": lambda x: jnp.einsum("bij,ij->b", x, X) * jnp.einsum("bij,bij->b", x, x),
    "outer": lambda x: jnp.einsum("bi,bj->bij", x[:, 0], x[:, 1]),
    "remainder": lambda x: jax.checkpoint(jnp.sin)(x) + jax.jit(jnp.cos)(x),
    "tiles": lambda x: jnp.tile(x, (1, 2, 1)) - jnp.stack(jnp.unstack(x, axis=1)[:1], 1),
    "stacks": lambda x: jnp.stack([x, 2 * x], 1) + jnp.stack([x, x], 3).transpose(0, 3, 1, 2),
    "constants": lambda x: x * jnp.linspace(0, 1, 5) [None, None] + jnp.arange(6.0)[None, :, None],
    "steps": lambda x: lax.dynamic_slice(x, (0, 1, 2), (x.shape[0], 3, 3)),
    "identity": lambda x: x,
    "constant": lambda x: jnp.ones_like(x),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    program = of(OPERATIONS[name], (6, 5))
    with jax.numpy_rank_promotion("allow"):
        check(program, to_onnx(program), sizes=(1, 3), tolerance=1e-5)


IMAGE_OPERATIONS = {
    "strided": lambda x: lax.conv_general_dilated(
        x, KERNEL, (2, 1), [(1, 0), (0, 2)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "dilated": lambda x: lax.conv_general_dilated(
        x, KERNEL, (1, 1), "SAME", rhs_dilation=(2, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "grouped": lambda x: lax.conv_general_dilated(
        x, KERNEL[:, :, :2], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    ),
    "max_pool": lambda x: lax.reduce_window(
        x, -np.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 0), (0, 0))
    ),
    "mean_pool": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 3, 1), (1, 2, 1, 1), "SAME"),
    "affine": lambda x: jax.nn.relu(conv(x) * ROW + ROW) * ROW - conv(x) + ROW,
    "used_twice": lambda x: (lambda y: y * ROW + y)(conv(x)),
    "flipped_between": lambda x: conv(conv(x)[:, :, ::-1, :4])[:, 1:].transpose(0, 2, 1, 3),
}  # fmt: skip
KERNEL: Any = np.random.default_rng(1).normal(size=(3, 3, 4, 6)).astype(np.float32)
ROW = np.random.default_rng(2).normal(size=(1, 1, 1, 6)).astype(np.float32)


def conv(x):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=dims)


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_image_operations(name):
    program = of(IMAGE_OPERATIONS[name], (8, 6, 4))
    check(program, to_onnx(program), sizes=(1, 3), tolerance=1e-5)


def test_an_affine_map_of_channels_goes_into_the_convolution():
    nodes = onnx.load_from_string(to_onnx(of(lambda x: conv(x) * ROW + ROW, (8, 6, 4)))).graph.node
    assert [node.op_type for node in nodes] == ["Transpose", "Conv", "Transpose"]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: jnp.sort(x, 1), "no ONNX operator for sort"),
        (lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 0, 1), (0, 0, 0)]), "padding between elements"),
        (lambda x: x[1:], "a part of the batch"),
        (lambda x: lax.while_loop(lambda y: y.sum() > 3, lambda y: y / 2, x), "operator for while"),
    ],
)
def test_what_has_no_operator(function, message):
    with pytest.raises(ExportError) as caught:
        to_onnx(of(function, (6, 5)))
    assert message in str(caught.value) and "stablehlo" in str(caught.value)


def test_all_missing_operators_are_named_at_once():
    with pytest.raises(ExportError) as caught:
        to_onnx(of(lambda x: jnp.sort(x, 1) + lax.cummax(x, 1), (6, 5)))
    assert {"sort", "cummax"} <= set(str(caught.value).replace(",", " ").split())


def test_dead_code_needs_no_operator():
    def function(x):
        jnp.sort(x, 1)
        return x + jax.random.uniform(jax.random.key(0), ())

    check(of(function, (6, 5)), to_onnx(of(function, (6, 5))), sizes=(2,))


def test_weights_apart_are_those_of_the_file():
    program = program_of("convnet", {"widths": (4,)})
    inside, apart = to_stablehlo(program), to_stablehlo(program, weights="apart")
    assert len(apart) < len(inside) + 2000
    x = draw(program.inputs, 3)
    tensors = program.named_weights
    shuffled = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    first = jax.export.deserialize(bytearray(inside)).call(x)
    second = jax.export.deserialize(bytearray(apart)).call(shuffled, x)
    for name, value in program.function(program.weights, x).items():
        np.testing.assert_allclose(first[name], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=1e-5)
    assert jax.export.deserialize(bytearray(inside)).platforms == ("cpu", "cuda", "tpu")


def test_safetensors_are_read_back(tmp_path):
    tensors = {
        "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "byte": np.array([1, 2, 3], np.uint8),
        "half": np.ones((2,), jnp.bfloat16),
        "empty": np.zeros((0, 3), np.int64),
        "scalar": np.float64(2.5),
        "flag": np.array([True, False]),
    }
    path = tmp_path / "x.safetensors"
    dj.weights.write_safetensors(path, tensors, {"note": "é"})
    found = dj.weights.read(path)
    assert found.metadata == {"note": "é"} and set(found) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == np.asarray(x).dtype
    with pytest.raises(dj.weights.WeightsError, match="holds no <U1"):
        dj.weights.write_safetensors(path, {"x": np.array("a")})
    assert set(dj.weights.read(path)) == set(tensors)


def test_every_rule_belongs_to_a_primitive_of_jax():
    """A renamed primitive would otherwise be refused without anybody noticing."""
    named = {p.name for p in vars(lax).values() if isinstance(p, Primitive)}
    ours = {"conv2d", "name", "stop_gradient", "copy", "copy_p", "pvary", "add_any"}
    assert set(RULES) - ours - named <= {"sharding_constraint", "optimization_barrier", "split"}


def test_values_keep_their_layout():
    graph = onnx_graph.Graph(None)
    aval = jax.ShapeDtypeStruct((2, 3), np.float32)
    value = graph.folded(np.zeros((3, 1)), aval, order=(1, 0), ones=(0,))
    assert not value.is_plain and value.is_constant
    plain = graph.expanded(graph.reordered(value))
    assert plain.is_plain and plain.array.shape == (2, 3)
    assert dataclasses.replace(plain, order=(1, 0)).is_plain is False
    assert json.dumps(list(flatten.CALLS))
