"""What the studies on sequences share: training as one program, choices, paired differences."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import chains, sampling
from distill_jax.core.api import Model
from distill_jax.evaluators import exact_answer
from distill_jax.report.statistics import estimate

WARMUP, CLIP, DECAY = 0.1, 1.0, 0.01


def rows_of(part: Any) -> dict[str, Any]:
    """Returns all rows of a part, as a batch is before its transforms."""
    return dict(part.read(np.arange(len(part))))


def identified(rows: Mapping[str, Any], index: Any, epoch: Any) -> dict[str, Any]:
    """Returns the rows at `index` `[b]` with what transforms draw from."""
    made = jax.tree.map(lambda x: x[index], dict(rows))
    return {**made, "index": index, "epoch": jnp.broadcast_to(epoch, index.shape)}


def cosine(step: Any, steps: int) -> Any:
    """The rate as a share of its peak: a linear rise, then half a cosine."""
    warmup = WARMUP * steps
    fall = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / (steps - warmup)))
    return jnp.where(step < warmup, (step + 1) / warmup, fall)


def fit(
    net: Model,
    loss: Callable[[Any, dict[str, Any], Any, Any], Any],
    rows: Mapping[str, Any],
    key: Any,
    lr: Any,
    *,
    steps: int,
    batch: int,
    marks: Sequence[int] = (),
) -> Any:
    """Trains with AdamW; rows come in an order that is drawn anew for each pass.

    Args:
      net: the network.
      loss: `(params, rows [batch, ...], step, key) -> scalar`.
      rows: `[n, ...]`.
      key: of the initial parameters, the order and all draws.
      lr: peak rate, which may be traced.
      steps: number of steps.
      batch: rows a step.
      marks: steps after which parameters are kept.

    Returns:
      The parameters; with `marks` a list of those at the marks and the last.
    """
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam())
    params, _ = net.init(jax.random.fold_in(key, 0), jnp.zeros((1, 8), jnp.int32))
    n = len(jax.tree.leaves(dict(rows))[0])

    def order(epoch):
        return jax.random.permutation(jax.random.fold_in(key, 1 + epoch), n)

    def body(carry, step):
        params, state = carry
        place = step * batch + jnp.arange(batch)
        epoch = place // n
        now = jnp.where(epoch == epoch[0], order(epoch[0])[place % n], order(epoch[-1])[place % n])
        some = identified(rows, now, epoch)
        gradient = jax.grad(loss)(params, some, step, jax.random.fold_in(key, 10**6 + step))
        update, state = tx.update(gradient, state, params)
        rate = lr * cosine(step, steps)
        params = jax.tree.map(lambda p, u: p - rate * (u + DECAY * p), params, update)
        return (params, state), None

    carry, kept = (params, tx.init(params)), []
    edges = [0, *marks, steps]
    for first, last in itertools.pairwise(edges):
        carry, _ = jax.lax.scan(body, carry, jnp.arange(first, last))
        kept.append(carry[0])
    return kept if marks else kept[0]


def write(net: Model, params: Any, prompt: Any, start: Any, *, steps: int) -> Any:
    """Returns greedy continuations of prompts, int `[n, steps]`."""
    n = len(prompt)
    ids = {"index": jnp.arange(n), "epoch": jnp.zeros(n, jnp.int32)}
    keys = sampling.keys_of(jax.random.key(0), ids)
    assert net.decode is not None
    made = sampling.sample(
        net.decode, params, prompt, keys, steps=steps, start=start, temperature=0, end=chains.END
    )
    return made.tokens[:, 0, prompt.shape[1] :]


def scores(written: Any, rows: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of `evaluators/exact_answer.py`."""
    more = (np.asarray(rows[name]) for name in ("prompt", "start", "distracted"))
    return exact_answer.scores(np.asarray(written), *more)


def nats(net: Model, params: Any, batch: Mapping[str, Any], *, train: Any = None) -> Any:
    """Returns logarithms of all probabilities `[b, t, v]`; `train` is the key of dropout."""
    how = {"train": train is not None, "rngs": {} if train is None else {"dropout": train}}
    return jax.nn.log_softmax(net.apply(params, {}, batch["input"], **how)[0]["logits"])


def cross_entropy(log_p: Any, batch: Mapping[str, Any], smoothing: Any = 0.0) -> Any:
    """Returns the mean over the targets, whose labels may be smoothed uniformly."""
    right = jnp.take_along_axis(log_p, batch["target"][..., None], -1)[..., 0]
    value = -((1 - smoothing) * right + smoothing * log_p.mean(-1))
    return (value * batch["target_mask"]).sum() / jnp.maximum(batch["target_mask"].sum(), 1)


def paired(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Returns mean, standard error and 95 % interval of the differences."""
    gap = estimate([a - b for a, b in zip(one, other, strict=True)])
    return {"mean": gap.mean, "se": gap.se, "interval": gap.interval}
