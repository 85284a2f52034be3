"""Contrastive losses against loops over anchors, and their three forms against each other."""

import functools
import math
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_jax.configs.ssl import simclr

from distill_jax.analysis import walk
from distill_jax.core import partition, replicas
from distill_jax.core.errors import ConfigError
from distill_jax.losses import contrastive
from distill_jax.models import temperature
from distill_jax.objectives import _queue
from distill_jax.run import build
from distill_jax.run import config as config_lib
from tests import harness
from tests.reference import difference, draw, softmax, unit

B, V, D = 8, 3, 5
TAU = 0.3
MASK = np.array([1, 1, 0, 1, 1, 1, 1, 0.0])
REAL = np.flatnonzero(MASK)
LABEL = np.array([0, 1, 1, 0, 2, 1, 0, 0])


def check(loss, loop, *inputs):
    """Compares the masked mean and its gradients with those of a loop over real examples."""
    with jax.enable_x64(True):
        mask = jnp.asarray(MASK)
        mean = lambda *x: (mask * loss(*x)).sum() / mask.sum()  # noqa: E731
        both = jax.jit(jax.value_and_grad(mean, argnums=tuple(range(len(inputs)))))
        value, grads = both(*(jnp.asarray(x) for x in inputs))
        np.testing.assert_allclose(value, loop(*inputs), rtol=1e-10)
        for i, grad in enumerate(grads):

            def one(x, i=i):
                return loop(*inputs[:i], x, *inputs[i + 1 :])

            want = difference(one, np.asarray(inputs[i]))
            np.testing.assert_allclose(grad, want, rtol=2e-5, atol=1e-7)


def loop_contrast(z, label=None):
    """SimCLR eq. 1 and SupCon eq. 2: one anchor after the other."""
    z, total = unit(z), 0.0
    views = [(i, v) for i in REAL for v in range(z.shape[1])]
    same = (lambda i, j: i == j) if label is None else (lambda i, j: label[i] == label[j])
    for i, v in views:
        others = [(j, u) for j, u in views if (j, u) != (i, v)]
        below = math.log(sum(math.exp(z[i, v] @ z[j, u] / TAU) for j, u in others))
        positives = [z[i, v] @ z[j, u] / TAU - below for j, u in others if same(i, j)]
        total -= sum(positives) / len(positives)
    return total / len(views)


def test_nt_xent():
    mask = jnp.asarray(MASK)
    for v in (2, V):
        check(lambda z: contrastive.nt_xent(z, mask, temperature=TAU), loop_contrast, draw(B, v, D))


def test_nt_xent_is_that_of_optax():
    """Optax's loss has the mean over examples with a positive, and no padding."""
    z = jnp.asarray(draw(B, 2, D))
    got = jax.jit(lambda z: contrastive.nt_xent(z, jnp.ones(B), temperature=TAU).mean())(z)
    label = jnp.arange(B).repeat(2)
    want = jax.jit(lambda z: optax.losses.ntxent(z.reshape(2 * B, D), label, TAU))(z)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sup_con():
    label, mask = jnp.asarray(LABEL), jnp.asarray(MASK)
    check(
        lambda z: contrastive.sup_con(z, label, mask, temperature=TAU),
        lambda z: loop_contrast(z, LABEL),
        draw(B, V, D),
    )


def loop_soft_con(z, q):
    z, total = unit(z), 0.0
    views = [(i, v) for i in REAL for v in range(z.shape[1])]
    for i, v in views:
        others = [(j, u) for j, u in views if (j, u) != (i, v)]
        below = math.log(sum(math.exp(z[i, v] @ z[j, u] / TAU) for j, u in others))
        weights = [1.0 if i == j else q[i] @ q[j] for j, _ in others]
        terms = [
            w * (z[i, v] @ z[j, u] / TAU - below) for w, (j, u) in zip(weights, others, strict=True)
        ]
        total -= sum(terms) / sum(weights)
    return total / len(views)


def test_soft_con_and_its_hard_limit():
    q, mask = softmax(draw(B, 4, seed=1)), jnp.asarray(MASK)
    check(
        lambda z, q: contrastive.soft_con(z, q, mask, temperature=TAU),
        loop_soft_con,
        draw(B, V, D),
        q,
    )
    with jax.enable_x64(True):
        certain, label = jnp.asarray(np.eye(3)[LABEL]), jnp.asarray(LABEL)
        both = lambda z: (  # noqa: E731
            contrastive.sup_con(z, label, mask, temperature=TAU),
            contrastive.soft_con(z, certain, mask, temperature=TAU),
        )
        hard, soft = jax.jit(both)(jnp.asarray(draw(B, V, D)))
        np.testing.assert_allclose(soft[REAL], hard[REAL], rtol=1e-12)


def test_the_example_of_soft_con_runs():
    code = contrastive.soft_con.__doc__.split("classifier:\n\n")[1].split("\n\n    Args:")[0]

    @jax.jit
    def run(z, logits, mask):
        names = {**vars(contrastive), "z": z, "logits": logits, "prior": jnp.full(4, 0.25)}
        names |= {"mask": mask, "b": B, "v": V, "k": 4}
        exec(textwrap.dedent(code), names)
        return names["value"], names["far"]

    value, far = run(draw(B, V, D), draw(B, V, 4), MASK)
    assert value.shape == (B,) and far.shape == ()
    assert np.isfinite(value).all() and far > 0


def test_debiased_probs():
    logits, prior = draw(2, V, 4), np.array([0.4, 0.3, 0.2, 0.1])
    want = softmax(logits / 0.5 - 0.7 * np.log(prior)).mean(1)
    got = contrastive.debiased_probs(
        jnp.asarray(logits), jnp.asarray(prior), temperature=0.5, power=0.7
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_marginal_divergence():
    prior, power = np.array([0.4, 0.3, 0.2, 0.1]), 1.1

    def loop(logits):
        p = softmax(logits[REAL], 0.5).mean(0) / prior**power
        p = p / p.sum()
        return math.log(4) + sum(x * math.log(x) for x in p)

    def loss(logits, mask):
        return contrastive.marginal_divergence(
            logits, jnp.asarray(prior), mask, temperature=0.5, power=power
        )

    mask = jnp.asarray(MASK)
    check(lambda x: jnp.broadcast_to(loss(x, mask)[None], (B,)), loop, draw(B, 4))
    # Predictions whose mean is proportional to the power of the prior leave nothing to do.
    ideal = jnp.asarray(0.5 * power * np.log(prior)[None].repeat(B, 0))
    assert abs(float(loss(ideal, mask))) < 1e-6


def test_queue_contrast_sees_no_empty_slot():
    queue = unit(draw(6, D, seed=2))
    usable = np.array([1, 1, 0, 1, 0, 0], bool)

    def loop(x, k):
        x, k, total = unit(x), unit(k), 0.0
        for i in REAL:
            logits = [x[i] @ k[i] / TAU, *(x[i] @ queue[j] / TAU for j in np.flatnonzero(usable))]
            total += math.log(sum(map(math.exp, logits))) - logits[0]
        return total / len(REAL)

    x, k = draw(B, D), draw(B, D, seed=1)

    def loss(x, k):
        return contrastive.queue_contrast(
            x, k, jnp.asarray(queue), jnp.asarray(usable), temperature=TAU
        )

    check(lambda x: loss(x, jnp.asarray(k)), lambda x: loop(x, k), x)
    assert not np.any(jax.grad(lambda k: loss(jnp.asarray(x), k).sum())(jnp.asarray(k)))
    empty = contrastive.queue_contrast(
        jnp.asarray(x), jnp.asarray(k), jnp.asarray(queue), jnp.zeros(6, bool), temperature=TAU
    )
    assert not np.any(empty)


def loop_pairs(x, y, scale):
    """Both directions of CLIP; the temperature is one over `scale`."""
    x, y, total = unit(x), unit(y), 0.0
    for i in REAL:
        rows = [scale * x[i] @ y[j] for j in REAL]
        columns = [scale * x[j] @ y[i] for j in REAL]
        own = scale * x[i] @ y[i]
        total += 0.5 * (math.log(sum(map(math.exp, rows))) - own)
        total += 0.5 * (math.log(sum(map(math.exp, columns))) - own)
    return total / len(REAL)


def loop_sigmoids(x, y, scale, bias):
    x, y, total = unit(x), unit(y), 0.0
    for i in REAL:
        for j in REAL:
            sign = 1 if i == j else -1
            total += math.log1p(math.exp(-sign * (scale * x[i] @ y[j] + bias)))
    return total / len(REAL)


def test_clip_and_siglip():
    mask, pair = jnp.asarray(MASK), (draw(B, D), draw(B, D, seed=1))

    def rows(value):
        return jnp.broadcast_to(value[None], (B,))

    def clip(x, y, scale):
        return contrastive.clip_contrast(x, y, mask, rows(scale))

    def siglip(x, y, scale, bias):
        return contrastive.sigmoid_contrast(x, y, mask, rows(scale), rows(bias))

    check(clip, loop_pairs, *pair, np.array(3.0))
    check(siglip, loop_sigmoids, *pair, np.array(3.0), np.array(-2.0))


def test_temperature_stays_below_its_limit_and_can_come_back():
    model = temperature.make(initial=0.005, bias=-10.0)
    params, state = model.init(jax.random.key(0), jnp.zeros((4, 2)))

    def apply(params):
        return model.apply(params, state, jnp.zeros((4, 2)), train=True, rngs={})[0]

    outputs = apply(params)
    np.testing.assert_allclose(outputs["scale"], 100.0, rtol=1e-5)
    np.testing.assert_allclose(outputs["bias"], -10.0)
    grads = jax.grad(lambda p: apply(p)["scale"].sum())(params)
    np.testing.assert_allclose(grads["log_scale"], 400.0, rtol=1e-5)
    within = temperature.make(initial=0.07).init(jax.random.key(0), jnp.zeros((4, 2)))[0]
    np.testing.assert_allclose(np.exp(within["log_scale"]), 1 / 0.07, rtol=1e-5)
    with pytest.raises(ConfigError, match="a positive number"):
        temperature.make(initial=0.0)


def some_losses(form, z):
    """Losses that have forms, with padding, as one number: with and without oneself, and a sum."""
    mask, rows = jnp.asarray(np.tile(MASK, 2)), jnp.full(2 * B, 3.0)
    x, y = z[:, 0], z[:, 1]
    values = [
        contrastive.nt_xent(z, mask, temperature=TAU, form=form),
        contrastive.pair_contrast(x, y, mask, temperature=TAU, form=form),
        contrastive.sigmoid_contrast(x, y, mask, rows, -rows, form=form),
    ]
    return sum((i + 1) * (mask * value).sum() for i, value in enumerate(values))


def test_forms_agree_on_any_number_of_devices(monkeypatch):
    """16 examples with padding in float64; blocks of 5 candidates, so that the last is ragged.

    `benchmarks/ring.py` has all forms on 1, 2, 4 and 8 devices.
    """
    monkeypatch.setattr(contrastive, "BLOCK", 5)
    with jax.enable_x64(True):
        z = jnp.asarray(draw(2 * B, 2, D))
        want = jax.jit(jax.value_and_grad(functools.partial(some_losses, "dense")))(z)
        for form, devices, fsdp in (("ring", 1, 1), ("ring", 4, 2), ("gathered", 8, 1)):
            mesh = partition.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
            split = jax.device_put(z, partition.over_batch(mesh))
            with jax.set_mesh(mesh):
                fn = jax.value_and_grad(functools.partial(some_losses, form))
                got = jax.device_get(jax.jit(fn)(split))
            np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
            np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "found"), [("dense", set()), ("gathered", {"all_gather"}), ("ring", {"ppermute"})]
)
def test_forms_communicate_as_they_say(form, found):
    z, exchanges = jnp.zeros((2 * B, V, D)), {"all_gather", "ppermute"}
    trace = jax.make_jaxpr(functools.partial(some_losses, form))
    with jax.sharding.use_abstract_mesh(partition.make_mesh().abstract_mesh):
        assert walk.primitives(trace(z)) & exchanges == found
    assert not walk.primitives(trace(z)) & exchanges


def test_ring_within_replicas():
    """Two replicas of four devices each: the ring goes through the devices of its own replica."""

    def loss(z, form):
        return contrastive.nt_xent(z, jnp.ones(B), temperature=TAU, form=form).mean()

    z, mesh = jnp.asarray(draw(2, B, 2, D)), replicas.make_replica_mesh(2)
    ring = jax.value_and_grad(functools.partial(loss, form="ring"))
    mapped = replicas.over_replicas(ring, mesh=mesh, shared=(False,), strategy="vmap")
    value, grad = jax.jit(mapped)(z)
    dense = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, form="dense"))))
    want = dense(z)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(grad, want[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", contrastive.FORMS)
def test_negatives_are_those_of_the_global_batch(form):
    """As the temperature grows, all candidates weigh the same: `log(2 B - 1)` of all 16."""
    mesh = partition.make_mesh()
    z = jax.device_put(draw(16, 2, D), partition.over_batch(mesh))
    with jax.set_mesh(mesh):
        loss = jax.jit(
            lambda z: contrastive.nt_xent(z, jnp.ones(16), temperature=1e6, form=form).mean()
        )
        np.testing.assert_allclose(loss(z), math.log(31), rtol=1e-5)


@pytest.mark.parametrize("form", ["dense", "ring"])
def test_nothing_but_padding_is_finite(form):
    @jax.jit
    @jax.value_and_grad
    def loss(z):
        mask = jnp.zeros(4)
        return (mask * contrastive.nt_xent(z, mask, temperature=TAU, form=form)).sum()

    value, grad = loss(jnp.asarray(draw(4, 2, D)))
    assert float(value) == 0
    assert not np.any(grad)


def loop_attraction(z, t, weigh=None):
    z, total = unit(z), 0.0
    for i in REAL:
        for v in range(V):
            cost = [((z[i, v] - z[i, u]) ** 2).sum() for u in range(V) if u != v]
            w = np.exp(t * np.array(cost if weigh is None else weigh(i, v)))
            total += (w / w.sum()) @ cost / V
    return total / len(REAL)


def loop_repulsion(z, t):
    z, total = unit(z), 0.0
    pairs = [(v, u) for v in range(V) for u in range(v + 1, V)]
    for v, u in pairs:
        for i in REAL:
            cost = np.array([((z[i, v] - z[j, u]) ** 2).sum() for j in REAL if j != i])
            w = np.exp(-t * cost)
            total -= (w / w.sum()) @ cost
    return total / len(REAL) / len(pairs)


def test_attraction_and_repulsion():
    """Their difference, so that one gradient has both; `uniform` is the same with t of 0."""
    z, mask = draw(B, V, D), jnp.asarray(MASK)
    for uniform in (False, True):
        check(
            lambda z, uniform=uniform: (
                contrastive.attraction(z, t=1.5, uniform=uniform)
                - 2 * contrastive.repulsion(z, mask, t=2.0, uniform=uniform)
            ),
            lambda z, on=not uniform: (
                loop_attraction(z, 1.5 * on) - 2 * loop_repulsion(z, 2.0 * on)
            ),
            z,
        )


def test_weights_without_gradient_are_constants():
    fixed = unit(draw(B, V, D))

    def weigh(i, v):
        return [((fixed[i, v] - fixed[i, u]) ** 2).sum() for u in range(V) if u != v]

    check(
        lambda z: contrastive.attraction(z, t=1.5, stop_grad_weights=True),
        lambda z: loop_attraction(z, 1.5, weigh),
        draw(B, V, D),
    )


def test_two_views_do_not_weigh_attraction():
    z = jnp.asarray(draw(B, 2, D))
    attraction = jax.jit(lambda t: contrastive.attraction(z, t=t))
    np.testing.assert_allclose(attraction(5.0), attraction(0.0), rtol=1e-6)


def test_distance_zero_has_a_finite_gradient():
    grad = jax.jit(jax.grad(lambda z: contrastive.repulsion(z, jnp.ones(4), t=1.0).sum()))
    assert np.isfinite(grad(jnp.ones((4, 3, D)))).all()


def keys_after(objective, rounds, mask=None):
    """The queue after some batches of 3 keys, each a multiple of a unit vector of its own."""
    memory = objective.memory(jax.random.key(0), {"mask": jnp.ones(3)})
    enqueue = jax.jit(_queue.enqueue)
    for i in range(rounds):
        keys = jnp.arange(3.0)[:, None] + 3 * i + jnp.zeros((1, objective.dim))
        memory = enqueue(memory, keys, jnp.ones(3) if mask is None else jnp.asarray(mask))
    return memory


def test_queue_is_first_in_first_out():
    objective = harness.make_objective("moco", queue=7, dim=2)
    memory = keys_after(objective, 2)
    assert memory["keys"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert (int(memory["next"]), int(memory["filled"])) == (6, 6)
    memory = keys_after(objective, 4)  # 12 keys: the last 7, written around the end
    assert memory["keys"][:, 0].tolist() == [7, 8, 9, 10, 11, 5, 6]
    assert (int(memory["next"]), int(memory["filled"])) == (5, 7)
    memory = keys_after(objective, 2, mask=[1.0, 0.0, 1.0])  # padding takes no slot
    assert memory["keys"][:, 0].tolist() == [0, 2, 3, 5, 0, 0, 0]
    assert (int(memory["next"]), int(memory["filled"])) == (4, 4)


class Mirror:
    """Networks whose outputs are their inputs, times -1 for the moving average of the student."""

    def __call__(self, role, *inputs, train=False, stop_gradient_params=False):
        x = -inputs[0] if role == "target" else inputs[0]
        if role == "predictor":
            x = x @ jnp.asarray(PREDICTOR, x.dtype)
        return {"embedding": x, "output": x}, {}

    def after_sgd_step(self, role, loss, *, lr):
        raise NotImplementedError


PREDICTOR = draw(D, D, seed=3)


def test_keys_of_one_step_are_the_negatives_of_the_next():
    first, second = draw(B, 2, D), draw(B, 2, D, seed=1)
    objective = harness.make_objective("moco", temperature=TAU, queue=9, dim=D)
    batch = {"mask": jnp.asarray(MASK), "views": jnp.asarray(first)}
    step = jax.jit(
        lambda views, memory: objective.loss(Mirror(), batch | views, memory, jnp.int32(0))
    )
    terms = step({"views": jnp.asarray(first)}, objective.memory(jax.random.key(0), batch))
    assert not np.any(terms.values["contrastive"])
    terms = step({"views": jnp.asarray(second)}, terms.memory)
    np.testing.assert_allclose(terms.metrics["filled"], len(REAL) / 9)
    queue, q, k = unit(-first[REAL, 1]), unit(second[:, 0]), unit(-second[:, 1])
    for i in REAL:
        logits = [q[i] @ k[i] / TAU, *(queue @ q[i] / TAU)]
        want = math.log(sum(map(math.exp, logits))) - logits[0]
        np.testing.assert_allclose(terms.values["contrastive"][i], want, rtol=1e-4)


def test_moco_v3_symmetrizes_and_scales():
    """`2 tau (ctr(q1, k2) + ctr(q2, k1))`."""

    def contrast(q, k):
        q, k = unit(q), unit(k)
        below = [math.log(sum(math.exp(q[i] @ k[j] / TAU) for j in REAL)) for i in REAL]
        return np.mean([b - q[i] @ k[i] / TAU for b, i in zip(below, REAL, strict=True)])

    x = draw(B, 2, D)
    q, k = x @ PREDICTOR, -x
    want = 2 * TAU * (contrast(q[:, 0], k[:, 1]) + contrast(q[:, 1], k[:, 0]))
    objective = harness.make_objective("moco_v3", temperature=TAU)
    loss = jax.jit(lambda batch: objective.loss(Mirror(), batch, {}, jnp.int32(0)))
    value = loss({"views": jnp.asarray(x), "mask": jnp.asarray(MASK)}).values["contrastive"]
    np.testing.assert_allclose((MASK * value).sum() / MASK.sum(), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("simclr", {"temperature": 0.0}, "temperature is 0.0"),
        ("simclr", {"form": "rings"}, "form: 'rings'"),
        ("moco", {"queue": 0}, "queue is 0"),
        ("cacr", {"t_minus": -1.0}, "t_minus is -1.0"),
        ("clip", {"pairing": "sigmoids"}, "pairing: 'sigmoids'"),
        ("groco", {"negatives": 0}, "negatives is 0"),
        ("look", {"neighbours": 0}, "neighbours is 0"),
    ],
)
def test_wrong_hyperparameters_are_named(name, kwargs, match):
    with pytest.raises(ConfigError, match=match):
        harness.make_objective(name, **kwargs)


def test_networks_and_batches_that_do_not_fit():
    with pytest.raises(ConfigError, match="the projector gives 128 features and the queue has 64"):
        harness.setup("moco", kwargs={"dim": 64})
    with pytest.raises(ConfigError, match="a queue of 8 for batches of 16"):
        harness.setup("moco", kwargs={"queue": 8})
    with pytest.raises(ConfigError, match="pairing='sigmoid' needs a bias"):
        harness.setup("clip", kwargs={"pairing": "sigmoid"})


def test_ring_of_a_run_goes_through_its_mesh(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", jax.stages.Lowered.as_text)
    config = config_lib.smoke(simclr.get_config())
    config.roles.student = config_lib.role("mlp", hidden=(8,), num_classes=0)
    config.roles.projector = config_lib.role("projector", features=4)
    config.objective.kwargs.form = "ring"
    experiment = build.build(config, shapes_only=True)
    program: Any = build.compile_step(experiment, build.feed_shapes(experiment))
    assert "collective_permute" in program
