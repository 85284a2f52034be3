"""Mixed precision: parameters and optimizer in float32, networks in a compute type.

With "float64" parameters and optimizer have that type too, and JAX must be allowed 64 bits.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import PyTree

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def cast(tree: PyTree, dtype) -> PyTree:
    """Casts the floating-point leaves of `tree`; integers and keys pass through.

    A leaf wider than float32 keeps its type, so that a float64 run stays float64 throughout.
    """

    def one(x):
        wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4
        return x.astype(dtype) if wide else x

    return jax.tree.map(one, tree)
