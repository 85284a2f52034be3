"""Estimates over a long horizon against their definitions, transcribed in NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import horizon, hypergradient
from distill_jax.core.bilevel import Bilevel, Optimizers
from distill_jax.core.errors import ConfigError
from tests import harness
from tests.core.test_hypergradient import Problem, chain, stacked

N, RATE = 5, 0.2


def inner_loss(params, omega):
    """A smooth loss without symmetry, convex enough for conjugate gradients."""
    m = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)))
    x = m @ params
    return (omega**2 * jnp.log(jnp.cosh(x))).sum() + 0.5 * (params**2).sum() + jnp.sin(omega) @ x


def outer_loss(params):
    return ((params - jnp.arange(1.0, N + 1)) ** 2).sum() + jnp.cos(params).sum()


def grad_fn(params, omega, k):
    del k
    return jax.grad(inner_loss, argnums=(0, 1))(params, omega)


def start():
    draw = np.random.default_rng(1)
    return draw.normal(size=N), draw.normal(size=N)


def parts(params, omega):
    """Hessian `[p, p]` and cross derivative `[w, p]` of the inner loss."""
    hessian = jax.hessian(inner_loss)(params, omega)
    cross = jax.jacobian(jax.grad(inner_loss, argnums=1))(params, omega)
    return np.asarray(hessian), np.asarray(cross)


def estimate(fn, tx, params, omega, opt_state=None, **kwargs):
    opt_state = tx.init(params) if opt_state is None else opt_state
    given = grad_fn, jax.value_and_grad(outer_loss), tx, params, opt_state, omega
    return jax.jit(lambda: fn(*given, **kwargs))()


def neumann_sgd(params, omega, v, *, steps, damping):
    """-lr sum_j (I - lr (H + damping))^j v."""
    hessian, cross = parts(params, omega)
    a, u = v, np.zeros(N)
    for _ in range(steps):
        u = u - RATE * a
        a = a - RATE * (hessian + damping * np.eye(N)) @ a
    return cross @ u


def conjugate(params, omega, v, *, steps, damping):
    hessian, cross = parts(params, omega)
    a = hessian + damping * np.eye(N)
    x, r = np.zeros(N), v
    p = r
    for _ in range(steps):
        alpha = r @ r / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * a @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    return -cross @ x


@pytest.mark.parametrize(
    "fn, transcribed",
    [(horizon.neumann, neumann_sgd), (horizon.conjugate_gradient, conjugate)],
)
@pytest.mark.parametrize("steps, damping", [(1, 0.0), (3, 0.5)])
def test_implicit_estimates_equal_their_definitions(fn, transcribed, steps, damping):
    with jax.enable_x64(True):
        params, omega = start()
        tx = optax.sgd(RATE)
        value, got = estimate(fn, tx, params, omega, steps=steps, damping=damping)
        moved = params - RATE * grad_fn(params, omega, 0)[0]
        want = transcribed(
            params, omega, np.asarray(jax.grad(outer_loss)(moved)), steps=steps, damping=damping
        )
        np.testing.assert_allclose(got, want, rtol=1e-11)
        np.testing.assert_allclose(value, outer_loss(moved), rtol=1e-12)


def test_conjugate_gradients_solve_after_as_many_steps_as_unknowns():
    with jax.enable_x64(True):
        params, omega = start()
        _, got = estimate(horizon.conjugate_gradient, optax.sgd(RATE), params, omega, steps=N)
        hessian, cross = parts(params, omega)
        moved = params - RATE * grad_fn(params, omega, 0)[0]
        want = -cross @ np.linalg.solve(hessian, np.asarray(jax.grad(outer_loss)(moved)))
        np.testing.assert_allclose(got, want, rtol=1e-7)


def test_conjugate_gradients_stop_at_negative_curvature():
    with jax.enable_x64(True):
        bent = lambda p, w, k: (-p, jnp.outer(jnp.ones(2), jnp.ones(2)) @ p * w)  # noqa: E731
        given = bent, jax.value_and_grad(lambda p: p.sum()), optax.sgd(0.1), jnp.ones(2)
        state = optax.sgd(0.1).init(jnp.ones(2))
        _, got = horizon.conjugate_gradient(*given, state, jnp.ones(2), steps=3)
        np.testing.assert_array_equal(got, 0)
        _, damped = horizon.conjugate_gradient(*given, state, jnp.ones(2), steps=3, damping=3.0)
        np.testing.assert_allclose(damped, -1.0)  # -(1 + 1) / (3 - 1)


def test_neumann_series_is_that_of_the_optimizer_with_its_state():
    """Heavy ball: the powers of one matrix over parameters and momentum."""
    with jax.enable_x64(True):
        mu, steps = 0.7, 4
        params, omega = start()
        tx = optax.sgd(RATE, momentum=mu)
        trace = np.random.default_rng(2).normal(size=N)
        opt_state = jax.tree.map(lambda x: jnp.asarray(trace), tx.init(params))
        _, got = estimate(horizon.neumann, tx, params, omega, opt_state, steps=steps)
        hessian, cross = parts(params, omega)
        g, eye = np.asarray(grad_fn(params, omega, 0)[0]), np.eye(N)
        v = np.asarray(jax.grad(outer_loss)(params - RATE * (g + mu * trace)))
        jacobian = np.block([[eye - RATE * hessian, -RATE * mu * eye], [hessian, mu * eye]])
        through = np.block([[-RATE * eye], [eye]])  # of the gradient into both
        a, u = np.concatenate([v, np.zeros(N)]), np.zeros(N)
        for _ in range(steps):
            u, a = u + through.T @ a, jacobian.T @ a
        np.testing.assert_allclose(got, cross @ u, rtol=1e-11)


@pytest.mark.parametrize("name", ["nesterov", pytest.param("adamw", marks=pytest.mark.slow)])
def test_carried_tangents_are_the_derivative_of_all_steps(name):
    with jax.enable_x64(True):
        params, omega = start()
        tx, c = chain(name), jnp.zeros(2)

        def step(params, state, c):
            shifted = jnp.asarray(omega).at[:2].add(c)
            return hypergradient.apply(tx, grad_fn(params, shifted, 0)[0], state, params)

        def after(c):
            carry = jnp.asarray(params), tx.init(jnp.asarray(params))
            for _ in range(4):
                carry = step(*carry, c)
            return carry[0]

        carry = jnp.asarray(params), tx.init(jnp.asarray(params))
        tangents = halved = horizon.zero_tangents(*carry, count=2)
        for _ in range(4):
            tangents = horizon.carry(step, *carry, tangents)
            last, halved = halved, horizon.carry(step, *carry, halved, forget=0.5)
            carry = step(*carry, c)
        want = jax.jacobian(after)(c)
        np.testing.assert_allclose(tangents[0].T, want, rtol=1e-10)
        v = jax.grad(outer_loss)(carry[0])
        np.testing.assert_allclose(horizon.along(v, tangents), v @ want, rtol=1e-10)
        assert harness.max_relative(last, halved) > 1e-3
        assert harness.max_relative(tangents, halved) > 1e-3


def test_offsets_shift_log_ratios_and_keep_sums():
    with jax.enable_x64(True):
        weights = np.random.default_rng(0).uniform(0.1, 2, size=(6, 3))
        c = jnp.asarray([0.3, -1.2])
        got = horizon.offset(jnp.asarray(weights), c)
        ratios = lambda w: np.log(w[:, 1:] / w[:, :1])  # noqa: E731
        np.testing.assert_allclose(
            ratios(np.asarray(got)), ratios(weights) + np.asarray(c)[None], rtol=1e-12
        )
        np.testing.assert_allclose(got.sum(1), weights.sum(1), rtol=1e-12)
        logit = np.random.default_rng(1).normal(size=6)
        two = jax.nn.softmax(jnp.stack([jnp.zeros(6), logit], 1))
        shifted = horizon.offset(two, c[:1])[:, 1]
        np.testing.assert_allclose(shifted, jax.nn.sigmoid(logit + c[0]), rtol=1e-12)


def test_centred_weights_have_no_derivative_that_all_share():
    with jax.enable_x64(True):
        logit = jnp.asarray(np.random.default_rng(1).normal(size=6))
        mask, value = jnp.ones(6).at[2].set(0.0), jnp.arange(6.0)

        def loss(logit, centre):
            w = jax.nn.softmax(jnp.stack([jnp.zeros(6), logit], 1))
            w = horizon.centred(w, mask) if centre else w
            return (mask * value * w[:, 1]).sum()

        assert float(loss(logit, True)) == pytest.approx(float(loss(logit, False)), rel=1e-12)
        plain, centred = (np.asarray(jax.grad(loss)(logit, c)) for c in (False, True))
        np.testing.assert_allclose(centred, plain - np.asarray(mask) * plain.sum() / 5, rtol=1e-10)


# As steps of training.


def moved_by(problem, options, batches, *, carried):
    """What the weighting moves by in an outer step on the last of `batches`, after inner ones."""
    problem.optimizers = Optimizers(problem.tx, problem.outer_tx, ("weighting",), options.method)
    begin = problem.state
    inner, _ = problem.optimizers.split(begin.params)
    now = begin.replace(opt_state={**begin.opt_state, **carried(inner, begin.opt_state["inner"])})
    plain = jax.jit(problem.make(options, outer=False))
    for batch in batches[:-1]:
        now, _ = plain(now, problem.frozen, batch, problem.key)
    many = options.batches > 1
    fed = {"train": stacked(batches) if many else batches[-1], "held_out": problem.held_out}
    new, metrics = jax.jit(problem.make(options, outer=True))(now, problem.frozen, fed, problem.key)
    assert np.isfinite(metrics["outer_loss"])
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), now.params, new.params)[
        "weighting"
    ], new


def none(inner, state):
    del inner, state
    return {}


def past(inner, state):
    return {"past": {"params": inner, "state": state}}


@pytest.mark.parametrize(
    "method, carried",
    [("truncated", past), pytest.param("neumann", none, marks=pytest.mark.slow)],
)
def test_horizons_of_one_step_equal_the_one_step_gradient(method, carried):
    with jax.enable_x64(True):
        problem = Problem(chain("nesterov"))
        exact, _ = moved_by(problem, Bilevel(), [problem.train], carried=none)
        got, _ = moved_by(problem, Bilevel(method=method), [problem.train], carried=carried)
        assert harness.max_relative(exact, got) < 1e-12


@pytest.mark.slow
def test_neumann_on_a_quadratic_step_equals_steps_on_one_batch():
    """Where the Hessian is fixed, K terms are K steps: here to first order in the rate."""
    with jax.enable_x64(True):
        problem = Problem(optax.sgd(1e-4))
        options = Bilevel(method="neumann", horizon=4)
        got, _ = moved_by(problem, options, [problem.train], carried=none)
        want = problem.brute_force([problem.train] * 4)
        assert 1e-9 < harness.max_relative(want, got) < 1e-2


def test_truncated_equals_brute_force_over_the_steps_taken():
    k = 3
    with jax.enable_x64(True):
        problem = Problem(chain("nesterov"))
        batches = [problem.train, *(harness.make_batch(16, seed=20 + i) for i in range(1, k))]
        last = int(problem.state.step) + k - 1
        options = Bilevel(method="truncated", horizon=k, every=k, warmup=last)
        got, new = moved_by(problem, options, batches, carried=past)
        want = problem.brute_force(batches)
        assert harness.max_relative(want, got) < 1e-10
        kept, student = new.opt_state["past"]["params"], new.params["student"]
        assert harness.max_relative(kept["student"], student) == 0  # for the next one


def biased():
    problem = Problem(chain("nesterov"))
    weighting = problem.state.params["weighting"]
    last = {**weighting["last"], "bias": jnp.full(1, 0.2)}
    params = {**problem.state.params, "weighting": {**weighting, "last": last}}
    problem.state = problem.state.replace(params=params)
    return problem


def test_two_speeds_take_the_offset_from_all_steps_and_the_rest_from_one():
    def carried(inner, state):
        return {"tangent": horizon.zero_tangents(inner, state, count=1)}

    with jax.enable_x64(True):
        problem = biased()
        batches = [problem.train, *(harness.make_batch(16, seed=20 + i) for i in range(1, 3))]
        got, new = moved_by(problem, Bilevel(method="two_speed"), batches, carried=carried)
        want = problem.brute_force(batches)
        np.testing.assert_allclose(got["last"]["bias"], want["last"]["bias"], rtol=1e-10)
        one_step, plain = moved_by(problem, Bilevel(), batches, carried=none)
        assert harness.max_relative(one_step["last"]["kernel"], got["last"]["kernel"]) > 1e-3
        # The student's steps are those of any other method.
        assert harness.max_relative(plain.params["student"], new.params["student"]) < 1e-12


def test_networks_without_one_output_bias_are_refused():
    good = {"Dense_0": {"bias": jnp.zeros(7)}, "Dense_1": {"bias": jnp.ones(1)}}
    assert horizon.output_biases(good).shape == (1,)
    moved = horizon.with_output_biases(good, jnp.full(1, 3.0))
    assert float(moved["Dense_1"]["bias"][0]) == 3 and not moved["Dense_0"]["bias"].any()
    for bad in ({"kernel": jnp.zeros(3)}, {"a": {"bias": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}):
        with pytest.raises(ConfigError, match="last bias"):
            horizon.output_biases(bad)
