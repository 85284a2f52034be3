"""Relational losses against loops over pairs, triplets and channels, and against PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.losses import relations
from tests import harness
from tests.reference import difference, draw, unit

B, D, E = 7, 5, 6
MASK = np.array([1, 1, 0, 1, 1, 1, 0.0])
VALID = np.flatnonzero(MASK)


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def norm(x):
    return math.sqrt(sum(v * v for v in x))


def loop_distance(s, t):
    n = len(s)

    def potential(x):
        d = [[norm(x[i] - x[j]) for j in range(n)] for i in range(n)]
        return np.array(d) / (np.sum(d) / (n * (n - 1)))

    ps, pt = potential(s), potential(t)
    return sum(huber(ps[i, j] - pt[i, j]) for i in range(n) for j in range(n)) / n**2


def loop_angle(s, t):
    n, total = len(s), 0.0
    for j in range(n):
        for i in range(n):
            for k in range(n):
                a, b = (unit(x[i] - x[j]) @ unit(x[k] - x[j]) for x in (s, t))
                total += huber(a - b)
    return total / n**3


def loop_similarity(s, t):
    n, total = len(s), 0.0
    for i in range(n):
        a, b = (unit(np.array([x[i] @ x[j] for j in range(n)])) for x in (s, t))
        total += ((a - b) ** 2).sum()
    return total / n**2


def loop_congruence(s, t):
    """The series is summed to order 3 for gamma 0.3."""
    n, total = len(s), 0.0

    def kernel(x, y):
        c = unit(x) @ unit(y)
        return math.exp(-0.6) * (1 + 0.6 * c + 0.36 * c * c / 2 + 0.216 * c**3 / 6)

    for i in range(n):
        for j in range(n):
            total += (kernel(t[i], t[j]) - kernel(s[i], s[j])) ** 2
    return total / n**2


def loop_probability(s, t):
    n, total = len(s), 0.0

    def conditional(x, i):
        k = np.array([(unit(x[i]) @ unit(x[j]) + 1) / 2 for j in range(n)])
        return k / k.sum()

    for i in range(n):
        p, q = conditional(t, i), conditional(s, i)
        total += sum(a * math.log((a + 1e-7) / (b + 1e-7)) for a, b in zip(p, q, strict=True))
    return total / n**2


SHARES = {
    "distance": (relations.distance_share, loop_distance),
    "angle": (relations.angle_share, loop_angle),
    "similarity": (relations.similarity_share, loop_similarity),
    "congruence": (
        lambda *x: relations.congruence_share(*x, gamma=0.3, order=3),
        loop_congruence,
    ),
    "probability": (relations.probability_share, loop_probability),
}


def masked_mean(share, s, t, mask):
    return (share(s, t, mask) * mask).sum() / mask.sum()


mean_of = jax.jit(masked_mean, static_argnums=0)
mean_and_gradient = jax.jit(jax.value_and_grad(masked_mean, argnums=1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradient(loss, s, t):
    """Losses `[b]` and the gradient of their sum."""
    value, pull = jax.vjp(lambda s: loss(s, t), s)
    return value, pull(jnp.ones_like(value))[0]


@pytest.mark.parametrize("name", SHARES)
def test_mean_of_shares_equals_loops(name):
    share, loop = SHARES[name]
    s, t = draw(B, D), draw(B, E, seed=1)
    with jax.enable_x64(True):
        value, grad = mean_and_gradient(share, s, t, MASK)
    np.testing.assert_allclose(value, loop(s[VALID], t[VALID]), rtol=1e-8)
    want = np.zeros_like(s)
    want[VALID] = difference(lambda x: loop(x, t[VALID]), s[VALID])
    np.testing.assert_allclose(grad, want, atol=1e-8)
    single = mean_of(share, s, t, MASK)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, value, rtol=1e-5)


@pytest.mark.parametrize("name", SHARES)
def test_equal_examples_keep_gradients_finite(name):
    """Equal, zero and single examples: distances, norms and means of 0."""
    share, s = SHARES[name][0], np.zeros((4, D), np.float32)
    s[2:] = 1

    @jax.jit
    @jax.value_and_grad
    def total(s, t, mask):
        return (share(s, t, mask) * mask).sum()

    for mask in ([1.0, 1, 1, 1], [1.0, 0, 0, 0], [0.0, 0, 0, 0]):
        value, grad = total(s, s + 1, np.array(mask))
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", SHARES)
def test_the_same_geometry_costs_nothing(name):
    """None of the losses sees a rotation; RKD sees no shift and no scale either."""
    s = draw(B, D)
    rotation = np.linalg.qr(draw(D, D, seed=2))[0]
    t = s @ rotation
    if name in ("distance", "angle"):
        t = 3 * t + 1
    assert abs(float(mean_of(SHARES[name][0], s, t, MASK))) < 1e-6


def test_angles_in_blocks_are_the_same(monkeypatch):
    s, t, mask = (jnp.asarray(x) for x in (draw(B, D), draw(B, E, seed=1), MASK))

    def run():
        return jax.value_and_grad(lambda s: relations.angle_share(s, t, mask) @ mask)(s)

    want = jax.jit(run)()
    monkeypatch.setattr(relations, "TRIPLET_BLOCK", 2 * B * B)
    assert "scan" in str(jax.make_jaxpr(lambda: run())())
    assert harness.max_relative(want, jax.jit(lambda: run())()) < 1e-5


def test_successive_differences():
    s, t = draw(B, D), draw(B, D, seed=1)
    delta = np.abs(s - t)
    pairs = [(i, i + 1) for i in range(B - 1) if MASK[i] and MASK[i + 1]]
    want = sum(delta[i] @ delta[j] for i, j in pairs) / len(pairs)
    value = mean_of(relations.successive_share, s, t, MASK)
    np.testing.assert_allclose(value, want, rtol=1e-5)


def loop_selectivity(s, t):
    """MMD with the kernel (x . y)^2 over unit channels, from its definition."""

    def kernel(a, b):
        a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
        c, e = a.shape[1], b.shape[1]
        sums = [(unit(a[:, i]) @ unit(b[:, j])) ** 2 for i in range(c) for j in range(e)]
        return sum(sums) / (c * e)

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def loop_channels(s, t):
    c, total = s.shape[-1], 0.0
    for i in range(c):
        a, b = (unit(np.array([(x[..., i] * x[..., j]).sum() for j in range(c)])) for x in (s, t))
        total += ((a - b) ** 2).sum()
    return total / c


@pytest.mark.parametrize(
    "fn, loop, shape, width",
    [
        (relations.selectivity, loop_selectivity, (3, 3, 4), 6),
        (relations.selectivity, loop_selectivity, (2, 2, 3), 5),
        (relations.channel_correlation, loop_channels, (2, 3, 4), 4),
    ],
    ids=["selectivity-channels", "selectivity-positions", "channel-correlation"],
)
def test_channels_equal_loops(fn, loop, shape, width):
    s, t = draw(2, *shape), draw(2, *shape[:-1], width, seed=1)
    with jax.enable_x64(True):
        value, grad = values_and_gradient(fn, s, t)
    for i in range(2):
        np.testing.assert_allclose(value[i], loop(s[i], t[i]), rtol=1e-8)
        want = difference(lambda x, i=i: loop(x, t[i]), s[i])
        np.testing.assert_allclose(grad[i], want, atol=1e-8)


@pytest.mark.parametrize("fn", [relations.selectivity, relations.channel_correlation])
def test_a_silent_channel_has_a_finite_gradient(fn):
    s, t = draw(2, 3, 3, 4), draw(2, 3, 3, 4, seed=1)
    s[..., 1] = 0
    assert np.isfinite(values_and_gradient(fn, s, t)[1]).all()


def torch_losses(torch):
    """The losses over a whole batch, as public programs for PyTorch spell them."""
    f = torch.nn.functional

    def distance(s, t):
        def potential(x):
            d = torch.where(
                torch.eye(len(x), dtype=bool),
                torch.zeros(()),
                torch.cdist(x + 0, x, compute_mode="donot_use_mm_for_euclid_dist"),
            )
            return d / d[d > 0].mean()

        return f.smooth_l1_loss(potential(s), potential(t))

    def angle(s, t):
        def cosines(x):
            e = f.normalize(x[None] - x[:, None], dim=2)
            return torch.bmm(e, e.transpose(1, 2))

        return f.smooth_l1_loss(cosines(s), cosines(t))

    def similarity(s, t):
        gs, gt = (f.normalize(x @ x.T, dim=1) for x in (s, t))
        return ((gs - gt) ** 2).sum() / len(s) ** 2

    def congruence(s, t):
        def kernel(x):
            c = f.normalize(x) @ f.normalize(x).T
            return math.exp(-0.6) * sum(0.6**p / math.factorial(p) * c**p for p in range(4))

        return f.mse_loss(kernel(s), kernel(t))

    def probability(s, t):
        def conditional(x):
            k = (f.normalize(x) @ f.normalize(x).T + 1) / 2
            return k / k.sum(1, keepdim=True)

        p, q = conditional(t), conditional(s)
        return (p * torch.log((p + 1e-7) / (q + 1e-7))).mean()

    return locals()


@pytest.mark.parametrize("name", SHARES)
def test_equals_pytorch(name):
    torch = pytest.importorskip("torch")
    s, t = draw(B, D), draw(B, E, seed=1)
    x = torch.tensor(s, requires_grad=True)
    want = torch_losses(torch)[name](x, torch.tensor(t))
    want.backward()
    with jax.enable_x64(True):
        share, ones = SHARES[name][0], jnp.ones(B)
        fn = jax.value_and_grad(lambda x: masked_mean(share, x, jnp.asarray(t), ones))
        value, grad = fn(jnp.asarray(s))
    np.testing.assert_allclose(value, want.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-5, atol=1e-9)


def test_selectivity_equals_pytorch():
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    s, t = draw(3, 4, 4, 5), draw(3, 4, 4, 6, seed=1)
    x = torch.tensor(s, requires_grad=True)
    a, b = (
        f.normalize(v.permute(0, 3, 1, 2).reshape(3, v.shape[-1], -1), dim=2)
        for v in (x, torch.tensor(t))
    )

    def kernel(a, b):
        return (a[:, None] * b[:, :, None]).sum(-1).pow(2).mean()

    want = kernel(b, b) + kernel(a, a) - 2 * kernel(b, a)
    want.backward()
    with jax.enable_x64(True):
        fn = jax.value_and_grad(lambda x: relations.selectivity(x, jnp.asarray(t)).mean())
        value, grad = fn(jnp.asarray(s))
    np.testing.assert_allclose(value, want.item(), rtol=1e-8)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-10)


WEIGHTS = {
    "rkd": {"distance": 25.0, "angle": 50.0},
    "similarity": {"similarity": 3000.0},
    "pkt": {"neighbours": 30000.0},
    "nst": {"selectivity": 50.0},
    "correlation_congruence": {"congruence": 100.0},
    "ickd": {"channels": 2.5},
}


def loss_of(name, **kwargs):
    """The objective's loss of a batch, with networks as they start."""
    objective = harness.make_objective(name, **kwargs)
    models = {role: harness.role_model(role) for role in objective.roles}

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del stop_gradient_params
        params, st = models[role].init(jax.random.key(0), *inputs)
        return models[role].apply(params, st, *inputs, train=train, rngs={})

    return lambda batch: objective.loss(nets, batch, {}, jnp.int32(0))


def terms_of(name, **kwargs):
    """The terms on shapes alone; coefficients are numbers."""
    loss, found = loss_of(name, **kwargs), []
    jax.eval_shape(lambda batch: found.append(loss(batch)), harness.make_batch())
    return found[0]


@pytest.mark.parametrize("name", WEIGHTS)
def test_terms_and_usual_weights(name):
    terms = terms_of(name)
    assert terms.coef == {**WEIGHTS[name], "cross_entropy": 1.0}
    assert set(terms.values) == set(terms.coef)


def test_stages_add_up():
    losses = [
        loss_of("similarity", student_stages=stages, teacher_stages=stages)
        for stages in (("stage1", "stage2"), ("stage1",), ("stage2",))
    ]
    values = jax.jit(lambda batch: [loss(batch).values["similarity"] for loss in losses])
    both, first, second = jax.device_get(values(harness.make_batch()))
    np.testing.assert_allclose(both, first + second, rtol=1e-5)


def test_successive_form_trains_two_projectors():
    made = harness.setup("correlation_congruence", kwargs={"form": "successive", "weight": 0.02})
    current, history = harness.run(made, harness.make_batch())
    assert {"projector", "projector_of_teacher"} <= set(current.params)
    assert history[0]["congruence"] > 0


@pytest.mark.parametrize(
    "name, kwargs, match",
    [
        ("rkd", {"feature": "embeding"}, "embedding"),
        ("rkd", {"angle_weight": -1.0}, "angle_weight"),
        ("similarity", {"student_stages": ("stage1",)}, "1 stages of the student and 2"),
        ("similarity", {"student_stages": ("stage9", "stage1")}, "stage9"),
        ("nst", {"teacher_stages": ("stage1",)}, "2 stages of the student and 1"),
        ("ickd", {"student_stage": "stage3"}, "stage3"),
        ("correlation_congruence", {"form": "kernels"}, "kernel"),
        ("correlation_congruence", {"gamma": 0.0}, "gamma"),
    ],
)
def test_mistakes_are_named(name, kwargs, match):
    with pytest.raises(ConfigError, match=match):
        terms_of(name, **kwargs)
