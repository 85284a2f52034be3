"""Objectives over tokens against transcriptions in NumPy; large vocabularies; bad batches."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import bilevel, phases, sequences, state, steps
from distill_jax.core.errors import ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.losses.sequence import DIVERGENCES
from distill_jax.models import ratio_mlp, transformer
from distill_jax.models.adapters import as_model
from distill_jax.objectives import next_token, salt, salt_ds, token_kd
from distill_jax.weighting import meta_weight_net
from tests import harness

KEY = jax.random.key(0)
SIZES = {"vocabulary": harness.VOCABULARY, "layout": "smollm", "depth": 1, "heads": 2}


def network(width=8, **kwargs):
    return transformer.make(**{**SIZES, **kwargs}, width=width)


def answering(batch, *, top=0, seed=0) -> tuple[Any, dict[str, np.ndarray]]:
    """Networks that answer with random logits, and these logits, float64."""
    random = np.random.default_rng(seed)
    shape = (*batch["target"].shape, harness.VOCABULARY)
    logits = {role: random.normal(size=shape) for role in ("student", "teacher")}

    def nets(role, view, *, train=False):
        assert train == (role == "student")
        z = jnp.asarray(logits[role], jnp.float32)
        outputs = {"logits": z}
        if isinstance(view, dict):
            outputs["log_probs"] = jnp.take_along_axis(jax.nn.log_softmax(z), view["ask"], -1)
        if role == "teacher" and top:
            found = sequences.top_log_probs(z, top)
            outputs = {"top_index": found.index, "top_log_probs": found.log_probs}
            outputs["tail_log_prob"] = found.tail
        return outputs, {}

    return nets, logits


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def oracle(p, q, kind, s):
    """The six divergences of distributions `[..., c]`, from their definitions."""

    def kl(a, b):
        return (a * np.log(a / b)).sum(-1)

    m = (1 - s) * p + s * q
    return {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "jeffreys": 0.5 * kl(p, q) + 0.5 * kl(q, p),
        "skew_forward": kl(p, s * p + (1 - s) * q),
        "skew_reverse": kl(q, s * q + (1 - s) * p),
        "jensen_shannon": (1 - s) * kl(p, m) + s * kl(q, m),
    }[kind]


def test_next_token_is_the_mean_over_targets():
    batch, objective = harness.make_token_batch(), next_token.make()
    nets, logits = answering(batch)
    terms = objective.loss(nets, batch, {}, jnp.int32(0))
    p, rows = softmax(logits["student"]), np.asarray(batch["mask"])
    losses = [
        -np.log(p[b, t, batch["target"][b, t]])
        for b in range(len(p))
        for t in range(p.shape[1])
        if rows[b] and batch["target_mask"][b, t]
    ]
    loss, metrics = steps.mean_loss(terms, batch["mask"])
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["counts/cross_entropy"] == len(losses)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("top", [0, 3])
def test_token_kd(kind, top):
    batch, share, alpha = harness.make_token_batch(seed=1), 0.3, 0.7
    temperature = 1.0 if top else 2.0
    objective = token_kd.make(divergence=kind, share=share, alpha=alpha, temperature=temperature)
    nets, logits = answering(batch, top=top)
    terms = objective.loss(nets, batch, {}, jnp.int32(0))
    p, q = (softmax(logits[role] / temperature) for role in ("teacher", "student"))
    if top:
        index = np.argsort(-p, -1)[..., :top]
        p, q = (np.take_along_axis(x, index, -1) for x in (p, q))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    mask = np.asarray(batch["mask"])[:, None] * np.asarray(batch["target_mask"])
    distillation = temperature**2 * (mask * oracle(p, q, kind, share)).sum() / mask.sum()
    own = softmax(logits["student"])
    picked = np.take_along_axis(own, np.asarray(batch["target"])[..., None], -1)[..., 0]
    cross_entropy = -(mask * np.log(picked)).sum() / mask.sum()
    loss, metrics = steps.mean_loss(terms, batch["mask"])
    assert float(metrics["distillation"]) == pytest.approx(distillation, rel=2e-5)
    expected = alpha * distillation + (1 - alpha) * cross_entropy
    assert float(loss) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("top", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_weight_for_each_token_is_learned(top):
    """The weighting learns in the bilevel step; with `top`, through log-probabilities asked for."""
    batch = harness.make_token_batch()
    weighted = WeightedObjective(
        objective=token_kd.make(),
        weighting=meta_weight_net.make(),  # pyright: ignore[reportAbstractUsage]
        loss_terms=("cross_entropy", "distillation"),
        num_classes=0,
        task="classification",
    )
    models = {
        "student": network() if top else harness.answering(harness.tiny_decoder()),
        "teacher": network(12, top=top) if top else harness.tiny_decoder(width=12),
        "weighting": as_model(ratio_mlp.make(hidden=(4,), outputs=2)),
    }
    shapes = state.infer_shapes(weighted, models, batch)
    assert shapes.terms.weights["distillation"].shape == batch["target"].shape
    optimizers: Any = bilevel.Optimizers(optax.sgd(0.1), optax.sgd(1e3), ("weighting",))
    learned = ("student", "weighting")
    init = state.make_init(weighted, models, optimizers, shapes, trainable=learned, ema={})
    start = jax.jit(init)(KEY)
    frozen = {"teacher": models["teacher"].init(KEY, batch["input"])}
    step = bilevel.make_bilevel_step(weighted, models, optimizers, bilevel.Bilevel(), outer=True)
    both = {"train": batch, "held_out": harness.make_token_batch(seed=2)}
    new, metrics = jax.jit(step)(start, frozen, both, KEY)
    assert metrics["outer_grad_norm"] > 0 and np.isfinite(metrics["outer_loss"])
    for role in learned:
        moved = jax.tree.map(lambda a, b: np.any(a != b), start.params[role], new.params[role])
        assert any(jax.tree.leaves(moved))


def temporaries(objective, models, batch: Any) -> int:
    """Bytes of temporary memory of the gradient with respect to the student."""
    shapes = state.infer_shapes(objective, models, batch)

    def loss(student, teacher):
        params = {"student": student, "teacher": teacher}
        nets = steps.BoundNets(models, params, {role: {} for role in models}, key=KEY)
        return steps.mean_loss(objective.loss(nets, batch, {}, jnp.int32(0)), batch["mask"])[0]

    params = [shapes.roles[role].params for role in ("student", "teacher")]
    compiled = jax.jit(jax.grad(loss)).lower(*params).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_a_large_vocabulary():
    v, shape = 49_152, (4, 1024)
    batch = {
        "input": np.zeros(shape, np.int32),
        "target": np.zeros(shape, np.int32),
        "target_mask": np.ones(shape, np.float32),
        "mask": np.ones(4, np.float32),
    }
    student = network(32, vocabulary=v)
    dense, sparse = (
        temporaries(
            token_kd.make(),
            {"student": student, "teacher": network(16, vocabulary=v, top=top)},
            batch,
        )
        for top in (0, 16)
    )
    assert sparse <= 0.45 * dense, (sparse, dense)


REFUSED = {
    "no targets": ({"target": None}, {}, {}, "a batch has no target"),
    "another vocabulary": ({}, {"vocabulary": 13}, {}, "13 tokens and the student 11"),
    "another one's top": ({}, {"vocabulary": 13, "top": 2}, {}, "13 tokens and the student 11"),
    "a temperature": ({}, {"top": 2}, {"temperature": 2.0}, "temperature is 2.0"),
    "a divergence": ({}, {}, {"divergence": "forwards"}, "no divergence 'forwards'"),
    "more than all": ({}, {"top": 12}, {}, "no 12 most probable tokens of 11"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, of_teacher, kwargs, message = REFUSED[name]
    batch = {**harness.make_token_batch(), **changes}
    batch = {key: x for key, x in batch.items() if x is not None}
    with pytest.raises(ConfigError) as error:
        models = {"student": network(), "teacher": network(**of_teacher)}
        state.infer_shapes(token_kd.make(**kwargs), models, batch)
    assert message in str(error.value)


@pytest.mark.parametrize(("teaching", "ramp"), [(3, 0), ("20 %", "10 steps"), ("100 %", 0)])
def test_salt_teaches_first(teaching, ramp):
    """Its weight over the steps, and its loss with a teacher that is softened alone."""
    batch, rho, omega = harness.make_token_batch(), 0.5, 0.6
    made = salt.make(omega=omega, rho=rho, teaching=teaching, ramp=ramp, total_steps=50)
    end, length = {3: 3, "20 %": 10, "100 %": 50}[teaching], 10 if ramp else 0
    nets, logits = answering(batch)
    mask = np.asarray(batch["mask"])[:, None] * np.asarray(batch["target_mask"])
    p, q = softmax(logits["teacher"] / rho), softmax(logits["student"])
    kl = (mask * oracle(p, q, "forward", 0.5)).sum() / mask.sum()
    picked = np.take_along_axis(q, np.asarray(batch["target"])[..., None], -1)[..., 0]
    cross_entropy = -(mask * np.log(picked)).sum() / mask.sum()
    stages = phases.of(made)
    assert [stage.start for stage in stages] == ([0] if end == 50 else [0, end + length])
    assert all(stage.objective.roles == ("student",) for stage in stages[1:])
    for step in (0, 2, 3, 9, 10, 12, 20, 49):
        left = np.clip((end + length - step) / length, 0, 1) if length else step < end
        loss, _ = steps.mean_loss(made.loss(nets, batch, {}, jnp.int32(step)), batch["mask"])
        expected = omega * left * kl + (1 - omega * left) * cross_entropy
        assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_salt_ds_selects_rows_that_are_hard_and_learnable():
    """Scores and selection by NumPy; rows left out count 0 in the first stage only."""
    batch = {**harness.make_token_batch(), "mask": jnp.ones(16)}
    made = salt_ds.make(num_examples=20, share=0.4, top=3, teaching=5)
    nets, logits = answering(batch)

    def scout(role, view, **kwargs):
        return nets("teacher" if role == "teacher_scout" else role, view, **kwargs)

    rows = made.dataset_pass(cast(Any, scout), batch, {}, jnp.int32(0))
    p, mask, target = (
        softmax(logits["teacher"]),
        *map(np.asarray, (batch["target_mask"], batch["target"])),
    )
    scores = []
    for b in range(16):
        best = np.argsort(-p[b], -1)[:, :3]
        kept = [t for t in range(p.shape[1]) if mask[b, t] and target[b, t] in best[t]]
        losses = [-np.log(p[b, t, target[b, t]]) for t in kept]
        scores.append(np.median(losses) if losses else -np.inf)
    np.testing.assert_allclose(rows["score"], scores, rtol=1e-5)
    ids = np.arange(2, 18)
    memory = made.memory(KEY, batch)
    memory = made.init_memory(
        {"score": np.asarray(rows["score"])}, ids, memory, np.random.default_rng()
    )
    chosen = np.zeros(20)
    chosen[ids[np.argsort(-np.array(scores), kind="stable")[:7]]] = 1
    np.testing.assert_array_equal(memory["selected"], chosen)
    given = {**batch, "index": jnp.asarray(ids)}
    for step, weight in ((0, chosen[2:18]), (5, np.ones(16))):
        terms = made.loss(cast(Any, scout), given, memory, jnp.int32(step))
        np.testing.assert_array_equal(terms.counts["cross_entropy"], weight[:, None] * mask)
    assert [stage.start for stage in phases.of(made)] == [0, 5]


def test_uniform_labels_need_no_teacher():
    batch, made = harness.make_token_batch(), salt.make(labels="uniform", teaching=5, omega=0.3)
    nets, logits = answering(batch)
    assert made.roles == ("student",)
    q, v = softmax(logits["student"]), harness.VOCABULARY
    terms = made.loss(nets, batch, {}, jnp.int32(0))
    want = np.asarray(batch["target_mask"]) * (-np.log(q).mean(-1) - np.log(v))
    np.testing.assert_allclose(terms.values["distillation"], want, rtol=1e-4, atol=1e-6)


def test_too_many_logits_are_refused_before_they_exist():
    batch = jax.eval_shape(lambda: harness.make_token_batch(2**12))
    models = {"student": network(vocabulary=2**16), "teacher": network(vocabulary=2**16)}
    with pytest.raises(ConfigError, match="too many to hold"):
        state.infer_shapes(token_kd.make(), models, batch)
