"""A weighting beside the weights that an objective gives its own examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import bilevel, state, steps
from distill_jax.core.api import Terms
from distill_jax.core.errors import ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.objectives.kd import KD
from distill_jax.weighting import meta_weight_net, reweight
from tests import harness
from tests.core.test_hypergradient import LOSS_TERMS, ByProbabilities, weigher_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen(KD):
    """Every third example of the training part counts, as a weight or within the value."""

    as_weight: bool

    def loss(self, nets, batch, memory, step):
        terms = super().loss(nets, batch, memory, step)
        held_out = batch["epoch"] < 0
        chosen = jnp.where(held_out | (batch["index"] % 3 == 0), 3.0, 0.0)
        if self.as_weight:
            return terms.replace(weights={"distillation": chosen})
        value = terms.values["distillation"] * jnp.where(held_out, 1.0, chosen)
        return terms.replace(values={**terms.values, "distillation": value})


def student_and_weigher(weighting, part, **kwargs):
    """Parameters after a step on two levels."""
    weighted = WeightedObjective(
        objective=Chosen(**kwargs),
        weighting=weighting,
        loss_terms=LOSS_TERMS,
        num_classes=harness.K,
    )
    net = harness.tiny_model()
    models = {"student": net, "teacher": net}
    models |= dict.fromkeys(weighting.roles, weigher_model())
    train, held_out = harness.make_batch(), harness.make_batch(8, seed=1)
    held_out["epoch"] -= 1
    shapes = state.infer_shapes(weighted, models, train)
    roles = tuple(weighting.roles)
    tx = bilevel.Optimizers(optax.sgd(0.3), optax.sgd(1.0), roles)
    trainable = ("student", *roles)
    init = state.make_init(weighted, models, tx, shapes, trainable=trainable, ema={})
    step = bilevel.make_bilevel_step(
        weighted, models, tx, bilevel.Bilevel(jvp_fraction=part), outer=True
    )

    def begin(key):
        return init(key), {"teacher": net.init(key, train["input"])}

    draw = np.random.default_rng(0)

    def drawn(x):
        scale = 0.3 if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
        return (scale * draw.normal(size=x.shape)).astype(x.dtype)

    start = jax.tree.map(drawn, jax.eval_shape(begin, jax.random.key(0)))
    fed = {"train": train, "held_out": held_out}
    return jax.device_get(jax.jit(step)(*start, fed, jax.random.key(3))[0].params)


@pytest.mark.parametrize("weighting, part", [(ByProbabilities(), 0.5), (reweight.make(), 1.0)])
def test_an_objectives_own_weights_are_factors(weighting, part):
    """A weight of an example is the same as that factor in its value, on both levels."""
    with jax.enable_x64(True):
        found = [student_and_weigher(weighting, part, as_weight=own) for own in (True, False)]
    assert harness.max_relative(*found) < 1e-8


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_divided_by_a_mean_of_the_batch_are_not_accumulated(normalize):
    weighting = meta_weight_net.make(normalize=normalize)
    weighted = WeightedObjective(
        objective=KD(), weighting=weighting, loss_terms=LOSS_TERMS, num_classes=harness.K
    )
    assert weighted.couples_batch == normalize
    if normalize:
        with pytest.raises(ConfigError, match="couples the examples"):
            steps.check_accumulation(weighted, 2)


@pytest.mark.parametrize("teacher", [True, False])
def test_a_weighting_does_not_see_hidden_labels(teacher):
    weighted = WeightedObjective(
        objective=KD(), weighting=reweight.make(), loss_terms=LOSS_TERMS, num_classes=3
    )
    logits = {"teacher": jnp.asarray([[0.0, 2, 1], [0, 1, 2]])} if teacher else {}
    terms = Terms(values=dict.fromkeys(LOSS_TERMS, jnp.zeros(2)), logits=logits)
    batch = {"labelled": jnp.asarray([2.0, 0]), "mask": jnp.ones(2)}
    for hidden in (0, 1):
        evidence = weighted.evidence(terms, {**batch, "label": jnp.asarray([0, hidden])}, {})
        np.testing.assert_array_equal(evidence.label_probs, [[1, 0, 0], [0, 0, int(teacher)]])
