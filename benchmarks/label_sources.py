"""Small label sources and measures of difficulty on digits: do they do what they are for?

  python -m benchmarks.label_sources --out=benchmarks/results/label_sources.json

Ten divisions of `data/weak_digits.py`; differences are paired by division.

* Counting (SS3, `data/counting.py`) beside multinomial naive Bayes, both fitted on the 250 images
  of the stage `weak`, with settings that 100 held-out images choose. A word is a pixel with one
  of three grey levels.
* Debiased labels (`losses.targets.debiased`): a supervisor that was trained on nine even digits for
  every odd one, its answers as they are, less its answer to an empty image, and divided by the
  shares of the classes in its training, which in practice are not known.
* Difficulty (`losses.item_response`): 24 networks of several widths and lengths answer the test
  images. A fifth of the answers is hidden, and models with one and with two parameters tell them
  from the others, beside the share of right answers of an image, of a network, and both added up.
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

from benchmarks.weak_sweep import apply, init, parts, pooled, train
from distill_jax.data import counting
from distill_jax.losses import item_response
from distill_jax.losses.targets import debiased
from distill_jax.report.statistics import estimate

WIDTHS, LENGTHS = (2, 4, 8, 32), (20, 40, 80, 160, 320, 640)
RARE = 9
"""Examples of the frequent class for each of the other."""


def words(images: np.ndarray) -> np.ndarray:
    """Counts of words `[n, 192]`: which pixels are dark, medium or bright."""
    level = np.ceil(images.reshape(len(images), -1) * 3).astype(int)
    return np.concatenate([(level == i).astype(float) for i in (1, 2, 3)], axis=1)


def bayes(counts: np.ndarray, labels: np.ndarray, test: np.ndarray, *, add: float) -> np.ndarray:
    """Scores of multinomial naive Bayes, `[n, k]`; `add` is added to each count."""
    k = labels.max() + 1
    p = np.stack([add + counts[labels == c].sum(0) for c in range(k)])
    prior = np.bincount(labels, minlength=k) / len(labels)
    return test @ np.log(p / p.sum(1, keepdims=True)).T + np.log(prior)


def counted(digits: dict) -> dict[str, float]:
    """Test accuracies; settings of each are chosen by the held-out images."""
    (x, y), (h, held), (z, truth) = (digits[name] for name in ("weak", "clean", "test"))
    seen, chosen, asked = words(x), words(h), words(z)
    ss3 = {
        setting: counting.fit(
            seen,
            y,
            num_classes=10,
            **dict(zip(("smoothness", "significance", "sanction"), setting, strict=True)),
        ).scores
        for setting in itertools.product((0.2, 0.45, 0.9), (0.25, 0.5, 1.0, 2.0), (0.0, 1.0))
    }
    naive = {add: functools.partial(bayes, seen, y, add=add) for add in (0.01, 0.1, 1.0, 10.0)}

    def best(ways: dict) -> float:
        by = {s: (score(chosen).argmax(1) == held).mean() for s, score in ways.items()}
        return float((ways[max(by, key=by.get)](asked).argmax(1) == truth).mean())

    published = float((ss3[0.45, 0.5, 1.0](asked).argmax(1) == truth).mean())
    return {"ss3": best(ss3), "ss3_published": published, "naive_bayes": best(naive)}


def biased(data: dict, seed: int) -> dict[str, float]:
    (x, y), (z, truth) = data["weak"], data["test"]
    rare = np.flatnonzero(y == 1)
    rows = np.concatenate([np.flatnonzero(y == 0), rare[: max(1, (y == 0).sum() // RARE)]])
    hot, key = jax.nn.one_hot(y[rows], 2), jax.random.key(seed)
    net = _supervisor(key, pooled(x[rows]), hot)
    said = jax.nn.softmax(apply(net, jnp.asarray(pooled(z))))
    blank = jax.nn.softmax(apply(net, jnp.zeros((1, 16))))[0]
    shares = np.bincount(y[rows], minlength=2) / len(rows)
    told = {"as_it_is": said, "debiased": debiased(said, blank), "divided_by_shares": said / shares}
    found = {name: float((np.argmax(p, 1) == truth).mean()) for name, p in told.items()}
    return {**found, "blank_odd": float(blank[1])}


@jax.jit
def _supervisor(key: Any, x: Any, y: Any) -> Any:
    return train(init(key, (16, 2)), [], x, y, key=key, lr=1e-2, steps=800, most=800)


@functools.partial(jax.jit, static_argnames="width")
def _answers(key: Any, x: Any, y: Any, asked: Any, *, width: int) -> Any:
    """Classes that networks of all lengths name, `[lengths, n]`."""

    def one(steps):
        layers = init(jax.random.fold_in(key, steps), (64, width, 10))
        run = {"key": key, "lr": 1e-2, "steps": steps, "most": max(LENGTHS)}
        return apply(train(layers, [], x, y, **run), asked).argmax(1)

    return jax.vmap(one)(jnp.asarray(LENGTHS))


def answered(digits: dict, seed: int) -> np.ndarray:
    """Returns 1 where a network is right on a test image, `[m, n]`."""
    (x, y), (z, truth) = digits["pretrain"], digits["test"]
    x, z = (part.reshape(len(part), -1) for part in (x, z))
    keys = [jax.random.key(1000 * seed + width) for width in WIDTHS]
    found = [
        np.asarray(_answers(key, x, jax.nn.one_hot(y, 10), z, width=width)) == truth
        for key, width in zip(keys, WIDTHS, strict=True)
    ]
    return np.concatenate(found).astype(np.float32)


def difficult(right: np.ndarray, seed: int) -> dict[str, float]:
    random = np.random.default_rng(seed)
    known = (random.random(right.shape) > 0.2).astype(np.float32)
    hidden = known == 0

    def loss(p: np.ndarray) -> float:
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return float(-np.where(right > 0, np.log(p), np.log(1 - p))[hidden].mean())

    def odds(axis: int) -> np.ndarray:
        share = ((known * right).sum(axis, keepdims=True) + 1) / (
            known.sum(axis, keepdims=True) + 2
        )
        return np.log(share / (1 - share))

    total = ((known * right).sum() + 1) / (known.sum() + 2)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    both = odds(0) + odds(1) - np.log(total / (1 - total))
    found = {
        "image": loss(np.broadcast_to(sigmoid(odds(0)), right.shape)),
        "network": loss(np.broadcast_to(sigmoid(odds(1)), right.shape)),
        "both": loss(sigmoid(both)),
    }
    for name, slopes in (("one_parameter", False), ("two_parameters", True)):
        items = item_response.fit(jnp.asarray(right), jnp.asarray(known), slopes=slopes)
        found[name] = loss(sigmoid(np.asarray(items.logits(), np.float64)))
    halves = [item_response.fit(jnp.asarray(right[i::2])).difficulty for i in (0, 1)]
    found["reliability"] = float(np.corrcoef(*halves)[0, 1])
    return found


def compared(rows: list[dict[str, float]], pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in rows[0]:
        one = estimate([row[name] for row in rows])
        found[name] = {"mean": one.mean, "se": one.se, "values": [row[name] for row in rows]}
    for name, (one, other) in pairs.items():
        gap = estimate([row[one] - row[other] for row in rows])
        found[name] = {"mean": gap.mean, "se": gap.se, "interval": gap.interval}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    rows: dict[str, list] = {"counting": [], "debiased": [], "difficulty": []}
    for seed in range(options.seeds):
        data = parts("parity", seed)
        digits = parts("digit", seed)
        rows["counting"].append(counted(digits))
        rows["debiased"].append(biased(data, seed))
        rows["difficulty"].append(difficult(answered(digits, seed), seed))
    pairs = {
        "counting": {"ss3 minus naive_bayes": ("ss3", "naive_bayes")},
        "debiased": {
            "debiased minus as_it_is": ("debiased", "as_it_is"),
            "debiased minus divided_by_shares": ("debiased", "divided_by_shares"),
        },
        "difficulty": {
            "one_parameter minus both": ("one_parameter", "both"),
            "two_parameters minus one_parameter": ("two_parameters", "one_parameter"),
        },
    }
    found = {name: compared(values, pairs[name]) for name, values in rows.items()}
    about = {"jax": jax.__version__, "seeds": list(range(options.seeds))}
    options.out.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
    for name, values in found.items():
        for what, value in values.items():
            print(name, what, {k: v for k, v in value.items() if k != "values"})


if __name__ == "__main__":
    main()
