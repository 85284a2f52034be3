"""Networks of the CIFAR-100 distillation benchmark, and the grouped convolutions that they use."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.models import (
    mobilenet_v2,
    resnet_four_stages,
    shufflenet_v1,
    shufflenet_v2,
    vgg,
)
from distill_jax.models.convolution import _conv, conv2d
from distill_jax.models.layers import Conv, shuffle_channels
from tests.models.test_models import count

pytestmark = pytest.mark.slow

SMALL = {
    "vgg": (vgg.make, {"variant": "vgg8", "width_multiplier": 1 / 16}, 5),
    "mobilenet_v2": (mobilenet_v2.make, {"width_multiplier": 0.1, "expansion": 2}, 4),
    "shufflenet_v1": (shufflenet_v1.make, {}, 3),
    "shufflenet_v2": (shufflenet_v2.make, {"variant": "0.5x"}, 3),
    "resnet18": (resnet_four_stages.make, {"variant": "resnet18", "width": 4}, 4),
    "resnet50": (resnet_four_stages.make, {"variant": "resnet50", "width": 4}, 4),
}


# Published: parameters for CIFAR-100, as the distillation literature reports them; exact where its
# networks have no biases that a norm would cancel.


def vgg_size(repeats, k):
    total, c = 0, 3
    for width, n in zip((64, 128, 256, 512, 512), repeats, strict=True):
        for _ in range(n):
            total += 9 * c * width + 2 * width
            c = width
    return total + c * k + k, sum(
        n * w for n, w in zip(repeats, (64, 128, 256, 512, 512), strict=True)
    )


@pytest.mark.parametrize(
    ("variant", "repeats", "published"),
    [("vgg8", (1,) * 5, 3.97), ("vgg13", (2,) * 5, 9.46)],
)
def test_vgg_has_the_published_size_less_biases(variant, repeats, published):
    size, biases = vgg_size(repeats, 100)
    assert count(vgg.make(num_classes=100, variant=variant)) == size
    assert (size + biases) / 1e6 == pytest.approx(published, abs=0.005)


def norm_conv(c, d, *, kernel=1, groups=1):
    """A convolution without bias and its norm."""
    return kernel * kernel * c * d // groups + 2 * d


def test_mobilenet_v2_of_half_width_has_the_published_size():
    total, c = norm_conv(3, 16, kernel=3), 16
    for t, width, n in (
        (1, 8, 1),
        (6, 12, 2),
        (6, 16, 3),
        (6, 32, 4),
        (6, 48, 3),
        (6, 80, 3),
        (6, 160, 1),
    ):
        for _ in range(n):
            total += norm_conv(c, t * c) + norm_conv(t * c, t * c, kernel=3, groups=t * c)
            total += norm_conv(t * c, width)
            c = width
    total += norm_conv(c, 1280) + 1280 * 100 + 100
    assert count(mobilenet_v2.make(num_classes=100)) == total == 812_836


def test_shufflenet_v1_of_three_groups_has_the_published_size():
    total, c = norm_conv(3, 24), 24
    for width, n in ((240, 4), (480, 8), (960, 4)):
        for i in range(n):
            made = width - c if i == 0 else width
            inner = made // 4
            total += norm_conv(c, inner, groups=1 if c == 24 else 3)
            total += norm_conv(inner, inner, kernel=3, groups=inner)
            total += norm_conv(inner, made, groups=3)
            c = width
    total += c * 100 + 100
    assert count(shufflenet_v1.make(num_classes=100)) == total == 949_258


def test_shufflenet_v2_has_the_published_size():
    total, c = norm_conv(3, 24), 24
    for width, n in ((116, 4), (232, 8), (464, 4)):
        half = width // 2
        depthwise = norm_conv(half, half, kernel=3, groups=half)
        total += norm_conv(c, c, kernel=3, groups=c) + norm_conv(c, half)
        total += norm_conv(c, half) + depthwise + norm_conv(half, half)
        total += (n - 1) * (2 * norm_conv(half, half) + depthwise)
        c = width
    total += norm_conv(c, 1024) + 1024 * 100 + 100
    assert count(shufflenet_v2.make(num_classes=100)) == total == 1_355_528


def test_resnet50_has_the_published_size():
    total, c = norm_conv(3, 64, kernel=3), 64
    for width, n in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(n):
            total += norm_conv(c, width) + norm_conv(width, width, kernel=3)
            total += norm_conv(width, 4 * width)
            total += norm_conv(c, 4 * width) if i == 0 else 0
            c = 4 * width
    total += c * 100 + 100
    assert count(resnet_four_stages.make(num_classes=100)) == total == 23_705_252


@pytest.mark.parametrize(
    ("make", "kwargs", "shapes"),
    [
        (vgg.make, {}, [(32, 64), (16, 128), (8, 256), (4, 512), (4, 512)]),
        (mobilenet_v2.make, {}, [(16, 12), (8, 16), (4, 48), (2, 160)]),
        (shufflenet_v1.make, {}, [(16, 240), (8, 480), (4, 960)]),
        (shufflenet_v2.make, {}, [(16, 116), (8, 232), (4, 464)]),
        (resnet_four_stages.make, {}, [(32, 256), (16, 512), (8, 1024), (4, 2048)]),
    ],
)
def test_stages_of_32x32_have_the_resolutions_of_the_benchmark(make, kwargs, shapes):
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    model = make(num_classes=100, **kwargs)
    outputs = jax.eval_shape(
        lambda key, x: model.apply(*model.init(key, x), x)[0], jax.random.key(0), x
    )
    for i, (size, channels) in enumerate(shapes, 1):
        assert outputs[f"stage{i}"].shape == (2, size, size, channels)
    assert f"stage{len(shapes) + 1}" not in outputs


@pytest.fixture
def short(monkeypatch):
    """Fewer blocks of each kind, which compile in less time."""
    monkeypatch.setattr(shufflenet_v1, "REPEATS", (2, 1, 1))
    monkeypatch.setattr(shufflenet_v2, "REPEATS", (2, 1, 1))
    monkeypatch.setattr(mobilenet_v2, "BLOCKS", [(*b[:2], 1, *b[3:]) for b in mobilenet_v2.BLOCKS])
    few = dict.fromkeys(resnet_four_stages.REPEATS, (2, 1, 1, 1))
    monkeypatch.setattr(resnet_four_stages, "REPEATS", few)


def built(name):
    """Returns a small network, an input, parameters drawn by NumPy (cheaper) and state."""
    make, kwargs, _ = SMALL[name]
    model = make(num_classes=5, **kwargs)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(path, like):
        if "scale" in str(path):
            return jnp.ones(like.shape, like.dtype)
        fan_in = np.prod(like.shape[:-1]) if like.ndim > 1 else 10
        return jnp.asarray(rng.normal(size=like.shape) * (2 / fan_in) ** 0.5, like.dtype)

    def fresh(path, like):
        return jnp.full(like.shape, float("var" in str(path)), like.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    return model, x, params, jax.tree_util.tree_map_with_path(fresh, state)


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"resnet18"}))
def test_endpoints_state_and_gradients(name, short):
    model, x, params, state = built(name)

    def loss(params):
        outputs, new = model.apply(params, state, x, train=True, rngs={})
        return -jax.nn.log_softmax(outputs["logits"])[:, 0].mean(), (outputs, new)

    (_, (outputs, new)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert outputs["logits"].shape == (4, 5)
    assert outputs["embedding"].ndim == 2
    stages = [f"stage{i + 1}" for i in range(SMALL[name][2])]
    assert set(outputs) - {"stem", "embedding", "logits"} == {
        *stages,
        *(f"{stage}_pre" for stage in stages),
    }
    for stage in stages:
        pre = outputs[f"{stage}_pre"]
        activated = pre if name == "mobilenet_v2" else jnp.maximum(pre, 0)
        np.testing.assert_array_equal(outputs[stage], activated)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), new, state))
    for path, leaf in jax.tree.leaves_with_path(grads):
        # The bias of a linear bottleneck without a shortcut is taken off again by the next norm.
        if (name, path[0].key, path[1].key) == ("mobilenet_v2", "Block_0", "BatchNorm_2"):
            continue
        assert bool(jnp.any(leaf != 0)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["shufflenet_v2"])
def test_bfloat16_stays_and_is_close(name, short):
    model, x, params, state = built(name)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    run = jax.jit(lambda params, x: model.apply(params, state, x, train=False, rngs={})[0])
    outputs, exact = run(*low), run(params, x)
    assert {o.dtype for o in outputs.values()} == {jnp.dtype(jnp.bfloat16)}
    spread = float(exact["logits"].std())
    difference = outputs["logits"].astype(jnp.float32) - exact["logits"]
    assert float(jnp.abs(difference).max()) < 0.2 * spread


def test_small_and_odd_images_pass():
    for name, (make, kwargs, _) in SMALL.items():
        model = make(num_classes=5, **kwargs)
        images = jax.ShapeDtypeStruct((2, 5, 9, 1), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        outputs, _ = jax.eval_shape(model.apply, *shapes, images)
        assert outputs["logits"].shape == (2, 5), name


@pytest.mark.parametrize("groups", shufflenet_v1.WIDTHS)
def test_shufflenet_v1_of_every_number_of_groups(groups, short):
    model = shufflenet_v1.make(num_classes=5, groups=groups)
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    outputs, _ = jax.eval_shape(model.apply, params, state, x)
    for stage in range(3):
        width = shufflenet_v1.WIDTHS[groups] * 2**stage
        assert outputs[f"stage{stage + 1}"].shape == (2, 8 // 2**stage, 8 // 2**stage, width)


@pytest.mark.parametrize(
    "block",
    [
        shufflenet_v1.Block(features=48, stride=1, groups=3),
        mobilenet_v2.Block(features=48, stride=1, expansion=1),
    ],
    ids=lambda block: type(block).__module__.rpartition(".")[2],
)
def test_inner_convolutions_see_activations_of_the_benchmark(block):
    """Three convolutions; behind the first two a norm and a ReLU without an upper bound."""
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, Conv) and context.method_name == "__call__":
            seen.append(args[0])
        return call(*args, **kwargs)

    @jax.jit
    def inner(x):
        seen.clear()
        with nn.intercept_methods(watch):
            block.init_with_output(jax.random.key(1), x, train=False)
        return seen[1:]

    found = inner(100 * jax.random.normal(jax.random.key(0), (2, 4, 4, 48)))
    assert len(found) == 2
    for x in found:
        assert float(x.min()) == 0 and float(x.max()) > 6


def test_channels_are_interleaved():
    # Two groups (0 1 2) and (3 4 5): one from each in turn.
    x = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(shuffle_channels(x, 2)[0], [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(shuffle_channels(shuffle_channels(x, 2), 3), x)


@pytest.mark.parametrize("groups, d", [(6, 6), (3, 9), (2, 4), (6, 12)])
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_grouped_convolution_equals_lax_in_every_derivative(groups, d, size, stride):
    rng = np.random.default_rng(0)
    shapes = ((3, 7, 8, 6), (size, size, 6 // groups, d))

    def everything(conv, args, tangents):
        def f(x, kernel):
            return jnp.tanh(conv(x, kernel, stride=stride, groups=groups)).sum((1, 2, 3))

        def grads(x, kernel):
            return jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1))(x, kernel)

        return f(*args), jax.jvp(grads, args, tangents)

    with jax.enable_x64(True):
        args, tangents = (tuple(jnp.asarray(rng.normal(size=s)) for s in shapes) for _ in "ab")
        ours, theirs = (
            jax.jit(functools.partial(everything, conv))(args, tangents) for conv in (conv2d, _conv)
        )
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    jax.tree.map(compare, ours, theirs)


def test_grouped_convolution_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="4 groups"):
        conv2d(jnp.zeros((1, 4, 4, 6)), jnp.zeros((3, 3, 1, 6)), groups=4)


@pytest.mark.parametrize(
    ("make", "kwargs", "hint"),
    [
        (vgg.make, {"variant": "vgg12"}, "'vgg1"),
        (vgg.make, {"width_multiplier": 0.01}, "no channel"),
        (mobilenet_v2.make, {"width_multiplier": 0.05}, "no channel"),
        (mobilenet_v2.make, {"expansion": 0}, "1 or more"),
        (shufflenet_v1.make, {"groups": 5}, "available: 1, 2, 3, 4, 8"),
        (shufflenet_v2.make, {"variant": "1.0x"}, "'1"),
        (resnet_four_stages.make, {"variant": "resnet20"}, "'resnet"),
        (resnet_four_stages.make, {"width": 0}, "1 or more"),
    ],
)
def test_wrong_arguments_are_refused_with_the_nearest(make, kwargs, hint):
    with pytest.raises(ConfigError, match=hint):
        make(num_classes=5, **kwargs)
