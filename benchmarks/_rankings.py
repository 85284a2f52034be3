"""What the studies of ranking share: lists of digits, training as one program, chosen rates."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._sequences import paired
from distill_jax.core import means
from distill_jax.core.api import Objective, Transform
from distill_jax.data import digit_lists
from distill_jax.evaluators import ranking as evaluator
from distill_jax.models import two_tower

BATCH, STEPS = 32, 400
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PARTS = ("held_out", "test")
MODEL = two_tower.make()


def division(seed: int, lists: int) -> dict[str, Any]:
    """Returns all rows of each part of a division of the images."""
    data = digit_lists.make(lists=lists, split_seed=seed)
    return {name: part.read(np.arange(len(part))) for name, part in data.parts.items()}


def loss_of(objective: Objective, params: Any, batch: Mapping[str, Any], step: Any) -> Any:
    def nets(role, x, *, train=False):
        return MODEL.apply(params, {}, x, train=train)

    return means.mean_loss(objective.loss(cast(Any, nets), batch, {}, step), batch["mask"])[0]


def fit(
    stages: Sequence[tuple[Objective, int]],
    transform: Transform | None,
    train: Mapping[str, Any],
    key: Any,
    rate: Any,
) -> Any:
    """Trains with Adam, whose rate falls by half a cosine in `STEPS`; returns the parameters.

    Args:
      stages: objectives, and the step at which each ends.
      transform: of batches, after the lists are read in their order.
      train: rows `[n, ...]`, as of `division`.
      key: of the initial parameters and what the transform draws.
      rate: at first, which may be traced.
    """
    tx, n = optax.adam(optax.cosine_decay_schedule(1.0, STEPS)), len(train["label"])
    first = jax.tree.map(lambda x: x[:1], train["input"])
    params, _ = MODEL.init(jax.random.fold_in(key, 0), first)
    carry, edges = (params, tx.init(params)), [0, *(end for _, end in stages)]
    for (objective, _), (start, end) in zip(stages, itertools.pairwise(edges), strict=True):

        def body(carry, step, objective=objective):
            params, state = carry
            rows = (step * BATCH) % n + jnp.arange(BATCH)
            batch = {
                **jax.tree.map(lambda x: x[rows], dict(train)),
                "mask": jnp.ones(BATCH),
                "index": rows,
                "epoch": jnp.full(BATCH, step * BATCH // n),
            }
            if transform:
                batch = transform(jax.random.fold_in(key, 1), batch, step)
            grad = jax.grad(lambda params: loss_of(objective, params, batch, step))(params)
            update, state = tx.update(grad, state)
            update = jax.tree.map(lambda u: rate * u, update)
            return (optax.apply_updates(params, update), state), None

        carry, _ = jax.lax.scan(body, carry, jnp.arange(start, end))
    return carry[0]


def program(stages: Sequence[tuple[Objective, int]], transform: Transform | None = None):
    """Returns a function `(key, rows, rates) -> metrics` of both measured parts, by rate."""

    def train(key, train, inputs, rate):
        params = fit(stages, transform, train, key, rate)
        return [MODEL.apply(params, {}, x, train=False)[0]["logits"] for x in inputs]

    trained = jax.jit(jax.vmap(train, in_axes=(None, None, None, 0)))

    def run(key: Any, rows: Mapping[str, Any], rates: Sequence[float]):
        inputs = jax.tree.map(jnp.asarray, [rows["train"], [rows[p]["input"] for p in PARTS]])
        scores = trained(key, *inputs, jnp.asarray(rates))
        return {
            part: [measured(np.nan_to_num(np.asarray(s)), rows[part]) for s in some]
            for part, some in zip(PARTS, scores, strict=True)
        }

    return run


def measured(scores: np.ndarray, rows: Mapping[str, Any]) -> dict[str, float]:
    return evaluator.make(relevant=digit_lists.GRADES)({"student": {"logits": scores}}, rows)


def chosen(runs: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    """Returns test metrics by seed at the rate with the best mean held-out nDCG@10.

    Args:
      runs: of `program`, one for each seed.
      rates: those of the runs.
    """
    by_rate = np.mean([[m["ndcg10"] for m in run["held_out"]] for run in runs], 0)
    best = int(by_rate.argmax())
    return {
        "rate": rates[best],
        "held_out_by_rate": by_rate.round(4).tolist(),
        **{m: [run["test"][best][m] for run in runs] for m in runs[0]["test"][best]},
    }


def minus(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the paired differences of all metrics of two arms."""
    names = [m for m in row if isinstance(row[m], list) and m != "held_out_by_rate"]
    return {m: paired(row[m], base[m]) for m in names}
