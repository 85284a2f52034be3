"""distill_jax: learning from supervision signals in JAX."""

__version__ = "0.1.0"
