"""`Trainer` takes the step of the core, and refuses what does not fit before it is compiled."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import distill_jax as dj
from distill_jax.core import bilevel, rng, steps
from distill_jax.core.errors import UserError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.models import mlp, ratio_mlp
from distill_jax.weighting import meta_weight_net

K, B = 4, 16
RANDOM = np.random.default_rng(0)
BATCH = {
    "input": RANDOM.normal(size=(B, 6)).astype(np.float32),
    "label": RANDOM.integers(0, K, B).astype(np.int32),
}
MLP = mlp.make(num_classes=K, hidden=(8,))


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def kd(**kwargs):
    arguments = {
        "student": MLP,
        "frozen": {"teacher": MLP},
        "optimizer": optax.adam(1e-2),
        **kwargs,
    }
    return dj.Trainer(dj.objectives.KD(), **arguments)


@pytest.fixture(scope="module")
def trained():
    trainer = kd(averages={"average": ("student", 0.9)})
    first = trainer.init(jax.random.key(3), BATCH)
    before = jax.device_get(first)
    after, metrics = trainer.step(first, BATCH)
    return trainer, before, after, metrics


def test_step_is_that_of_the_core_with_the_batch_filled_in(trained):
    trainer, before, after, metrics = trained
    update = steps.make_train_step(
        trainer.objective, trainer.models, trainer.optimizer, ema=trainer.averages
    )
    index = np.arange(B, dtype=np.int32)
    full = {**BATCH, "mask": np.ones(B, np.float32), "index": index, "epoch": 0 * index}
    run = jax.jit(update)
    expected, wanted = run(before.train, before.frozen, full, before.key)
    for got, want in zip(jax.tree.leaves(after.train), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert set(metrics) == set(wanted) == {"loss", "distillation", "cross_entropy"}
    assert int(after.step) == 1


def test_keys_of_networks_are_those_of_runs(trained):
    trainer, before, _, _ = trained
    params, _ = MLP.init(rng.stream(jax.random.key(3), "init", "student"), BATCH["input"])
    assert equal(params, trainer.student(before)[0])
    assert equal(params, trainer.network(before, "average")[0])
    assert not equal(params, trainer.network(before, "teacher")[0])


def test_frozen_weights_can_be_given():
    weights = MLP.init(jax.random.key(9), BATCH["input"])
    trainer = kd(frozen={"teacher": (MLP, *weights)})
    state = trainer.init(jax.random.key(0), BATCH)
    assert equal(trainer.network(state, "teacher"), weights)
    state, _ = trainer.step(state, BATCH)
    assert equal(trainer.network(state, "teacher"), weights)


def test_evaluate_drops_padding_and_numbers_examples(trained):
    trainer, _, after, _ = trained

    class Collect:
        outputs: ClassVar = {"student": ("logits",)}

        def __call__(self, outputs, batch):
            return {"logits": outputs["student"]["logits"], **batch}

    padded = {**BATCH, "mask": np.r_[np.ones(B - 3), np.zeros(3)].astype(np.float32)}
    found = trainer.evaluate(after, [BATCH, padded], {"collect": Collect()})
    assert len(found["logits"]) == 2 * B - 3
    np.testing.assert_array_equal(found["index"], np.arange(2 * B - 3))
    np.testing.assert_array_equal(found["label"][:B], BATCH["label"])
    want = trainer.predict(after, BATCH["input"])["logits"]
    np.testing.assert_allclose(found["logits"][:B], want, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: kd(frozen={}), "KD needs a network 'teacher'"),
        (
            lambda: kd(networks={"student": MLP}, frozen={"student": MLP}),
            "'student' is given twice",
        ),
        (lambda: kd(student=nn.Dense(3)), "the network 'student' is a Dense"),
        (lambda: kd(averages={"a": ("studnet", 0.9)}), "did you mean 'student'?"),
        (lambda: kd(bilevel=bilevel.Bilevel()), "bilevel needs an outer_optimizer"),
        (lambda: kd(outer_optimizer=optax.adam(1e-2)), "needs a WeightedObjective"),
        (lambda: dj.Options(precision="float16"), "unknown precision 'float16'"),
        (lambda: dj.Options(accum_steps=0), "accum_steps is 0"),
        (lambda: kd().shapes({"x": BATCH["input"]}), "batch has no 'input', but x"),
        (lambda: kd().shapes({**BATCH, "label": BATCH["label"][:3]}), "differ in length"),
        (lambda: kd().shapes({k: v[:3] for k, v in BATCH.items()}), "does not split evenly"),
        (lambda: ps_kd().shapes(BATCH), "batch has no 'index'"),
        (lambda: kd(optimizer="adamw"), "optimizer is 'adamw'"),
        (
            lambda: dj.Trainer(dj.objectives.KD, optimizer=optax.sgd(0.1)),
            "objective is the class KD",
        ),
        (lambda: kd().init(0, BATCH), "key is 0"),
        (
            lambda: kd().shapes({**BATCH, "label": np.ones(B, np.float32)}),
            "label has type float32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


def ps_kd():
    objective = dj.objectives.PSKD(
        num_examples=B, num_classes=K, total_steps=10, steps_per_epoch=1.0
    )
    return dj.Trainer(objective, student=MLP, optimizer=optax.sgd(0.1))


def test_bilevel_steps_are_those_of_the_core():
    weighted = WeightedObjective(
        objective=dj.objectives.KD(),
        weighting=meta_weight_net.MetaWeightNet(),
        loss_terms=("cross_entropy", "distillation"),
        num_classes=K,
    )
    networks = {"weighting": ratio_mlp.make(hidden=(4,), outputs=2)}
    trainer = dj.Trainer(
        weighted,
        student=MLP,
        networks=networks,
        frozen={"teacher": MLP},
        optimizer=optax.sgd(0.1),
        outer_optimizer=optax.adam(1e-2),
    )
    state = trainer.init(jax.random.key(0), BATCH)
    before = jax.device_get(trainer.network(state, "weighting"))
    state, metrics = trainer.step(state, BATCH)
    assert equal(before, trainer.network(state, "weighting"))
    assert "outer_loss" not in metrics
    state, metrics = trainer.step(state, BATCH, held_out=BATCH)
    assert not equal(before, trainer.network(state, "weighting"))
    assert metrics["outer_grad_norm"] > 0


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2)])
def test_hypergradient_equals_brute_force(optimizer):
    x, y = jnp.asarray(BATCH["input"]), jnp.asarray(BATCH["label"])

    def losses(params):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ params), y)

    def inner(omega, values):
        return (jax.nn.sigmoid(omega) * values).mean()

    def outer(params):
        return losses(params)[:4].mean()

    params = jnp.asarray(RANDOM.normal(size=(6, K)), jnp.float32)
    omega = jnp.asarray(RANDOM.normal(size=B), jnp.float32)
    # A second moment that is not zero, so that the update has a derivative.
    grads = jnp.asarray(RANDOM.normal(size=(6, K)), jnp.float32)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)

    def brute(omega):
        grads = jax.grad(lambda p: inner(omega, losses(p)))(params)
        updates, _ = optimizer.update(grads, opt_state, params)
        return outer(optax.apply_updates(params, updates))

    value, d_omega = dj.hypergradient(losses, inner, outer, optimizer)(params, opt_state, omega)
    want, d_want = jax.value_and_grad(brute)(omega)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(d_omega, d_want, rtol=1e-4, atol=1e-8)
    assert np.abs(d_want).max() > 1e-5


def test_to_nnx_returns_a_new_module_and_refuses_another_structure():
    from flax import nnx

    def make(width):
        return nnx.Sequential(
            nnx.Linear(6, width, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        )

    net = make(3)
    params, net_state = dj.from_nnx(net).init(jax.random.key(0))
    changed = jax.tree.map(lambda x: x + 1, params)
    new = dj.to_nnx((changed, net_state), like=net)
    np.testing.assert_array_equal(
        new.layers[0].kernel.get_value(), net.layers[0].kernel.get_value() + 1
    )
    with pytest.raises(UserError, match="the params do not fit Sequential"):
        dj.to_nnx((changed, net_state), like=make(4))
