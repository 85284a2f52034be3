"""A bank of image transformations used as labels, and joint logits over classes and views.

Self-supervised label augmentation (Lee, Hwang, Shin 2020, arXiv:1910.05872), section 3: M
transformations, k classes, k * M joint classes. Views are sample-major: row `i * M + j` is view j
of image i; joint class `c * M + j` is class c under transformation j. View 0 is the image itself.
"""

import itertools

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array

ROTATIONS = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}
"""Quarter turns by size of the group."""

PERMUTATIONS = {
    1: ((0, 1, 2),),
    3: ((0, 1, 2), (1, 2, 0), (2, 0, 1)),
    6: tuple(itertools.permutations(range(3))),
}
"""Permutations of three colour channels: identity, cyclic, all."""


def augmented_views(x: Array, *, rotations: int, permutations: int) -> Array:
    """Returns every view of images, `[b, h, w, c] -> [b * M, h, w, c]`, sample-major.

    Args:
      x: images; square if rotated, with three channels if these are permuted.
      rotations: 1, 2 or 4.
      permutations: 1, 3 or 6. `M = rotations * permutations`, the permutation varies fastest.
    """
    views = [
        turned if permutations == 1 else turned[..., jnp.array(order)]
        for turned in (jnp.rot90(x, turns, (1, 2)) for turns in ROTATIONS[rotations])
        for order in PERMUTATIONS[permutations]
    ]
    return jnp.stack(views, axis=1).reshape(-1, *x.shape[1:])


def own_columns(joint: Array, *, views: int) -> Array:
    """Returns the joint logits of each view's own transformation, `[b * M, k * M] -> [b, M, k]`.

    Entry `[i, j, c]` is the logit of joint class `c * M + j` in view j. The mean over j is the
    aggregated prediction (section 3.2), and entry `[i, 0]` is the single-inference one.
    """
    own = joint.reshape(-1, views, joint.shape[-1] // views, views)
    return jnp.diagonal(own, axis1=1, axis2=3).swapaxes(1, 2)


def joint_cross_entropy(joint: Array, probs: Array, *, views: int) -> Array:
    """Cross-entropy of the joint class, mean over views, `[b * M, k * M], [b, k] -> [b]`.

    Args:
      joint: logits of the joint classes of every view.
      probs: the label as a distribution over the k classes, one-hot or mixed.
      views: M.
    """
    log_p = own_columns(jax.nn.log_softmax(joint), views=views)
    return -(log_p * probs[:, None, :]).sum(-1).mean(-1)
