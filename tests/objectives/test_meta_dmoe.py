"""Meta-DMoE: the inner step, its gradient to the aggregator, and who is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import steps
from distill_jax.core.errors import ConfigError
from distill_jax.core.means import mean_loss
from distill_jax.models import expert_aggregator
from distill_jax.objectives import meta_dmoe
from tests import harness

LR = 0.3


def bound(made, state, params=None):
    return steps.BoundNets(
        made.models,
        {r: p for r, (p, _) in made.frozen.items()} | dict(state.params) | (params or {}),
        {r: s for r, (_, s) in made.frozen.items()} | dict(state.model_state),
        key=jax.random.key(1),
    )


def setup():
    # Features as wide as the experts', which the harness makes wider than a student.
    objective = harness.make_objective("meta_dmoe", inner_lr=LR, test_domains=1)
    models = {r: harness.tiny_model() for r in objective.roles if r != "aggregator"}
    models["aggregator"] = harness.role_model("aggregator")
    batch = harness.make_batch()
    shapes = harness.state.infer_shapes(objective, models, batch)
    tx = harness.optax.sgd(0.1)
    init = harness.state.make_init(
        objective, models, tx, shapes, trainable=("student", "aggregator"), ema={}
    )
    expert = jax.jit(harness.tiny_model().init)
    frozen = {
        role: expert(jax.random.key(7 + i), batch["input"])
        for i, role in enumerate(("teacher1", "teacher2"))
    }
    made = harness.Setup(objective, models, shapes, init, None, frozen)
    return made, jax.jit(init)(jax.random.key(0)), batch


def loss_of(made, state, batch, params=None, step=0):
    terms = made.objective.loss(bound(made, state, params), batch, state.memory, jnp.int32(step))
    return mean_loss(terms, batch["mask"])[0]


def transcription(made, state, batch, phi, *, step):
    """The loss of one step, from the models alone, with the inner gradient by `jax.grad`."""
    student, aggregator = made.models["student"], made.models["aggregator"]
    rows = [i for i in range(16) if batch["domain"][i] == step % 2 and batch["mask"][i] > 0]
    support, query = np.array(rows[::2]), np.array(rows[1::2])
    x = batch["input"]
    experts = [
        made.models[r].apply(*made.frozen[r], x[support], train=False, rngs={})[0]["embedding"]
        for r in ("teacher1", "teacher2")
    ]
    keep = np.ones((len(support), 2))
    keep[:, step % 2] = 0.0
    target = aggregator.apply(
        phi, {}, jnp.stack(experts, 1), jnp.asarray(keep), train=False, rngs={}
    )[0]["output"]

    def inner(theta):
        found = student.apply(theta, {}, x[support], train=False, rngs={})[0]["embedding"]
        return ((found - target) ** 2).mean()

    theta = state.params["student"]
    moved = jax.tree.map(lambda p, g: p - LR * g, theta, jax.grad(inner)(theta))
    logits = student.apply(moved, {}, x[query], train=False, rngs={})[0]["logits"]
    return -jax.nn.log_softmax(logits)[np.arange(len(query)), batch["label"][query]].mean()


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3])
def test_loss_and_gradient_of_the_aggregator(step):
    """The gradient through the inner step is that of the transcription and of differences."""
    with jax.enable_x64(True):
        made, state, batch = setup()
        state = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state
        )
        batch["mask"] = batch["mask"].at[jnp.array([2, 5, 9])].set(0.0)
        phi = state.params["aggregator"]

        def of(phi):
            return loss_of(made, state, batch, {"aggregator": phi}, step=step)

        value, grad = jax.jit(jax.value_and_grad(of))(phi)
        want = transcription(made, state, batch, phi, step=step)
        np.testing.assert_allclose(value, want, rtol=1e-7)
        other = jax.grad(lambda phi: transcription(made, state, batch, phi, step=step))(phi)
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) > 1e-4
        for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)
        r = np.random.default_rng(0)
        way = jax.tree.map(lambda p: jnp.asarray(r.normal(size=p.shape)), phi)
        ahead, back = (
            of(jax.tree.map(lambda p, w, e=e: p + e * w, phi, way)) for e in (1e-5, -1e-5)
        )
        slope = sum(
            float((g * w).sum())
            for g, w in zip(jax.tree.leaves(grad), jax.tree.leaves(way), strict=True)
        )
        np.testing.assert_allclose((ahead - back) / 2e-5, slope, rtol=1e-4)


def test_the_inner_step_leaves_the_classifier_alone():
    made, state, batch = setup()

    @jax.jit
    def adapt(state):
        nets = bound(made, state)

        def inner(nets):
            return (nets("student", batch["input"])[0]["embedding"] ** 2).mean()

        moved = nets.after_sgd_step("student", inner, lr=LR)._params["student"]
        assert nets._params["student"] is state.params["student"]
        return moved

    moved, old = jax.device_get((adapt(state), state.params["student"]))
    np.testing.assert_array_equal(moved["last"]["kernel"], old["last"]["kernel"])
    assert np.any(moved["first"]["kernel"] != old["first"]["kernel"])


def test_a_domain_adapts_to_its_own_examples():
    """What is predicted for a domain depends on its batch and on no other domain's examples."""
    made, state, batch = setup()

    @jax.jit
    def predict(batch):
        found = made.objective.predictions(bound(made, state), batch, state.memory, jnp.int32(0))
        return found["prediction"]["logits"]

    batch = jax.device_get(batch)
    first = np.asarray(predict(batch))
    other = {**batch, "input": batch["input"].copy()}
    other["input"][1] += 1.0  # of domain 1
    second = np.asarray(predict(other))
    np.testing.assert_array_equal(first[::2], second[::2])
    assert np.any(first[3::2] != second[3::2])
    alone = {k: v[::2] for k, v in batch.items()}
    np.testing.assert_allclose(predict(alone), first[::2], atol=1e-5)


def test_the_aggregator_does_not_see_experts_left_out():
    model = expert_aggregator.make(heads=2)
    x = np.random.RandomState(0).randn(4, 3, 8).astype(np.float32)
    keep = np.array([[1.0, 0.0, 1.0]] * 4, np.float32)
    params, _ = jax.jit(model.init)(jax.random.key(1), x, keep)
    run = jax.jit(lambda *x: model.apply(params, {}, *x, train=False, rngs={})[0]["output"])
    np.testing.assert_allclose(run(x, keep), run(x + 9 * (1 - keep)[..., None], keep), atol=1e-6)
    np.testing.assert_allclose(run(x, keep), run(x[:, ::2], keep[:, ::2]), atol=1e-5)
    np.testing.assert_allclose(run(x, keep), run(x[:, ::-1], keep[:, ::-1]), atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"experts": 1}, {"inner_lr": 0.0}])
def test_hyperparameters_are_checked(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        meta_dmoe.make(**kwargs)


def test_features_of_another_width_are_refused():
    objective = meta_dmoe.make()
    models = {r: harness.tiny_model() for r in ("teacher1", "teacher2")}
    models |= {
        "student": harness.tiny_model(width=6),
        "aggregator": harness.role_model("aggregator"),
    }
    with pytest.raises(ConfigError, match="student has 6 features and the experts 8"):
        harness.state.infer_shapes(objective, models, harness.make_batch())
