"""Contrastive distillation against loops, against PyTorch, and the contract of its memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import partition, state
from distill_jax.core.errors import ConfigError
from distill_jax.losses import contrastive_distillation as losses
from distill_jax.objectives import crd
from distill_jax.trainer.io.checkpoint import Checkpointer
from tests import harness
from tests.reference import difference, draw, unit

MEMORY = {"negatives": "memory", "dim": 32, "num_negatives": 40, "class_aware": True}


def values_and_gradients(fn, *inputs):
    """Losses `[b]`, and the gradients of their sum."""
    value, pull = jax.vjp(fn, *inputs)
    return value, pull(jnp.ones_like(value))


def loop_noise_contrast(positive, negative, weights, log_z, n):
    b, q = negative.shape
    total = np.zeros(b)
    for i in range(b):
        p = math.exp(positive[i] - log_z)
        total[i] = -math.log(p / (p + q / n))
        for j in range(q):
            p = math.exp(negative[i, j] - log_z)
            total[i] -= weights[i, j] * math.log(1 - p / (p + q / n))
    return total


def loop_batch_contrast(s, t, allowed, temperature):
    b, total = len(s), np.zeros(len(s))
    for i in range(b):
        for x, y in ((s, t), (t, s)):
            e = [math.exp(x[i] @ y[j] / temperature) for j in range(b)]
            total[i] -= math.log(e[i] / sum(e[j] for j in range(b) if allowed[i, j] or j == i))
    return total


def test_noise_contrast_equals_its_definition():
    b, q, n, log_z = 3, 4, 50, 1.3
    r = np.random.RandomState(0)
    positive, negative = r.randn(b), r.randn(b, q)
    weights = r.randint(0, 2, (b, q)).astype(float)

    def fn(positive, negative):
        w = jnp.asarray(weights)
        return losses.noise_contrast(positive, negative, w, log_z=log_z, num_examples=n)

    with jax.enable_x64(True):
        value, grads = jax.jit(functools.partial(values_and_gradients, fn))(positive, negative)
    loop = lambda p, q: loop_noise_contrast(p, q, weights, log_z, n)  # noqa: E731
    np.testing.assert_allclose(value, loop(positive, negative), rtol=1e-8)
    want = difference(lambda x: loop(x, negative).sum(), positive)
    np.testing.assert_allclose(grads[0], want, atol=1e-8)
    want = difference(lambda x: loop(positive, x).sum(), negative)
    np.testing.assert_allclose(grads[1], want, atol=1e-8)


def test_extreme_logits_stay_finite():
    def fn(far):
        negative, ones = far[:, None], jnp.ones((2, 1))
        return losses.noise_contrast(
            far, negative, ones, log_z=jnp.float32(0), num_examples=9
        ).sum()

    value, grad = jax.value_and_grad(fn)(jnp.array([1e3, -1e3]))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_normalizer_is_the_mean_over_the_pairs_that_count():
    r = np.random.RandomState(0)
    positive, negative, weights = r.randn(3), r.randn(3, 4), r.rand(3, 4)
    mask, total, count = [1.0, 0.0, 1.0], 0.0, 0.0
    for i in (0, 2):
        total += math.exp(positive[i]) + sum(weights[i] * np.exp(negative[i]))
        count += 1 + weights[i].sum()
    got = losses.estimate_log_z(
        *(jnp.asarray(x) for x in (positive, negative, weights, mask)), num_examples=50
    )
    np.testing.assert_allclose(got, math.log(50 * total / count), rtol=1e-5)


def test_batch_contrast_equals_its_definition():
    s, t = unit(draw(5, 4)), unit(draw(5, 4, seed=1))
    allowed = np.random.RandomState(2).rand(5, 5) < 0.6

    def fn(s, t):
        return losses.batch_contrast(s, t, jnp.asarray(allowed), temperature=0.3)

    with jax.enable_x64(True):
        value, grads = jax.jit(functools.partial(values_and_gradients, fn))(s, t)
    np.testing.assert_allclose(value, loop_batch_contrast(s, t, allowed, 0.3), rtol=1e-8)
    for i in range(2):
        pair = [s, t]
        want = difference(
            lambda x, i=i, pair=pair: loop_batch_contrast(
                *(x if i == j else pair[j] for j in range(2)), allowed, 0.3
            ).sum(),
            pair[i],
        )
        np.testing.assert_allclose(grads[i], want, atol=1e-7)


def test_equals_pytorch():
    """Both losses over whole batches, as public programs for PyTorch spell them."""
    torch = pytest.importorskip("torch")
    s, t, bank = (
        unit(draw(5, 4)),
        unit(draw(5, 4, seed=1)),
        unit(draw(5 * 7, 4, seed=2)).reshape(5, 7, 4),
    )
    x, y, n, z = torch.tensor(s, requires_grad=True), torch.tensor(t), 90, 40.0

    logits = x @ y.T / 0.3
    cross_entropy = torch.nn.functional.cross_entropy
    want = cross_entropy(logits, torch.arange(5)) + cross_entropy(logits.T, torch.arange(5))
    want.backward()
    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(
            lambda s: losses.batch_contrast(
                s, jnp.asarray(t), jnp.ones((5, 5), bool), temperature=0.3
            ).mean()
        )(jnp.asarray(s))
    np.testing.assert_allclose(value, want.item(), rtol=1e-8)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-9)

    x.grad = None
    p = (
        torch.exp(torch.bmm(torch.tensor(bank), x[:, :, None])[:, :, 0] / 0.3) / z
    )  # first: positive
    noise = 6 / n
    want = -(torch.log(p[:, 0] / (p[:, 0] + noise)) + torch.log(noise / (p[:, 1:] + noise)).sum(1))
    want.mean().backward()

    def fn(s):
        logits = (s[:, None] * jnp.asarray(bank)).sum(-1) / 0.3
        return losses.noise_contrast(
            logits[:, 0], logits[:, 1:], jnp.ones((5, 6)), log_z=jnp.log(z), num_examples=n
        ).mean()

    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(fn)(jnp.asarray(s))
    np.testing.assert_allclose(value, want.mean().item(), rtol=1e-8)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-9)


def nets_that_give(s, t):
    """Networks whose projectors give two embeddings, at twice their length."""

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del inputs, train, stop_gradient_params
        found = {"projector": s, "projector_of_teacher": t}.get(role)
        if found is not None:
            return {"output": jnp.asarray(2 * found)}, {}
        return {"embedding": jnp.zeros((len(s), 3)), "logits": jnp.zeros((len(s), 5))}, {}

    return nets


@pytest.mark.parametrize("class_aware", [True, False])
def test_negatives_in_a_batch(class_aware):
    """Padding is no negative, nor are examples of the same class where classes count."""
    s, t, batch = unit(draw(6, 4)), unit(draw(6, 4, seed=1)), harness.make_batch(6)
    batch["mask"] = np.array([1.0, 1, 0, 1, 1, 1])
    batch["label"] = label = np.array([0, 0, 1, 1, 2, 0], np.int32)
    objective, nets = crd.make(class_aware=class_aware), nets_that_give(s, t)
    terms = jax.jit(lambda batch: objective.loss(nets, batch, {}, jnp.int32(0)))(batch)
    allowed = np.array([[j != 2 for j in range(6)] for i in range(6)])
    if class_aware:
        allowed &= np.array([[label[i] != label[j] for j in range(6)] for i in range(6)])
    want = loop_batch_contrast(s, t, allowed, 0.07)
    valid = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(np.asarray(terms.values["contrast"])[valid], want[valid], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shared, class_aware", [(True, True), (False, False)])
def test_memory_form_step_by_step(shared, class_aware):
    """Two steps of the memory form from its description, example by example."""
    b, d, n, q, step = 6, 4, 20, 9, 3
    s, t = unit(draw(b, d)), unit(draw(b, d, seed=1))
    batch = harness.make_batch(b)
    batch["index"] = jnp.array([4, 7, 4, 1, 19, 7], jnp.int32)
    batch["mask"] = jnp.array([1.0, 1, 1, 1, 1, 0])
    objective = crd.make(
        negatives="memory",
        dim=d,
        num_examples=n,
        num_negatives=q,
        shared_negatives=shared,
        class_aware=class_aware,
        label_weight=0.0,
    )

    nets = nets_that_give(s, t)
    memory = objective.memory(jax.random.key(1), batch)
    banks = {k: np.array(memory[k], np.float64) for k in ("student", "teacher")}
    labels, log_z = np.full(n, -1), {}
    rows = 1 if shared else b
    index, label, mask = (np.asarray(batch[k]) for k in ("index", "label", "mask"))
    for now in (step, step + 1):
        terms = objective.loss(nets, batch, memory, jnp.int32(now))
        key = jax.random.fold_in(jax.random.key(0), now)
        drawn = np.broadcast_to(np.asarray(jax.random.randint(key, (rows, q), 0, n)), (b, q))
        want = np.zeros(b)
        for ours, theirs in (("student", "teacher"), ("teacher", "student")):
            anchor = s if ours == "student" else t
            bank = banks[theirs]
            positive = np.array([anchor[i] @ bank[index[i]] for i in range(b)]) / 0.07
            negative = np.array([[anchor[i] @ bank[j] for j in drawn[i]] for i in range(b)]) / 0.07
            allowed = np.array([[float(j != index[i]) for j in drawn[i]] for i in range(b)])
            if class_aware:
                allowed *= np.array([[labels[j] != label[i] for j in drawn[i]] for i in range(b)])
            weights = allowed * q / allowed.sum(1, keepdims=True)
            if ours not in log_z:
                total = sum(
                    mask[i] * (math.exp(positive[i]) + weights[i] @ np.exp(negative[i]))
                    for i in range(b)
                )
                log_z[ours] = math.log(n * total / (mask.sum() * (1 + q)))
            want += loop_noise_contrast(positive, negative, weights, log_z[ours], n)
        np.testing.assert_allclose(terms.values["contrast"][:5], want[:5], rtol=2e-5)

        old = {k: v.copy() for k, v in banks.items()}
        for i in range(b):
            if mask[i]:
                for name, embedding in (("student", s), ("teacher", t)):
                    moved = 0.5 * old[name][index[i]] + 0.5 * embedding[i]
                    banks[name][index[i]] = moved / np.linalg.norm(moved)
                labels[index[i]] = label[i]
        memory = terms.memory
        for name in banks:
            np.testing.assert_allclose(memory[name], banks[name], atol=1e-6)
        if class_aware:
            np.testing.assert_array_equal(memory["label"], labels)
    np.testing.assert_allclose(memory["log_z"], [log_z["student"], log_z["teacher"]], rtol=1e-5)


@pytest.fixture(scope="module")
def case():
    made = harness.setup("crd", kwargs=MEMORY)
    return harness.follow(made, harness.make_batch(), n_steps=2)


IN_ONE_PROCESS = pytest.mark.xdist_group("crd_memory")


@IN_ONE_PROCESS
def test_memory_on_one_device_equals_eight(case):
    one, mesh = case.states[2], partition.make_mesh(data=2, fsdp=4)
    eight, other = harness.run(case.made, case.batch, mesh=mesh, n_steps=2)
    assert set(one.memory) == {"student", "teacher", "log_z", "label"}
    assert harness.max_relative(one.memory, eight.memory) < 1e-5
    assert harness.max_relative(one.params, eight.params) < 1e-5
    np.testing.assert_allclose(case.metrics[-1]["contrast"], other[-1]["contrast"], rtol=1e-5)


@IN_ONE_PROCESS
def test_every_leaf_learns_and_only_rows_of_the_batch_move(case):
    start, end = case.states[:2]
    still = jax.tree.map(np.array_equal, start.params, end.params)
    assert not any(jax.tree.leaves(still))
    for name in ("student", "teacher", "label"):
        moved = (start.memory[name] != end.memory[name]).reshape(64, -1).any(1)
        np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(16))
        assert end.memory[name].dtype == start.memory[name].dtype


@IN_ONE_PROCESS
def test_padding_is_neither_written_nor_read(case):
    batch = jax.device_get(case.batch)
    padded = jax.tree.map(lambda x: np.concatenate([x, x[:4] * 0 + 3]), batch)
    padded["index"][16:], padded["mask"][16:] = [3, 3, 40, 41], 0
    want = case.states[2]
    got, other = harness.run(case.made, padded, n_steps=2)
    assert harness.max_relative(want.params, got.params) < 1e-5
    assert harness.max_relative(want.memory, got.memory) < 1e-5
    np.testing.assert_allclose(case.metrics[-1]["loss"], other[-1]["loss"], rtol=1e-5)


def test_resume_is_bitwise(tmp_path):
    made = harness.setup("crd", kwargs=MEMORY, tx=optax.adamw(1e-2))
    batch, step = harness.make_batch(), jax.jit(made.step)
    states = [jax.jit(made.init)(jax.random.key(0))]
    for _ in range(3):
        states.append(step(states[-1], made.frozen, batch, jax.random.key(0))[0])
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(states[1], {}, metric=None)
    checkpointer.wait()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), states[0]
    )
    current = checkpointer.restore(like).state
    for _ in range(2):
        current, _ = step(current, made.frozen, batch, jax.random.key(0))
    checkpointer.close()
    same = jax.tree.map(np.array_equal, *jax.device_get((current, states[3])))
    assert all(jax.tree.leaves(same))


def test_the_last_occurrence_is_written():
    index, mask = jnp.array([5, 2, 5, 2, 0]), jnp.array([1.0, 1, 1, 0, 0])
    np.testing.assert_array_equal(crd.rows_to_write(index, mask, 9), [9, 2, 5, 9, 9])


@pytest.mark.parametrize("name", ["crd", "ps_kd"])
def test_a_step_writes_its_rows_of_a_table_in_place(name):
    kwargs = MEMORY if name == "crd" else {}
    made = harness.setup(name, kwargs={**kwargs, "num_examples": 50_000}, tx=optax.sgd(1e-2))
    state = jax.eval_shape(made.init, jax.random.key(0))
    table = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.memory))
    step = jax.jit(made.step, donate_argnums=0)
    compiled = step.lower(state, made.frozen, harness.make_batch(), jax.random.key(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table / 4


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"negatives": "queue"}, "memory"),
        ({"contrast_temperature": 0.0}, "contrast_temperature"),
        ({**MEMORY, "momentum": 1.0}, "momentum"),
        ({**MEMORY, "num_examples": 1}, "num_examples"),
        ({**MEMORY, "dim": 16}, "set it to 32"),
        ({"feature": "embed"}, "embedding"),
    ],
)
def test_mistakes_are_named(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        harness.setup("crd", kwargs=kwargs)


def test_projectors_share_one_space():
    objective = harness.make_objective("crd")
    models = {role: harness.role_model(role) for role in objective.roles}
    narrow = harness.tiny_model()

    def apply(params, st, x, *, train, rngs):
        out, st = narrow.apply(params, st, x, train=train, rngs=rngs)
        return {"output": out["logits"]}, st

    models["projector"] = narrow._replace(apply=apply)
    with pytest.raises(ConfigError, match="projector gives 5 features"):
        state.infer_shapes(objective, models, harness.make_batch())
