"""Few good labels or many weak ones for the same money (Mallen and Belrose 2024, 2410.13215)?

  python -m benchmarks.label_budget --out=benchmarks/results/label_budget.json

The stages of `data/weak_digits.py`, parity, several divisions. A good label costs as much as
`ratio` weak ones, which a linear network on 4 x 4 pixels gives, and a budget counts in weak labels.
A share of it goes to weak labels, and the last layer of a pretrained perceptron learns from both:
from all at once (`mix`), or first from the weak and then, with a fresh optimizer, from the good
ones (`then`). Each has the same number of steps. For every budget the 100 clean held-out images
choose the share and one of two rates (of `then`, that of its second stage); their labels are not
paid for. The test images measure. The claim: as the budget grows, the best share of weak labels
falls from all to none, with something between on the way.
"""

import argparse
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.weak_sweep import apply, init, parts, pooled, train
from distill_jax.losses.classification import soft_cross_entropy
from distill_jax.report.statistics import estimate

STEPS, BATCH, RATES = 400, 64, (3e-4, 3e-3)
RATIOS, BUDGETS = (2, 4, 16, 64), (16, 32, 64, 128, 256, 512)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def plans(n: int) -> list[dict]:
    """Numbers of weak and good labels that each budget buys, of at most n images."""
    found = []
    for ratio, budget, share, rate in itertools.product(RATIOS, BUDGETS, SHARES, RATES):
        good = min(int((1 - share) * budget / ratio), n)
        weak = min(int(share * budget), n - good)
        if (good or share == 1) and (weak or share == 0):
            plan = {"ratio": ratio, "budget": budget, "share": share, "rate": rate}
            found.append({**plan, "weak": weak, "good": good})
    return found


def fit(head, x, targets, *, key, first, count, rate):
    """Returns the last layer after `STEPS` steps on rows `first` to `first + count`.

    Without rows nothing changes.
    """
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 20, STEPS))

    def loss(head, x, target):
        return soft_cross_entropy(apply(head, x), target).mean()

    def body(carry, t):
        head, state = carry
        draw = jax.random.uniform(jax.random.fold_in(key, t), (BATCH,))
        rows = first + jnp.floor(draw * count).astype(jnp.int32)
        update, state = tx.update(jax.grad(loss)(head, x[rows], targets[rows]), state)
        update = jax.tree.map(lambda u: jnp.where(count > 0, rate * u, 0), update)
        return (optax.apply_updates(head, update), state), None

    return jax.lax.scan(body, (head, tx.init(head)), jnp.arange(STEPS))[0][0]


def measure(seeds: list[int], chosen: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Returns accuracies `[plans, seeds]` by way and by part."""
    divisions = [parts("parity", seed) for seed in seeds]
    at = {
        name: tuple(np.stack([d[name][i] for d in divisions]) for i in (0, 1))
        for name in divisions[0]
    }

    def one(seed, data):
        key, flat = jax.random.key(seed), {n: x.reshape(len(x), -1) for n, (x, _) in data.items()}
        digits = jax.nn.one_hot(data["pretrain"][1], 10)
        body = train(
            init(key, (64, 256, 256, 10)),
            [],
            flat["pretrain"],
            digits,
            key=key,
            lr=3e-3,
            steps=800,
            most=800,
        )[:-1]
        small = {name: pooled(x) for name, (x, _) in data.items()}
        truth = jax.nn.one_hot(data["weak"][1], 2)
        supervisor = train(
            init(key, (16, 2)), [], small["weak"], truth, key=key, lr=1e-2, steps=800, most=800
        )
        said = jax.nn.softmax(apply(supervisor, small["student"]))
        features = {
            name: jax.nn.relu(apply(body, flat[name])) for name in ("student", "clean", "test")
        }
        return features, said, jax.nn.one_hot(data["student"][1], 2), init(key, (256, 2))

    def under(features, said, good, head, key, weak, count, rate):
        mixed = jnp.where(jnp.arange(len(good))[:, None] < count, good, said)
        x = features["student"]
        double = jax.random.split(key)
        both = {"first": 0, "count": weak + count, "rate": rate}
        once = fit(fit(head, x, mixed, key=key, **both), x, mixed, key=double[0], **both)
        first = fit(head, x, mixed, key=key, first=count, count=weak, rate=RATES[-1])
        then = fit(first, x, mixed, key=double[1], first=0, count=count, rate=rate)
        return {
            way: {part: apply(learned, features[part]).argmax(-1) for part in ("clean", "test")}
            for way, learned in (("mix", once), ("then", then))
        }

    made = jax.jit(jax.vmap(one))(jnp.asarray(seeds), at)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    run = jax.vmap(under, in_axes=(*[0] * 5, *[None] * 3))
    run = jax.vmap(run, in_axes=(*[None] * 5, *[0] * 3))
    numbers = [np.asarray([plan[name] for plan in chosen]) for name in ("weak", "good", "rate")]
    found = jax.jit(run)(*made, keys, *numbers)
    return {
        way: {
            {"clean": "held_out"}.get(part, part): np.mean(np.asarray(top) == at[part][1], -1)
            for part, top in tops.items()
        }
        for way, tops in found.items()
    }


def table(chosen: list[dict], found: dict, ratio: int, budget: int) -> dict:
    """What each way makes of a budget, and whether the chosen share beats the ends."""
    rows = [i for i, p in enumerate(chosen) if (p["ratio"], p["budget"]) == (ratio, budget)]
    made: dict = {"ratio": ratio, "budget": budget}
    for way, by_part in found.items():
        held, test = (by_part[part][rows] for part in ("held_out", "test"))
        best = int(held.mean(1).argmax())
        made[way] = {name: chosen[rows[best]][name] for name in ("share", "rate")}
        made[way] |= {"test": float(test[best].mean()), "by_share": {}}
        for share in SHARES:
            own = [i for i, row in enumerate(rows) if chosen[row]["share"] == share]
            if own:
                top = own[int(held[own].mean(1).argmax())]
                made[way]["by_share"][str(share)] = round(float(test[top].mean()), 4)
        ends = [i for i, row in enumerate(rows) if chosen[row]["share"] in (0.0, 1.0)]
        end = ends[int(held[ends].mean(1).argmax())]
        gap = estimate((test[best] - test[end]).tolist())
        made[way]["minus_best_end"] = {"mean": gap.mean, "interval": gap.interval}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    seeds = list(range(options.seeds))
    chosen = plans(550)
    found = measure(seeds, chosen)
    rows = [table(chosen, found, r, q) for r, q in itertools.product(RATIOS, BUDGETS)]
    about = {"jax": jax.__version__, "seeds": seeds, "steps": 2 * STEPS, "rates": RATES}
    options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    for row in rows:
        for way in found:
            one = row[way]
            print(
                row["ratio"],
                row["budget"],
                way,
                one["share"],
                one["by_share"],
                one["minus_best_end"],
            )


if __name__ == "__main__":
    main()
