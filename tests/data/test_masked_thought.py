"""Hidden tokens of answers: which they may be, how many, and that all else stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import tokens

V, B, T, KEY = 50, 64, 40, jax.random.key(2)


def batch_of():
    """Rows of two documents and padding, of which the beginnings are questions."""
    r = np.random.RandomState(0)
    segments = np.where(np.arange(T + 1) < 18, 0, 1)
    segments = np.where(np.arange(T + 1) > 35, -1, segments)[None].repeat(B, 0)
    rows = {"tokens": r.randint(0, V, (B, T + 1)), "segments": segments}
    batch = {
        "input": jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), rows),
        "index": jnp.arange(B, dtype=jnp.int32),
        "epoch": jnp.zeros(B, jnp.int32),
    }
    batch = dict(tokens.make_next_token()(KEY, batch, jnp.int32(0)))
    question = np.arange(T) % 18 < 5  # targets that are not to be learned
    batch["target_mask"] = batch["target_mask"] * (1 - question[None])
    return batch


def hidden(batch, step=0, key=KEY, **kwargs):
    made = jax.jit(tokens.make_masked_thought(vocabulary=V, **kwargs))(key, batch, jnp.int32(step))
    same = {name: x for name, x in made.items() if name != "input"}
    assert jax.tree.all(jax.tree.map(np.array_equal, same, {n: batch[n] for n in same}))
    np.testing.assert_array_equal(made["input"]["segments"], batch["input"]["segments"])
    return np.asarray(made["input"]["tokens"])


def test_tokens_of_answers_are_hidden():
    batch = batch_of()
    clean, mask = np.asarray(batch["input"]["tokens"]), np.asarray(batch["target_mask"])
    segments = np.asarray(batch["input"]["segments"])
    may = np.zeros((B, T), bool)
    for b in range(B):
        for t in range(1, T):
            may[b, t] = mask[b, t - 1] > 0 and segments[b, t] == segments[b, t - 1]
    assert 0 < may.mean() < 0.8
    found = hidden(batch, rate=0.4, mask_token=V - 1)
    changed = found != clean
    assert not changed[~may].any() and (found[changed] == V - 1).all()
    share = (found == V - 1)[may].mean() - (clean == V - 1)[may].mean()
    np.testing.assert_allclose(share, 0.4, atol=0.05)
    drawn = hidden(batch, rate=1.0)
    assert not (drawn != clean)[~may].any() and len(np.unique(drawn[may])) == V
    np.testing.assert_array_equal(hidden(batch, rate=0.0), clean)


def test_the_share_rises_over_the_ramp():
    batch = batch_of()
    options = {"rate": 0.8, "ramp": 100, "mask_token": 0}
    counts = [(hidden(batch, step, **options) == 0).sum() for step in (0, 50, 100, 200)]
    base = (np.asarray(batch["input"]["tokens"]) == 0).sum()
    first, half, whole, after = (count - base for count in counts)
    assert first == 0 and after == whole and 0.4 < half / whole < 0.6


def test_it_is_a_function_of_the_example():
    batch = batch_of()
    turned = jax.tree.map(lambda x: x[::-1], batch)
    np.testing.assert_array_equal(hidden(batch), hidden(turned)[::-1])
    later = {**batch, "epoch": batch["epoch"] + 1}
    assert (hidden(batch) != hidden(later)).any()


@pytest.mark.parametrize(
    "kwargs", [{"rate": 1.5}, {"ramp": -1}, {"mask_token": V}, {"vocabulary": 0}], ids=str
)
def test_bad_arguments(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        tokens.make_masked_thought(**{"vocabulary": V, **kwargs})


def test_it_comes_after_next_token():
    batch = {"input": {"tokens": jnp.zeros((2, 4), int), "segments": jnp.zeros((2, 4), int)}}
    with pytest.raises(ConfigError, match="next_token comes before"):
        tokens.make_masked_thought(vocabulary=V)(KEY, batch, jnp.int32(0))
