"""Settings of weak-to-strong training, many at once: which rates, lengths and shares are best?

  python benchmarks/weak_sweep.py --out=benchmarks/results/weak_sweep.json

The stages of `data/weak_digits.py` for ten divisions of the images, with networks, losses and
schedules of `configs/studies/paper_weak_to_strong.py`, as one program that is mapped over divisions
and settings. Each method has the same number of settings, the 100 clean held-out images choose, and
the test images measure: accuracy, and the share of the gap between supervisor and ceiling. Methods
that the file already has are not run again.
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

from distill_jax.data import weak_digits
from distill_jax.losses.classification import soft_cross_entropy
from distill_jax.losses.targets import hardened, product
from distill_jax.report.statistics import estimate

BATCH, WARMUP, RAMP = 64, 0.05, 0.2
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
NAIVE = [{"lr": lr, "steps": steps} for lr, steps in itertools.product(RATES, (100, 200, 400, 800))]
CONFIDENT = [
    {"lr": lr, "steps": 800, "alpha": alpha}
    for lr, alpha in itertools.product(RATES, (0.25, 0.5, 0.75, 1.0))
]
OWN = {"confidence": {}, "constant": {"ramp": 1e-9}, "product": {"mixed": False}}
"""Ways to learn from own predictions: a growing share, a constant one, the product target."""

ARMS = {"naive": NAIVE, "chain": NAIVE, **dict.fromkeys(OWN, CONFIDENT)}
"""Settings of each method; `chain` is naive too, on the labels of a student of middle size."""

FEW = 4
"""Divisions and settings of a method where the whole student learns, which costs more."""


def init(key, sizes):
    """Layers `[(kernel, bias)]` of a perceptron."""
    keys = jax.random.split(key, len(sizes) - 1)
    lecun = jax.nn.initializers.lecun_normal()
    return [
        (lecun(k, (i, o)), jnp.zeros(o))
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(layers, x):
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


def train(
    learned, fixed, x, weak, *, key, lr, steps, most, alpha=None, ramp=RAMP, mixed=True, more=None
):
    """Returns the learned layers after `steps` of at most `most` steps on soft labels `weak`.

    Args:
      learned: layers that learn, behind those of `fixed`.
      fixed: layers in front.
      x: inputs `[n, d]`.
      weak: labels `[n, k]`.
      key: of the order.
      lr: peak rate, after a linear rise and before half a cosine.
      steps: number of steps, traced.
      most: number of steps that are computed; those beyond `steps` change nothing.
      alpha: final share of the student's own predictions, if any.
      ramp: share of the steps over which it rises.
      more: a further loss, a function of logits `[b, k]` and rows `[b]`.
      mixed: whether the target is the mixture of labels and hardened predictions, or the product.
    """
    tx = optax.scale_by_adam()

    def loss(learned, x, weak, a, rows):
        logits = apply([*fixed, *learned], x)
        value, probs = soft_cross_entropy(logits, weak), jax.nn.softmax(logits)
        if a is not None and not mixed:
            value = soft_cross_entropy(logits, product(probs, weak, own=a, power=1.0))
        elif a is not None:
            own = hardened(probs, weak, jnp.ones(len(x)))
            value = (1 - a) * value + a * soft_cross_entropy(logits, own)
        return (value if more is None else value + more(logits, rows)).mean()

    def body(carry, t):
        learned, state = carry
        epoch, first = t * BATCH // len(x), t * BATCH % len(x)
        rows = jnp.arange(BATCH) + first
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(x))
        later = jax.random.permutation(jax.random.fold_in(key, epoch + 1), len(x))
        rows = jnp.where(rows < len(x), order[rows % len(x)], later[rows % len(x)])
        a = None if alpha is None else alpha * jnp.minimum((t + 1) / (ramp * steps), 1)
        gradient = jax.grad(loss)(learned, x[rows], weak[rows], a, rows)
        update, state = tx.update(gradient, state)
        warmup = jnp.maximum(WARMUP * steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - warmup) / (steps - warmup), 0, 1)))
        rate = -lr * jnp.where(t < warmup, t / warmup, cosine) * (t < steps)
        return (optax.apply_updates(learned, jax.tree.map(lambda u: rate * u, update)), state), None

    return jax.lax.scan(body, (learned, tx.init(learned)), jnp.arange(most))[0][0]


def parts(task: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns inputs and labels of every stage for a division."""
    found = {}
    for stage in weak_digits.SIZES:
        data = weak_digits.make(
            stage=stage, task="digit" if stage == "pretrain" else task, split_seed=seed
        )
        named = {stage: data.train, **({"clean": data.held_out, "test": data.test})}
        for name, source in named.items():
            rows = source.read(np.arange(len(source)))
            x = rows["input"].reshape(-1, 8, 8).astype(np.float32) / 255
            found[name] = x, rows["label"]
    return found


def pooled(x):
    return x.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)


def study(task: str, seeds: list[int], found: dict) -> None:
    """Adds the methods that `found` does not have: accuracies on held-out and test images."""
    divisions = [parts(task, seed) for seed in seeds]
    at = {
        name: tuple(np.stack([d[name][i] for d in divisions]) for i in (0, 1))
        for name in divisions[0]
    }
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    flat = {name: x.reshape(*x.shape[:2], -1) for name, (x, _) in at.items()}
    hot = lambda name, k: jax.nn.one_hot(at[name][1], k)  # noqa: E731
    over = functools.partial(jax.vmap, in_axes=0)
    fit = functools.partial(train, most=800)

    def one(key, x, y):
        return fit(init(key, (64, 256, 256, 10)), [], x, y, key=key, lr=3e-3, steps=800)

    body = jax.jit(over(one))(keys, flat["pretrain"], hot("pretrain", 10))[:-1]
    small = {name: np.stack([pooled(x) for x in arrays]) for name, (arrays, _) in at.items()}

    def supervisor(key, x, y):
        return fit(init(key, (16, 2)), [], x, y, key=key, lr=1e-2, steps=800)

    weak = jax.jit(over(supervisor))(keys, small["weak"], hot("weak", 2))
    said = {name: jax.nn.softmax(over(apply)(weak, x)) for name, x in small.items()}
    right = lambda probs, name: np.mean(np.asarray(probs).argmax(-1) == at[name][1], -1)  # noqa: E731
    heads = over(lambda key: init(key, (256, 2)))(keys)

    def student(
        key, layers: Any, head: Any, x, y, clean, test, lr, steps, alpha, *, whole, most, own
    ):
        learned, fixed = ([*layers, *head], []) if whole else (head, [*layers])
        how = {"alpha": alpha, **OWN[own]} if own else {}
        learned = train(learned, fixed, x, y, key=key, lr=lr, steps=steps, most=most, **how)
        return [apply([*fixed, *learned], part) for part in (clean, test)]

    def measure(labels, settings, *, whole, own=""):
        most = max(s["steps"] for s in settings)
        run = functools.partial(student, whole=whole, most=most, own=own)
        run = jax.vmap(run, in_axes=(*[0] * 7, None, None, None))
        run = jax.jit(jax.vmap(run, in_axes=(*[None] * 7, 0, 0, 0)))
        columns = [
            np.asarray([s.get(name, 0.0) for s in settings], np.float32)
            for name in ("lr", "steps", "alpha")
        ]
        rows = (keys, body, heads, flat["student"], labels, flat["clean"], flat["test"])
        clean, test = run(*rows, *columns)
        return {"held_out": right(clean, "clean"), "test": right(test, "test")}

    def middle(key, digits, names, x, y):
        """What a student of middle size says of the student's images."""
        most = {"key": key, "lr": 3e-3, "steps": 800, "most": 800}
        layers = train(init(key, (64, 32, 10)), [], digits, names, **most)[:-1]
        head = train(init(key, (32, 2)), layers, x, y, **most)
        return jax.nn.softmax(apply([*layers, *head], x))

    pretraining = (keys, flat["pretrain"], hot("pretrain", 10), flat["student"], said["student"])
    chained = jax.jit(over(middle))(*pretraining)
    low = right(said["test"], "test")
    found.setdefault("weak", {"test": low.tolist()})
    for whole in (False, True):
        where = "full" if whole else "head"
        missing = [
            arm
            for arm in (("naive", "confidence") if whole else ARMS)
            if f"{where}/{arm}" not in found
        ]
        if whole and missing:  # fewer divisions
            keys, body, heads, said, at, flat = jax.tree.map(
                lambda x: x[:FEW], (keys, body, heads, said, at, flat)
            )
        rates = RATES[1:3] if whole else RATES
        if f"{where}/ceiling" not in found:
            settings = [{"lr": lr, "steps": 800} for lr in rates]
            truth = measure(hot("student", 2), settings, whole=whole)
            best = truth["held_out"].mean(1).argmax()
            found[f"{where}/ceiling"] = {"lr": rates[best], "test": truth["test"][best].tolist()}
        high = np.asarray(found[f"{where}/ceiling"]["test"])
        for arm in missing:
            settings = ARMS[arm]
            if whole:
                settings = [
                    s
                    for s in settings
                    if s["lr"] in rates
                    and s.get("alpha", 0.5) in (0.5, 0.75)
                    and s["steps"] in (100, 800)
                ]
            labels = chained if arm == "chain" else said["student"]
            own = arm if arm in OWN else ""
            made = measure(labels, settings, whole=whole, own=own)
            found[f"{where}/{arm}"] = {
                "settings": settings,
                **{split: value.mean(1).tolist() for split, value in made.items()},
                **chosen(made, low[: len(high)], high),
            }
    for name in [name for name in found if "chosen" in found[name]]:
        where, _, arm = name.partition("/")
        if arm != "naive":
            pair = [np.asarray(found[f"{where}/{x}"]["chosen"]["test"]) for x in (arm, "naive")]
            gap = estimate((pair[0] - pair[1]).tolist())
            found[f"{name} minus naive"] = {
                "mean": gap.mean,
                "se": gap.se,
                "interval": gap.interval,
            }


def chosen(made, low, high):
    """The setting that the held-out images prefer, and what it does on the test images."""
    best = int(made["held_out"].mean(1).argmax())
    test = made["test"][best]
    recovered = ((test - low) / (high - low)).tolist()
    return {
        "chosen": {
            "setting": best,
            "test": test.tolist(),
            "mean": float(test.mean()),
            "gap_recovered": float(np.mean(recovered)),
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--tasks", default="parity,at_least_5")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    seeds: list[int] = list(range(100, 100 + options.seeds))
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = {task: stored.get(task, {}) for task in options.tasks.split(",")}
    for task, arms in found.items():
        study(task, seeds, arms)
    about = {"jax": jax.__version__, "seeds": seeds, "batch": BATCH, "warmup": WARMUP, "ramp": RAMP}
    options.out.write_text(json.dumps({**stored, "about": about, **found}, indent=1) + "\n")
    for task, arms in found.items():
        for arm, value in arms.items():
            what = value.get("chosen", value)
            print(task, arm, {k: v for k, v in what.items() if k not in ("test", "settings")})


if __name__ == "__main__":
    main()
