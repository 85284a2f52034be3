"""Curricula of ranking (MacAvaney et al. 2020, arXiv:2004.14269) on lists of digits.

  python -m benchmarks.ranking_curricula --out=benchmarks/results/ranking_curricula.json

The lists of `data/digit_lists.py`, whose first stage is a linear ranker on 4 x 4 pixels. Each seed
has its own division of images, lists and first stage; the learning rates of an arm are one program.
Each arm has the same steps and rates, of which held-out nDCG@10 chooses one; the test part reports.
A curriculum is half the training long. Lists are seen once, or 320 lists forty times. For the
pointwise loss, an anti-curriculum is compared at finer rates with one in which all candidates of a
class have the same weight. An interrupted run goes on where it was.
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

from benchmarks import _rankings as common
from benchmarks._rankings import BATCH, RATES, STEPS
from distill_jax.data import digit_lists
from distill_jax.data.transforms import rankings
from distill_jax.objectives.ranking import Ranking

FINE = (2e-3, 3e-3, 4.5e-3, 6.5e-3, 1e-2, 1.5e-2)
NUMBERS = {"once": BATCH * STEPS, "few": 320}
"""Training lists of a setting."""

ARMS = {
    "none": None,
    **{kind: (kind, "easy", "example") for kind in rankings.HEURISTICS},
    **{f"{kind}, anti": (kind, "hard", "example") for kind in rankings.HEURISTICS},
    **{f"{kind}, batch": (kind, "easy", "batch") for kind in rankings.HEURISTICS},
    **{f"{kind}, random": (kind, "shuffled", "example") for kind in rankings.HEURISTICS},
    "reciprocal_rank, anti, by class": ("reciprocal_rank", "hard", "class"),
}
"""Heuristic, order and level of each arm."""


FINE_ARMS = ("none", "reciprocal_rank, anti", "reciprocal_rank, anti, by class")


def by_class(transform):
    """Gives all relevant candidates of a list the mean of their values, and all others of theirs.

    What is left of a curriculum is how much each class weighs.
    """

    def apply(key, batch, step):
        batch = transform(key, batch, step)
        ease, relevant = batch["ease"], batch["label"] > 0

        def mean(of):
            return (ease * of).sum(1, keepdims=True) / jnp.maximum(of.sum(1, keepdims=True), 1)

        return {**batch, "ease": jnp.where(relevant, mean(relevant), mean(~relevant))}

    return apply


@functools.cache
def program(loss: str, arm: str):
    kind, transform = ARMS[arm], None
    options: dict[str, Any] = {}
    if kind:
        options = {"ramp": "50 %", "level": "batch" if kind[2] == "batch" else "example"}
        pairs = loss == "pairwise"
        transform = rankings.make_ranking_ease(heuristic=kind[0], pairs=pairs, order=kind[1])
        transform = by_class(transform) if kind[2] == "class" else transform
    grades = digit_lists.GRADES
    objective = Ranking(rank_loss=loss, grades=grades, total_steps=STEPS, **options)
    return common.program([(objective, STEPS)], transform)


def run(loss: str, setting: str, seeds: list[int], *, fine: bool) -> dict:
    """Returns the quality of each arm: by rate on held-out lists, and of the chosen on the test."""
    arms = FINE_ARMS if fine else [arm for arm in ARMS if not arm.endswith("by class")]
    rates, runs, first_stage = FINE if fine else RATES, {arm: [] for arm in arms}, []
    for seed in seeds:
        rows = common.division(seed, NUMBERS[setting])
        first_stage.append(common.measured(rows["test"]["first_stage"], rows["test"]))
        for arm in arms:
            runs[arm].append(program(loss, arm)(jax.random.key(seed), rows, rates))
    summary: dict[str, Any] = {arm: common.chosen(runs[arm], rates) for arm in arms}
    for arm in arms:
        if arm != "none":
            summary[arm]["minus none"] = common.minus(summary[arm], summary["none"])
        other = f"{arm.partition(',')[0]}, {'anti, by class' if fine else 'random'}"
        if arm != other and other in summary:
            of = "by class" if fine else "random"
            summary[arm][f"minus {of}"] = common.minus(summary[arm], summary[other])
    names = list(first_stage[0])
    first = {m: float(np.mean([row[m] for row in first_stage])) for m in names}
    return {"first_stage": first, **summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--losses", default="pairwise,pointwise")
    parser.add_argument("--settings", default="once,few")
    options = parser.parse_args()
    seeds = list(range(options.seeds))
    about = {"jax": jax.__version__, "seeds": seeds, "steps": STEPS}
    found: dict[str, Any] = {"about": about}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if found["about"]["seeds"] != seeds:
            parser.error(f"{options.out} has other seeds")
    settings = itertools.product(options.losses.split(","), options.settings.split(","))
    plans = [(loss, setting, False) for loss, setting in settings]
    plans += [(loss, setting, True) for loss, setting, _ in plans if loss == "pointwise"]
    for loss, setting, fine in plans:
        name = f"{loss}/{setting}" + "/fine" * fine
        if name not in found:
            found[name] = run(loss, setting, seeds, fine=fine)
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
