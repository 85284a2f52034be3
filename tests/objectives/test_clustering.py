"""Assignments to prototypes, DINO and iBOT against loops written from the equations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import masks
from distill_jax.losses import clustering
from distill_jax.models import prototypes
from distill_jax.objectives import dino
from tests import harness
from tests.reference import difference, draw, softmax

B, U, W, K = 5, 2, 4, 3
MASK = np.array([1, 1, 0, 1, 1.0])
VALID = np.flatnonzero(MASK)


def loop_dino(targets, s, temperature):
    """Eq. 3: every whole view against every other view."""
    values = np.zeros(len(s))
    for b in range(len(s)):
        pairs = [(u, w) for u in range(U) for w in range(W) if u != w]
        for u, w in pairs:
            q = softmax(s[b, w], temperature)
            values[b] -= sum(targets[b, u, k] * math.log(q[k]) for k in range(K)) / len(pairs)
    return values


def test_entropy_between_views():
    t, s = np.abs(draw(B, U, K)), draw(B, W, K, seed=1)
    with jax.enable_x64(True):
        ours = lambda s: clustering.between_views(  # noqa: E731
            clustering.view_entropies(jnp.asarray(t), s, temperature=0.3)
        )
        np.testing.assert_allclose(ours(jnp.asarray(s)), loop_dino(t, s, 0.3), rtol=1e-9)
        grad = jax.jit(jax.grad(lambda s: ours(s).sum()))(jnp.asarray(s))
        want = difference(lambda s: loop_dino(t, s, 0.3).sum(), s)
        np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-8)


def test_entropy_of_masked_patches():
    """Per image the mean over its masked patches; an image without any gives 0."""
    t, s = np.abs(draw(B, W, K)), draw(B, W, K, seed=1)
    weights = (np.arange(W)[None] < np.array([0, 1, 2, 3, 4])[:, None]).astype(float)
    want = np.zeros(B)
    for b in range(B):
        for p in range(b):
            q = softmax(s[b, p], 0.3)
            want[b] -= sum(t[b, p, k] * math.log(q[k]) for k in range(K)) / b
    got = clustering.masked_entropy(
        jnp.asarray(t), jnp.asarray(s), jnp.asarray(weights), temperature=0.3
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_centred_softmax_and_the_centre():
    t, c = draw(B, U, K), draw(K, seed=1)
    got = clustering.centred_softmax(jnp.asarray(t), jnp.asarray(c), temperature=0.2)
    want = softmax(t - c, 0.2)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    weights = jnp.repeat(jnp.asarray(MASK)[:, None], U, 1)
    moved = clustering.move_centre(jnp.asarray(c), jnp.asarray(t), weights, decay=0.9)
    np.testing.assert_allclose(moved, 0.9 * c + 0.1 * t[VALID].reshape(-1, K).mean(0), rtol=1e-5)
    same = clustering.move_centre(jnp.asarray(c), jnp.asarray(t), 0 * weights, decay=0.9)
    np.testing.assert_array_equal(same, jnp.asarray(c))


def loop_sinkhorn(t, temperature, iterations):
    """In the exponential domain: prototypes get 1 / k each, then examples 1 / n each."""
    q = np.exp(t / temperature)
    n, k = q.shape
    q /= q.sum()
    for _ in range(iterations):
        for j in range(k):
            q[:, j] /= q[:, j].sum() * k
        for i in range(n):
            q[i] /= q[i].sum() * n
    return q * n


def test_sinkhorn():
    t = draw(B, K)
    with jax.enable_x64(True):
        balance = jax.jit(clustering.sinkhorn, static_argnames="iterations")
        got = np.asarray(balance(jnp.asarray(t), jnp.asarray(MASK), temperature=0.5))
        np.testing.assert_allclose(got[VALID], loop_sinkhorn(t[VALID], 0.5, 3), rtol=1e-10)
        np.testing.assert_array_equal(got[np.flatnonzero(MASK == 0)], 0)
        many = balance(jnp.asarray(t), jnp.asarray(MASK), temperature=0.5, iterations=16)
        many = np.asarray(many)
    np.testing.assert_allclose(many.sum(0), len(VALID) / K, rtol=1e-5)
    np.testing.assert_allclose(many[VALID].sum(1), 1, rtol=1e-6)


def test_sinkhorn_neither_overflows_nor_divides_by_nothing():
    t = 10 * jnp.asarray(draw(B, K), jnp.float32)  # exp(10 / 0.02) is no float32
    got = clustering.sinkhorn(t, jnp.ones(B), temperature=0.02)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    nothing = clustering.sinkhorn(t, jnp.zeros(B), temperature=0.02)
    np.testing.assert_array_equal(nothing, 0)


def test_prototypes_are_cosines():
    model = prototypes.make(count=K)
    x = jnp.asarray(draw(B, U, 4))
    params, state = model.init(jax.random.key(0), x)
    out, _ = model.apply(params, state, x, train=True, rngs={})
    kernel = np.asarray(params["kernel"])
    for b in range(B):
        for k in range(K):
            a, c = np.asarray(x[b, 1]), kernel[:, k]
            want = a @ c / math.sqrt((a @ a) * (c @ c))
            np.testing.assert_allclose(out["output"][b, 1, k], want, rtol=1e-4)
    scaled = jax.tree.map(lambda w: 3 * w, params)
    again, _ = model.apply(scaled, state, 5 * x, train=True, rngs={})
    np.testing.assert_allclose(out["output"], again["output"], atol=1e-6)
    with pytest.raises(ConfigError):
        prototypes.make(count=1)


def nets_of(outputs):
    """Networks by role that give the next of stored outputs at each call."""
    left = {role: list(values) for role, values in outputs.items()}

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del inputs, train, stop_gradient_params
        return left[role].pop(0), {}

    return nets


def dino_terms(s, t, *, step=0, memory=None, **kwargs):
    """Terms of DINO where heads give the cosines `s` `[b, w, k]` and `t` `[b, u, k]`."""
    objective = harness.make_objective("dino", num_prototypes=K, steps_per_epoch=2.0, **kwargs)
    whole, local = jnp.zeros((B * U, 2)), jnp.zeros((B * (W - U), 2))
    head = {"output": jnp.zeros((B * W, 2))}
    cosines = {"output": jnp.asarray(s).reshape(-1, K)}
    nets = nets_of(
        {
            "student": [{"embedding": whole}, {"embedding": local}],
            "projector": [head],
            "prototypes": [cosines, cosines],
            "target": [{"embedding": whole}],
            "target_projector": [{"output": whole}],
            "target_prototypes": [{"output": jnp.asarray(t).reshape(-1, K)}],
        }
    )
    batch = {
        "views": jnp.zeros((B, U, 4, 4, 1)),
        "local_views": jnp.zeros((B, W - U, 2, 2, 1)),
        "mask": jnp.asarray(MASK),
    }
    memory = objective.memory(jax.random.key(0), batch) if memory is None else memory
    return jax.jit(objective.loss, static_argnums=0)(nets, batch, memory, jnp.int32(step))


def test_dino_uses_the_centre_from_before_the_step():
    s, t, c = draw(B, W, K), draw(B, U, K, seed=1), draw(K, seed=2)
    terms = dino_terms(s, t, memory={"centre": jnp.asarray(c, jnp.float32)})
    targets = softmax(t - c, 0.04)
    np.testing.assert_allclose(terms.values["clusters"], loop_dino(targets, s, 0.1), rtol=2e-4)
    want = 0.9 * c + 0.1 * t[VALID].reshape(-1, K).mean(0)
    np.testing.assert_allclose(terms.memory["centre"], want, rtol=1e-5)
    mean = targets[VALID].reshape(-1, K).mean(0)
    entropy = -sum(p * math.log(p) for p in mean if p > 0)
    np.testing.assert_allclose(terms.metrics["prototype_entropy"], entropy, rtol=1e-3)


def test_dino_with_sinkhorn_balances_all_whole_views():
    s, t = draw(B, W, K), draw(B, U, K, seed=1)
    terms = dino_terms(s, t, centring="sinkhorn", temperature=0.5)
    targets = np.zeros((B, U, K))
    targets[VALID] = loop_sinkhorn(t[VALID].reshape(-1, K), 0.5, 3).reshape(-1, U, K)
    want = loop_dino(targets, s, 0.1)
    np.testing.assert_allclose(np.asarray(terms.values["clusters"])[VALID], want[VALID], rtol=1e-4)
    assert not terms.memory


@pytest.mark.parametrize(("step", "want"), [(0, 0.02), (2, 0.03), (4, 0.04), (9, 0.04)])
def test_temperature_rises(step, want):
    objective = dino.make(
        first_temperature=0.02, temperature_warmup="2 epochs", steps_per_epoch=2.0
    )
    np.testing.assert_allclose(objective.temperature_at(jnp.int32(step)), want, rtol=1e-6)


def test_prototypes_and_encoder_wait_and_then_learn():
    waiting = {"freeze_prototypes": "1 epoch", "heads_only": 2}
    made, batch = harness.setup("dino", kwargs=waiting), harness.make_batch()
    state = jax.jit(made.init)(jax.random.key(0))
    step = jax.jit(made.step)
    states = [state.params]
    for _ in range(3):  # two steps are an epoch
        state, _ = step(state, made.frozen, batch, jax.random.key(0))
        states.append(state.params)
    for role in ("prototypes", "student"):
        first, _, second, third = (jax.tree.leaves(params[role])[-1] for params in states)
        np.testing.assert_array_equal(first, second)
        assert np.any(second != third)
    heads = [jax.tree.leaves(params["projector"])[-1] for params in states]
    assert np.any(heads[0] != heads[1])


def ibot_terms(s, t, chosen, hidden, **kwargs):
    """Terms of iBOT where heads give cosines of patches `s`, `t` `[b, v, t, k]`; images zeros."""
    objective = harness.make_objective("ibot", num_prototypes=K, temperature=0.3, **kwargs)
    b, v, n, _ = s.shape

    def nets(role, x, *rest, train=False, stop_gradient_params=False):
        """An encoder's tokens are the cosines, behind a class token; heads keep what they see."""
        del train, stop_gradient_params
        if role in ("student", "target"):
            cosines = jnp.asarray(s if rest else t).reshape(b * v, n, K)
            cls = jnp.full((b * v, 1, K), 7.0)
            return {"tokens": jnp.concatenate([cls, cosines], 1), "embedding": cls[:, 0]}, {}
        return {"output": x}, {}

    batch = {
        "views": jnp.zeros((b, v, 4, 4, 1)),
        "mask": jnp.asarray(MASK),
        "patch_mask": jnp.asarray(hidden),
        "masked": jnp.asarray(chosen),
    }
    memory = objective.memory(jax.random.key(0), batch)
    return jax.jit(objective.loss, static_argnums=0)(nets, batch, memory, jnp.int32(0))


def test_ibot_compares_masked_patches_of_the_same_view():
    n = 4
    s, t = draw(B, U, n, K), draw(B, U, n, K, seed=1)
    counts = np.random.RandomState(2).randint(0, n, (B, U))
    order = np.argsort(np.random.RandomState(3).rand(B, U, n), -1)
    hidden = np.argsort(order, -1) < counts[:, :, None]  # the first of `order`
    terms = ibot_terms(s, t, order[:, :, : n - 1], hidden)
    want, rows = np.zeros(B), []
    for b in range(B):
        for u in range(U):
            for p in np.flatnonzero(hidden[b, u]):
                target, q = softmax(t[b, u, p], 0.3), softmax(s[b, u, p], 0.1)
                value = -sum(target[k] * math.log(q[k]) for k in range(K))
                want[b] += value / counts[b, u] / U
                rows += [t[b, u, p]] if MASK[b] else []
    np.testing.assert_allclose(terms.values["patches"], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(terms.memory["patch_centre"], 0.1 * np.mean(rows, 0), rtol=1e-4)


def test_ibot_with_all_parts_of_dinov2():
    objective = harness.make_objective(
        "ibot", shared_head=False, spread_weight=0.1, centring="sinkhorn"
    )
    assert {"patch_projector", "target_patch_prototypes"} < set(objective.roles)
    t = draw(B, U, 2, K)
    chosen, hidden = np.zeros((B, U, 1), int), np.ones((B, U, 2), bool)
    terms = ibot_terms(
        t, t, chosen, hidden, shared_head=False, spread_weight=0.1, centring="sinkhorn"
    )
    assert set(terms.values) == {"clusters", "patches", "spread"}
    np.testing.assert_allclose(terms.coef["spread"], 0.1)
    np.testing.assert_allclose(
        np.asarray(terms.values["spread"])[VALID], -U * math.log(1e-8), rtol=1e-5
    )
    with pytest.raises(ConfigError, match="does not divide"):
        ibot_terms(t, t, chosen, hidden, spread_weight=0.1, spread_groups=2)


def views_batch(b=8, size=16):
    batch = harness.make_batch(b)
    return {**batch, "views": jnp.zeros((b, 2, size, size, 1))}


def test_patch_masks_have_exactly_the_drawn_number():
    transform = masks.make_patch_masks(patch_size=2, ratio=(0.25, 0.25), share=1.0)
    transform = jax.jit(transform)
    batch = transform(jax.random.key(0), views_batch(), jnp.int32(0))
    counts = batch["patch_mask"].sum(-1)
    np.testing.assert_array_equal(counts, 16)
    taken = jnp.take_along_axis(batch["patch_mask"], batch["masked"], axis=2)
    assert taken.shape == (8, 2, 16)
    assert taken.all()
    other = transform(jax.random.key(1), views_batch(), jnp.int32(0))
    assert np.any(other["patch_mask"] != batch["patch_mask"])
    assert np.any(batch["patch_mask"][:, 0] != batch["patch_mask"][:, 1])


def test_patch_masks_are_blocks_and_leave_some_views_whole():
    transform = masks.make_patch_masks(patch_size=2, ratio=(0.1, 0.5), share=0.5)
    transform = jax.jit(transform)
    batch = transform(jax.random.key(0), views_batch(64), jnp.int32(0))
    mask = np.asarray(batch["patch_mask"]).reshape(-1, 8, 8)
    counts = mask.sum((1, 2))
    assert 0.3 < (counts == 0).mean() < 0.7
    assert set(counts) <= {0, *range(6, 33)}
    assert len(set(counts)) > 10
    down, across = mask[:, 1:] != mask[:, :-1], mask[:, :, 1:] != mask[:, :, :-1]
    edges = down.sum((1, 2)) + across.sum((1, 2))
    scattered = 2 * 2 * 7 * 8 * (counts / 64) * (1 - counts / 64)  # as many, drawn one by one
    masked = counts > 0
    assert (edges[masked] < 0.8 * scattered[masked]).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "where"),
    [
        ("dino", {"centring": "maen"}, "centring"),
        ("dino", {"temperature": 0.0}, "temperature"),
        ("dino", {"centre_decay": 1.0}, "centre_decay"),
        ("dino", {"num_prototypes": 7}, "num_prototypes"),
        ("ibot", {"spread_groups": 0}, "spread_groups"),
    ],
)
def test_bad_arguments_are_refused(name, kwargs, where):
    with pytest.raises(ConfigError) as error:
        harness.setup(name, kwargs=kwargs)
    assert error.value.where.removeprefix("objective.kwargs.") == where
