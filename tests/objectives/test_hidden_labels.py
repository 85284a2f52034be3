"""Which methods leave a hidden label alone: by structure, as a run asks, and by numbers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import state as state_lib
from distill_jax.core.means import mean_loss
from distill_jax.core.steps import BoundNets
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.objectives.kd import KD
from distill_jax.run.preflight import trace
from distill_jax.weighting import annealed, teacher_margin
from tests import harness
from tests.reference import cross_entropy, softmax

HIDDEN = np.arange(16) % 4 > 0
HONEST = {
    "active_distillation": {},
    "fitnet": {},
    "kd": {},
    "multi_teacher": {"combination": "confidence"},
    "nested_coteaching": {"ramp": 0},
    "self_training": {"threshold": 0.1},
    "simclr_v2": {"alpha": 0.5},
    "weak_to_strong": {"label_weight": 1.0},
}
READING = {
    "crd": {"class_aware": True},
    "dkd": {},
    "ps_kd": {},
    "sla": {},
    "stored_labels": {},
    "tf_kd": {},
}
NUMBERS = ("active_distillation", "nested_coteaching", "tf_kd")


def hiding(*, mixed=False):
    batch = harness.make_batch(mixed=mixed)
    return {**batch, "labelled": jnp.asarray(np.where(HIDDEN, 0, 4), jnp.float32)}


def leaks(made):
    trainable = tuple(r for r in made.objective.roles if not harness.is_frozen(r))
    fields = {"objective": made.objective, "models": made.models, "shapes": made.shapes}
    return trace.trace(
        types.SimpleNamespace(**fields, trainable=trainable, total_steps=10)  # pyright: ignore
    ).leaks


def by_numbers(made):
    """Whether the gradient changes with the labels that are hidden."""
    batch = hiding()
    state = jax.jit(made.init)(jax.random.key(0))
    fixed = {role: params for role, (params, _) in made.frozen.items()}
    states = {role: s for role, (_, s) in made.frozen.items()} | dict(state.model_state)

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            nets = BoundNets(made.models, {**fixed, **params}, states, key=jax.random.key(1))
            terms = made.objective.loss(nets, batch, state.memory, jnp.int32(0))
            return mean_loss(terms, batch["mask"])[0]

        return jax.grad(loss)(params)

    other = {**batch, "label": (batch["label"] + HIDDEN) % harness.K}
    first, second = (gradient(dict(state.params), b) for b in (batch, other))
    return harness.max_relative(first, second) > 1e-6


@pytest.mark.parametrize("name", [*HONEST, *READING])
def test_a_method_that_reads_hidden_labels_is_told_apart(name):
    made = harness.setup(name, batch=hiding(), kwargs={**HONEST, **READING}[name])
    found = leaks(made)
    assert found == (set() if name in HONEST else {"label"})
    if name in NUMBERS:
        assert by_numbers(made) == bool(found)


@pytest.mark.parametrize(
    "weighting, reads",
    [(annealed.make(total_steps=9), False), (teacher_margin.make(granularity="sample"), True)],
)
def test_so_is_a_weigher(weighting, reads):
    loss_terms = ("cross_entropy", "distillation")
    weighted = WeightedObjective(
        objective=KD(), weighting=weighting, loss_terms=loss_terms, num_classes=harness.K
    )
    models = dict.fromkeys(weighted.roles, harness.tiny_model())
    shapes = state_lib.infer_shapes(weighted, models, hiding())
    made = harness.Setup(weighted, models, shapes, None, None, None)
    assert leaks(made) == ({"label"} if reads else set())


def test_mixed_labels_do_not_say_which_are_hidden():
    assert leaks(harness.setup("kd", batch=hiding(mixed=True))) == {"label_probs"}


def logits_of(**logits):
    def nets(role, *inputs, train=False, stop_gradient_params=False):
        return {"logits": jnp.asarray(logits[role], jnp.float32)}, {}

    return nets


def test_class_means_are_of_labels_that_are_shown():
    weighted = WeightedObjective(
        objective=KD(),
        weighting=teacher_margin.make(),
        loss_terms=("cross_entropy", "distillation"),
        num_classes=harness.K,
    )
    batch, logits = hiding(), np.random.RandomState(0).randn(16, harness.K)
    nets = logits_of(student=logits, teacher=logits)
    sums, counts = weighted.class_sums(nets, batch, {"objective": {}})
    probs, shown = softmax(logits), ~HIDDEN
    onehot = np.eye(harness.K)[np.asarray(batch["label"])][shown]
    np.testing.assert_allclose(sums, onehot.T @ probs[shown], rtol=1e-5)
    np.testing.assert_array_equal(counts, onehot.sum(0))


def test_peers_pick_among_labels_that_are_shown():
    """Half of the four that are shown, by their losses; what is hidden has no loss to rank."""
    r = np.random.RandomState(1)
    logits = {"student": r.randn(16, harness.K), "peer": r.randn(16, harness.K)}
    objective = harness.make_objective("nested_coteaching", forget_rate=0.5)
    batch = hiding()
    terms = objective.loss(logits_of(**logits), batch, {}, jnp.int32(0))
    z, label = logits["peer"], np.asarray(batch["label"])
    picks = cross_entropy(z, label)
    kept = np.argsort(np.where(HIDDEN, np.inf, picks))[:2]
    assert set(np.flatnonzero(terms.values["cross_entropy"])) == set(kept)


def test_confidence_is_in_nats_and_equal_where_a_label_is_hidden():
    r = np.random.RandomState(2)
    logits = {name: r.randn(16, harness.K) for name in ("student", "teacher1", "teacher2")}
    objective = harness.make_objective("multi_teacher", combination="confidence")
    batch = hiding()
    found, whole = (
        objective.loss(logits_of(**logits), b, {}, jnp.int32(0)).weights["distillation/teacher1"]
        for b in (batch, {k: v for k, v in batch.items() if k != "labelled"})
    )
    np.testing.assert_allclose(found, np.where(HIDDEN, 0.5, whole), rtol=1e-5)
