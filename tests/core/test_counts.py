"""Terms of tokens and their counts: the mean of a batch, however it is divided, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import partition, state, steps
from distill_jax.core.api import Objective, Terms
from distill_jax.core.errors import ConfigError
from distill_jax.losses.classification import cross_entropy
from tests import harness

FORMS = ("sums", "tokens", "mixed")
MIXED = ["mixed", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[:2])]


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of tokens as sums `[b]` or one by one `[b, t]`, or both beside a plain term."""

    form: str = "tokens"
    roles = ("student",)

    def loss(self, nets, batch, memory, step):
        outputs, new = nets("student", batch["input"], train=True)
        logits, mask = outputs["logits"], batch["target_mask"]
        loss = mask * cross_entropy(logits, batch["target"])
        right = mask * (logits.argmax(-1) == batch["target"])
        values, counts = {"tokens": loss, "accuracy": right}, {"tokens": mask, "accuracy": mask}
        weights = {"tokens": 1 + 0.1 * batch["input"] / harness.VOCABULARY}
        if self.form != "tokens":
            summed = {"sums": loss.sum(1)}, {"sums": mask.sum(1)}, {"sums": weights["tokens"][:, 0]}
            if self.form == "sums":
                values, counts, weights = summed
            else:
                values, counts, weights = values | summed[0], counts | summed[1], weights
                values["plain"] = jnp.square(logits).mean((1, 2))
        coef = {"accuracy": 0.0} if "accuracy" in values else {}
        return Terms(
            values=values, counts=counts, weights=weights, coef=coef, state={"student": new}
        )


def made(form, **kwargs):
    models, tx = {"student": harness.tiny_decoder()}, optax.sgd(0.1, momentum=0.9)
    objective, batch = NextToken(form), harness.make_token_batch(16)
    shapes = state.infer_shapes(objective, models, batch)
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    step = steps.make_train_step(objective, models, tx, grad_norm=True, **kwargs)
    return harness.Setup(objective, models, shapes, init, step, {})


@functools.cache
def whole(form):
    with jax.enable_x64(True):
        setup = made(form)
        start = harness.fresh(jax.jit(setup.init)(jax.random.key(0)))
        batch = harness.make_token_batch(16)
        return start, jax.device_get(jax.jit(setup.step)(start, {}, batch, jax.random.key(3)))


def equal(one, other):
    """Whether states and metrics agree to 1e-12."""
    assert one[1].keys() == other[1].keys()
    assert harness.max_relative(one[0].params, other[0].params) < 1e-12
    assert harness.max_relative(one[1], other[1]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_step_is_the_mean_over_tokens(form):
    """The loss by NumPy, and the sum of the counts among the metrics."""
    with jax.enable_x64(True):
        start, (_, metrics) = whole(form)
        batch = jax.device_get(harness.make_token_batch(16))
        model = harness.tiny_decoder()
        logits = model.apply(start.params["student"], {}, batch["input"], train=True, rngs={})
        z = np.asarray(logits[0]["logits"])
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        mask, x = batch["target_mask"], batch["input"]
        loss = -np.take_along_axis(log_p, batch["target"][..., None], -1)[..., 0] * mask
        weight = 1 + 0.1 * x / harness.VOCABULARY
        n = (mask * batch["mask"][:, None]).sum()
        want = (loss * weight * batch["mask"][:, None]).sum() / n
        if form == "sums":
            want = (loss.sum(1) * weight[:, 0] * batch["mask"]).sum() / n
            share = (weight[:, 0] * mask.sum(1) * batch["mask"]).sum() / n
            np.testing.assert_allclose(metrics["weight/sums"], share, rtol=1e-12)
        elif form == "mixed":
            want += (loss.sum(1) * batch["mask"]).sum() / n
            want += (np.square(z).mean((1, 2)) * batch["mask"]).sum() / batch["mask"].sum()
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-12)
        assert all(
            metrics[f"counts/{name}"] == n for name in {"sums": ["sums"]}.get(form, ["tokens"])
        )


@pytest.mark.parametrize("form", MIXED)
@pytest.mark.parametrize(
    ("accum_steps", "unroll"),
    [(2, True), pytest.param(4, False, marks=pytest.mark.slow), (8, False)],
)
def test_accumulation_is_exact(form, accum_steps, unroll):
    with jax.enable_x64(True):
        start, want = whole(form)
        step = made(form, accum_steps=accum_steps, unroll=unroll).step
        got = jax.jit(step)(start, {}, harness.make_token_batch(16), jax.random.key(3))
        equal(want, jax.device_get(got))


@pytest.mark.parametrize("form", MIXED)
def test_padding_is_exact(form):
    with jax.enable_x64(True):
        start, want = whole(form)
        padded = harness.padded(harness.make_token_batch(16), 8)
        step = made(form, accum_steps=4, unroll=False).step
        equal(want, jax.device_get(jax.jit(step)(start, {}, padded, jax.random.key(3))))


@pytest.mark.parametrize("form", MIXED)
def test_one_device_equals_a_mesh_of_eight(form):
    with jax.enable_x64(True):
        setup, batch = made(form), harness.make_token_batch(16)
        one, alone = harness.run(setup, batch)
        eight, split = harness.run(setup, batch, mesh=partition.make_mesh(data=2, fsdp=4))
        equal((one, alone[-1]), (eight, split[-1]))


@pytest.mark.parametrize(
    ("parts", "unroll", "most"),
    [(2, True, 1.05), pytest.param(8, False, 1.1 * 2 / 8, marks=pytest.mark.slow)],
)
def test_counting_costs_no_forward_pass(parts, unroll, most):
    """Operations of accumulated gradients against the whole batch.

    Of a loop the first part and the body are counted, each once, and the update is not divided.
    """
    start, batch = whole("tokens")[0], harness.make_token_batch(16)

    def flops(**kwargs):
        step = jax.jit(made("tokens", **kwargs).step)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (start, {}, batch))
        compiled = step.lower(*like, jax.random.key(0)).compile()
        return (compiled.cost_analysis() or {})["flops"]

    assert flops(accum_steps=parts, unroll=unroll) <= most * flops()


@dataclasses.dataclass(frozen=True)
class CountsWhatItRemembers(Objective):
    """A count that depends on the memory, which micro-batches change one after the other."""

    roles = ("student",)

    def memory(self, key, batch):
        del key, batch
        return {"seen": jnp.zeros(())}

    def loss(self, nets, batch, memory, step):
        outputs, _ = nets("student", batch["input"], train=True)
        seen = memory["seen"] + batch["mask"].sum()
        mask = batch["target_mask"] * seen
        loss = cross_entropy(outputs["logits"], batch["target"])
        return Terms(values={"x": mask * loss}, counts={"x": mask}, memory={"seen": seen})


def test_counts_see_the_memory_that_the_losses_see():
    """The mean of equal losses is that loss, whatever the counts are."""
    net, batch = harness.tiny_decoder(), harness.make_token_batch(16)
    flat = net._replace(init=lambda *args: (jax.tree.map(jnp.zeros_like, net.init(*args)[0]), {}))
    objective, tx = CountsWhatItRemembers(), optax.sgd(0.1)
    shapes = state.infer_shapes(objective, {"student": flat}, batch)
    init = state.make_init(objective, {"student": flat}, tx, shapes, trainable=("student",), ema={})
    step = steps.make_train_step(objective, {"student": flat}, tx, accum_steps=4, unroll=False)
    new, metrics = jax.jit(step)(init(jax.random.key(0)), {}, batch, jax.random.key(1))
    np.testing.assert_allclose(metrics["x"], np.log(harness.VOCABULARY), rtol=1e-6)
    assert new.memory["seen"] == batch["mask"].sum()


@pytest.mark.parametrize(("form", "accum_steps"), [("sums", 1), ("tokens", 2)])
def test_batch_without_tokens_changes_nothing(form, accum_steps):
    batch = harness.make_token_batch(16)
    batch["target_mask"] = jnp.zeros_like(batch["target_mask"])
    setup = made(form, accum_steps=accum_steps)
    start = jax.jit(setup.init)(jax.random.key(0))
    new, metrics = jax.jit(setup.step)(start, {}, batch, jax.random.key(3))
    assert metrics["loss"] == metrics[f"counts/{form}"] == 0
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, start.params, new.params)))


B, T = 4, 3
BY_TOKEN, BY_EXAMPLE = jnp.ones((B, T)), jnp.ones(B)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"values": {"x": BY_TOKEN}}, "(?s)loss term 'x' has shape .*tokens need counts"),
        (
            {"values": {"x": BY_EXAMPLE[:, None]}},
            r"(?s)loss term 'x' .*\[b, 1\] array would broadcast",
        ),
        ({"values": {"x": BY_TOKEN.T}, "counts": {"x": BY_TOKEN.T}}, "loss term 'x' has shape"),
        ({"values": {"x": BY_TOKEN}, "counts": {"x": BY_EXAMPLE}}, "count 'x' has shape"),
        ({"values": {"x": BY_EXAMPLE}, "counts": {"x": BY_TOKEN}}, "count 'x' has shape"),
        (
            {"values": {"x": BY_TOKEN}, "counts": {"x": BY_TOKEN}, "weights": {"x": BY_EXAMPLE}},
            "weight 'x' has shape",
        ),
        ({"values": {"x": BY_EXAMPLE}, "counts": {"y": BY_EXAMPLE}}, "count 'y' has no loss term"),
    ],
)
def test_shapes_of_a_term_are_checked(terms, message):
    with pytest.raises(ConfigError, match=message):
        state.check_terms(Terms(**terms), (B,))


def test_terms_of_both_shapes_pass():
    values = {"x": BY_TOKEN, "sum": BY_EXAMPLE, "plain": BY_EXAMPLE}
    counts = {"x": BY_TOKEN, "sum": BY_EXAMPLE}
    state.check_terms(Terms(values=values, counts=counts, weights={"x": BY_TOKEN}), (B,))
