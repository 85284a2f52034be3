"""PG-RANK on digits: lists of 20 images for a query image, relevance by class.

  python benchmarks/pg_rank.py run --arm=listwise --out=runs/pg_rank/listwise.json   (each of ARMS)
  python benchmarks/pg_rank.py variance --out=runs/pg_rank/variance.json
  python benchmarks/pg_rank.py join runs/pg_rank --out=benchmarks/results/pg_rank.json

Candidates of a query of class a have the relevance max(0, 3 - |a - c|). Query and candidates are
embedded by one small network; the score is a scaled product. Arms get the same lists, steps and
learning rates, of which held-out nDCG@10 chooses one for each arm; the test part reports.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import distill_jax as dj
from distill_jax.core.api import Model, Objective
from distill_jax.data import digit_lists, digits
from distill_jax.data.transforms import rankings
from distill_jax.losses import listwise
from distill_jax.objectives.pg_rank import PGRank
from distill_jax.objectives.ranking import Ranking

LISTS, CANDIDATES, STEPS, SEEDS = 32, 20, 400, 5
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
WARM = "25 %"
LISTWISE = Ranking(rank_loss="listwise")


@dataclasses.dataclass(frozen=True)
class Warm(Objective):
    """Listwise training first, then policy gradients."""

    roles: ClassVar[tuple[str, ...]] = ("student",)

    def phases(self):
        return ((0, LISTWISE), (WARM, PGRank()))


ARMS = {
    "pointwise": (Ranking(rank_loss="pointwise", grades=digit_lists.GRADES), 1),
    "listwise": (LISTWISE, 1),
    "pg_2": (PGRank(), 2),
    "pg_8": (PGRank(), 8),
    "pg_32": (PGRank(), 32),
    "pg_8_no_baseline": (PGRank(baseline=False), 8),
    "warm_pg_8": (Warm(), 8),
}
"""Objectives, and how many rankings they sample."""


def scorer(width: int = 32) -> Model:
    """`{"query": [b, d], "candidates": [b, n, d]} -> logits [b, n]`."""

    def init(key, x):
        d, keys = x["query"].shape[-1], jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(keys[0], (d, width)) / d**0.5},
            "last": {"kernel": jax.random.normal(keys[1], (width, width)) / width**0.5},
        }, {}

    def embed(params, x):
        h = jax.nn.relu(jnp.einsum("...d,dw->...w", x, params["first"]["kernel"]))
        return jnp.einsum("...w,wv->...v", h, params["last"]["kernel"])

    def apply(params, state, x, *, train=False, rngs=None):
        query, candidates = embed(params, x["query"]), embed(params, x["candidates"])
        return {"logits": jnp.einsum("bw,bnw->bn", query, candidates) / width**0.5}, state

    return Model(init, apply)


def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images `[m, 64]` in [0, 1] and classes of the three parts, which are disjoint."""
    dataset = digits.make()
    found = []
    for source in (dataset.train, dataset.held_out, dataset.test):
        rows = source.read(np.arange(len(source)))
        found.append(
            (np.asarray(rows["input"], np.float32).reshape(len(source), -1), rows["label"])
        )
    x, y = (np.concatenate(a) for a in zip(*found, strict=True))
    x = x / x.max()
    order = np.random.default_rng(0).permutation(len(x))
    cuts = np.split(order, [len(x) * 6 // 10, len(x) * 8 // 10])
    names = ("train", "held_out", "test")
    return {name: (x[rows], y[rows]) for name, rows in zip(names, cuts, strict=True)}


def lists(part, b: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws lists: a query and other images of the part."""
    x, y = part
    rows = np.stack([random.choice(len(x), CANDIDATES + 1, replace=False) for _ in range(b)])
    label = digit_lists.relevance(y[rows[:, :1]], y[rows[:, 1:]])
    view = {"query": x[rows[:, 0]], "candidates": x[rows[:, 1:]]}
    return {"input": view, "label": label}


def trainer_of(objective, k: int, rate: float) -> dj.Trainer:
    return dj.Trainer(
        objective,
        student=scorer(),
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, STEPS)),
        transform=rankings.make_gumbel_noise(rankings=max(k, 2)),
        options=dj.Options(total_steps=STEPS),
    )


def quality(trainer, state, batch) -> dict[str, float]:
    scores = trainer.predict(state, batch["input"])["logits"]
    mask, zeros = jnp.ones(scores.shape), jnp.zeros((len(scores), 1, CANDIDATES))
    order = listwise.plackett_luce_rankings(scores, zeros, mask)
    label = jnp.asarray(batch["label"])
    return {
        f"ndcg{cutoff}": float(listwise.ndcg(label, order, mask, cutoff=cutoff).mean())
        for cutoff in (5, 10)
    }


def run(arm: str) -> dict:
    """Trains an arm with every rate and seed; returns the quality of each run."""
    (objective, k), data = ARMS[arm], parts()
    measured = {n: lists(data[n], 400, np.random.default_rng(9)) for n in ("held_out", "test")}
    found = []
    for rate in RATES:
        trainer = trainer_of(objective, k, rate)
        for seed in range(SEEDS):
            random = np.random.default_rng([1, seed])
            state = trainer.init(jax.random.key(seed), lists(data["train"], LISTS, random))
            curve = []
            for step in range(STEPS):
                state, _ = trainer.step(state, lists(data["train"], LISTS, random))
                if (step + 1) % 100 == 0:
                    curve.append(quality(trainer, state, measured["held_out"])["ndcg10"])
            result = {n: quality(trainer, state, batch) for n, batch in measured.items()}
            found.append({"rate": rate, "seed": seed, "curve": curve, **result})
    return {arm: found}


def variance(draws: int = 200) -> dict:
    """The variance of the gradient over draws of rankings, after 100 steps of listwise training."""
    data, random = parts(), np.random.default_rng([1, 0])
    trainer = trainer_of(LISTWISE, 1, 1e-2)
    batch = lists(data["train"], LISTS, random)
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(100):
        state, _ = trainer.step(state, lists(data["train"], LISTS, random))
    params, model = jax.device_get(trainer.student(state)[0]), scorer()
    found = {}
    for k in (2, 8, 32):
        for baseline in (True, False):
            objective = PGRank(baseline=baseline)
            noise = rankings.make_gumbel_noise(rankings=k)

            def loss(params, key, objective=objective, noise=noise):
                index = jnp.arange(LISTS)
                filled = noise(key, {**batch, "index": index, "epoch": 0 * index}, jnp.int32(0))

                def nets(role, view, *, train, params=params):
                    return model.apply(params, {}, view)

                return (
                    objective.loss(nets, filled, {}, jnp.int32(0)).values["policy_gradient"].mean()
                )

            grad = jax.jit(jax.grad(loss))
            rows = [grad(params, jax.random.key(i)) for i in range(draws)]
            flat = np.stack([np.concatenate([x.ravel() for x in jax.tree.leaves(r)]) for r in rows])
            found[f"k{k}_{'baseline' if baseline else 'plain'}"] = {
                "variance": float(flat.var(0, ddof=1).sum()),
                "squared_norm_of_mean": float((flat.mean(0) ** 2).sum()),
            }
    return {"variance": found}


def join(folder: pathlib.Path) -> dict:
    """Chooses rates on held-out lists and compares arms on the test lists."""
    raw: dict = {}
    for path in sorted(folder.glob("*.json")):
        for key, value in json.loads(path.read_text()).items():
            raw[key] = [*raw.get(key, []), *value] if isinstance(value, list) else value
    summary = {}
    for arm in (arm for arm in ARMS if arm in raw):
        rates = sorted({r["rate"] for r in raw[arm]})
        means = {
            rate: float(np.mean([r["held_out"]["ndcg10"] for r in raw[arm] if r["rate"] == rate]))
            for rate in rates
        }
        rate = max(rates, key=lambda rate: means[rate])
        rows = [r for r in raw[arm] if r["rate"] == rate]
        summary[arm] = {
            "rate": rate,
            "held_out_by_rate": {str(rate): round(x, 4) for rate, x in means.items()},
            **{m: [r["test"][m] for r in rows] for m in ("ndcg5", "ndcg10")},
            "held_out_curve": np.mean([r["curve"] for r in rows], 0).round(4).tolist(),
        }
    for row in summary.values():
        for metric in ("ndcg5", "ndcg10"):
            change = np.array(row[metric]) - np.array(summary["listwise"][metric])
            half = 2.776 * change.std(ddof=1) / SEEDS**0.5  # t of 4 degrees of freedom
            row[f"{metric}_mean"] = round(float(np.mean(row[metric])), 4)
            row[f"{metric}_against_listwise"] = [round(float(change.mean()), 4), round(half, 4)]
    settings = {"lists": LISTS, "candidates": CANDIDATES, "steps": STEPS, "seeds": SEEDS}
    versions = {"jax": jax.__version__, "numpy": np.__version__, "optax": optax.__version__}
    return {
        "settings": {**settings, "warm": WARM},
        "versions": versions,
        "arms": summary,
        "variance": raw.get("variance", {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("run", "variance", "join"))
    parser.add_argument("folder", nargs="?", type=pathlib.Path)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    if args.mode == "join":
        found = join(args.folder)
    else:
        found = run(args.arm) if args.mode == "run" else variance()
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
