"""Networks for tables: sizes, transcriptions of their equations, gradients, meshes, errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import partition
from distill_jax.core.errors import ConfigError
from distill_jax.models import _tables, dcnv2, deepfm, tabular_mlp, tabular_transformer, wide_deep

CARDS, M, B = (5, 3, 200), 2, 6
SMALL = {"embedding_dim": 4, "hidden": (8, 6)}
NETS = {
    "tabular_mlp": (tabular_mlp.make, SMALL | {"batch_norm": True}),
    "tabular_transformer": (tabular_transformer.make, {"width": 8, "depth": 1, "heads": 2}),
    "wide_deep": (wide_deep.make, SMALL | {"crosses": ((0, 1), (2, 0)), "cross_buckets": 64}),
    "deepfm": (deepfm.make, SMALL),
    "dcnv2": (dcnv2.make, SMALL | {"cross_layers": 2}),
    "dcnv2_stacked": (
        dcnv2.make,
        SMALL | {"cross_layers": 2, "structure": "stacked", "low_rank": 3},
    ),
}


def table(cards=CARDS, m=M, b=B, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, n, b) for n in cards], 1) if cards else np.zeros((b, 0))
    numeric = rng.normal(size=(b, m))
    return {"categorical": jnp.int32(ids), "numeric": jnp.float32(numeric)}


def shapes(name, cards=CARDS, m=M, k=3, **kwargs):
    """Returns a network, a table, and the shapes of parameters and state."""
    make, defaults = NETS[name]
    model = make(num_classes=k, cardinalities=cards, **(defaults | kwargs))
    x = table(cards, m)
    return model, x, *jax.eval_shape(model.init, jax.random.key(0), x)


@functools.cache
def built(name, *args, **kwargs):
    """Returns a network, a table, parameters drawn by NumPy (none of them 0) and state."""
    model, x, params, state = shapes(name, *args, **kwargs)
    rng = np.random.default_rng(1)

    def draw(path, like):
        scale = 1.0 if "scale" in str(path) else 0.0
        return jnp.asarray(scale + 0.5 * rng.normal(size=like.shape), like.dtype)

    def fresh(path, like):
        return jnp.full(like.shape, float("var" in str(path)), like.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    return model, x, params, jax.tree_util.tree_map_with_path(fresh, state)


def rows(cards):
    """Rows of a table, by hand: up to the next multiple of 128."""
    n = sum(cards)
    return n if n % 128 == 0 else n + 128 - n % 128


def tower_size(d, hidden, *, norm=0):
    return sum(a * b + b + norm * b for a, b in zip((d, *hidden[:-1]), hidden, strict=True))


def size(name, k, cards, m):
    """Counts parameters by hand."""
    e, hidden, r, c = 4, (8, 6), rows(cards), len(cards)
    d, last = c * e + m, hidden[-1]
    if name == "tabular_mlp":
        return r * e + tower_size(d, hidden, norm=2) + (last + 1) * k
    if name == "wide_deep":
        wide = rows((*cards, 15, 64)) + m  # 5 * 3 pairs are few enough, 200 * 5 are not
        return r * e + tower_size(d, hidden) + (last + 1) * k + wide * k
    if name == "deepfm":
        scores = 1 if k == 2 else k
        interactions = 0 if k == 2 else e * k
        deep = tower_size((c + m) * e, hidden) + (last + 1) * scores
        return (r + m) * e + (r + m) * scores + interactions + deep
    if name == "dcnv2":
        return r * e + 2 * (d * d + d) + tower_size(d, hidden) + (d + last + 1) * k
    if name == "dcnv2_stacked":
        return r * e + 2 * (2 * d * 3 + d) + tower_size(d, hidden) + (last + 1) * k
    w = 8
    block = 4 * w + (w + 1) * 3 * w + (w + 1) * w + (w + 1) * 2 * w + (2 * w + 1) * w
    return (r + m) * w + (c + m) * w + w + 2 * block + 2 * w + (w + 1) * k


@pytest.mark.parametrize("k", [2, 7])
@pytest.mark.parametrize("name", NETS)
def test_size_is_that_of_its_arithmetic(name, k):
    kwargs = {"depth": 2} if name == "tabular_transformer" else {}
    _, _, params, _ = shapes(name, k=k, **kwargs)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size(name, k, CARDS, M)


@pytest.mark.parametrize("name", NETS)
def test_endpoints_modes_and_gradients(name):
    model, x, params, state = built(name)

    def loss(params):
        outputs, new = model.apply(params, state, x, train=True, rngs={})
        return -jax.nn.log_softmax(outputs["logits"])[:, 0].mean(), new

    @jax.jit
    def run(params):
        evaluated = model.apply(params, state, x, train=False, rngs={})
        return evaluated, jax.grad(loss, has_aux=True)(params)

    (outputs, same), (grads, new) = run(params)
    assert outputs["logits"].shape == (B, 3)
    assert outputs["embedding"].shape[0] == B
    assert outputs["embedding"].ndim == 2
    assert {"stage1", "stage2"} <= set(outputs)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, state))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), new, state))
    used = np.zeros(rows(CARDS), bool)
    used[np.asarray(x["categorical"]) + np.array([0, 5, 8])] = True
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.any(leaf), jax.tree_util.keystr(path)
    # Of a table, exactly the rows of the batch learn.
    np.testing.assert_array_equal(np.any(grads["fields"]["embedding"] != 0, axis=1), used)


@pytest.mark.parametrize("name", ["deepfm", "dcnv2_stacked"])
def test_jitted_equals_eager(name):
    model, x, params, state = built(name)
    eager = model.apply(params, state, x, train=True, rngs={})
    jitted = jax.jit(lambda x: model.apply(params, state, x, train=True, rngs={}))(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), eager, jitted)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("cards", "m"), [((), 3), ((4, 130), 0), ((7,), 1)])
def test_columns_of_one_kind_or_few_in_bfloat16(name, cards, m):
    kwargs = {"crosses": ()} if name == "wide_deep" else {}
    model, x, params, state = shapes(name, cards, m, k=2, **kwargs)
    low = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype
        ),
        (params, x),
    )
    outputs, _ = jax.eval_shape(lambda p, x, s: model.apply(p, s, x), *low, state)
    assert outputs["logits"].shape == (B, 2)
    assert {o.dtype for o in outputs.values()} == {jnp.dtype(jnp.bfloat16)}
    assert ("embedding" in params.get("fields", {})) == bool(cards)
    assert all(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["tabular_mlp", "tabular_transformer"])
def test_dropout_follows_its_key_and_asks_for_it_only_in_training(name):
    model, x, params, state = built(name, dropout=0.5)

    @jax.jit
    def logits(seeds):
        def one(train, **rngs):
            return model.apply(params, state, x, train=train, rngs=rngs)[0]["logits"]

        first, second = (jax.random.key(seed) for seed in seeds)
        trained = [one(True, dropout=key) for key in (first, second, first)]
        return trained, [one(False, dropout=first), one(False)]

    (first, second, again), (keyed, unkeyed) = logits(jnp.arange(2))
    np.testing.assert_array_equal(first, again)
    assert bool((first != second).any())
    assert bool((first != keyed).any())
    np.testing.assert_array_equal(keyed, unkeyed)
    with pytest.raises(ConfigError, match=r"no key[\s\S]*dropout"):
        jax.eval_shape(lambda: model.apply(params, state, x, train=True, rngs={})[0])


@pytest.mark.parametrize("name", NETS)
def test_an_id_outside_its_column_counts_as_the_nearest_inside(name):
    model, x, params, state = built(name)
    ids = np.asarray(x["categorical"]).copy()
    outside, inside = ids.copy(), ids.copy()
    outside[:3, 0], inside[:3, 0] = (5, 99, 2**31 - 1), 4
    outside[3:5, 1], inside[3:5, 1] = (-1, -(2**31)), 0
    run = jax.jit(lambda ids: model.apply(params, state, {**x, "categorical": ids})[0]["logits"])
    np.testing.assert_array_equal(run(outside), run(inside))
    assert bool((run(inside) != run(ids)).any())


def vectors(params, x, cards):
    """Field vectors times values of each example, by loops, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["fields"])
    starts = [sum(cards[:j]) for j in range(len(cards))]
    ids, numeric = np.asarray(x["categorical"]), np.asarray(x["numeric"], np.float64)
    return [
        [p["embedding"][s + i] for s, i in zip(starts, row, strict=True)]
        + [v * w for v, w in zip(values, p.get("numeric", []), strict=False)]
        for row, values in zip(ids, numeric, strict=True)
    ]


def perceptron(params, x, layers=2):
    for layer in range(layers):
        dense = params[f"Dense_{layer}"]
        x = np.maximum(x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"]), 0)
    return x


def affine(dense, x):
    return x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)


def first_order(params, ids, numeric, cards):
    starts = np.array([sum(cards[:j]) for j in range(len(cards))])
    weights = np.asarray(params["embedding"], np.float64)
    return weights[ids + starts[None]].sum(1) + numeric @ np.asarray(params["numeric"]["kernel"])


@pytest.mark.parametrize("k", [2, 3])
def test_deepfm_equals_its_equations(k):
    model, x, params, state = built("deepfm", k=k)
    outputs, _ = jax.jit(model.apply)(params, state, x)
    v = vectors(params, x, CARDS)
    pairs = np.array([sum(a * b for a, b in itertools.combinations(f, 2)) for f in v])
    np.testing.assert_allclose(outputs["interactions"], pairs, rtol=1e-5, atol=1e-5)
    z = first_order(params["wide"], np.asarray(x["categorical"]), np.asarray(x["numeric"]), CARDS)
    deep = perceptron(params["deep"], np.array(v).reshape(B, -1))
    z = z + affine(params["Dense_0"], deep)
    if k == 2:
        # A pair of fields meets in an inner product (eq. 2).
        inner = [sum(a @ b for a, b in itertools.combinations(f, 2)) for f in v]
        z = np.stack([np.zeros(B), z[:, 0] + inner], axis=1)
    else:
        z = z + pairs @ np.asarray(params["interactions"]["kernel"])
    np.testing.assert_allclose(outputs["logits"], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["embedding"], deep, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dcnv2", "dcnv2_stacked"])
def test_dcnv2_equals_its_equations(name):
    model, x, params, state = built(name)
    outputs, _ = jax.jit(model.apply)(params, state, x)
    ids = vectors(params, x, CARDS)
    first = np.hstack([np.array(ids).reshape(B, -1), np.asarray(x["numeric"], np.float64)])
    crossed = first
    for layer in (1, 2):
        p = params[f"cross{layer}"]
        w = np.asarray(p["Dense_0"]["kernel"], np.float64)
        if name == "dcnv2_stacked":
            w = np.asarray(p["Linear_0"]["kernel"], np.float64) @ w
            assert np.linalg.matrix_rank(w) == 3
        new = np.empty_like(first)
        for i, j in itertools.product(range(B), range(first.shape[1])):
            inner = sum(w[n, j] * crossed[i, n] for n in range(first.shape[1]))
            new[i, j] = first[i, j] * (inner + float(p["Dense_0"]["bias"][j])) + crossed[i, j]
        crossed = new
        np.testing.assert_allclose(outputs[f"cross{layer}"], crossed, rtol=1e-4, atol=1e-5)
    if name == "dcnv2":
        last = np.hstack([crossed, perceptron(params["deep"], first)])
    else:
        last = perceptron(params["deep"], crossed)
    np.testing.assert_allclose(outputs["embedding"], last, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        outputs["logits"], affine(params["Dense_0"], last), rtol=1e-4, atol=1e-4
    )


def test_wide_deep_equals_its_equations():
    model, x, params, state = built("wide_deep")
    outputs, _ = jax.jit(model.apply)(params, state, x)
    ids, numeric = np.asarray(x["categorical"]), np.asarray(x["numeric"], np.float64)
    exact = ids[:, 0] * 3 + ids[:, 1]
    # Knuth's multiplicative hash in unbounded integers: the top 6 of 32 bits.
    hashed = [(int(a) * 5 + int(b)) * 2654435769 % 2**32 >> 26 for a, b in ids[:, [2, 0]]]
    columns = np.column_stack([ids, exact, hashed])
    wide = first_order(params["wide"], columns, numeric, (*CARDS, 15, 64))
    np.testing.assert_allclose(outputs["wide"], wide, rtol=1e-4, atol=1e-5)
    flat = np.hstack([np.array(vectors(params, x, CARDS)).reshape(B, -1), numeric])
    deep = affine(params["Dense_0"], perceptron(params["deep"], flat))
    np.testing.assert_allclose(outputs["logits"], wide + deep, rtol=1e-4, atol=1e-5)


def test_crosses_fill_their_buckets_evenly_or_exactly():
    first, second = (jnp.ravel(a) for a in jnp.meshgrid(jnp.arange(300), jnp.arange(70)))
    exact = wide_deep.cross(first, second, (300, 70), 2**15)
    np.testing.assert_array_equal(np.sort(exact), np.arange(21000))
    for buckets in (1, 2, 1024):
        hashed = np.asarray(wide_deep.cross(first, second, (300, 70), buckets))
        count = np.bincount(hashed, minlength=buckets)
        assert len(count) == buckets
        assert abs(count - 21000 / buckets).max() <= 0.25 * 21000 / buckets
    large = wide_deep.cross(jnp.array([2**30]), jnp.array([2**30 - 1]), (2**31 - 1, 2**30), 2**20)
    assert int(large[0]) == (2**60 + 2**30 - 1) * 2654435769 % 2**32 >> 12


def test_tabular_mlp_is_a_perceptron_of_embeddings():
    model, x, params, state = built("tabular_mlp", batch_norm=False)
    outputs, _ = jax.jit(model.apply)(params, state, x)
    flat = np.hstack([np.array(vectors(params, x, CARDS)).reshape(B, -1), np.asarray(x["numeric"])])
    deep = perceptron(params["deep"], flat)
    np.testing.assert_allclose(outputs["embedding"], deep, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["logits"], affine(params["Dense_0"], deep), rtol=1e-4, atol=1e-5
    )


def test_tabular_transformer_tokens_and_head():
    """Blocks that add nothing leave the tokens of the tokenizer (section 3.3) to be seen."""
    model, x, params, state = built("tabular_transformer", depth=2)
    params = {
        name: jax.tree.map(jnp.zeros_like, leaf) if name.startswith("Block") else leaf
        for name, leaf in params.items()
    }
    outputs, _ = jax.jit(model.apply)(params, state, x)
    tokens = np.array(vectors(params, x, CARDS)) + np.asarray(params["bias"])[None]
    np.testing.assert_allclose(outputs["block2"][:, 1:], tokens, rtol=1e-5, atol=1e-5)
    cls = np.asarray(params["cls"], np.float64)[0]
    np.testing.assert_allclose(outputs["block1"][:, 0], np.tile(cls, (B, 1)), rtol=1e-6)
    norm = params["LayerNorm_0"]
    cls = (cls - cls.mean()) / np.sqrt(cls.var() + 1e-6)
    last = np.maximum(cls * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    np.testing.assert_allclose(
        outputs["logits"], np.tile(affine(params["Dense_0"], last), (B, 1)), rtol=1e-4, atol=1e-5
    )


def test_tabular_transformer_reads_every_column_and_no_order_of_examples():
    model, x, params, state = built("tabular_transformer")
    run = jax.jit(lambda x: model.apply(params, state, x)[0]["logits"])
    base = run(x)
    np.testing.assert_allclose(run(jax.tree.map(lambda a: a[::-1], x))[::-1], base, rtol=1e-4)
    for name, column in (("categorical", 0), ("categorical", 2), ("numeric", 0), ("numeric", 1)):
        other = np.asarray(x[name]).copy()
        other[:, column] = (other[:, column] + 1) % 3
        assert bool((run({**x, name: jnp.asarray(other)}) != base).any(axis=1).all())


@pytest.mark.parametrize(
    ("name", "scale"),
    [("tabular_mlp", 16**-0.5), ("deepfm", 0.01), ("tabular_transformer", (3 * 8) ** -0.5)],
)
def test_tables_start_at_the_scale_of_their_paper(name, scale):
    kwargs = {} if name == "tabular_transformer" else {"embedding_dim": 16}
    make, defaults = NETS[name]
    model = make(num_classes=2, cardinalities=(1000,), **(defaults | kwargs))
    x = table((1000,), 1)
    # Returning the table alone spares the compiler all other parameters.
    embedding = jax.jit(lambda key: model.init(key, x)[0]["fields"]["embedding"])(jax.random.key(0))
    np.testing.assert_allclose(embedding.std(), scale, rtol=0.05)
    np.testing.assert_allclose(embedding.mean(), 0, atol=0.05 * scale)
    if name == "tabular_transformer":
        assert 0.95 * 8**-0.5 < float(jnp.abs(embedding).max()) <= 8**-0.5


def split_table(name):
    """Returns a network whose parameters and batch are spread over eight devices, and whole."""
    cards = (1000, 60, 7000)
    model, _, params, state = built(name, cards, M)
    x, mesh = table(cards, M, 16), partition.make_mesh(data=2, fsdp=4)
    shardings = partition.infer(params, mesh, rules={})
    assert params["fields"]["embedding"].shape[0] == 8064 == rows(cards)
    spec = shardings["fields"]["embedding"].spec
    assert spec == jax.sharding.PartitionSpec("fsdp", None)
    spread = jax.device_put(x, partition.over_batch(mesh))
    return model, state, (params, x), (jax.device_put(params, shardings), spread)


@pytest.mark.parametrize("name", ["tabular_mlp", "tabular_transformer", "wide_deep", "dcnv2"])
def test_split_tables_give_the_logits_of_whole_ones(name):
    model, state, whole, split = split_table(name)
    run = jax.jit(lambda params, x: model.apply(params, state, x)[0]["logits"])
    want, got = np.asarray(run(*whole)), np.asarray(run(*split))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * abs(want).max())


def test_split_tables_give_the_logits_and_gradients_of_whole_ones():
    model, state, whole, split = split_table("deepfm")

    @jax.jit
    def run(params, x):
        def loss(params):
            logits = model.apply(params, state, x)[0]["logits"]
            return jax.nn.log_softmax(logits)[:, 0].mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    for want, got in zip(*map(jax.tree.leaves, (run(*whole), run(*split))), strict=True):
        want = np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * abs(want).max())


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (tabular_mlp.make, {"cardinalities": (3, 0)}, "cardinalities: "),
        (tabular_mlp.make, {"cardinalities": (2**30, 2**30)}, "cardinalities: .*\n.*hash"),
        (tabular_mlp.make, {"embedding_dim": 0}, "embedding_dim: "),
        (tabular_mlp.make, {"hidden": (8, 2.5)}, "hidden: "),
        (tabular_mlp.make, {"dropout": 1.0}, "dropout: "),
        (wide_deep.make, {"crosses": ((0, 3),)}, "below 3"),
        (wide_deep.make, {"crosses": ((1, 1),)}, "two different"),
        (wide_deep.make, {"crosses": ((0, 1, 2),)}, "two different"),
        (wide_deep.make, {"cross_buckets": 1000}, "e.g. 512"),
        (dcnv2.make, {"structure": "paralel"}, "'parallel'"),
        (dcnv2.make, {"cross_layers": 0}, "cross_layers: "),
        (dcnv2.make, {"low_rank": -1}, "low_rank: "),
        (dcnv2.make, {"hidden": ()}, "stacked"),
        (deepfm.make, {"hidden": (0,)}, "hidden: "),
        (tabular_transformer.make, {"heads": 5, "width": 16}, "divisors: 1, 2, 4"),
        (tabular_transformer.make, {"depth": 0}, "depth: "),
        (tabular_transformer.make, {"drop_path": -0.1}, "drop_path: "),
    ],
)
def test_wrong_arguments_are_refused(make, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make(**{"num_classes": 2, "cardinalities": CARDS} | kwargs)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((2, 4)), "not a table"),
        ({"numeric": jnp.zeros((2, 4))}, "not a table"),
        (table((5, 3), 2), "3 cardinalities for 2"),
        (table() | {"categorical": jnp.zeros((2, 3))}, "float32"),
        (table() | {"numeric": jnp.zeros(2)}, r"numeric float32 \(1,\)"),
        (table() | {"numeric": jnp.zeros((2, 1), int)}, "int32"),
    ],
)
def test_inputs_that_are_no_such_table_are_refused(x, message):
    model = tabular_mlp.make(num_classes=2, cardinalities=CARDS)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), x)


def test_a_table_without_columns_is_refused():
    with pytest.raises(ConfigError, match="no columns"):
        _tables.read(table((), 0), ())
