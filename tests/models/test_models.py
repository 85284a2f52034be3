"""Every network: published parameter counts, endpoints, modes, precision, gradients, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.analysis import dependence
from distill_jax.core.errors import ConfigError
from distill_jax.models import convnet, mlp, resnet, resnet_four_stages, vit, wide_resnet

NETS = {
    "resnet": (resnet.make, {"depth": 8}),
    "resnet_x4": (resnet.make, {"variant": "resnet8x4"}),
    "wide_resnet": (wide_resnet.make, {"depth": 10, "width_multiplier": 1}),
    "convnet": (convnet.make, {"widths": (4, 8)}),
    "mlp": (mlp.make, {"hidden": (16, 8), "batch_norm": True}),
    "vit": (vit.make, {"width": 16, "depth": 3, "heads": 2, "patch_size": 4}),
    "vit_mean": (vit.make, {"width": 16, "depth": 3, "heads": 2, "pool": "mean"}),
}

FOUR_STAGES = resnet_four_stages.make, {"variant": "resnet50", "width": 2, "max_depth": 1}
REMAT = {**{name: NETS[name] for name in ("vit", "resnet")}, "resnet_four_stages": FOUR_STAGES}


@functools.cache
def shapes(name, channels=3, size=8, **kwargs):
    """Returns a network and the shapes of an input, parameters and state."""
    make, defaults = (NETS | REMAT)[name]
    model = make(num_classes=5, **(defaults | kwargs))
    x = jax.ShapeDtypeStruct((4, size, size, channels), jnp.float32)
    return model, x, *jax.eval_shape(model.init, jax.random.key(0), x)


@functools.cache
def built(name, **kwargs):
    """Returns a network, an input, parameters drawn by NumPy (cheaper) and state."""
    model, x, params, state = shapes(name, **kwargs)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def draw(path, like):
        scale = 1.0 if "scale" in str(path) else 0.0
        fan_in = max(1, like.size // like.shape[-1]) if like.ndim > 1 else 10
        return jnp.asarray(scale + rng.normal(size=like.shape) / fan_in**0.5, like.dtype)

    def fresh(path, like):
        return jnp.full(like.shape, float("var" in str(path)), like.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    return model, x, params, jax.tree_util.tree_map_with_path(fresh, state)


def count(model):
    params, _ = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def resnet_size(n, stem, widths, k):
    """Counts convolutions (9 or 1 weights a pair of channels) and norms (2 a channel) by hand."""
    total, c = 3 * stem * 9 + 2 * stem, stem
    for stage, w in enumerate(widths):
        total += 9 * c * w + (2 * n - 1) * 9 * w * w + 2 * n * 2 * w
        if stage > 0 or c != w:
            total += c * w + 2 * w
        c = w
    return total + c * k + k


def wide_resnet_size(n, m, k):
    """As above; a norm precedes each convolution of a block, and one follows the last block."""
    total, c = 3 * 16 * 9, 16
    for stage, w in enumerate((16 * m, 32 * m, 64 * m)):
        total += 9 * c * w + (2 * n - 1) * 9 * w * w + 2 * c + (2 * n - 1) * 2 * w
        if stage > 0 or c != w:
            total += c * w
        c = w
    return total + 2 * c + c * k + k


@pytest.mark.parametrize(
    ("variant", "published", "arithmetic"),
    [
        # Published: Tian et al. 2020 (parameters for CIFAR-100, in millions).
        ("resnet20", 0.278, resnet_size(3, 16, (16, 32, 64), 100)),
        ("resnet56", 0.862, resnet_size(9, 16, (16, 32, 64), 100)),
        ("resnet110", 1.737, resnet_size(18, 16, (16, 32, 64), 100)),
        ("resnet8x4", 1.234, resnet_size(1, 32, (64, 128, 256), 100)),
        ("resnet32x4", 7.434, resnet_size(5, 32, (64, 128, 256), 100)),
    ],
)
def test_resnet_has_the_published_size(variant, published, arithmetic):
    n = count(resnet.make(num_classes=100, variant=variant))
    assert n == arithmetic
    assert n == pytest.approx(published * 1e6, abs=600)


def test_resnet20_has_278324_parameters():
    # stem 464; stage 1: 3 (2 * 2304 + 64) = 14016; stage 2: 4608 + 5 * 9216 + 3 * 128 + 576;
    # stage 3: 18432 + 5 * 36864 + 3 * 256 + 2176; linear 6500.
    assert count(resnet.make(num_classes=100)) == 464 + 14016 + 51648 + 205696 + 6500 == 278324


@pytest.mark.parametrize(
    ("variant", "published"),
    [("wrn-40-2", 2.255), ("wrn-40-1", 0.570), ("wrn-16-2", 0.703)],
)
def test_wide_resnet_has_the_published_size(variant, published):
    depth, multiplier = map(int, variant.split("-")[1:])
    n = count(wide_resnet.make(num_classes=100, variant=variant))
    assert n == wide_resnet_size((depth - 4) // 6, multiplier, 100)
    assert n == pytest.approx(published * 1e6, abs=600)


def test_vit_tiny_has_the_size_of_its_arithmetic():
    d, depth = 192, 12
    block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d
    other = (16 * 3 + 1) * d + d + 65 * d + 2 * d + (d + 1) * 10
    assert count(vit.make(num_classes=10, variant="tiny")) == depth * block + other


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_endpoints_modes_and_gradients(name):
    model, x, params, state = built(name)

    @jax.jit
    def evaluate(x):
        return model.apply(params, state, x, train=False, rngs={})

    outputs, same = evaluate(x)
    assert outputs["logits"].shape == (4, 5)
    assert outputs["embedding"].ndim == 2
    assert {"stage1", "stage2"} <= set(outputs)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, state))
    for endpoint, again in evaluate(x)[0].items():
        np.testing.assert_array_equal(outputs[endpoint], again)

    def loss(params):
        outputs, new = model.apply(params, state, x, train=True, rngs={})
        return -jax.nn.log_softmax(outputs["logits"])[:, 0].mean(), new

    (_, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), new, state))
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert bool(jnp.any(leaf != 0)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("channels", [1, 2])
def test_any_number_of_channels(name, channels):
    model, x, params, state = shapes(name, channels)
    outputs, _ = jax.eval_shape(model.apply, params, state, x)
    assert outputs["logits"].shape == (4, 5)


@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_jitted_equals_eager(name):
    model, x, params, state = built(name)
    eager = model.apply(params, state, x, train=True, rngs={})
    jitted = jax.jit(lambda x: model.apply(params, state, x, train=True, rngs={}))(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), eager, jitted)


def test_init_is_a_function_of_the_key_and_has_the_layout_of_its_shapes():
    model, x, params, state = built("convnet")
    first, again, other = (jax.jit(model.init)(jax.random.key(n), x) for n in (0, 0, 1))
    assert jax.tree.structure(first) == jax.tree.structure((params, state))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    kernels = [tree[0]["Conv_1"]["kernel"] for tree in (first, other)]
    assert bool((kernels[0] != kernels[1]).all())
    # He et al. by fan-out: variance 2 / (9 * 8).
    np.testing.assert_allclose(kernels[0].std(), (2 / 72) ** 0.5, rtol=0.15)


@pytest.mark.parametrize("name", ["resnet", "wide_resnet", "convnet"])
def test_activated_stages_are_their_pre_activation_above_zero(name):
    model, x, params, state = built(name)
    outputs, _ = jax.jit(lambda x: model.apply(params, state, x))(x)
    stages = [k for k in outputs if k.startswith("stage") and "_" not in k]
    assert len(stages) >= 2
    for stage in stages:
        want = np.maximum(outputs[f"{stage}_pre"], 0)  # two fusions may compute it twice
        np.testing.assert_allclose(outputs[stage], want, rtol=1e-5, atol=1e-5)


def test_raw_stages_of_a_wide_resnet_are_what_the_next_norm_sees():
    model, x, params, state = built("wide_resnet")
    outputs, _ = jax.jit(lambda x: model.apply(params, state, x))(x)
    # The stem, and the first norms of stages 2 and 3 and behind the last block: depth 10.
    for name, norm in (("stem", 0), ("stage1", 2), ("stage2", 4), ("stage3", 6)):
        named = params[f"BatchNorm_{norm}"], state["batch_stats"][f"BatchNorm_{norm}"]
        layer, running = jax.device_get(named)
        scale = layer["scale"] / np.sqrt(running["var"] + 1e-5)
        want = (np.asarray(outputs[f"{name}_raw"]) - running["mean"]) * scale + layer["bias"]
        np.testing.assert_allclose(outputs[f"{name}_pre"], want, rtol=1e-4, atol=1e-4)
    assert float(outputs["stage2_raw"].min()) < 0


@pytest.mark.parametrize(
    "name, changes",
    [("vit", {"attention": "xla"}), *((name, {"remat": True}) for name in REMAT)],
)
def test_other_programs_of_a_network_have_its_parameters_state_and_gradient(name, changes):
    model, x, params, state = built(name)
    make, arguments = REMAT[name]
    other = make(num_classes=5, **arguments, **changes)
    shapes_of = lambda m: jax.eval_shape(m.init, jax.random.key(0), x)  # noqa: E731
    assert shapes_of(other) == shapes_of(model)
    stage = "block2" if name == "vit" else "stage2"

    @functools.partial(jax.jit, static_argnums=0)
    def grad(model, params):
        def loss(params):
            outputs, new = model.apply(params, state, x, train=True, rngs={})
            return (outputs["logits"] ** 2).sum() + outputs[stage].mean(), new

        return jax.grad(loss, has_aux=True)(params)

    for own, its in zip(
        *map(jax.tree.leaves, (grad(model, params), grad(other, params))), strict=True
    ):
        largest = max(1.0, float(jnp.abs(own).max()))
        np.testing.assert_allclose(its, own, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", REMAT)
def test_blocks_computed_again_keep_less_for_the_backward_pass(name):
    make, arguments = REMAT[name]

    def kept(remat):
        model = make(num_classes=5, **arguments, remat=remat)
        _, x, params, state = built(name)

        def backward(params):
            run = lambda p: model.apply(p, state, x, train=True, rngs={})[0]["logits"]  # noqa: E731
            return jax.vjp(run, params)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, params))
        return sum(array.size for array in kept) - sum(p.size for p in jax.tree.leaves(params))

    assert kept(remat=True) < 0.5 * kept(remat=False)


def test_cudnn_attention_of_a_vit_computes_in_sixteen_bits():
    _, x, params, state = built("vit")
    other = vit.make(num_classes=5, **NETS["vit"][1], attention="cudnn")
    with pytest.raises(ConfigError, match="16 bits, not in float32"):
        other.apply(params, state, x, train=True, rngs={})


@pytest.mark.parametrize("name", ["resnet", "wide_resnet", "convnet", "mlp", "vit"])
def test_bfloat16_in_bfloat16_out_and_float32_state(name):
    model, x, params, state = built(name, **({"depth": 1} if name == "vit" else {}))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, state)))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    run = jax.jit(lambda params, x: model.apply(params, state, x, train=True, rngs={}))
    (outputs, new), (exact, _) = run(*low), run(params, x)
    assert {o.dtype for o in outputs.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))
    np.testing.assert_allclose(
        outputs["logits"].astype(jnp.float32), exact["logits"], atol=0.15, rtol=0.1
    )


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("wide_resnet", {"dropout": 0.5}),
        ("convnet", {"dropout": 0.5}),
        ("mlp", {"dropout": 0.5}),
        ("vit", {"dropout": 0.5, "depth": 1}),
        ("vit", {"drop_path": 0.5, "depth": 2}),
    ],
)
def test_dropout_follows_its_key_and_asks_for_it(name, kwargs):
    model, x, params, state = built(name, **kwargs)

    def logits(seed, x, train=True):
        key = jax.random.key(seed)
        return model.apply(params, state, x, train=train, rngs={"dropout": key})[0]["logits"]

    jitted = jax.jit(logits)
    first, again, other = (np.asarray(jitted(seed, x)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert dependence.inputs_used(functools.partial(logits, train=False), 0, x) == {"1"}
    with pytest.raises(ConfigError, match=r"no key[\s\S]*dropout"):
        jax.eval_shape(lambda: model.apply(params, state, x, train=True, rngs={})[0])


@pytest.mark.parametrize("name", ["resnet", "wide_resnet", "convnet"])
def test_parameters_fit_images_of_another_size(name):
    model, _, params, state = shapes(name)
    images = jax.ShapeDtypeStruct((2, 11, 14, 3), jnp.float32)
    outputs, _ = jax.eval_shape(model.apply, params, state, images)
    assert outputs["logits"].shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "kwargs", "hint"),
    [
        (resnet.make, {"depth": 18}, "nearest: 20"),
        (resnet.make, {"variant": "resnet9"}, "nearest: 8"),
        (resnet.make, {"variant": "resnt20"}, "'resnet20'"),
        (resnet.make, {"width_multiplier": 0}, "1 or more"),
        (wide_resnet.make, {"depth": 18}, "nearest: 16"),
        (wide_resnet.make, {"variant": "wrn-40"}, "'wrn-40-"),
        (wide_resnet.make, {"width_multiplier": 0}, "1 or more"),
        (convnet.make, {"widths": ()}, "at least one"),
        (vit.make, {"variant": "tny"}, "'tiny'"),
        (vit.make, {"pool": "gap"}, "cls, mean"),
        (vit.make, {"attention": "cudn"}, "'cudnn'"),
        (vit.make, {"heads": 5}, "divisors: 1, 2, 3"),
    ],
)
def test_wrong_arguments_are_refused_with_the_nearest(make, kwargs, hint):
    with pytest.raises(ConfigError, match=hint):
        make(num_classes=5, **kwargs)


def test_patches_that_do_not_tile_the_image_are_refused():
    with pytest.raises(ConfigError, match="divisors: 1, 2, 4, 8"):
        shapes("vit", patch_size=3)
