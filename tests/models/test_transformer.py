"""Transformers over tokens: sizes, masks, causality, outputs, devices, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core import hypergradient, partition, sequences
from distill_jax.core.errors import ConfigError
from distill_jax.models import transformer

SIZES = {"vocabulary": 40, "width": 16, "depth": 2, "heads": 4, "mlp_width": 24}
NETS = {
    "gpt2": {"layout": "gpt2", "max_length": 16},
    "llama": {"layout": "llama", "groups": 2},
    "bert": {"layout": "bert", "head": "masked", "max_length": 16},
    "clip_text": {"layout": "clip_text", "projection": 6, "max_length": 16},
}
CAUSAL = ("gpt2", "llama", "clip_text")


def mostly_slow(names, *fast):
    """Names as parameters, of which the fast suite takes a few: the masks are one code."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


def drawn(like, seed=0):
    """Parameters by NumPy, gains near 1 and biases not 0."""
    random = np.random.default_rng(seed)

    def draw(path, x):
        values = random.normal(size=x.shape) * (0.4 if x.ndim > 1 else 0.2)
        return jnp.asarray(values + float("scale" in str(path[-1])), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, like)


@functools.cache
def network(name, **changes):
    """Returns a jitted network of inputs, and its parameters."""
    model = transformer.make(**{**SIZES, **NETS[name], **dict(changes)})
    like = {"tokens": jax.ShapeDtypeStruct((2, 6), jnp.int32)}
    params, state = jax.eval_shape(model.init, jax.random.key(0), like)
    assert not state
    return jax.jit(lambda p, x: model.apply(p, {}, x, train=False)[0]), drawn(params)


TOKENS = np.random.default_rng(1).integers(0, 40, (2, 6)).astype(np.int32)


def apply(name, tokens=TOKENS, changes=None, **given):
    run, params = network(name, **(changes or {}))
    return run(params, {"tokens": tokens, **given})


@pytest.mark.parametrize("layout", transformer.LAYOUTS)
def test_outputs_of_every_layout(layout):
    model = transformer.make(**SIZES, layout=layout, max_length=8)
    x = {
        "tokens": jax.ShapeDtypeStruct((2, 6), jnp.int32),
        "mask": jax.ShapeDtypeStruct((2, 6), jnp.float32),
    }
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    outputs, _ = jax.eval_shape(lambda p, x: model.apply(p, {}, x, train=False), params, x)
    shapes = {name: leaf.shape for name, leaf in outputs.items()}
    blocks = ("embedded", "block1", "block2", "stage1", "stage2", "stage3", "hidden", "tokens")
    wanted = {name: (2, 6, 16) for name in blocks}
    wanted["embedding"] = (2, 512 if layout == "clip_text" else 16)
    if layout in ("gpt2", "llama", "qwen2", "smollm"):
        wanted["logits"] = (2, 6, 40)
    assert shapes == wanted


PUBLISHED = {
    "gpt2": (124_439_808, dict(layout="gpt2", vocabulary=50_257, width=768, depth=12, heads=12)),
    "smollm2_135m": (
        134_515_008,
        dict(
            layout="smollm",
            vocabulary=49_152,
            width=576,
            depth=30,
            heads=9,
            groups=3,
            mlp_width=1536,
        ),
    ),
    "qwen2_05b": (
        494_032_768,
        dict(
            layout="qwen2",
            vocabulary=151_936,
            width=896,
            depth=24,
            heads=14,
            groups=2,
            mlp_width=4864,
            head="tied",
        ),
    ),
    "bert_base": (
        109_482_240,
        dict(layout="bert", vocabulary=30_522, width=768, depth=12, heads=12),
    ),
    "distilbert": (
        66_362_880,
        dict(layout="distilbert", vocabulary=30_522, width=768, depth=6, heads=12),
    ),
    "clip_text_b32": (
        63_165_952 + 512 * 512,
        dict(layout="clip_text", vocabulary=49_408, width=512, depth=12, heads=8),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Numbers of parameters that the models' cards have, or that follow from their configs."""
    count, arguments = PUBLISHED[name]
    model = transformer.make(**arguments)
    like = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), like)
    assert sum(x.size for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("name", NETS)
def test_the_last_token_moves_earlier_states_unless_the_network_is_causal(name):
    other = TOKENS.copy()
    other[:, -1] = (other[:, -1] + 1) % 40
    a, b = apply(name)["hidden"], apply(name, other)["hidden"]
    moved = np.abs(a - b).max(axis=(0, 2))
    assert moved[-1] > 1e-3
    if name in CAUSAL:
        assert (moved[:-1] == 0).all()
    else:
        assert (moved > 1e-5).all()


@pytest.mark.parametrize("name", mostly_slow(NETS, "gpt2", "bert"))
@pytest.mark.parametrize("left", [2, 0])
def test_padding_changes_nothing(name, left):
    tokens = np.full((2, 6), 7, np.int32)
    tokens[:, left : left + 4] = TOKENS[:, :4]
    mask = np.zeros((2, 6), np.float32)
    mask[:, left : left + 4] = 1
    padded = apply(name, tokens, mask=mask)
    alone = apply(name, TOKENS[:, :4])
    found = padded["hidden"][:, left : left + 4]
    np.testing.assert_allclose(found, alone["hidden"], rtol=1e-4, atol=1e-5)
    if name != "clip_text":  # pools where the largest id is, which may be the padding
        np.testing.assert_allclose(padded["embedding"], alone["embedding"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(("gpt2", "llama", "bert"), "llama"))
def test_packed_documents_do_not_see_each_other(name):
    segments = np.array([[3, 3, 5, 5, 5, 5]] * 2, np.int32)
    packed = apply(name, segments=segments)["hidden"]
    for part in (slice(0, 2), slice(2, 6)):
        alone = apply(name, TOKENS[:, part])["hidden"]
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(("llama", "bert"), "bert"))
def test_what_is_asked_of_the_logits(name):
    ask = np.random.default_rng(2).integers(0, 40, (2, 6, 3)).astype(np.int32)
    outputs = apply(name, ask=ask, changes={"top": 5})
    wanted = jax.nn.log_softmax(outputs["logits"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(outputs["log_probs"], np.take_along_axis(wanted, ask, -1))
    close(outputs["top_log_probs"], np.sort(wanted)[..., :-6:-1])
    assert (
        np.take_along_axis(wanted, outputs["top_index"], -1) == np.sort(wanted)[..., :-6:-1]
    ).all()
    rest = 1 - np.exp(np.asarray(outputs["top_log_probs"], np.float64)).sum(-1)
    close(np.exp(outputs["tail_log_prob"]), rest)


MASK = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], np.float32)


@pytest.mark.parametrize(
    ("pool", "columns"),
    [("last", [3, 5]), pytest.param("cls", [0, 1], marks=pytest.mark.slow)],
)
def test_the_embedding_is_that_of_a_token(pool, columns):
    outputs = apply("llama", mask=MASK, changes={"pool": pool})
    np.testing.assert_array_equal(outputs["embedding"], outputs["hidden"][np.arange(2), columns])


@pytest.mark.slow
def test_the_embedding_is_a_mean_or_at_the_end_token():
    mask, rows = MASK, np.arange(2)
    outputs = apply("llama", mask=mask, changes={"normalize": True})
    mean = (outputs["hidden"] * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(outputs["embedding"], mean, rtol=1e-5, atol=1e-6)
    tokens = np.array([[3, 9, 2, 9, 1, 1], [1, 2, 39, 4, 9, 1]], np.int32)
    for end, columns in {9: [1, 4], -1: [1, 2]}.items():
        outputs = apply("llama", tokens, changes={"pool": "end", "end": end})
        np.testing.assert_array_equal(outputs["embedding"], outputs["hidden"][rows, columns])


def test_a_classifier_of_the_embedding():
    model = transformer.make(**SIZES, layout="bert", num_classes=3, max_length=8)
    x = jnp.asarray(TOKENS)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    outputs = jax.eval_shape(lambda p: model.apply(p, {}, x, train=False)[0], params)
    assert outputs["logits"].shape == (2, 3) and params["pooler"]["kernel"].shape == (16, 16)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", "mask"),
        pytest.param("llama", None, marks=pytest.mark.slow),
        pytest.param("bert", "segments", marks=pytest.mark.slow),
    ],
)
def test_the_attention_of_jax_is_ours(name, given):
    inputs = {
        "mask": {"mask": np.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.float32)},
        "segments": {"segments": np.array([[0, 0, 0, 1, 1, 1]] * 2, np.int32)},
        None: {},
    }[given]
    ours = apply(name, **inputs)["hidden"]
    other = apply(name, changes={"attention": "xla"}, **inputs)["hidden"]
    seen = inputs.get("mask", np.ones((2, 6))) > 0
    np.testing.assert_allclose(other[seen], ours[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_computed_again_have_the_same_derivatives():
    """Backwards, and forwards as bilevel steps need them."""

    def derivatives(remat):
        run, params = network("llama", remat=remat)

        def loss(params):
            logits = run(params, {"tokens": TOKENS})["logits"]
            return jax.nn.log_softmax(logits)[..., 0].sum()

        ones = jax.tree.map(jnp.ones_like, params)
        return jax.jit(lambda p: (jax.grad(loss)(p), jax.jvp(loss, (p,), (ones,))))(params)

    got, want = (jax.tree.leaves(derivatives(remat)) for remat in (True, False))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_sixteen_bits():
    run, params = network("llama")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    outputs = run(half, {"tokens": TOKENS})
    assert outputs["hidden"].dtype == jnp.bfloat16 and outputs["logits"].dtype == jnp.float32
    whole = run(params, {"tokens": TOKENS})["logits"]
    assert np.abs(outputs["logits"] - whole).max() < 0.1 * whole.std()


def test_a_token_that_does_not_exist_is_nan():
    tokens = TOKENS.copy()
    tokens[0, 2] = 40
    hidden = apply("llama", tokens)["hidden"]
    assert np.isnan(hidden[0, 2:]).all() and np.isfinite(hidden[1]).all()


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", 2),
        pytest.param("llama", 1, marks=pytest.mark.slow),
        pytest.param("gpt2", 4, marks=pytest.mark.slow),
    ],
)
def test_heads_are_split_over_devices(name, groups):
    """Each device has whole heads, and exchanges one sum in each branch of a block."""
    run, params = network(name, groups=groups)
    mesh = partition.make_mesh(data=1, model=2, devices=jax.devices()[:2])
    rules = transformer.partition_rules(devices=2, **{**SIZES, **NETS[name], "groups": groups})
    shardings = partition.infer(params, mesh, rules=rules)
    attention = shardings["block0"]["attention"]
    assert attention["query"]["kernel"].spec == PartitionSpec("fsdp", "model")
    assert ("model" in attention["key"]["kernel"].spec) == (groups > 1)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(lambda p, x: run(p, x)["hidden"], in_shardings=(shardings, whole))
    text = step.lower(params, {"tokens": TOKENS}).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 4
    assert "all-gather" not in text
    wanted = run(params, {"tokens": TOKENS})["hidden"]
    np.testing.assert_allclose(step(params, {"tokens": TOKENS}), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"layout": "lama"}, "layout"),
        ({"heads": 3}, "heads"),
        ({"groups": 3}, "groups"),
        ({"head_width": 3}, "heads"),
        ({"norm": "batch"}, "norm"),
        ({"activation": "swish"}, "activation"),
        ({"pool": "max"}, "pool"),
        ({"attention": "flash"}, "attention"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"depth": -1}, "depth"),
        ({"dropout": 1.0}, "dropout"),
        ({"end": 40}, "end"),
        ({"num_classes": 2}, "num_classes"),
        ({"top": 41}, "top"),
        ({"layout": "bert", "top": 1}, "top"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope_scaling"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(changes, where):
    with pytest.raises(ConfigError) as error:
        transformer.make(**{**SIZES, **changes})
    assert error.value.where == where


@pytest.mark.parametrize(
    ("name", "given", "where"),
    [
        ("llama", {"token": TOKENS}, "input"),
        ("llama", {"mask": TOKENS}, "input"),
        ("llama", {"tokens": TOKENS.astype(np.float32)}, "input.tokens"),
        ("llama", {"tokens": TOKENS[0]}, "input.tokens"),
        ("llama", {"tokens": TOKENS, "mask": TOKENS[:, :3]}, "input.mask"),
        ("llama", {"tokens": TOKENS, "ask": TOKENS}, "input.ask"),
        ("gpt2", {"tokens": np.tile(TOKENS, (1, 3))}, "max_length"),
        ("clip_text", {"tokens": TOKENS, "ask": TOKENS[..., None]}, "ask"),
    ],
)
def test_inputs_that_do_not_fit(name, given, where):
    run, params = network(name)
    with pytest.raises(ConfigError) as error:
        run(params, given)
    assert error.value.where == where


def test_cudnn_computes_in_sixteen_bits():
    run, params = network("llama", attention="cudnn")
    with pytest.raises(ConfigError, match="16 bits, not in float32"):
        run(params, {"tokens": TOKENS})


@pytest.mark.parametrize("devices", [3, 8])
def test_devices_that_do_not_divide_the_heads(devices):
    with pytest.raises(ConfigError, match="does not split over model="):
        transformer.partition_rules(devices=devices, **SIZES)


@pytest.mark.slow
def test_a_weight_for_each_token_is_learned_by_the_hypergradient():
    """Through attention and chunked log-probabilities, against reverse mode through the update."""
    run, params = network("llama")
    held_out = TOKENS[::-1].copy()

    def log_probs(params, tokens):
        hidden = run(params, {"tokens": tokens})["hidden"][:, :-1]
        table = params["head"]["embedding"]
        return sequences.log_probs_of(hidden, table, tokens[:, 1:, None], chunk=2)[..., 0]

    def forward(params):
        return log_probs(params, TOKENS)

    def inner(omega, outputs):
        return -(jax.nn.sigmoid(omega) * outputs).mean()

    def outer(params):
        return -log_probs(params, held_out).mean()

    # Reverse mode through Adam is NaN where a gradient is 0, as for tokens that are not there.
    optimizer = optax.sgd(0.1, momentum=0.9)
    state, omega = optimizer.init(params), jnp.linspace(-1, 1, 10).reshape(2, 5)

    def direct(omega):
        grads = jax.grad(lambda params: inner(omega, forward(params)))(params)
        updates, _ = optimizer.update(grads, state, params)
        return outer(optax.apply_updates(params, updates))

    compute = hypergradient.hypergradient(forward, inner, outer, optimizer)
    (value, found), (wanted_value, wanted) = jax.jit(
        lambda omega: (compute(params, state, omega), jax.value_and_grad(direct)(omega))
    )(omega)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    assert np.abs(wanted).max() > 1e-5
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
