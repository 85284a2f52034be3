"""PG-RANK (Gao et al. 2023, arXiv:2310.04407) on lists of digits.

  python -m benchmarks.pg_rank --out=benchmarks/results/pg_rank.json
  python -m benchmarks.pg_rank --out=benchmarks/results/pg_rank.json --page=docs/results/pg_rank.md

Arms get the same lists, of `data/digit_lists.py`, and the same steps and learning rates, of which
held-out nDCG@10 chooses one for each arm; the test part reports. Each seed has its own division of
the images. An interrupted run goes on where it was. The page's tables are written from the numbers;
what they support is written by hand above the mark, and kept.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _rankings as common
from benchmarks._rankings import BATCH, RATES, STEPS
from benchmarks.selection_page import interval
from distill_jax.data import digit_lists
from distill_jax.data.transforms import rankings
from distill_jax.objectives.pg_rank import PGRank
from distill_jax.objectives.ranking import Ranking

SEEDS, WARM, DRAWS = (0, 1, 2, 3, 4), 100, 200
LISTWISE = Ranking(rank_loss="listwise")
ARMS = {
    "pointwise": ([(Ranking(rank_loss="pointwise", grades=digit_lists.GRADES), STEPS)], 0),
    "listwise": ([(LISTWISE, STEPS)], 0),
    "pg_2": ([(PGRank(), STEPS)], 2),
    "pg_8": ([(PGRank(), STEPS)], 8),
    "pg_32": ([(PGRank(), STEPS)], 32),
    "pg_8_no_baseline": ([(PGRank(baseline=False), STEPS)], 8),
    "warm_pg_8": ([(LISTWISE, WARM), (PGRank(), STEPS)], 8),
}
"""Objectives with the step at which each ends, and how many rankings are sampled."""

PAIRS = (
    *((arm, "listwise") for arm in ARMS if arm != "listwise"),
    ("pg_8", "pg_2"),
    ("pg_32", "pg_8"),
    ("pg_8_no_baseline", "pg_8"),
    ("warm_pg_8", "pg_8"),
)
MARK = "<!-- tables: benchmarks/pg_rank.py -->"


def run(arm: str) -> dict[str, Any]:
    """Trains an arm with every rate and seed."""
    stages, k = ARMS[arm]
    fit = common.program(stages, rankings.make_gumbel_noise(rankings=k) if k else None)
    divisions = ((seed, common.division(seed, BATCH * STEPS)) for seed in SEEDS)
    runs = [fit(jax.random.key(seed), rows, RATES) for seed, rows in divisions]
    return common.chosen(runs, RATES)


def variance() -> dict[str, Any]:
    """The variance of the gradient over draws of rankings, after 100 steps of listwise training."""
    rows = common.division(0, BATCH * STEPS)["train"]
    rows = jax.tree.map(jnp.asarray, rows)
    start = functools.partial(common.fit, [(LISTWISE, WARM)], None)
    params = jax.jit(start)(rows, jax.random.key(0), 1e-2)
    index = WARM * BATCH + jnp.arange(BATCH)
    batch = {**jax.tree.map(lambda x: x[index], rows), "mask": jnp.ones(BATCH), "index": index}
    batch["epoch"] = 0 * index
    found = {}
    for k in (2, 8, 32):
        for baseline in (True, False):
            objective = PGRank(baseline=baseline)
            noise = rankings.make_gumbel_noise(rankings=k)

            def flat(key, objective=objective, noise=noise):
                drawn = noise(key, batch, jnp.int32(0))
                gradient = jax.grad(common.loss_of, 1)(objective, params, drawn, jnp.int32(0))
                return jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])

            keys = jax.random.split(jax.random.key(0), DRAWS)
            rows_of = np.asarray(jax.jit(lambda keys, flat=flat: jax.lax.map(flat, keys))(keys))
            found[f"k{k}_{'baseline' if baseline else 'plain'}"] = {
                "variance": float(rows_of.var(0, ddof=1).sum()),
                "squared_norm_of_mean": float((rows_of.mean(0) ** 2).sum()),
            }
    return found


def tables(found: dict[str, Any]) -> list[str]:
    arms, pairs = found["arms"], found["pairs"]
    lines = [
        "| arm | rate | test nDCG@10 | minus listwise | test nDCG@5 | minus listwise |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in arms.items():
        gap = pairs.get(f"{arm} - listwise")
        cells = [arm, f"{row['rate']:g}"]
        for metric in ("ndcg10", "ndcg5"):
            cells += [f"{np.mean(row[metric]):.3f}", interval(gap[metric]) if gap else "reference"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference | nDCG@10 | nDCG@5 | MRR@10 |", "|---|---|---|---|"]
    for name, gap in pairs.items():
        if not name.endswith(" - listwise"):
            values = (interval(gap[m]) for m in ("ndcg10", "ndcg5", "mrr10"))
            lines.append(f"| {name} | {' | '.join(values)} |")
    lines += [
        "",
        "| rankings | variance of the gradient | without the baseline | ratio |",
        "|---|---|---|---|",
    ]
    for k in (2, 8, 32):
        one, other = (found["variance"][f"k{k}_{x}"]["variance"] for x in ("baseline", "plain"))
        lines.append(f"| {k} | {one:.3g} | {other:.3g} | {other / one:.1f} |")
    norm = found["variance"]["k32_baseline"]["squared_norm_of_mean"]
    return [*lines, "", f"The squared norm of the mean gradient is {norm:.2g} (32 rankings)."]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--page", type=pathlib.Path, help="the page whose tables are written")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.page:
        head = options.page.read_text().partition(MARK)[0]
        options.page.write_text("\n".join([head + MARK, "", *tables(found)]) + "\n")
        return
    found.setdefault("about", {"jax": jax.__version__, "steps": STEPS, "rates": RATES})
    arms = found.setdefault("arms", {})
    for arm in ARMS:
        if arm not in arms:
            arms[arm] = run(arm)
            print(arm, arms[arm], flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    found["pairs"] = {f"{a} - {b}": common.minus(arms[a], arms[b]) for a, b in PAIRS}
    if "variance" not in found:
        found["variance"] = variance()
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
