"""Curricula of ranking (MacAvaney et al. 2020, arXiv:2004.14269) on lists of digits.

  python benchmarks/ranking_curricula.py --out=benchmarks/results/ranking_curricula.json

The lists of `data/digit_lists.py`, whose first stage is a linear ranker on 4 x 4 pixels. Each seed
has its own division of images, lists and first stage; the learning rates of an arm are one program.
Each arm has the same steps and rates, of which held-out nDCG@10 chooses one; the test part reports.
A curriculum is half the training long. Lists are seen once, or 320 lists forty times.
"""

import argparse
import functools
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.data import digit_lists
from distill_jax.data.transforms import rankings
from distill_jax.evaluators import ranking as evaluator
from distill_jax.models import two_tower
from distill_jax.objectives.ranking import Ranking
from distill_jax.report.statistics import estimate

BATCH, STEPS = 32, 400
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
NUMBERS = {"once": BATCH * STEPS, "few": 320}
"""Training lists of a setting."""

ARMS = {
    "none": None,
    **{kind: (kind, "easy", "example") for kind in rankings.HEURISTICS},
    **{f"{kind}, anti": (kind, "hard", "example") for kind in rankings.HEURISTICS},
    **{f"{kind}, batch": (kind, "easy", "batch") for kind in rankings.HEURISTICS},
    **{f"{kind}, random": (kind, "shuffled", "example") for kind in rankings.HEURISTICS},
}
"""Heuristic, order and level of each arm."""


@functools.cache
def program(loss: str, arm: str, epoch: int):
    """Returns a function that trains with each rate on one division: scores of two parts."""
    kind = ARMS[arm]
    objective: Any = Ranking(rank_loss=loss, grades=digit_lists.GRADES, total_steps=STEPS)
    transform = None
    if kind:
        objective = Ranking(
            rank_loss=loss,
            grades=digit_lists.GRADES,
            ramp="50 %",
            level=kind[2],
            total_steps=STEPS,
        )
        transform = rankings.make_ranking_ease(
            heuristic=kind[0], pairs=loss == "pairwise", order=kind[1]
        )
    model = two_tower.make()
    tx = optax.adam(optax.cosine_decay_schedule(1.0, STEPS))

    def value(params, batch, step):
        def nets(role, x, *, train=False):
            return model.apply(params, {}, x, train=train)

        return objective.loss(nets, batch, {}, step).values["ranking"].mean()

    def train(key, train, held_out, test, rate):
        first = jax.tree.map(lambda x: x[:1], train["input"])
        params, _ = model.init(jax.random.fold_in(key, 0), first)

        def body(carry, step):
            params, state = carry
            rows = (step * BATCH) % epoch + jnp.arange(BATCH)
            batch = {
                **jax.tree.map(lambda x: x[rows], train),
                "mask": jnp.ones(BATCH),
                "index": rows,
                "epoch": jnp.full(BATCH, step * BATCH // epoch),
            }
            if transform:
                batch = transform(jax.random.fold_in(key, 1), batch, step)
            update, state = tx.update(jax.grad(value)(params, batch, step), state)
            update = jax.tree.map(lambda u: rate * u, update)
            return (optax.apply_updates(params, update), state), None

        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(STEPS))
        return [model.apply(params, {}, x, train=False)[0]["logits"] for x in (held_out, test)]

    return jax.jit(jax.vmap(train, in_axes=(None, None, None, None, 0)))


def measured(scores, rows) -> dict[str, float]:
    return evaluator.make(relevant=digit_lists.GRADES)({"student": {"logits": scores}}, rows)


def run(loss: str, setting: str, seeds: list[int]) -> dict:
    """Returns the quality of each arm: by rate on held-out lists, and of the chosen on the test."""
    n = NUMBERS[setting]
    found = {arm: {"held_out": [], "test": []} for arm in ARMS}
    first_stage = []
    for seed in seeds:
        data = digit_lists.make(lists=n, split_seed=seed)
        rows = {name: part.read(np.arange(len(part))) for name, part in data.parts.items()}
        inputs = [rows["train"], rows["held_out"]["input"], rows["test"]["input"]]
        inputs = jax.tree.map(jnp.asarray, inputs)
        first_stage.append(measured(rows["test"]["first_stage"], rows["test"]))
        for arm in ARMS:
            fit = program(loss, arm, n)
            outputs = fit(jax.random.key(seed), *inputs, jnp.asarray(RATES))
            for name, scores in zip(("held_out", "test"), outputs, strict=True):
                finite = np.nan_to_num(np.asarray(scores))
                found[arm][name].append([measured(s, rows[name]) for s in finite])
    names = list(first_stage[0])
    summary: dict[str, Any] = {
        "first_stage": {m: float(np.mean([row[m] for row in first_stage])) for m in names}
    }
    for arm, parts in found.items():
        by_rate = np.mean([[r["ndcg10"] for r in row] for row in parts["held_out"]], 0)
        best = int(by_rate.argmax())
        summary[arm] = {
            "rate": RATES[best],
            "held_out_by_rate": by_rate.round(4).tolist(),
            **{m: [row[best][m] for row in parts["test"]] for m in names},
        }
    for arm, other in itertools.product(ARMS, ("none", "random")):
        base = "none" if other == "none" else f"{arm.partition(',')[0]}, random"
        if arm in ("none", base) or base not in summary:
            continue
        for m in names:
            gap = estimate(np.subtract(summary[arm][m], summary[base][m]).tolist())
            numbers = {"mean": gap.mean, "se": gap.se, "interval": gap.interval}
            summary[arm].setdefault(f"minus {other}", {})[m] = numbers
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--losses", default="pairwise,pointwise")
    parser.add_argument("--settings", default="once,few")
    options = parser.parse_args()
    seeds = list(range(options.seeds))
    found: dict[str, Any] = {"about": {"jax": jax.__version__, "seeds": seeds, "steps": STEPS}}
    for loss, setting in itertools.product(options.losses.split(","), options.settings.split(",")):
        found[f"{loss}/{setting}"] = run(loss, setting, seeds)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
