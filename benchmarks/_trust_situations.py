"""Situations of the suite of learned trust: data, known faults and teachers (`trust_suite.py`)."""

import dataclasses
import functools
import zlib
from typing import Any

import _trust_text
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import state, steps
from distill_jax.core.api import Model
from distill_jax.data import fashion_mnist_5k, letter
from distill_jax.models import convnet, mlp
from distill_jax.objectives import supervised

POOL, OUTER, SELECT, BATCH = 5000, 250, 250, 128
"""Examples to draw from; of these the ratio learns from 250 and 250 choose, others in each seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Situation:
    """What is wrong; the outer, the selecting and the test examples are clean.

    Attributes:
      noise: share of training labels that are wrong, "uniform" over other classes or the "pair".
      damage: share of the examples ("random", or "region": those with the largest projection of the
        input on a random direction) or classes ("class") for which the teacher's logits are rolled.
      per_class: labels shown of each class; 0 shows all.
      imbalance: largest over smallest class of the training part.
      teacher: "sound": trained on the clean labels of the training part; "moved": on distorted
        inputs.
    """

    noise: float = 0.0
    noise_kind: str = "uniform"
    damage: float = 0.0
    damage_kind: str = "class"
    per_class: int = 0
    imbalance: float = 1.0
    teacher: str = "sound"


SITUATIONS = {
    "sound": Situation(),
    "damage_class": Situation(damage=0.3, damage_kind="class"),
    "damage_random": Situation(damage=0.3, damage_kind="random"),
    "damage_region": Situation(damage=0.3, damage_kind="region"),
    "noise_uniform": Situation(noise=0.45),
    "noise_pair": Situation(noise=0.45, noise_kind="pair"),
    "both": Situation(noise=0.45, noise_kind="pair", damage=0.2),
    "few_labels": Situation(per_class=20),
    "imbalanced": Situation(imbalance=20.0),
    "other_domain": Situation(teacher="moved"),
}
SET_ASIDE = {
    "both_region": Situation(noise=0.3, damage=0.3, damage_kind="region"),
    "few_both": Situation(per_class=50, noise=0.3, damage=0.2, damage_kind="class"),
}
"""Not run until every method and rule of choice was final; then run once."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """Inputs float32 `[n, f]` and labels of the pool and of the test part, networks and rates."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    k: int
    student: Model
    teacher: Model
    lr: float
    teacher_lr: float
    shape: tuple[int, ...]


@functools.cache
def domain(name: str) -> Domain:
    """Returns "images", Fashion-MNIST-5k at 14x14; "table", 5,000 rows of Letter Recognition; or
    "text", passages of addresses (`_trust_text.py`)."""
    if name == "text":
        x, y, x_test, y_test = _trust_text.passages()
        net = mlp.make(num_classes=10, hidden=(128,))
        student = _trust_text.seen(mlp.make(num_classes=10, hidden=(32,)))
        k, rate, teacher_rate, shape = 10, 0.02, 0.02, (x.shape[1],)
        return Domain(x, y, x_test, y_test, k, student, net, rate, teacher_rate, shape)
    if name == "images":
        data = fashion_mnist_5k.make(held_out=0.0)
        (x, y), (x_test, y_test) = (_pixels(p) for p in (data.train, data.test))
        net = convnet.make(num_classes=10, widths=(16, 32, 64))
        student, k, rate, shape = mlp.make(num_classes=10, hidden=(64,)), 10, 0.1, (14, 14, 1)
    else:
        data = letter.make(held_out=0.0)
        parts = [p.read(np.arange(len(p))) for p in (data.train, data.test)]
        rows = [p["input"]["numeric"] for p in parts]
        pick = np.random.default_rng(0).permutation(len(rows[0]))[:POOL]
        x, y, x_test, y_test = rows[0][pick], parts[0]["label"][pick], rows[1], parts[1]["label"]
        net = mlp.make(num_classes=26, hidden=(256, 256))
        student, k, rate, shape = mlp.make(num_classes=26, hidden=(64,)), 26, 0.4, (16,)
    y, y_test = y.astype(np.int32), y_test.astype(np.int32)
    return Domain(x, y, x_test, y_test, k, student, net, rate, 0.1, shape)


def _pixels(part: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = part.read(np.arange(len(part)))
    x = rows["input"].astype(np.float32).reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    return ((x - 0.2861) / 0.33).reshape(len(x), -1).astype(np.float32), rows["label"]


def random(seed: int, *purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(p.encode()) for p in purpose)])


@dataclasses.dataclass(frozen=True)
class Tables:
    """One situation in one seed; `[n]` over the pool.

    Attributes:
      label: as given; wrong labels included.
      labelled: factor of the label's term without (0) and with (1) the outer examples, `[2, n]`.
      teacher: logits `[n, k]`.
      label_wrong, teacher_wrong: the true flags that the oracle knows.
      ids: examples of "train", "added" (with the outer ones), "shown" (those of known label),
        "outer" and "select".
      class_means: of the teacher over the training examples of each given class, `[k, k]`.
    """

    label: np.ndarray
    labelled: np.ndarray
    teacher: np.ndarray
    label_wrong: np.ndarray
    teacher_wrong: np.ndarray
    ids: dict[str, np.ndarray]
    class_means: np.ndarray


def make_tables(data: Domain, name: str, seed: int, logits: np.ndarray) -> Tables:
    """Draws the faults of a seed; `logits` `[n, k]` are those of the teacher as it was trained."""
    what, n, k, y = (SITUATIONS | SET_ASIDE)[name], len(data.y), data.k, data.y
    train, outer, select = parts(seed, what, data)
    draw = random(seed, name)
    shift, hit = 1 + draw.integers(0, k - 1, n), draw.random(n) < what.damage
    if what.damage_kind == "class":
        of_class = 1 + draw.integers(0, k - 1, k)
        bad = draw.permutation(k)[: round(what.damage * k)]
        shift, hit = of_class[y], np.isin(y, bad)
    elif what.damage_kind == "region":
        side = data.x @ draw.normal(size=data.x.shape[1]).astype(np.float32)
        hit, shift = side > np.quantile(side, 1 - what.damage), np.full(n, shift[0])
    rolled = (np.arange(k)[None] - np.where(hit, shift, 0)[:, None]) % k
    teacher = np.take_along_axis(logits, rolled, axis=1)
    moved = 1 if what.noise_kind == "pair" else 1 + draw.integers(0, k - 1, n)
    wrong = (draw.random(n) < what.noise) & np.isin(np.arange(n), train)
    label = np.where(wrong, (y + moved) % k, y).astype(np.int32)
    shown, order = np.isin(np.arange(n), train), draw.random(n)
    if what.per_class:
        shown[:] = False
        for c in range(k):
            mine = train[y[train] == c]
            shown[mine[np.argsort(order[mine])[: what.per_class]]] = True
    added = np.concatenate([train, outer])
    labelled = []
    for ids in (train, added):
        known = (shown | np.isin(np.arange(n), outer)) & np.isin(np.arange(n), ids)
        labelled.append(np.where(known, len(ids) / known.sum(), 0.0))
    probs, known = np.asarray(jax.nn.softmax(teacher)), train[shown[train]]
    means = np.stack(
        [probs[m].mean(0) if len(m := known[label[known] == c]) else np.full(k, 1 / k)
         for c in range(k)]
    )  # fmt: skip
    teacher_wrong = hit & (what.damage > 0) if what.teacher == "sound" else logits.argmax(1) != y
    ids = {"train": train, "added": added, "shown": known, "outer": outer, "select": select}
    return Tables(
        label, np.stack(labelled).astype(np.float32), teacher.astype(np.float32), wrong,
        teacher_wrong, ids, means.astype(np.float32),
    )  # fmt: skip


def parts(seed: int, what: Situation, data: Domain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the training, outer and selecting examples of a seed; the last two are balanced."""
    order = random(seed, "parts").permutation(len(data.y))
    outer, select, train = np.split(order, (OUTER, OUTER + SELECT))
    if what.imbalance > 1:
        kept = []
        for c in range(data.k):
            mine = train[data.y[train] == c]
            kept.append(mine[: max(1, round(len(mine) * what.imbalance ** (-c / (data.k - 1))))])
        train = np.sort(np.concatenate(kept))
    return train, outer, select


def teachers(data: Domain, what: Situation, seeds: list[int], length: int) -> np.ndarray:
    """Trains a teacher a seed on clean labels; returns logits `[seeds, n, k]` of the pool."""
    x = data.x.reshape(-1, *data.shape)
    seen = distorted(x) if what.teacher == "moved" else x
    objective, models = supervised.make(), {"student": data.teacher}
    rate = optax.cosine_decay_schedule(data.teacher_lr, length)
    tx = optax.sgd(rate, momentum=0.9, nesterov=True)
    first = batch_of(seen[:BATCH], data.y[:BATCH])
    shapes = state.infer_shapes(objective, models, first)
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    step = jax.jit(steps.make_train_step(objective, models, tx), donate_argnums=0)
    ask = jax.jit(lambda p, s, x: data.teacher.apply(p, s, x, train=False, rngs={})[0]["logits"])
    found = []
    for seed in seeds:
        ids, draw = parts(seed, what, data)[0], random(seed, "teacher")
        now, key = init(jax.random.key(seed)), jax.random.key(0)
        for _ in range(length):
            rows = ids[draw.integers(0, len(ids), BATCH)]
            now, _ = step(now, {}, batch_of(seen[rows], data.y[rows]), key)
        p, s = now.params["student"], now.model_state["student"]
        found.append(np.concatenate([np.asarray(ask(p, s, x[i : i + 500]))
                                     for i in range(0, len(x), 500)]))  # fmt: skip
    return np.stack(found)


def distorted(x: np.ndarray) -> np.ndarray:
    """Another domain: images moved down by 3 pixels, tables without a third of the columns."""
    if x.ndim == 4:
        return np.roll(x, 3, axis=1)
    return np.where(np.arange(x.shape[1]) % 3 == 0, 0, x).astype(np.float32)


def batch_of(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    rows = jnp.arange(len(y), dtype=jnp.int32)
    given = {"input": jnp.asarray(x), "label": jnp.asarray(y), "mask": jnp.ones(len(y))}
    return {**given, "index": rows, "epoch": jnp.zeros_like(rows)}
