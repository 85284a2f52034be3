"""Products in losses of embeddings are of full precision on every device."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from distill_jax.analysis import walk
from distill_jax.losses import clustering, contrastive, isotropy, noncontrastive, ranking
from distill_jax.models import prototypes

B, V, D = 8, 2, 5
MASK, LABEL = jnp.ones(B), jnp.arange(B) % 3
ROWS, VIEWS = jnp.ones((B, D)), jnp.ones((B, V, D))
HEAD = prototypes.make(count=4)

LOSSES = {
    "cross_view_cosine": lambda x: noncontrastive.cross_view_cosine(x, VIEWS),
    "cross_correlation": lambda x: noncontrastive.cross_correlation(x[:, 0], x[:, 1], MASK),
    "covariance_penalty": lambda x: noncontrastive.covariance_penalty(x[:, 0], MASK),
    "koleo": lambda x: noncontrastive.koleo(x[:, 0], MASK, groups=2),
    "move_centre": lambda x: clustering.move_centre(jnp.ones(D), x, jnp.ones((B, V)), decay=0.9),
    "view_entropies": lambda x: clustering.view_entropies(VIEWS, x, temperature=0.1),
    "sigreg": lambda x: isotropy.sigreg(x[:, 0], MASK, jnp.ones((D, 3))),
    "prototypes": lambda x: HEAD.apply(HEAD.init(jax.random.key(0), x)[0], {}, x, train=True)[0],
    **{
        f"nt_xent {form}": lambda x, form=form: contrastive.nt_xent(
            x, MASK, temperature=0.1, form=form
        )
        for form in contrastive.FORMS
    },
    "sup_con": lambda x: contrastive.sup_con(x, LABEL, MASK, temperature=0.1),
    "soft_con": lambda x: contrastive.soft_con(x, ROWS, MASK, temperature=0.1),
    "pair_contrast": lambda x: contrastive.pair_contrast(x[:, 0], x[:, 1], MASK),
    "sigmoid_contrast": lambda x: contrastive.sigmoid_contrast(
        x[:, 0], x[:, 1], MASK, jnp.ones(1), jnp.ones(1)
    ),
    "attraction": lambda x: contrastive.attraction(x, t=1.0),
    "repulsion": lambda x: contrastive.repulsion(x, MASK, t=1.0),
    "groco": lambda x: ranking.groco(x, MASK, negatives=3, steepness=1.0),
    "look": lambda x: ranking.look(x, LABEL, MASK, neighbours=3, temperature=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_products_are_of_full_precision(name):
    def total(x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(LOSSES[name](x)))

    equations = walk.equations(jax.make_jaxpr(jax.grad(total))(VIEWS))
    found = [e.params["precision"] for e in equations if e.primitive is lax.dot_general_p]
    assert found
    assert set(found) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
