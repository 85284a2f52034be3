"""Does a linear rule of indicators predict what training on a subset gives (InstructMining)?

  python benchmarks/instruct_mining.py --out=benchmarks/results/instruct_mining.json

Pieces of the Python standard library (`data/stdlib_snippets.py`). A small language model is
trained on each of 60 subsets of 500 pieces, from one initialization; many trainings are one
program. The rule (`objectives/instruct_mining.py`) is fitted on the held-out loss of 40 subsets and
predicts that of 20 others. Two families: `uniform`, drawn at random, and `tilted`, drawn with
weights `exp(sum_i b_i z_i)` of standardized indicators, with random b, so that subsets differ in
quality. The 20 are trained from a second initialization, too, which tells how much of their loss is
chance.

Then 500 of 3,000 new pieces are selected, by the rule of the tilted family, by single indicators
(in the direction of their correlation with the loss on its 40 subsets) and at random, five times
with other pieces and another initialization; the test pieces measure.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from distill_jax.data import stdlib_snippets
from distill_jax.data.transforms import tokens
from distill_jax.models import transformer
from distill_jax.objectives import instruct_mining, next_token, salt_ds
from distill_jax.report.statistics import estimate

SUBSETS, FITTED, SIZE, POOL, BATCH, STEPS, SEEDS = 60, 40, 500, 3000, 16, 60, 5
RATES, TEACHER, EARLY, CHUNK = (4e-3, 2e-3, 8e-3), 400, 100, 10
NAMES = ("length", "nll", "learnable", "novelty", "parses")
MODEL: Any = {"vocabulary": 257, "width": 64, "depth": 2, "heads": 2, "mlp_width": 192}


def arrays(part) -> dict[str, Any]:
    """The rows of a part with inputs and targets."""
    rows: Any = part.read(np.arange(len(part)))
    return {
        name: np.asarray(x)
        for name, x in {**tokens.next_token(**rows["input"]), **rows}.items()
        if name != "input"
    }


def nets_of(params):
    net = transformer.make(**MODEL)

    def nets(role, view, *, train=False):
        return net.apply(params, {}, view, train=train)

    return nets


def loss(params, rows) -> jax.Array:
    """Nats of the targets, and how many there are."""
    batch = {
        "input": {"tokens": rows["tokens"], "segments": rows["segments"]},
        **{name: rows[name] for name in ("target", "target_mask")},
    }
    terms = next_token.make().loss(nets_of(params), batch, {}, jnp.int32(0))
    return jnp.stack([terms.values["cross_entropy"].sum(), terms.counts["cross_entropy"].sum()])


def fit(seed, chosen, rate, rows, *, steps):
    """Returns parameters after `steps` steps on the rows `chosen` `[n]`."""
    key = jax.random.key(seed)
    params, _ = transformer.make(**MODEL).init(jax.random.fold_in(key, 0), rows["tokens"][:1])
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def body(carry, step):
        params, state = carry
        n = len(chosen)
        at = step * BATCH + jnp.arange(BATCH)
        order = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, 1 + e), n))(
            at[jnp.array([0, -1])] // n
        )
        row = jnp.where(at // n == at[0] // n, order[0][at % n], order[1][at % n])
        batch = {name: x[chosen[row]] for name, x in rows.items()}

        def mean(params):
            nats, count = loss(params, batch)
            return nats / jnp.maximum(count, 1)

        update, state = tx.update(jax.grad(mean)(params), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, update))
        return (params, state), None

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))[0][0]


@functools.partial(jax.jit, static_argnames="steps")
def losses(seeds, chosen, rates, rows, measured, *, steps):
    """Bits per token of the parts `measured` after each training, `[m, parts]`."""

    def one(seed, chosen, rate):
        params = fit(seed, chosen, rate, rows, steps=steps)
        sums = [loss(params, part) for part in measured]
        return jnp.stack([nats / count for nats, count in sums]) / jnp.log(2)

    return jax.vmap(one)(seeds, chosen, rates)


def train_all(seeds, chosen, rates, rows, measured, *, steps=STEPS) -> np.ndarray:
    """`losses` of any number of trainings, `CHUNK` at a time; lists are filled up."""
    found = []
    for at in range(0, len(seeds), CHUNK):
        some = np.arange(at, at + CHUNK) % len(seeds)
        group = [jnp.asarray(np.asarray(x)[some]) for x in (seeds, chosen, rates)]
        part = np.asarray(losses(*group, rows, measured, steps=steps))
        found.append(part[: len(seeds) - at])
        print(f"{at + len(found[-1])} of {len(seeds)} trainings", flush=True)
    return np.concatenate(found).astype(np.float64)


def indicators(rows, teachers) -> dict[str, np.ndarray]:
    """The indicators of each row."""
    teacher, early = (
        jax.jit(lambda view, p=p: nets_of(p)("teacher", view)[0]["logits"]) for p in teachers
    )
    found = {name: [] for name in NAMES}
    sketches = []
    for at in range(0, len(rows["target"]), 500):
        part = {name: jnp.asarray(x[at : at + 500]) for name, x in rows.items()}
        view = {"tokens": part["tokens"], "segments": part["segments"]}
        target, mask = part["target"], part["target_mask"]
        found["length"].append(mask.sum(1))
        found["nll"].append(instruct_mining.mean_loss(teacher(view), target, mask))
        found["learnable"].append(salt_ds.learnable_loss(early(view), target, mask, top=10))
        found["parses"].append(part["parses"])
        sketches.append(np.asarray(instruct_mining.sketch(target, mask)))
    every = np.concatenate(sketches)
    references = np.random.default_rng(0).permutation(len(every))[:2000]
    found["novelty"] = [instruct_mining.novelty(every, references)]
    return {
        name: instruct_mining.filled(np.concatenate([np.asarray(x) for x in column]))
        for name, column in found.items()
    }


def means(values, chosen) -> dict[str, np.ndarray]:
    return {
        name: np.array([column[rows].mean() for rows in chosen]) for name, column in values.items()
    }


def quality(predicted, actual) -> dict[str, float]:
    """How well log losses are predicted: R2 against their mean, and correlations."""
    error = np.square(actual - predicted).sum() / np.square(actual - actual.mean()).sum()
    rank: Any = stats.spearmanr(predicted, actual)
    found = {"r2": 1 - error, "spearman": rank.statistic, "p": rank.pvalue}
    return {name: float(x) for name, x in found.items()}


def families(values, pool, random) -> dict[str, np.ndarray]:
    """Subsets `[SUBSETS, SIZE]` of both families."""
    z = np.stack([(x[pool] - x[pool].mean()) / x[pool].std() for x in values.values()], 1)
    found = {"uniform": [], "tilted": []}
    for _ in range(SUBSETS):
        found["uniform"].append(random.choice(pool, SIZE, replace=False))
        weights = z @ random.normal(size=len(values)) * 0.7
        gumbel = random.gumbel(size=len(pool))
        found["tilted"].append(pool[np.argsort(-(weights + gumbel))[:SIZE]])
    return {name: np.stack(x) for name, x in found.items()}


def run(save=lambda found: None) -> dict[str, Any]:
    data = stdlib_snippets.make(train=12_000, measured=500)
    rows = {name: arrays(part) for name, part in data.parts.items()}
    keys = ("tokens", "segments", "target", "target_mask")
    train = {name: jnp.asarray(rows["train"][name]) for name in keys}
    measured = [
        {name: jnp.asarray(rows[part][name]) for name in keys} for part in ("held_out", "test")
    ]
    random = np.random.default_rng(0)
    order = random.permutation(len(data.train))
    of_teacher, pool, fresh = np.split(order, [len(order) // 3, 2 * len(order) // 3])
    learn = jax.jit(fit, static_argnames="steps")
    teachers = [
        learn(jnp.uint32(99), jnp.asarray(of_teacher), jnp.float32(3e-3), train, steps=steps)
        for steps in (TEACHER, EARLY)
    ]
    values = indicators(rows["train"], teachers)
    found: dict[str, Any] = {
        "about": {
            "jax": jax.__version__,
            "python": data.train.provenance.name,
            "parameters": sum(x.size for x in jax.tree.leaves(teachers[0])),
            **{
                name.lower(): globals()[name]
                for name in ("SUBSETS", "FITTED", "SIZE", "STEPS", "RATES")
            },
        },
        "teacher": [float(a / b / np.log(2)) for a, b in (loss(p, measured[0]) for p in teachers)],
    }
    subsets = families(values, pool, random)
    rules, measured_of = {}, {}

    def study(name: str) -> None:
        """Trains on the subsets of a family, fits its rule and predicts the last subsets."""
        chosen = subsets[name]
        one, two = (np.full(len(chosen), seed, np.uint32) for seed in (1, 2))
        rates = np.full(len(chosen), RATES[0], np.float32)
        first = train_all(one, chosen, rates, train, measured)[:, 0]
        again = train_all(two[FITTED:], chosen[FITTED:], rates[FITTED:], train, measured)[:, 0]
        mean = means(values, chosen)
        seen = {k: x[:FITTED] for k, x in mean.items()}
        rules[name] = instruct_mining.fit_rule(seen, first[:FITTED])
        measured_of[name] = ({k: x[FITTED:] for k, x in mean.items()}, np.log(first[FITTED:]))
        there, log_loss = measured_of[name]
        single = {k: instruct_mining.fit_rule({k: seen[k]}, first[:FITTED]) for k in NAMES}
        found[name] = {
            "loss": first.round(5).tolist(),
            "loss_again": again.round(5).tolist(),
            "indicators": {k: x.round(5).tolist() for k, x in mean.items()},
            "rule": rules[name]._asdict(),
            "two initializations": quality(log_loss, np.log(again)),
            "single": {
                k: {
                    **quality(rule({k: there[k]}), log_loss),
                    "correlation": float(np.corrcoef(seen[k], first[:FITTED])[0, 1]),
                }
                for k, rule in single.items()
            },
        }
        for of, (there, log_loss) in measured_of.items():
            predictions = {f"rule of {r}": quality(rules[r](there), log_loss) for r in rules}
            found[of]["prediction"] = predictions
        save(found)

    study("tilted")
    ways: dict[str, Any] = {"rule": rules["tilted"].coefficients}
    ways |= {k: {k: np.sign(found["tilted"]["single"][k]["correlation"])} for k in NAMES}
    plans = []
    for seed in range(SEEDS):
        some = random.choice(fresh, POOL, replace=False)
        for way, rule in {**ways, "random": {}}.items():
            score = sum(a * values[k][some] for k, a in rule.items()) + np.zeros(POOL)
            chosen = some[np.argsort(score, kind="stable")[:SIZE]]
            plans += [(way, seed, rate, chosen) for rate in RATES]
    result = train_all(
        np.array([10 + seed for _, seed, _, _ in plans], np.uint32),
        np.stack([chosen for *_, chosen in plans]),
        np.array([rate for _, _, rate, _ in plans], np.float32),
        train,
        measured,
    )
    rows = [
        {
            "way": way,
            "seed": seed,
            "rate": rate,
            "held_out": float(losses[0]),
            "test": float(losses[1]),
            "indicators": {k: float(x[chosen].mean()) for k, x in values.items()},
        }
        for (way, seed, rate, chosen), losses in zip(plans, result, strict=True)
    ]
    found["selection"] = rows
    save(found)
    found["summary"] = summarise(rows)
    save(found)
    study("uniform")
    return found


def difference(one: list[float], other: list[float]) -> dict[str, Any]:
    gap = estimate(np.subtract(one, other).tolist())
    return {"mean": gap.mean, "se": gap.se, "interval": gap.interval}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Chooses rates on held-out pieces and compares ways of selection on the test pieces."""
    found: dict[str, Any] = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        by_rate = {
            rate: float(np.mean([row["held_out"] for row in own if row["rate"] == rate]))
            for rate in sorted({row["rate"] for row in own})
        }
        rate = min(by_rate, key=by_rate.__getitem__)
        best = [row for row in own if row["rate"] == rate]
        found[way] = {
            "rate": rate,
            "held_out_by_rate": {str(key): value for key, value in by_rate.items()},
            "test": [row["test"] for row in best],
            "indicators": best[0]["indicators"],
        }
    test = {way: row["test"] for way, row in found.items()}
    for way, row in found.items():
        if way != "random":
            row["minus random"] = difference(test[way], test["random"])
        if way in NAMES:
            row["rule minus this"] = difference(test["rule"], test[way])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()

    def save(found):
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    run(save)


if __name__ == "__main__":
    main()
