"""Masked and joint-embedding methods against transcriptions of their equations."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import state, tokens
from distill_jax.core.errors import ConfigError
from distill_jax.losses import isotropy, jepa
from distill_jax.models import tabular_transformer, token_predictor, vit
from tests import harness

B, T, D = 2, 9, 4
X = np.random.RandomState(0).randn(B, 6, 6, 1)
KEEP = np.array([[0, 5, 8], [2, 3, 1]])
TARGETS = np.array([[[1, 2], [2, 7]], [[8, 0], [4, 5]]])
W, P = np.random.RandomState(1).randn(4, D), np.random.RandomState(2).randn(T, D)
R, A = np.random.RandomState(3).randn(D), np.random.RandomState(4).randn(4)


def objective(name, **kwargs):
    return importlib.import_module(f"distill_jax.objectives.{name}").make(**kwargs)


def patch(x, t):
    i, j = divmod(t, 3)
    return x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 0].reshape(4)


def nets(params):
    """Encoders that map each patch by itself, behind a register; a head that adds to their mean."""

    def encode(w):
        def apply(x, keep=None):
            every = jnp.tanh(jnp.einsum("btd,dk->btk", tokens.patchify(x, patch_size=2), w))
            every = every if keep is None else tokens.take(every, keep)
            front = jnp.broadcast_to(jnp.asarray(R)[None, None], (len(x), 1, D))
            every = jnp.concatenate([front, every], 1)
            return {"tokens": every, "embedding": every.mean(1)}

        return apply

    def predict(context, keep, targets, like):
        del keep, like
        return {"output": context.mean(1)[:, None, None] + params["places"][targets]}

    roles = {"student": encode(params["w"]), "target": encode(jnp.asarray(A[:, None] * W))}
    roles |= {"predictor": predict, "decoder": predict}
    return lambda role, *inputs, train=False, stop_gradient_params=False: (roles[role](*inputs), {})


def batch_of(**more):
    hidden = np.array([[t not in row for t in range(T)] for row in KEEP])
    found = {"input": X, "keep": KEEP, "targets": TARGETS, "hidden": hidden, "mask": np.ones(B)}
    return jax.tree.map(jnp.asarray, found | more)


def latent(distance, *, norm, own, through):
    """The transcription: loops over examples, sets and tokens."""

    def value(params):
        w, places = params["w"], params["places"]
        other = w if own and through else W if own else A[:, None] * W
        found = np.zeros(B)
        for b in range(B):
            context = np.mean([R, *(np.tanh(patch(X[b], t) @ w) for t in KEEP[b])], 0)
            errors = []
            for t in TARGETS[b].ravel():
                true = np.tanh(patch(X[b], t) @ other)
                if norm:
                    true = (true - true.mean()) / np.sqrt(true.var() + 1e-5)
                errors += [context + places[t] - true]
            e = np.abs(np.array(errors))
            if distance == "squared":
                found[b] = (e**2).mean()
            elif distance == "absolute":
                found[b] = e.mean()
            else:
                found[b] = np.where(e < 1, e**2 / 2, e - 0.5).mean()
        return found

    return value


def pixels(norm, epsilon):
    def value(params):
        found = np.zeros(B)
        for b in range(B):
            context = np.mean([R, *(np.tanh(patch(X[b], t) @ params["w"]) for t in KEEP[b])], 0)
            for t in TARGETS[b].ravel():
                true = patch(X[b], t)
                if norm:
                    true = (true - true.mean()) / np.sqrt(true.var(ddof=1) + epsilon)
                found[b] += ((context + params["places"][t] - true) ** 2).mean() / 4
        return found

    return value


def differences(value, params, step=1e-6):
    """Central differences of the sum of values."""
    found = {}
    for name, x in params.items():
        found[name] = np.zeros_like(x)
        for i in np.ndindex(*x.shape):
            up, down = ({**params, name: x.copy()} for _ in range(2))
            up[name][i] += step
            down[name][i] -= step
            found[name][i] = (value(up).sum() - value(down).sum()) / (2 * step)
    return found


SMOOTH = {"norm": True, "own": False, "through": False}
CASES = [
    ("ijepa", {}, latent("smooth_l1", **SMOOTH)),
    ("ijepa", {"target_norm": False}, latent("smooth_l1", **{**SMOOTH, "norm": False})),
    ("ijepa", {"moving_average": False}, latent("smooth_l1", **{**SMOOTH, "own": True})),
    (
        "ijepa",
        {"moving_average": False, "stop_gradient": False},
        latent("smooth_l1", norm=True, own=True, through=True),
    ),
    ("vjepa", {}, latent("absolute", **SMOOTH)),
    ("tjepa", {}, latent("squared", **{**SMOOTH, "norm": False})),
    ("mae", {"epsilon": 0.01}, pixels(True, 0.01)),
    ("mae", {"norm_pix": False}, pixels(False, 0.0)),
]


@pytest.mark.parametrize(("name", "kwargs", "transcription"), CASES)
def test_values_and_gradients_are_those_of_the_equations(name, kwargs, transcription):
    method = objective(name, **kwargs)
    params = {"w": W.copy(), "places": P.copy()}
    with jax.enable_x64(True):
        batch = batch_of()

        def loss(params):
            terms = method.loss(nets(params), batch, {}, jnp.int32(0))
            (value,) = terms.values.values()
            return value.sum(), value

        given = jax.tree.map(jnp.asarray, params)
        (_, value), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
        np.testing.assert_allclose(value, transcription(params), rtol=1e-12)
        wanted = differences(transcription, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), grads, wanted)


def test_several_ways_to_hide_count_alike():
    method, batch = objective("vjepa"), batch_of()
    other = batch_of(keep=KEEP[:, :2] * 0 + 6, targets=TARGETS[:, :1])
    both = batch | {f"{key}_1": other[key] for key in ("keep", "targets", "hidden")}
    apply = nets({"w": jnp.asarray(W), "places": jnp.asarray(P)})

    @jax.jit
    def of(batch):
        return method.loss(apply, batch, {}, jnp.int32(0)).values["prediction"]

    np.testing.assert_allclose(of(both), (of(batch) + of(other)) / 2, rtol=1e-5)


def test_clips_are_cut_in_space_and_time():
    clip = np.random.RandomState(0).randn(1, 4, 4, 6, 2)
    found = tokens.patchify(jnp.asarray(clip, jnp.float32), patch_size=2, tubelet=2)
    assert found.shape == (1, 2 * 2 * 3, 2 * 2 * 2 * 2)
    for t in range(12):
        f, i, j = np.unravel_index(t, (2, 2, 3))
        part = clip[0, 2 * f : 2 * f + 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(found[0, t], part.ravel(), rtol=1e-6)


def test_constant_rows_are_zeros_not_nan():
    flat = jnp.ones((2, 4))
    np.testing.assert_array_equal(jax.jit(jepa.standardize)(flat), 0)
    slope = jax.jit(jax.grad(lambda x: jepa.standardize(x).sum()))(flat)
    assert np.isfinite(slope).all()


def test_a_vision_transformer_sees_what_is_kept_where_it_is():
    model = vit.make(num_classes=0, width=8, depth=1, heads=2, patch_size=2, mask_token=True)
    x = X.astype(np.float32)
    params, _ = jax.device_get(jax.jit(model.init)(jax.random.key(0), x))
    params["cls"] = params["cls"] + 1

    @jax.jit
    def out(x, keep, mask):
        return model.apply(params, {}, x, keep, mask, train=False, rngs={})[0]["tokens"]

    front = 1
    full, order = out(x, None, None), np.array([np.random.RandomState(1).permutation(T)] * B)
    full = np.asarray(full)
    np.testing.assert_allclose(out(x, order, None)[:, front:], full[:, front + order[0]], atol=1e-5)
    some = out(x, KEEP, None)
    assert some.shape == (B, front + 3, 8)
    other = x.copy()
    other[:, 2:4, 2:4] += 1.0  # patch 4, which neither example keeps
    np.testing.assert_array_equal(out(other, KEEP, None), some)
    hide = np.arange(T)[None].repeat(B, 0) == 4
    np.testing.assert_array_equal(out(other, None, hide), out(x, None, hide))
    assert np.any(out(x, None, hide) != full)


@pytest.mark.parametrize("depth", [2, 5])
def test_the_last_four_blocks_side_by_side_are_of_patches_alone(depth):
    kwargs = {"width": 8, "depth": depth, "heads": 2, "patch_size": 2, "registers": 2}
    model = vit.make(num_classes=0, **kwargs)

    def out(key, x):
        return model.apply(model.init(key, x)[0], {}, x, train=False, rngs={})[0]

    found = jax.jit(out)(jax.random.key(0), X.astype(np.float32))
    last = [np.asarray(found[f"block{i}"])[:, -T:].mean(1) for i in range(1, depth + 1)][-4:]
    np.testing.assert_allclose(found["last_blocks"], np.concatenate(last, 1), rtol=1e-5)


def test_tables_keep_registers_and_reach_the_last_column():
    """Released code counts its register as column 0, and never sees the last column."""
    kwargs = {"width": 8, "depth": 1, "heads": 2, "registers": 2, "pool": "flat"}
    model = tabular_transformer.make(num_classes=0, cardinalities=(3, 4), **kwargs)
    r = np.random.RandomState(0)
    row = {"categorical": jnp.array([[1, 2]]), "numeric": jnp.asarray(r.randn(1, 3), jnp.float32)}
    params, _ = jax.jit(model.init)(jax.random.key(0), row)

    @jax.jit
    def out(row, keep):
        return model.apply(params, {}, row, keep, train=False, rngs={})[0]

    assert out(row, None)["embedding"].shape == (1, (2 + 5) * 8)

    def change(j):
        part, at = ("categorical", j) if j < 2 else ("numeric", j - 2)
        other = np.array(row[part])
        other[0, at] += 1
        return {**row, part: jnp.asarray(other)}

    for j in range(5):
        keep = jnp.array([[j]])
        seen = out(row, keep)["tokens"]
        assert seen.shape == (1, 2 + 1, 8)
        touched = [k for k in range(5) if np.any(out(change(k), keep)["tokens"] != seen)]
        assert touched == [j]


def test_a_prediction_is_of_its_own_place_and_set():
    model = token_predictor.make(width=8, depth=1, heads=2)
    r = np.random.RandomState(0)
    context = jnp.asarray(r.randn(1, 3, 6), jnp.float32)
    keep, targets = jnp.array([[0, 3]]), jnp.array([[[1, 2], [2, 4]]])
    like = jnp.zeros((1, 5, 7))
    params, _ = jax.jit(model.init)(jax.random.key(0), context, keep, targets, like)

    @jax.jit
    def out(keep, targets):
        return model.apply(params, {}, context, keep, targets, like, train=False, rngs={})[0][
            "output"
        ]

    found = out(keep, targets)
    assert found.shape == (1, 2, 2, 7)
    # Another second set leaves the first as it is; the order inside a set is that of the places.
    other = out(keep, jnp.array([[[2, 1], [3, 0]]]))
    np.testing.assert_allclose(other[:, 0, ::-1], found[:, 0], atol=1e-5)
    assert np.any(np.abs(out(keep[:, ::-1], targets) - found) > 1e-4)


def statistic(z, mask, a, largest=3.0, knots=17):
    """Both halves of the integral, complex, one direction at a time."""
    t = np.linspace(-largest, largest, 2 * knots - 1)
    z, phi = z[mask > 0], np.exp(-(t**2) / 2)
    found = []
    for direction in a.T:
        empirical = np.exp(1j * t[:, None] * (z @ direction)[None]).mean(1)
        found += [len(z) * np.trapezoid(np.abs(empirical - phi) ** 2 * phi, t)]
    return np.mean(found)


def test_lejepa_is_that_of_the_equations():
    r = np.random.RandomState(3)
    views, small = r.randn(6, 2, 3), r.randn(6, 1, 3)
    mask = np.array([1.0, 1, 1, 1, 1, 0])
    method = objective("lejepa", trade_off=0.3, directions=8, spread=0.5)

    def net(role, x, train=False, stop_gradient_params=False):
        return {"embedding": x, "output": x}, {}

    with jax.enable_x64(True):
        batch = {"views": views, "local_views": small, "mask": mask}
        batch = jax.tree.map(jnp.asarray, batch)

        def loss(views):
            terms = method.loss(net, {**batch, "views": views}, {}, jnp.int32(5))
            return sum(terms.coef[k] * v[0] for k, v in terms.values.items() if k == "isotropy")

        of = jax.jit(lambda batch, step: method.loss(net, batch, {}, step))
        terms = of(batch, jnp.int32(5))
        a = np.asarray(
            isotropy.random_directions(
                jax.random.fold_in(jax.random.key(0), 5), width=3, count=8, dtype=jnp.float64
            )
        )
        z = np.concatenate([views, small], 1)
        apart = ((z - views.mean(1, keepdims=True)) ** 2).mean((1, 2))
        np.testing.assert_allclose(terms.values["invariance"], apart, rtol=1e-12)

        def isotropic(params):
            z = np.concatenate([params["views"], small], 1)
            return 0.3 * np.mean([statistic(z[:, v], mask, a) for v in range(3)])

        wanted = np.full(6, isotropic({"views": views}) / 0.3)
        np.testing.assert_allclose(terms.values["isotropy"], wanted, rtol=1e-6)
        wanted = differences(isotropic, {"views": views})["views"]
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(batch["views"]), wanted, atol=1e-6)
        assert terms.coef == {"invariance": 0.7, "isotropy": 0.3, "spread": 0.5}
        later = of(batch, jnp.int32(6))
        assert later.values["isotropy"][0] != terms.values["isotropy"][0]


def test_sigreg_of_normal_rows_is_its_expectation_and_far_larger_for_constants():
    a = isotropy.random_directions(jax.random.key(1), width=4, count=64)
    np.testing.assert_allclose((a**2).sum(0), 1, rtol=1e-5)
    draws = jax.random.normal(jax.random.key(2), (200, 32, 4))
    ones = jnp.ones(32)
    of = jax.jit(jax.vmap(lambda z, mask: isotropy.sigreg(z, mask, a), in_axes=(0, None)))
    found = np.asarray(of(draws, ones))
    expected = isotropy.expected_sigreg()
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(200)
    constant = of(draws * 0, ones)
    assert constant.min() > 10 * expected
    # What a trade-off weighs must not depend on the number of examples; 24 of 32 are padding.
    some = ones.at[8:].set(0.0)
    few = np.asarray(of(draws, some))
    assert abs(few.mean() - expected) < 4 * few.std() / np.sqrt(200)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("ijepa", {"distance": "smooth"}, "smooth_l1"),
        ("ijepa", {"stop_gradient": False}, "set moving_average to false"),
        ("mae", {"epsilon": 0.0}, "above 0"),
        ("lejepa", {"trade_off": 1.5}, "between 0 and 1"),
        ("lejepa", {"knots": 1}, "2 or more"),
        ("lejepa", {"spread": -1.0}, "0 or more"),
    ],
)
def test_wrong_hyperparameters_are_refused(name, kwargs, match):
    with pytest.raises(ConfigError) as error:
        objective(name, **kwargs)
    assert match in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("mae", lambda b: b.pop("keep"), "random_masks"),
        ("tjepa", lambda b: b.pop("targets"), "column_masks"),
        ("ijepa", lambda b: b.update(hidden=b["hidden"][:, :4]), "masks of 4 tokens"),
        ("mae", lambda b: b.update(hidden=b["hidden"][:, :5]), "no 5 square patches"),
        ("mae", lambda b: b.update(hidden=b["hidden"][:, :4]), "masks of 4 tokens"),
    ],
)
def test_masks_that_do_not_fit_are_refused(name, change, match):
    batch = dict(harness.make_batch(4))
    change(batch)
    encoder = vit.make(num_classes=0, width=8, depth=1, heads=2, patch_size=2, pool="mean")
    models = {
        "student": encoder,
        "target": encoder,
        "predictor": harness.tiny_token_predictor(),
        "decoder": harness.tiny_token_predictor(),
    }
    method = objective(name)
    with pytest.raises(ConfigError) as error:
        state.infer_shapes(method, {r: models[r] for r in method.roles}, batch)
    assert match in str(error.value)
